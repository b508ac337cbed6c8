"""When a run is saved."""

from collections.abc import Sequence

import torch
from torch import Tensor

SCHEDULES = ("geometric", "even", "random")


def save_points(kind: str, count: int, steps: int) -> list[int]:
    """Steps after which all runs are saved: 0, ..., ``steps``.

    Args:
        kind: ``even``, or ``geometric``: 0 and then steps that grow by a constant factor, rounded, without repetition.
        count: How many, from 2 to steps + 1.
        steps: Optimizer steps of a run.
    """
    if kind == "even":
        return [round(i * steps / (count - 1)) for i in range(count)]
    if count == 2:
        return [0, steps]
    points = [0, 1]
    while len(points) < count:  # of the steps left, each the next of a geometric series, but at least one further
        left = count - len(points)
        points.append(max(points[-1] + 1, round(points[-1] * (steps / points[-1]) ** (1 / left))))
    return points


def random_save_points(count: int, steps: int, seed: int) -> list[int]:
    """Published choice for one run: 0, ``count - 2`` distinct steps drawn from 1..steps - 1, and ``steps``."""
    drawn = torch.randperm(steps - 1, generator=torch.Generator().manual_seed(seed))[: count - 2] + 1
    return [0, *sorted(drawn.tolist()), steps]


def saves_of(kind: str, count: int, steps: int, seeds: Sequence[int]) -> Tensor:
    """Save points (n, count) of n runs; ``random`` ones are drawn from the runs' seeds."""
    if kind == "random":
        return torch.tensor([random_save_points(count, steps, seed) for seed in seeds])
    return torch.tensor(save_points(kind, count, steps)).expand(len(seeds), -1)
