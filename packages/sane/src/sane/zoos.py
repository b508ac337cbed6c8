"""Making zoos of the published networks: many runs at once, each with its own settings.

Shapes: ``n`` runs of ``d`` weights, ``c`` checkpoints.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from zoo_common.datasets import Part, Splits
from zoo_common.interrupts import deferred_interrupt
from zoo_common.layout import ParameterLayout
from zoo_common.zoo import Run, Zoo

from sane.images import first_images, images_of
from sane.networks import build_network, input_shape
from sane.population import Networks

_MOMENTUM = 0.9
_PIXELS = {"digits": 64, "cifar10": 3072}


@dataclass(frozen=True)
class ZooConfig:
    """What a zoo is made of; runs differ in learning rate, weight decay, initialisation and seed."""

    data: str
    network: str = "CNN"
    epochs: int = 10
    batch: int = 64
    lr: tuple[float, float] = (1e-3, 1e-1)
    weight_decay: tuple[float, float] = (1e-5, 1e-2)
    inits: tuple[str, ...] = ("kaiming_uniform", "xavier_uniform", "xavier_normal", "kaiming_normal")
    activation: str = "tanh"
    train_images: int | None = None
    test_images: int | None = None
    chunk: int = 32
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    seed: int = 0

    def __post_init__(self) -> None:
        """Reject what cannot be trained."""
        for name, low_high in (("lr", self.lr), ("weight_decay", self.weight_decay)):
            if not 0 < low_high[0] <= low_high[1]:
                raise ValueError(f"{name} must be a range of positive numbers, got {low_high}")
        for name, value in (("epochs", self.epochs), ("batch", self.batch), ("chunk", self.chunk)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")

    def options(self, run: int) -> dict[str, object]:
        """Configuration of one run, with the published keys."""
        random = np.random.default_rng([self.seed, run])
        drawn = [float(np.exp(random.uniform(*np.log(bounds)))) for bounds in (self.lr, self.weight_decay)]
        return {
            "model::type": self.network,
            "model::channels_in": 3 if self.data == "cifar10" else 1,
            "model::o_dim": 10,
            "model::nlin": self.activation,
            "model::init_type": str(random.choice(self.inits)),
            **({"model::i_dim": _PIXELS.get(self.data, 784), "model::h_dim": [10]} if self.network == "MLP" else {}),
            "dataset::name": self.data,
            "optim::lr": drawn[0],
            "optim::wd": drawn[1],
            "trainset::batchsize": self.batch,
            "seed": int(random.integers(2**31)),
        }


@dataclass(frozen=True)
class ZooReport:
    """What a session came to."""

    path: Path
    runs: int
    """In the zoo now."""
    wanted: int
    failed: int
    """Runs of this session that were not finite, and are left out."""
    seconds: float
    stopped: str | None = None


def train_zoo(
    path: str | Path,
    config: ZooConfig,
    runs: int,
    *,
    data_dir: Path | None = None,
    limit_seconds: float | None = None,
    quiet: bool = True,
) -> ZooReport:
    """Train the runs that a zoo does not have yet, a chunk at a time; a killed session loses its chunk only.

    Runs of one chunk see the images in the same order. There is a checkpoint before the first epoch and after each;
    metrics are ``train_acc``, ``test_acc`` (fractions), ``train_loss`` and ``test_loss``.

    Raises:
        ValueError: The zoo there is another one, or network and data do not fit.
    """
    began = time.monotonic()
    options = config.options(0)
    splits = images_of({"data": config.data}, input_shape(options), data_dir=data_dir)
    layout = ParameterLayout.from_module(build_network(options))
    attributes = {key: value for key, value in vars(config).items() if key not in ("split",)}
    zoo = Zoo.create(path, layout=layout, creator="sane", split=config.split, attributes=attributes, exist_ok=True)
    names = [f"{config.data}-{config.network}-s{config.seed}-{run:06d}" for run in range(runs)]
    missing = [run for run in range(runs) if names[run] not in zoo]
    chunks = [list(group) for _, group in groupby(missing, key=lambda run: run // config.chunk)]
    failed, stopped = 0, None
    bar = tqdm(
        total=len(missing) * config.epochs, desc="train", unit="run-epoch", disable=quiet, file=sys.stderr, leave=False
    )
    with bar, deferred_interrupt() as interrupted:
        for chunk in chunks:
            made = _train_chunk(config, chunk, [names[run] for run in chunk], splits, bar)
            failed += len(chunk) - len(made)
            if made:
                zoo.append(made, name=f"runs-s{config.seed}-{chunk[0]:06d}-{chunk[-1]:06d}")
            late = limit_seconds is not None and time.monotonic() - began > limit_seconds
            stopped = "interrupted" if interrupted() else "time limit" if late else None
            if stopped:
                break
    return ZooReport(Path(path), len(zoo), runs, failed, time.monotonic() - began, stopped)


def _train_chunk(config: ZooConfig, chunk: Sequence[int], names: Sequence[str], splits: Splits, bar: tqdm) -> list[Run]:
    options = [config.options(run) for run in chunk]
    nets = []
    for one in options:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(int(str(one["seed"])))
            nets.append(build_network(one))
    networks = Networks(nets[0])
    weights = networks.layout.stack(nets).detach()
    parts = {
        "train": first_images(splits.train, config.test_images),
        "test": first_images(splits.test, config.test_images),
    }
    images, labels = first_images(splits.train, config.train_images)
    lr, decay = (torch.tensor([float(str(one[key])) for one in options])[:, None] for key in ("optim::lr", "optim::wd"))
    velocity = torch.zeros_like(weights)
    saved, judged = [weights.clone()], [_judge(networks, weights, parts)]
    for epoch in range(config.epochs):
        generator = torch.Generator().manual_seed(1_000_003 * (config.seed * 997 + chunk[0] // config.chunk) + epoch)
        order = torch.randperm(len(images), generator=generator)
        for rows in order.split(config.batch)[: max(1, len(order) // config.batch)]:
            weights.requires_grad_()
            logits, running = networks.train_forward(weights, images[rows])
            loss = F.cross_entropy(logits.flatten(0, 1), labels[rows].repeat(len(weights)), reduction="sum")
            (gradient,) = torch.autograd.grad(loss / len(rows), weights)
            with torch.no_grad():
                velocity.mul_(_MOMENTUM).add_(gradient).add_(decay * weights)
                weights = weights - lr * velocity
                networks.keep_statistics(weights, running)
        saved.append(weights.clone())
        judged.append(_judge(networks, weights, parts))
        bar.update(len(chunk))
    params, good = torch.stack(saved, 1), torch.stack(saved, 1).isfinite().all(2).all(1)
    metrics = {name: torch.stack([row[name] for row in judged], 1) for name in judged[0]}
    buffers = {name: b.expand(len(saved), *b.shape).clone() for name, b in networks.buffers.items()}
    return [
        Run(names[i], params[i], range(len(saved)), {k: v[i].numpy() for k, v in metrics.items()}, options[i], buffers)
        for i in range(len(chunk))
        if good[i]
    ]


def _judge(networks: Networks, weights: Tensor, parts: dict[str, Part]) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, (images, labels) in parts.items():
        metrics = networks.population.metrics(weights, images, labels)
        found |= {f"{name}_acc": metrics.accuracy, f"{name}_loss": metrics.loss}
    return found
