"""Train one network in 60 steps, saving every third; go on from the last save if there is one.

Usage: train_resumably.py FOLDER
"""

import random
import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn
from zoo_common import load_training, save_checkpoint, save_training

STEPS = 60

folder = Path(sys.argv[1])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 64), nn.Dropout(0.1), nn.BatchNorm1d(64), nn.Linear(64, 1))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, STEPS)
parts = {
    "modules": {"model": model},
    "optimizers": {"adamw": optimizer},
    "schedulers": {"cosine": scheduler},
    "generators": {"data": torch.Generator().manual_seed(1)},
}
random.seed(2)
np.random.seed(3)  # noqa: NPY002 (the global generators must be restored too)
done, losses = 0, []
state = folder / "training.safetensors"
if state.exists():
    progress = load_training(state, **parts)
    done, losses = progress["done"], progress["losses"]
for step in range(done, STEPS):
    x = torch.randn(32, 10, generator=parts["generators"]["data"]) + random.random() + np.random.normal()  # noqa: NPY002
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    scheduler.step()
    losses.append(loss.item())
    if step % 3 == 2:
        save_training(state, **parts, progress={"done": step + 1, "losses": losses})
save_checkpoint(folder / "final.safetensors", model.state_dict(), {"losses": losses})
