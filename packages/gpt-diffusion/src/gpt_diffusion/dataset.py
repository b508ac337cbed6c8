"""Training pairs: two checkpoints of one run, the earlier one to start from and the later one to reach.

Shapes: ``b`` pairs, ``R`` runs, ``C`` checkpoints of the longest run, ``D`` weights.
"""

from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from zoo_common.symmetry import Symmetry
from zoo_common.zoo import Zoo

from gpt_diffusion.augmentation import Permuter
from gpt_diffusion.normalization import Normalizer


class Pairs(NamedTuple):
    """A batch of training pairs; weights are normalised, metrics are raw and in float64."""

    start: Tensor  # (b, D) float32
    target: Tensor  # (b, D) float32
    start_metric: Tensor  # (b,)
    target_metric: Tensor  # (b,)


class ParameterDataset:
    """Batches of (start, target) pairs from the runs of a zoo.

    Batch ``k`` depends on the seed and on ``k`` alone, so a resumed training sees what an uninterrupted one would have
    seen. Every epoch visits each run equally often.

    Args:
        zoo: Where the checkpoints are.
        runs: Indices of the runs to draw from.
        metric: Name of the metric that conditions.
        normalizer: Applied to both vectors.
        mode: ``spacing``: the distance of the two checkpoints is uniform, then the earlier one (spec of G.pt).
            ``prompts``: the start is the initialisation in half of the pairs, else uniform; the target is a later
            checkpoint, in 60 % of the pairs the one whose metric is nearest to a value drawn uniformly between the
            run's last metric and that of the start.
        min_spacing: Smallest distance in save points, only for ``spacing``.
        max_spacing: Largest distance; None: as far as the run goes.
        epoch_size: Pairs per epoch, rounded down to a multiple of the number of runs.
        augment: Permutes the hidden units of each pair at random (the same way for both).
        from_first: Move every pair to the beginning of its run.
        seed: Seed of everything drawn.
        device: Where batches are wanted.

    Raises:
        ValueError: No runs, an epoch smaller than the number of runs, runs with a single checkpoint, or a spacing that
            no run has.
    """

    def __init__(
        self,
        zoo: Zoo,
        runs: np.ndarray,
        *,
        metric: str,
        normalizer: Normalizer,
        mode: Literal["spacing", "prompts"] = "spacing",
        min_spacing: int = 1,
        max_spacing: int | None = None,
        epoch_size: int | None = None,
        augment: Permuter | None = None,
        from_first: bool = False,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        self.epoch_size = pairs_per_epoch(len(runs), len(runs) if epoch_size is None else epoch_size)
        self.zoo, self.runs, self.mode, self.seed = zoo, np.asarray(runs), mode, seed
        self.spacing = (min_spacing, max_spacing)
        self.from_first = from_first
        self.normalizer, self.device = normalizer, torch.device(device)
        self.augment = augment or Symmetry(zoo.layout, ())
        self.metrics = zoo.metrics[metric].padded()  # (R, C), NaN after a run's end
        self.lengths = np.array([run.checkpoints for run in zoo.runs])
        self._order: tuple[int, np.ndarray] | None = None
        self.batch(1, 0)  # a spacing that does not fit shows here, not hours later

    def batches_per_epoch(self, size: int) -> int:
        """Full batches of ``size`` pairs in an epoch."""
        if size > self.epoch_size:
            raise ValueError(
                f"mb_size ({size}) is larger than an epoch ({self.epoch_size} pairs); lower it, or raise target_epoch_size"
            )
        return self.epoch_size // size

    def batch(self, size: int, k: int, rows: slice = slice(None)) -> Pairs:
        """Batch number ``k`` of ``size`` pairs, counted from the beginning of the training, or some rows of it."""
        epoch, i = divmod(k, self.batches_per_epoch(size))
        runs = self.runs[self._epoch_order(epoch)[i * size : (i + 1) * size] % len(self.runs)]
        rng = np.random.default_rng((self.seed, k))
        if self.mode == "prompts":
            start, target = self._prompted(runs, rng)
        else:
            _, start, target = self.zoo.pairs(runs, rng, min_spacing=self.spacing[0], max_spacing=self.spacing[1])
        if self.from_first:
            start, target = np.zeros_like(start), target - start
        runs, start, target = runs[rows], start[rows], target[rows]
        weights = self._weights(runs, start, target, k, size, rows).to(self.device)
        metrics = [torch.from_numpy(self.metrics[runs, index]).to(self.device) for index in (start, target)]
        return Pairs(weights[: len(runs)], weights[len(runs) :], *metrics)

    def _weights(
        self, runs: np.ndarray, start: np.ndarray, target: np.ndarray, k: int, size: int, part: slice
    ) -> Tensor:
        """Normalised weights (2 b, D) of b starts and their b targets; both of a pair are permuted alike.

        ``part`` says which of the ``size`` pairs of the batch they are.
        """
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 1, k))
        permutations = [p[part] for p in self.augment.random_permutations(size, generator)]
        n, width = len(runs), self.zoo.layout.size
        out = torch.from_numpy(np.empty((2 * n, width), np.float32))  # in huge pages, as torch.empty is not
        for entries, table, rows in self.zoo.params.parts(np.tile(runs, 2), np.concatenate([start, target])):
            pairs = entries[: len(entries) // 2]  # a run lies in one part: first come the starts, then their targets
            whole = len(pairs) == n  # then they are in order
            place = out if whole else torch.empty(len(entries), width)
            own = permutations if whole else [p[pairs] for p in permutations]
            self.augment.apply(
                table, own, rows=rows.view(2, -1), out=place.view(2, -1, width), write=self.normalizer.normalize
            )
            if not whole:
                out.index_copy_(0, entries, place)
        return out

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self._order is None or self._order[0] != epoch:
            rng = np.random.default_rng((self.seed, epoch, 1))
            self._order = (epoch, rng.permutation(self.epoch_size))
        return self._order[1]

    def _prompted(self, runs: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Starts mostly at the initialisation, targets mostly uniform in the metric."""
        length, metrics, n = self.lengths[runs], self.metrics[runs], len(runs)
        if (length < 2).any():
            raise ValueError(f"run {self.zoo.runs[runs[length.argmin()]].id!r} has a single checkpoint: pairs need two")
        start = rng.integers(length - 1) * (rng.random(n) < 0.5)
        first, last = metrics[np.arange(n), start], metrics[np.arange(n), length - 1]
        wanted = last + (first - last) * rng.random(n)
        distance = np.abs(metrics - wanted[:, None])
        distance[(np.arange(metrics.shape[1]) <= start[:, None]) | np.isnan(distance)] = np.inf
        anywhere = rng.integers(start + 1, length)
        return start, np.where(rng.random(n) < 0.6, distance.argmin(1), anywhere)


def pairs_per_epoch(runs: int, target: int) -> int:
    """Pairs in an epoch: the target, rounded down to a multiple of the number of runs.

    Raises:
        ValueError: No runs, or a target below their number.
    """
    if runs == 0:
        raise ValueError("no training runs: the zoo is empty or every run was filtered out")
    if target < runs:
        raise ValueError(f"target_epoch_size ({target}) must be at least the number of runs ({runs})")
    return runs * (target // runs)


def mix_seed(*numbers: int) -> int:
    """One seed of 64 bits from several non-negative numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])
