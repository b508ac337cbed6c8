"""Are sampled networks new, or copies of training checkpoints? Numbers, and a verdict in words.

Two numbers decide for each network, both calibrated on runs that the training has not seen:

* its distance to the nearest training checkpoint, relative to the distance that unseen networks of the same quality
  have (``distance_to_unseen``; an unseen network has about 1, a copy 0);
* its distance to the nearest run relative to the next nearest run (``contrast``). A network that comes from nowhere in
  particular is about equally far from its two nearest runs; one that was made from a run, with however much noise, is
  much nearer to that run than to any other.

A **copy** is at most :data:`COPY` of the unseen distance away. A **near copy** is at most :data:`NEAR` of it away, or has
a contrast of at most :data:`CONTRAST`. Where unseen networks themselves come near these two limits, they are lowered: to k
times as far below 1 as the lowest unseen value, k so large that another unseen network would pass the limit with a
probability of :data:`FALSE_ALARMS` if values below 1 have an exponential tail. Everything else is **new**.

Shapes: ``n`` networks asked about, ``u`` unseen ones, ``b`` images, ``D`` weights.
"""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from zoo_common.population import Population
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import Task, classification_error, classification_loss
from zoo_common.zoo import Zoo

from gpt_diffusion.baselines import aligned_mean
from gpt_diffusion.evaluation import batched_metric
from gpt_diffusion.novelty import Nearest, aligned_distances, nearest_checkpoints

#: Limits of the verdicts, see above.
COPY, NEAR, CONTRAST, FALSE_ALARMS = 0.1, 0.5, 0.7, 0.005
#: Unseen networks of the calibration; those nearest in quality that a network is compared with; networks compared in
#: pairs, and averaged; lines of the text.
_UNSEEN, _PEERS, _SOME, _LINES = 64, 8, 32, 12
#: Weights whose squared distances are finite in float32.
_LARGEST = 1e15

Verdict = Literal["copy", "near copy", "new"]


@dataclass(frozen=True)
class Calibration:
    """What runs that the training has not seen look like, and the limits that follow."""

    networks: int
    median_distance: float
    lowest_distance_to_unseen: float
    lowest_contrast: float | None
    copy_below: float
    """Of ``distance_to_unseen``."""
    near_copy_below: float
    """Of ``distance_to_unseen``."""
    contrast_below: float | None
    """None: there is only one training run."""


@dataclass(frozen=True)
class SampleNovelty:
    """One network beside its nearest training checkpoint."""

    verdict: Verdict
    run: str
    step: int
    metric: float
    distance: float
    """Euclidean, after alignment, all ReLU units on their canonical scales."""
    distance_to_norm: float
    """Relative to the norm of the network."""
    distance_to_unseen: float
    """Relative to the median distance of the unseen networks that are nearest in quality."""
    contrast: float | None
    """Relative to the distance to the nearest checkpoint of another run; None: there is none."""
    error_overlap: float | None
    """Jaccard index of the misclassified examples of both; None: not a classifier."""
    unrelated_error_overlap: float | None
    """The same with training checkpoints of other runs that are nearest in quality, their mean."""

    @property
    def words(self) -> str:
        """The verdict with what it is a copy of."""
        return "new" if self.verdict == "new" else f"{self.verdict} of {self.run} at step {self.step}"


@dataclass(frozen=True)
class Diversity:
    """Median distances of pairs of networks, aligned."""

    samples: float
    runs: float
    """Between unseen runs of the same quality."""
    ratio: float


@dataclass(frozen=True)
class NoveltyReport:
    """Whether networks are new."""

    verdict: str
    counts: dict[str, int]
    """Networks by verdict."""
    metric: str
    training_runs: int
    training_checkpoints: int
    calibration: Calibration
    diversity: Diversity | None
    """None: fewer than two samples, or unseen runs."""
    baselines: dict[str, float]
    """Median metric of the samples, and of what needs no model: their nearest checkpoints, these with noise of the same
    distance, and the aligned average of training runs' last checkpoints."""
    samples: tuple[SampleNovelty, ...]

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)

    def summary(self) -> dict[str, Any]:
        """The report without its samples."""
        median = float(np.median([sample.distance_to_unseen for sample in self.samples]))
        return {
            "verdict": self.verdict,
            "counts": self.counts,
            "median_distance_to_unseen": median,
            "diversity": None if self.diversity is None else self.diversity.ratio,
            "baselines": self.baselines,
        }

    def text(self) -> str:
        """A screen of text; of many samples the most suspicious ones."""
        order = sorted(
            self.samples, key=lambda s: (("copy", "near copy", "new").index(s.verdict), s.distance_to_unseen)
        )
        known = f"{self.training_checkpoints:,} training checkpoints of {self.training_runs:,} runs"
        titles = f"{'distance':>9} {'/ norm':>7} {'/ unseen':>8} {'/ next':>7} {'same errors':>12} {'unrelated':>10}"
        lines = [
            f"{len(order)} networks, {known}, calibrated on {self.calibration.networks} unseen networks",
            f"{self.metric:>10} {titles}  verdict",
        ]
        for s in order[:_LINES]:
            numbers = (s.contrast, s.error_overlap, s.unrelated_error_overlap)
            contrast, ours, theirs = ("-" if value is None else f"{value:.2f}" for value in numbers)
            lines.append(
                f"{s.metric:>10.4g} {s.distance:>9.3g} {s.distance_to_norm:>7.2f} {s.distance_to_unseen:>8.2f}"
                f" {contrast:>7} {ours:>12} {theirs:>10}  {s.words}"
            )
        if len(order) > _LINES:
            lines.append(f"... and {len(order) - _LINES} more, see --json")
        if self.diversity is not None:
            d = self.diversity
            lines.append(f"samples differ by {d.samples:.3g}, runs by {d.runs:.3g}: ratio {d.ratio:.2f}")
        lines.append("; ".join(f"{name.replace('_', ' ')} {value:.4g}" for name, value in self.baselines.items()))
        return "\n".join([*lines, self.verdict])


@torch.no_grad()
def novelty_report(
    networks: Tensor,
    zoo: Zoo,
    task: Task,
    *,
    seed: int = 0,
    split: Callable[[str], np.ndarray] | None = None,
    progress: Callable[[int, int], object] | None = None,
) -> NoveltyReport:
    """Compare networks with the training runs of a zoo.

    Args:
        networks: Weights (n, D), raw.
        zoo: Its training split is what may have been copied; its other splits calibrate.
        task: What the networks are, and their metric.
        seed: Of the noise of a baseline.
        split: Gives the runs of a split, where the training had others than ``zoo.split``.
        progress: Called with (checkpoints looked at, all of them).

    Raises:
        ValueError: Networks of another layout than the zoo's or with non-finite weights, no training runs, no unseen
            runs, or no metric of the task in the zoo.
    """
    split = split or zoo.split
    train, unseen = split("train"), np.concatenate([split("test"), split("validation")])[:_UNSEEN]
    _check(networks, zoo, task, train, unseen)
    networks, symmetry = networks.float().cpu(), task.symmetry()
    measure = batched_metric(task, torch.device("cpu"))
    table = zoo.metrics[task.metric_name].padded()  # (runs, checkpoints)
    metrics = measure(networks).double().numpy()
    bounded = np.nan_to_num(metrics, nan=np.inf).clip(np.nanmin(table), np.nanmax(table))
    wanted = bounded[np.arange(len(unseen)) % len(networks)]
    chosen = np.nanargmin(np.abs(table[unseen] - wanted[:, None]), axis=1)
    rivals = zoo.params.gather(unseen, chosen)
    both = nearest_checkpoints(torch.cat([networks, rivals]), zoo, train, symmetry, progress=progress)
    found, theirs = (
        Nearest(*(part[rows] for part in both)) for rows in (slice(len(networks)), slice(len(networks), None))
    )
    metric_of = table[unseen, chosen]
    calibration = _calibrate(theirs, metric_of)
    ratio = found.distance.numpy() / _expected(bounded, metric_of, theirs.distance.numpy())
    contrast = _contrast(found)
    nearest = zoo.params.gather(found.run.numpy(), found.checkpoint.numpy())
    overlap, unrelated = _overlaps(networks, nearest, found, bounded, zoo, task, table, train)
    norms = symmetry.balance(networks).norm(dim=1)
    samples = tuple(
        SampleNovelty(
            verdict=_verdict(ratio[i], contrast[i], calibration),
            run=zoo.runs[int(found.run[i])].id,
            step=int(zoo.steps[int(found.run[i]), int(found.checkpoint[i])]),
            metric=float(metrics[i]),
            distance=found.distance[i].item(),
            distance_to_norm=(found.distance[i] / norms[i].clamp(min=1e-12)).item(),
            distance_to_unseen=float(ratio[i]),
            contrast=contrast[i],
            error_overlap=None if overlap is None else overlap[i],
            unrelated_error_overlap=None if unrelated is None else unrelated[i],
        )
        for i in range(len(networks))
    )
    counts = Counter(sample.verdict for sample in samples)
    noise = torch.randn(networks.shape, generator=torch.Generator().manual_seed(seed)) / networks.shape[1] ** 0.5
    last = zoo.params.gather(train[:_SOME], np.full(len(train[:_SOME]), -1))
    rival_networks = {
        "samples": networks,
        "nearest_checkpoint": nearest,
        "checkpoint_plus_noise": symmetry.balance(nearest) + noise * found.distance[:, None],
        "average_of_checkpoints": aligned_mean(symmetry.balance(last), symmetry)[None],
    }
    return NoveltyReport(
        verdict=_in_words(counts, len(samples)),
        counts={kind: counts[kind] for kind in ("copy", "near copy", "new")},
        metric=task.metric_name,
        training_runs=len(train),
        training_checkpoints=sum(zoo.runs[int(run)].checkpoints for run in train),
        calibration=calibration,
        diversity=_diversity(networks, rivals, symmetry),
        baselines={name: measure(vectors).median().item() for name, vectors in rival_networks.items()},
        samples=samples,
    )


def _check(networks: Tensor, zoo: Zoo, task: Task, train: np.ndarray, unseen: np.ndarray) -> None:
    """Refuse what cannot be compared."""
    if networks.ndim != 2 or not len(networks) or networks.shape[1] != zoo.layout.size:
        shape = tuple(networks.shape)
        raise ValueError(f"{zoo.path}: the zoo holds networks of {zoo.layout.size} weights, got {shape} to compare")
    if not (networks.abs() < _LARGEST).all():
        raise ValueError(f"the networks to compare have NaN or infinite weights, or weights beyond {_LARGEST:g}")
    if not len(train):
        raise ValueError(f"{zoo.path}: the zoo has no training runs; there is nothing that could have been copied")
    if not len(unseen):
        raise ValueError(
            f"{zoo.path}: the zoo has no test or validation runs to tell how far an unseen network is; generate more runs"
        )
    if task.metric_name not in zoo.metrics:
        raise ValueError(f"{zoo.path}: no metric {task.metric_name!r}; the zoo has {', '.join(zoo.metrics)}")


def _calibrate(found: Nearest, metrics: np.ndarray) -> Calibration:
    """Limits from unseen networks."""
    distance = found.distance.numpy()
    lowest = float((distance / _expected(metrics, metrics, distance)).min())
    contrasts = [contrast for contrast in _contrast(found) if contrast is not None]
    return Calibration(
        networks=len(distance),
        median_distance=float(np.median(distance)),
        lowest_distance_to_unseen=lowest,
        lowest_contrast=min(contrasts, default=None),
        copy_below=COPY,
        near_copy_below=_limit(NEAR, lowest, len(distance)),
        contrast_below=_limit(CONTRAST, min(contrasts), len(contrasts)) if contrasts else None,
    )


def _limit(usual: float, lowest: float, count: int) -> float:
    """The usual limit, or a lower one where the lowest of ``count`` unseen values is near it."""
    k = 1.0
    while math.lgamma(count + 1) + math.lgamma(1 + k) - math.lgamma(count + 1 + k) > math.log(FALSE_ALARMS):
        k += 0.05  # the probability that one exponential variable exceeds k times the largest of ``count`` others
    return max(COPY, min(usual, 1 - k * (1 - lowest)))


def _expected(metrics: np.ndarray, unseen: np.ndarray, distance: np.ndarray) -> np.ndarray:
    """Median distance (u,) of the unseen networks whose metrics (u,) are nearest to the given ones (n,): (n,)."""
    nearest = np.abs(unseen - metrics[:, None]).argsort(axis=1)[:, :_PEERS]
    return np.maximum(np.median(distance[nearest], axis=1), 1e-12)


def _contrast(found: Nearest) -> list[float | None]:
    """Distance relative to the next nearest run; None where there is only one run."""
    return [
        None if other == math.inf else distance / max(other, 1e-12)
        for distance, other in zip(found.distance.tolist(), found.other_distance.tolist(), strict=True)
    ]


def _verdict(ratio: float, contrast: float | None, calibration: Calibration) -> Verdict:
    if ratio <= calibration.copy_below:
        return "copy"
    limit = calibration.contrast_below
    alike = contrast is not None and limit is not None and contrast <= limit
    return "near copy" if alike or ratio <= calibration.near_copy_below else "new"


def _in_words(counts: Counter[Verdict], total: int) -> str:
    if counts["new"] == total:
        return f"all {total} new: no network repeats a training checkpoint" if total > 1 else "new"
    parts = [
        (counts["copy"], "copy", "copies"),
        (counts["near copy"], "near copy", "near copies"),
        (counts["new"], "new", "new"),
    ]
    named = ", ".join(f"{count} {one if count == 1 else many}" for count, one, many in parts if count)
    return f"of {total} networks: {named}"


def _overlaps(
    networks: Tensor,
    nearest: Tensor,
    found: Nearest,
    metrics: np.ndarray,
    zoo: Zoo,
    task: Task,
    table: np.ndarray,
    train: np.ndarray,
) -> tuple[list[float], list[float] | list[None]] | tuple[None, None]:
    """Overlap of misclassified examples with the nearest checkpoint, and with unrelated ones of the same quality."""
    if task.test_fn not in (classification_loss, classification_error):
        return None, None
    images, labels = task.data_fn()
    population = Population(task.constructor())
    gaps = np.abs(table[train] - metrics[:, None, None])  # (n, runs, checkpoints)
    best = np.nanargmin(np.where(np.isnan(gaps), np.inf, gaps), axis=2)
    gap = np.take_along_axis(gaps, best[..., None], 2)[..., 0]
    gap[train == found.run.numpy()[:, None]] = np.inf
    peers = gap.argsort(axis=1)[:, : min(_PEERS, len(train) - 1)]  # (n, p)
    unrelated = zoo.params.gather(train[peers].ravel(), np.take_along_axis(best, peers, 1).ravel())
    ours, theirs = (_mistakes(population, part, images, labels) for part in (networks, nearest))
    others = _mistakes(population, unrelated, images, labels).view(*peers.shape, len(labels))
    mean = _jaccard(ours[:, None], others).mean(1).tolist() if peers.shape[1] else [None] * len(networks)
    return _jaccard(ours, theirs).tolist(), mean


def _mistakes(population: Population, vectors: Tensor, images: Tensor, labels: Tensor) -> Tensor:
    """Which images are misclassified, (n, b) bool; a bounded part at a time."""
    parts = [
        torch.cat(
            [population(some, x).argmax(2) != y for x, y in zip(images.split(256), labels.split(256), strict=True)], 1
        )
        for some in vectors.split(16)
        if len(some)
    ]
    return torch.cat([torch.zeros(0, len(labels), dtype=torch.bool), *parts])


def _jaccard(a: Tensor, b: Tensor) -> Tensor:
    """Size of the intersection over that of the union of sets (..., b) bool; 1 if both are empty."""
    union = (a | b).sum(-1)
    return torch.where(union == 0, 1.0, (a & b).sum(-1) / union.clamp(min=1))


def _diversity(networks: Tensor, unseen: Tensor, symmetry: Symmetry) -> Diversity | None:
    if min(len(networks), len(unseen)) < 2:
        return None
    samples, runs = (aligned_distances(part[:_SOME], symmetry).median().item() for part in (networks, unseen))
    return Diversity(samples, runs, samples / max(runs, 1e-12))
