"""Moments of many parameter vectors in one pass."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

_BLOCK = 1 << 22
"""Numbers that are held in float64 at once."""


@dataclass(frozen=True)
class ZooStats:
    """Moments of the parameters of N checkpoints with D parameters, in float64; standard deviations are unbiased."""

    count: int
    """N."""
    mean: Tensor
    """(D,) mean of every coordinate."""
    std: Tensor
    """(D,) standard deviation of every coordinate."""
    overall_mean: float
    """Mean of all N * D values."""
    overall_std: float
    """Standard deviation of all N * D values."""
    low: float
    high: float


@dataclass(frozen=True)
class Filtered:
    """What a filter left."""

    kept: np.ndarray
    """Indices of the good runs, int64."""
    dropped: dict[str, int]
    """Reason to number of runs dropped."""


class Moments:
    """Streaming mean and variance per coordinate by the pairwise update of Chan, Golub and LeVeque (1979)."""

    def __init__(self, size: int) -> None:
        """Moments of vectors of ``size`` numbers, none seen yet."""
        self.count = 0
        self.mean = torch.zeros(size, dtype=torch.float64)
        self.squares = torch.zeros(size, dtype=torch.float64)
        """Sum of squared deviations from the mean."""
        self.low, self.high = float("inf"), float("-inf")

    def add(self, vectors: Tensor) -> None:
        """Take in vectors (n, D)."""
        for part in vectors.split(max(1, _BLOCK // self.mean.numel())):
            block = part.double()
            total = self.count + len(block)
            mean = block.mean(dim=0)
            delta = mean - self.mean
            self.squares += (block - mean).square_().sum(dim=0) + delta.square() * (self.count * len(block) / total)
            self.mean += delta * (len(block) / total)
            self.count = total
            self.low, self.high = min(self.low, block.min().item()), max(self.high, block.max().item())

    def result(self) -> ZooStats:
        """The moments of all vectors seen.

        Raises:
            ValueError: There were none.
        """
        if not self.count:
            raise ValueError("no checkpoint to take statistics of: the chosen split or list of runs is empty")
        size = self.mean.numel()
        overall = self.mean.mean()
        squares = self.squares.sum() + self.count * (self.mean - overall).square().sum()
        return ZooStats(
            count=self.count,
            mean=self.mean,
            std=(self.squares / max(self.count - 1, 1)).sqrt(),
            overall_mean=overall.item(),
            overall_std=(squares / max(self.count * size - 1, 1)).sqrt().item(),
            low=self.low,
            high=self.high,
        )
