"""Settings of a meta-training, as the command line, a run's ``config.yaml`` and Python know them."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
"""Of SGD, from which an evaluation chooses one for each initialisation."""


@dataclass(frozen=True)
class TrainConfig:
    """Which hypernetwork is trained, on which networks and images, and how."""

    data: Literal["digits", "cifar10"] = "digits"
    """Images: scikit-learn's digits, or CIFAR-10 (needs the folder of its files)."""
    nets: Literal["small", "deepnets"] = "small"
    """Networks to train on: 3 or 4 cells of few channels, for laptops; or those of DeepNets-1M."""
    num_nets: int = 1000
    """How many different networks (DeepNets-1M: 1000000)."""
    hypernet: Literal["ghn3", "ghn2"] = "ghn3"
    """Kind of hypernetwork."""
    hid: int = 32
    """Width of node embeddings."""
    layers: int = 2
    """Layers of the GHN-3."""
    heads: int = 8
    """Attention heads of GHN-3."""
    max_shape: tuple[int, int, int, int] = (32, 32, 5, 5)
    """Largest tensor that is decoded; larger ones repeat it."""
    epochs: int = 100
    """Passes over the training images."""
    meta_batch: int = 4
    """Networks per update."""
    batch_size: int = 32
    """Images per update."""
    lr: float = 6e-3
    """Highest learning rate of AdamW."""
    scheduler: Literal["cosine-warmup", "cosine", "mstep", "step"] = "cosine-warmup"
    """How it changes from epoch to epoch: along a cosine, after a linear warm-up or at once; or in steps."""
    warmup_epochs: int = 2
    """Length of the warm-up (published: 5), at most half of the training."""
    warmup_lr: float = 1e-5
    """Where the warm-up begins."""
    lr_steps: tuple[int, ...] = (200, 250)
    """Epochs from which on mstep multiplies by gamma; step does so every so many epochs as the first number says."""
    gamma: float = 0.1
    """Factor of a step."""
    weight_decay: float = 1e-2
    """Of AdamW, on the hypernetwork."""
    predparam_wd: float = 3e-5
    """Weight of the norms of all predicted tensors in the loss."""
    grad_clip: float = 5.0
    """Largest norm of the gradient."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Of the forward passes; the decoders stay in fp32."""
    compile: bool = False
    """Compile the node network of the hypernetwork, for large ones on CUDA."""
    save_every: int = 100
    """Updates between two saved states."""
    log_every: int = 20
    """Updates between two lines of metrics."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Seed of everything; two trainings with one seed see the same networks and images."""

    def check(self) -> None:
        """Refuse what cannot be trained.

        Raises:
            ValueError: A setting is out of range.
        """
        for name in ("num_nets", "epochs", "meta_batch", "warmup_epochs", "batch_size", "save_every", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.lr < math.inf:
            raise ValueError(f"lr must be positive, got {self.lr}")
        for name in ("warmup_lr", "gamma", "weight_decay", "predparam_wd", "grad_clip"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, got {getattr(self, name)}")
        if not self.lr_steps or min(self.lr_steps) < 1:
            raise ValueError(f"lr_steps must be numbers from 1, and at least one, got {self.lr_steps}")
        check_seed(self.seed)
        if self.num_nets < self.meta_batch:
            raise ValueError(f"num_nets ({self.num_nets}) must not be smaller than meta_batch ({self.meta_batch})")

    def learning_rate(self, epoch: int) -> float:
        """Learning rate of an epoch, counted from 0: the published schedules."""
        if self.scheduler == "mstep":
            return self.lr * self.gamma ** sum(epoch >= step for step in self.lr_steps)
        if self.scheduler == "step":
            return self.lr * self.gamma ** (epoch // self.lr_steps[0])
        warmup = min(self.warmup_epochs, self.epochs // 2) if self.scheduler == "cosine-warmup" else 0
        if epoch < warmup - 1:
            return self.warmup_lr + (self.lr - self.warmup_lr) * epoch / (warmup - 1)
        done = (epoch - warmup) / max(1, self.epochs - warmup)
        return self.lr * max(0.0, 0.5 * (1 + math.cos(math.pi * done)))

    def ghn_config(self) -> dict[str, Any]:
        """Arguments of :func:`ghn.model.build`."""
        is_graphormer = self.hypernet == "ghn3"
        return {
            "max_shape": list(self.max_shape),
            "num_classes": 10,
            "hypernet": "graphormer" if is_graphormer else "gatedgnn",
            "decoder": "conv",
            "weight_norm": True,
            "ve": True,
            "layernorm": True,
            "hid": self.hid,
            "heads": self.heads,
            "layers": self.layers,
            "dialect": "ghn3" if is_graphormer else "ppuda",
            "rank": 0,
        }

    def to_yaml(self) -> str:
        """Text of a ``config.yaml``."""
        return yaml.safe_dump(json.loads(json.dumps(dataclasses.asdict(self))), sort_keys=False)


def check_seed(seed: int) -> None:
    """Refuse what no generator takes.

    Raises:
        ValueError: The seed is negative or too large.
    """
    if not 0 <= seed < 2**63:
        raise ValueError(f"seed must be from 0 to 2**63 - 1, got {seed}")


def read_config(path: Path) -> TrainConfig:
    """Read a ``config.yaml``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, or has other settings than there are.
    """
    try:
        stored = yaml.safe_load(path.read_text())
        values: dict[str, Any] = {key: tuple(v) if isinstance(v, list) else v for key, v in stored.items()}
        return TrainConfig(**values)
    except (yaml.YAMLError, UnicodeDecodeError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no configuration of a meta-training: {error}") from error
