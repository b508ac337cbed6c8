"""Train six tiny runs one after the other and record each in a zoo; runs that are there already are passed over.

Usage: record_zoo.py FOLDER
"""

import sys

import torch
from torch import nn
from zoo_common import ParameterLayout, Zoo, ZooRecorder


def make_model(seed: int) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(20, 50), nn.BatchNorm1d(50), nn.ReLU(), nn.Linear(50, 3))


def train(model: nn.Module, recorder: ZooRecorder) -> None:
    for step in range(20):
        loss = model(torch.randn(64, 20)).square().mean()
        recorder.record(step, loss=loss)
        gradients = torch.autograd.grad(loss, list(model.parameters()))
        with torch.no_grad():  # by hand, since torch.optim imports the compiler: seconds in every process
            for parameter, gradient in zip(model.parameters(), gradients, strict=True):
                parameter -= 0.1 * gradient


zoo = Zoo.create(sys.argv[1], layout=ParameterLayout.from_module(make_model(0)), exist_ok=True)
for seed in range(6):
    if f"run-{seed}" not in zoo:
        model = make_model(seed)
        with ZooRecorder(zoo, model, run_id=f"run-{seed}", config={"seed": seed}) as recorder:
            train(model, recorder)
