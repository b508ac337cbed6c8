"""How good predicted networks are: against random initialisation, before and after a little training."""

import copy
import math
import statistics
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from scipy.stats import t as student
from torch import nn
from tqdm import tqdm
from zoo_common.datasets import Part, Splits
from zoo_common.files import atomic_write

from ghn.batchnorm import evaluate
from ghn.config import LEARNING_RATES, check_seed
from ghn.deepnets.sampling import Sample, sample
from ghn.model import GHN
from ghn.training import keys_of

_BATCH = 64
"""Published size of the batches whose statistics BatchNorm layers use."""
_SGD_BATCH, _SGD_DECAY, _SGD_CLIP = 96, 3e-4, 5.0
"""Published settings for training one network on small images."""


@dataclass(frozen=True)
class Judged:
    """Test accuracies of one network, as fractions, with batch statistics."""

    index: int
    nodes: int
    parameters: int
    random: float
    """As initialised."""
    predicted: float
    """As predicted."""
    random_trained: float
    """After training from random initialisation."""
    predicted_trained: float
    """After the same training from predicted weights."""


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences, predicted minus random, with its 95 % interval (Student)."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """Accuracies of all networks, and their differences."""

    networks: tuple[Judged, ...]
    random_lr: float | None
    """Learning rate with the highest mean accuracy on validation images, from random weights; None: not trained."""
    predicted_lr: float | None
    """The same from predicted weights."""

    @property
    def untrained(self) -> Difference:
        """Predicted against random weights."""
        return difference([one.predicted - one.random for one in self.networks])

    @property
    def trained(self) -> Difference:
        """The same after training both."""
        return difference([one.predicted_trained - one.random_trained for one in self.networks])

    def means(self) -> dict[str, float]:
        """Mean accuracies by name."""
        names = ("random", "predicted", "random_trained", "predicted_trained")
        return {name: statistics.fmean(getattr(one, name) for one in self.networks) for name in names}


def compare(
    ghn: GHN,
    splits: Splits,
    *,
    num_nets: int = 48,
    small: bool = True,
    epochs: int = 1,
    lrs: Sequence[float] = LEARNING_RATES,
    seed: int = 0,
    quiet: bool = False,
) -> Comparison:
    """Judge predicted weights on networks that no training has seen (split ``test``).

    Each network is built once at random; a copy gets predicted weights. Both are trained with SGD on the same images in
    the same order. As the learning rate that suits one initialisation does not suit the other, each has its own: the
    one of ``lrs`` with the highest mean accuracy on the validation images.

    Args:
        ghn: The hypernetwork, on the device where all is computed.
        splits: Images; training on ``train``, choice on ``validation``, accuracy on ``test``.
        num_nets: How many networks.
        small: Draw small networks, see :func:`ghn.deepnets.sampling.sample`.
        epochs: Passes over the training images.
        lrs: Learning rates of SGD to choose from.
        seed: Draws networks, initial weights and the order of images.
        quiet: No progress bar.

    Raises:
        ValueError: Fewer than two networks, a negative number of epochs, no learning rate, or the hypernetwork is not for
            10 classes.
    """
    if num_nets < 2:
        raise ValueError(f"an interval needs at least 2 networks, got {num_nets}")
    if epochs < 0:
        raise ValueError(f"epochs must be at least 0, got {epochs}")
    check_seed(seed)
    if not lrs or not all(0 < lr < math.inf for lr in lrs):
        raise ValueError(f"learning rates must be positive, and at least one, got {tuple(lrs)}")
    if ghn.num_classes != 10:
        raise ValueError(
            f"networks of 10 classes are judged, this hypernetwork predicts {ghn.num_classes}: choose another"
        )
    parts = Splits(*(Part(*(tensor.to(ghn.device) for tensor in part)) for part in splits))
    rates = lrs if epochs else ()
    kept: list[tuple[int, int, int, float, float]] = []
    tried: list[list[list[tuple[float, float]]]] = []
    for index in tqdm(range(num_nets), desc="networks", disable=quiet, file=sys.stderr, leave=False):
        drawn = sample("test", index, seed=seed, small=small, dialect=ghn.dialect)
        nets = _initialise(ghn, drawn, seed + index)
        parameters = sum(parameter.numel() for parameter in nets[0].parameters())
        before = [evaluate(net, _batches(parts.test), batch_statistics=True).top1 for net in nets]
        kept.append((index, drawn.graph.n_nodes, parameters, before[0], before[1]))
        tried.append([[_train(net, parts, epochs, lr, seed + index) for lr in rates] for net in nets])
    if not epochs:
        return Comparison(tuple(Judged(*fields, *fields[-2:]) for fields in kept), None, None)
    accuracies = torch.tensor(
        tried, dtype=torch.float64
    )  # (networks, initialisations, learning rates, validation and test)
    best = accuracies[..., 0].mean(0).argmax(1).tolist()
    after = accuracies[:, [0, 1], best, 1].tolist()
    networks = tuple(Judged(*fields, *trained) for fields, trained in zip(kept, after, strict=True))
    return Comparison(networks, *(lrs[i] for i in best))


def difference(values: Sequence[float]) -> Difference:
    """Mean and 95 % interval of at least two values."""
    mean, n = statistics.fmean(values), len(values)
    half = float(student.ppf(0.975, n - 1)) * statistics.stdev(values) / math.sqrt(n)
    return Difference(mean, mean - half, mean + half)


def _initialise(ghn: GHN, drawn: Sample, seed: int) -> tuple[nn.Module, nn.Module]:
    """A network with random weights, and the same with predicted ones."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        random = drawn.architecture.build(keys=keys_of(ghn)).to(ghn.device)
    predicted = copy.deepcopy(random)
    ghn(predicted, drawn.graph, bn_track_running_stats=True, keep_grads=False)
    return random, predicted


def _train(net: nn.Module, parts: Splits, epochs: int, lr: float, seed: int) -> tuple[float, float]:
    """Accuracies of a trained copy on validation and test images."""
    net = copy.deepcopy(net)
    train_sgd(net, parts.train, epochs=epochs, lr=lr, seed=seed)
    validation, test = (
        evaluate(net, _batches(part), batch_statistics=True).top1 for part in (parts.validation, parts.test)
    )
    return validation, test


def train_sgd(net: nn.Module, train: Part, *, epochs: int, lr: float, seed: int) -> None:
    """Train a network in place; the seed decides the order of images and dropout."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9, weight_decay=_SGD_DECAY)
    net.train()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(len(train.labels)).to(train.labels.device)
            for rows in order.split(_SGD_BATCH):
                loss = F.cross_entropy(net(train.images[rows])[0], train.labels[rows])
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(net.parameters(), _SGD_CLIP)
                optimizer.step()


def _batches(part: Part) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    return zip(part.images.split(_BATCH), part.labels.split(_BATCH), strict=True)


def draw_comparison(comparison: Comparison, path: Path) -> None:
    """Accuracy with predicted against random weights, one point per network, before and after training.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'ghn[plot]'") from error
    figure = Figure(figsize=(10, 5), layout="constrained")
    panels = {
        "as initialised": ("random", "predicted", comparison.untrained),
        "after training": ("random_trained", "predicted_trained", comparison.trained),
    }
    for place, (title, (x, y, gain)) in enumerate(panels.items(), start=1):
        axes = figure.add_subplot(1, 2, place, xlim=(0, 1), ylim=(0, 1), aspect="equal")
        axes.axline((0, 0), slope=1, color="grey", linestyle="--", linewidth=1)
        points = [[getattr(one, name) for one in comparison.networks] for name in (x, y)]
        axes.scatter(points[0], points[1], s=18, alpha=0.7)
        axes.set(xlabel="test accuracy, random initialisation", ylabel="test accuracy, predicted weights")
        axes.set_title(f"{title}: {gain.mean:+.3f} (95 % interval {gain.low:+.3f} to {gain.high:+.3f})", fontsize=10)
    with atomic_write(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "png", dpi=150)
