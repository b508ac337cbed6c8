"""How many optimizer steps do what one prompt does? The same unseen starts, trained with SGD and with Adam.

Shapes: ``n`` networks, ``c`` points of a training.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from zoo_common.tasks import Task

from gpt_diffusion.evaluation import MetricFn, mean_and_band
from gpt_diffusion.generation.schedule import save_points
from gpt_diffusion.generation.supervised import trajectories_from

#: What a prompt can be held against.
OPTIMIZERS = ("sgd", "adam")
#: Learning rates of Adam that are tried, steps of a training at which it is judged, runs that choose the rate.
RATES, POINTS, JUDGES = (0.001, 0.003, 0.01, 0.03), 64, 16


@dataclass(frozen=True)
class Rival:
    """What an optimizer needs."""

    optimizer: str
    lr: float
    """SGD: the task's own; Adam: that of the grid with the best final metric on validation runs."""
    limit: int
    """Steps of each training."""
    needed: tuple[int | None, ...]
    """Steps after which each network is as good as one prompt made it; None: not reached."""
    median: int | None
    interval: tuple[int | None, int | None]
    """95 % interval of the median (order statistics); None: not reached."""
    steps: tuple[int, ...]
    """Where the trainings were judged, (c,)."""
    mean: tuple[float, ...]
    """Metric there, (c,)."""
    band: tuple[float, ...]
    """Half width of its 95 % interval (c,)."""

    @property
    def words(self) -> str:
        """The comparison in words."""
        missed = sum(steps is None for steps in self.needed)
        low, high = ("never" if end is None else f"{end:,}" for end in self.interval)
        what = f"not reached in {self.limit:,} steps" if self.median is None else f"{self.median:,} steps"
        return f"{what} (95 % {low} to {high}; {missed} of {len(self.needed)} never reach it)"

    def to_json(self) -> dict[str, Any]:
        """As plain values."""
        return dataclasses.asdict(self)


def check_optimizers(names: str) -> tuple[str, ...]:
    """Split a list like ``sgd,adam``.

    Raises:
        ValueError: An unknown one.
    """
    chosen = tuple(dict.fromkeys(name.strip().lower() for name in names.split(",")))
    for name in chosen:
        if name not in OPTIMIZERS:
            raise ValueError(f"--against {name!r} is unknown; choose from {', '.join(OPTIMIZERS)}")
    return chosen


def hold_against(
    optimizer: str,
    task: Task,
    starts: Tensor,
    reached: Tensor,
    judges: Tensor,
    metric: MetricFn,
    *,
    seed: int = 0,
    steps: int,
    device: str = "auto",
    tick: Callable[[int], object] = lambda _: None,
) -> Rival:
    """Train starts (n, D) and find when each gets to the metric (n,) that one prompt gave it.

    Args:
        optimizer: ``sgd`` (the task's recipe) or ``adam``.
        task: A supervised task.
        starts: Unseen initialisations (n, D).
        reached: What one prompt made of each (n,).
        judges: Other initialisations (m, D), with which Adam's learning rate is chosen.
        metric: Of a batch of networks.
        seed: Of the data orders.
        steps: Of each training; the learning rate is annealed over them.
        device: ``auto``, ``cpu`` or ``cuda``.
        tick: Called with the number of model-steps done since the last call.
    """
    points = save_points("geometric", min(POINTS, steps + 1), steps)
    assert task.recipe is not None, "the starts of a task without a recipe cannot be trained"

    def curves(networks: Tensor, saves: Sequence[int], order: int, lr: float | None) -> Tensor:
        found = trajectories_from(task, networks, saves, seed=order, steps=steps, adam_lr=lr, device=device, tick=tick)
        return metric(found.flatten(0, 1)).cpu().view(found.shape[:2])

    sign = 1 if task.minimize else -1
    rates = RATES if optimizer == "adam" else ()
    final = {lr: curves(judges, [steps], seed + 1, lr).mean().item() * sign for lr in rates}
    best = min(final, key=lambda lr: final[lr] if math.isfinite(final[lr]) else math.inf) if final else None
    observed = curves(starts, points, seed, best)  # (n, c)
    there = sign * observed <= sign * reached.cpu()[:, None]
    first = [points[int(row.int().argmax())] if row.any() else None for row in there]
    mean, band = mean_and_band(observed)
    low, middle, high = median_interval(first)
    return Rival(
        optimizer=optimizer,
        lr=task.recipe.lr if best is None else best,
        limit=steps,
        needed=tuple(first),
        median=middle,
        interval=(low, high),
        steps=tuple(points),
        mean=tuple(mean.tolist()),
        band=tuple(band.tolist()),
    )


def model_steps(optimizers: Sequence[str], starts: int, judges: int, steps: int) -> int:
    """Steps that :func:`hold_against` takes in all."""
    return sum(steps * (starts + (len(RATES) * judges if name == "adam" else 0)) for name in optimizers)


def median_interval(values: Sequence[int | None]) -> tuple[int | None, int | None, int | None]:
    """Median (the upper one of two) with its 95 % interval from order statistics; None counts as later than all."""
    from scipy.stats import binom

    ordered = sorted(values, key=lambda value: math.inf if value is None else value)
    low = max(0, int(binom.ppf(0.025, len(ordered), 0.5)) - 1)
    return ordered[low], ordered[len(ordered) // 2], ordered[len(ordered) - 1 - low]
