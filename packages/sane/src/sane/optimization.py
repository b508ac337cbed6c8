"""Optimizer and learning rates as published."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import OneCycleLR

_MOST = torch.finfo(torch.float32).max


@dataclass(frozen=True)
class OptimizationConfig:
    """How the autoencoder is trained."""

    optimizer: Literal["adamw", "adam", "sgd"] = "adamw"
    lr: float = 1e-3
    """Highest learning rate (published: 1e-4 with far larger models)."""
    weight_decay: float = 3e-9
    """Of matrices; vectors have none."""
    schedule: Literal["onecycle", "constant"] = "onecycle"
    clipping: Literal["none", "norm", "value"] = "norm"
    clip: float = 5.0
    """Largest norm, or absolute value, of the gradients."""

    def __post_init__(self) -> None:
        """Reject what cannot train."""
        if not (0 < self.lr <= _MOST and 0 <= self.weight_decay <= _MOST and 0 < self.clip):
            raise ValueError(
                f"lr and clip must be positive and weight_decay not negative, numbers of float32, got {self.lr}, "
                f"{self.clip}, {self.weight_decay}"
            )


def make_optimizer(model: nn.Module, config: OptimizationConfig) -> Optimizer:
    """The optimizer, with weight decay on tensors of two or more axes only."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.lr, momentum=0.9, fused=True)
    kind = torch.optim.AdamW if config.optimizer == "adamw" else torch.optim.Adam
    return kind(groups, lr=config.lr, fused=True)


def make_schedule(optimizer: Optimizer, config: OptimizationConfig, steps: int) -> OneCycleLR | None:
    """One cycle over all steps, stepped after every one: lr / 25 up to lr and down to lr / 250,000, beta1 against it."""
    if config.schedule == "constant":
        return None
    return OneCycleLR(optimizer, max_lr=config.lr, total_steps=max(2, steps))


def clip_gradients(model: nn.Module, config: OptimizationConfig) -> None:
    """Clip the gradients in place, as configured."""
    if config.clipping == "norm":
        nn.utils.clip_grad_norm_(model.parameters(), config.clip)
    elif config.clipping == "value":
        nn.utils.clip_grad_value_(model.parameters(), config.clip)
