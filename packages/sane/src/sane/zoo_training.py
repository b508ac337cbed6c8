"""Training one network of a zoo by its configuration (SANE, appendix on the model zoos).

Beside the published names of :mod:`sane.networks` a configuration has ``optim::optimizer`` (adam, sgd, rms_prop),
``optim::lr``, ``optim::wd``, ``optim::momentum``, ``optim::scheduler`` (None or OneCycleLR, stepped per batch),
``training::batchsize`` and ``seed``.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_common.datasets import Part, Splits
from zoo_common.formats.state_dicts import read_state
from zoo_common.layout import ParameterLayout
from zoo_common.zoo import Run

from sane.networks import build_network

EVALUATED = 500
"""Images that go through a network at a time when it is judged."""
OPTIMIZERS: dict[str, Callable[[Any, Mapping[str, Any]], torch.optim.Optimizer]] = {
    "adam": lambda weights, c: torch.optim.Adam(weights, lr=c["optim::lr"], weight_decay=c["optim::wd"]),
    "sgd": lambda weights, c: torch.optim.SGD(
        weights,
        lr=c["optim::lr"],
        momentum=c["optim::momentum"],
        nesterov=c["optim::momentum"] > 0,
        weight_decay=c["optim::wd"],
    ),
    "rms_prop": lambda weights, c: torch.optim.RMSprop(
        weights, lr=c["optim::lr"], momentum=c["optim::momentum"], weight_decay=c["optim::wd"]
    ),
}


@torch.no_grad()
def judge(network: nn.Module, part: Part) -> tuple[float, float]:
    """Mean cross entropy (nats) and accuracy (fraction) in evaluation mode."""
    network.eval()
    loss = right = 0.0
    for x, y in zip(part.images.split(EVALUATED), part.labels.split(EVALUATED), strict=True):
        logits = network(x)
        loss += F.cross_entropy(logits, y, reduction="sum").item()
        right += (logits.argmax(1) == y).sum().item()
    return loss / len(part.labels), right / len(part.labels)


def train_run(
    config: Mapping[str, Any], splits: Splits, epochs: int, save: Sequence[int], start: str | None
) -> "Trained":
    """Train one network, judged on training and test images whenever it is kept.

    Args:
        config: Of :func:`run_config`.
        splits: Images in the network's size, on the device.
        epochs: Passes over the training images; incomplete last batches are dropped.
        save: Rising epochs after which it is kept.
        start: File to start from; None: a random initialisation.
    """
    images, labels = splits.train
    with seeded(config["seed"]):
        network = build_network(config).to(images.device)
        if start is not None:
            network.load_state_dict(read_state(Path(start)))
        optimizer, batch = make_optimizer(network, config), config["training::batchsize"]
        steps = len(images) // batch
        schedule = None
        if config["optim::scheduler"] is not None:
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, config["optim::lr"], total_steps=epochs * steps)
        kept = Trained(ParameterLayout.from_module(network), [], [], {})
        for epoch in range(epochs + 1):
            if epoch > 0:
                network.train()
                order = torch.randperm(len(images))[: steps * batch].to(images.device)
                for rows in order.view(steps, batch):
                    optimizer.zero_grad()
                    F.cross_entropy(network(images[rows]), labels[rows]).backward()
                    optimizer.step()
                    if schedule is not None:
                        schedule.step()
            if epoch in save:
                kept.add(network, splits)
    return kept


class Trained(NamedTuple):
    """What is kept of one training."""

    layout: ParameterLayout
    vectors: list[Tensor]
    buffers: list[dict[str, Tensor]]
    metrics: dict[str, list[float]]

    def add(self, network: nn.Module, splits: Splits) -> None:
        """Keep the weights as they are now, and judge them."""
        self.vectors.append(self.layout.flatten(network).detach().cpu().clone())
        state = self.layout.buffers_of(network)
        self.buffers.append({name: value.detach().cpu().clone() for name, value in state.items()})
        parts = {"train": splits.train, "test": splits.test}
        if splits.validation is not splits.test:
            parts["val"] = splits.validation
        for name, part in parts.items():
            loss, accuracy = judge(network, part)
            self.metrics.setdefault(f"{name}_loss", []).append(loss)
            self.metrics.setdefault(f"{name}_acc", []).append(accuracy)

    def run(self, name: str, epochs: Sequence[int], config: Mapping[str, Any]) -> Run | None:
        """The run, or None if a number is not finite."""
        params = torch.stack(self.vectors)
        if not params.isfinite().all() or not np.isfinite([*self.metrics.values()]).all():
            return None
        buffers = {key: torch.stack([state[key] for state in self.buffers]) for key in self.buffers[0]}
        return Run(name, params, epochs, self.metrics, config, buffers)


def make_optimizer(network: nn.Module, config: Mapping[str, Any]) -> torch.optim.Optimizer:
    """The optimizer that a configuration names."""
    name = config["optim::optimizer"]
    if name not in OPTIMIZERS:
        raise ValueError(f"optim::optimizer {name!r} is unknown; use one of {', '.join(OPTIMIZERS)}")
    if config["optim::scheduler"] not in (None, "OneCycleLR"):
        raise ValueError(f"optim::scheduler {config['optim::scheduler']!r} is unknown; use OneCycleLR or none")
    return OPTIMIZERS[name](network.parameters(), config)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """One thread and one global seed for what is in the block; both are as before after it."""
    threads = torch.get_num_threads()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)
