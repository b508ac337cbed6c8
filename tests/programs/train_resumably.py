"""Train one network in 60 steps, saving every third; go on from the last save if there is one.

Usage: train_resumably.py FOLDER [adamw]

Momentum is done by hand unless ``adamw`` is asked for: torch.optim imports the compiler, seconds in every process.
"""

import random
import sys
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from torch import nn
from zoo_common import load_training, save_checkpoint, save_training

STEPS = 60

folder = Path(sys.argv[1])
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(10, 64), nn.Dropout(0.1), nn.BatchNorm1d(64), nn.Linear(64, 1))
velocity = deepcopy(model).requires_grad_(False)
for parameter in velocity.parameters():
    parameter.zero_()
parts = {"modules": {"model": model, "velocity": velocity}, "generators": {"data": torch.Generator().manual_seed(1)}}
if "adamw" in sys.argv:
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)
    parts["optimizers"] = {"adamw": adamw}
    parts["schedulers"] = {"cosine": torch.optim.lr_scheduler.CosineAnnealingLR(adamw, STEPS)}


def update(loss: torch.Tensor) -> None:
    if "adamw" in sys.argv:
        adamw.zero_grad()
        loss.backward()
        adamw.step()
        parts["schedulers"]["cosine"].step()
        return
    gradients = torch.autograd.grad(loss, list(model.parameters()))
    with torch.no_grad():
        for parameter, momentum, gradient in zip(model.parameters(), velocity.parameters(), gradients, strict=True):
            momentum.mul_(0.9).add_(gradient)
            parameter -= 0.001 * momentum


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
    update(loss)
    losses.append(loss.item())
    if step % 3 == 2:
        save_training(state, **parts, progress={"done": step + 1, "losses": losses})
save_checkpoint(folder / "final.safetensors", model.state_dict(), {"losses": losses})
