"""Rivals that a model of checkpoints must stand beside: they use the zoo, but learn no distribution.

Shapes: ``n`` starting networks, ``m`` stored checkpoints, ``D`` weights.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from zoo_common.symmetry import Symmetry


def nearest_by_metric(stored_metric: Tensor, prompts: Tensor) -> Tensor:
    """Index of the stored checkpoint whose metric (m,) is nearest to each prompt (...)."""
    order = stored_metric.argsort()
    values = stored_metric[order].contiguous()
    above = torch.searchsorted(values, prompts.to(values.dtype).contiguous()).clamp(max=len(values) - 1)
    below = (above - 1).clamp(min=0)
    closer = (prompts - values[below]).abs() <= (values[above] - prompts).abs()
    return order[torch.where(closer, below, above)]


def aligned_mean(networks: Tensor, symmetry: Symmetry, *, rounds: int = 3) -> Tensor:
    """Mean (D,) of networks (m, D) after permuting each onto the mean, starting from the first network."""
    mean = networks[0]
    for _ in range(rounds):
        mean = symmetry.align(networks, mean).mean(0)
    return mean


def line_to(goal: Tensor, starts: Tensor, symmetry: Symmetry, *, points: int = 21) -> Tensor:
    """Straight lines (n, points, D) from each start to ``goal`` (D,), which is first permuted onto that start."""
    goals = torch.cat([symmetry.align(goal[None], start) for start in starts])
    alpha = torch.linspace(0, 1, points, dtype=starts.dtype)[:, None]
    return starts[:, None] + alpha * (goals - starts)[:, None]


def ridge(starts: Tensor, ends: Tensor, penalty: float) -> Callable[[Tensor], Tensor]:
    """Ridge regression from start (m, D) to end (m, D), centred, solved in float64; returns the predictor."""
    mean_start, mean_end = starts.double().mean(0), ends.double().mean(0)
    x, y = starts.double() - mean_start, ends.double() - mean_end
    m, size = x.shape
    gram = x @ x.T if m < size else x.T @ x  # the smaller one: (X'X + p)^-1 X' = X' (XX' + p)^-1
    gram.diagonal().add_(penalty)
    solved = torch.linalg.solve(gram, y if m < size else x.T @ y)

    def predict(start: Tensor) -> Tensor:
        centred = start.double() - mean_start
        return ((centred @ x.T if m < size else centred) @ solved + mean_end).to(start.dtype)

    return predict


def best_ridge(
    fit: tuple[Tensor, Tensor], judge: tuple[Tensor, Tensor], *, penalties: tuple[float, ...] = (0.1, 1, 10, 100, 1000)
) -> Callable[[Tensor], Tensor]:
    """The ridge regression whose penalty has the least squared error on other runs, both given as (starts, ends)."""
    predictors = [ridge(*fit, penalty) for penalty in penalties]
    return min(predictors, key=lambda predict: float((predict(judge[0]) - judge[1]).square().mean()))
