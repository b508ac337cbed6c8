"""What kinds of runs have in common: the options asked for, and the work that a zoo is filled with."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task
from zoo_common.zoo import Run

from gpt_diffusion.generation.schedule import SCHEDULES

#: Saved vectors of one chunk, in bytes, when ``chunk`` is not given.
CHUNK_BYTES = 128 * 2**20


@dataclass(frozen=True)
class Request:
    """What is asked for; None: the task's own, or what the zoo was begun with."""

    runs: int | None
    """How many runs the zoo shall have; None: no end."""
    seed: int = 0
    share_batches: int = 1
    save_points: str | None = None
    save_count: int | None = None
    steps: int | None = None
    strategy: str = "auto"
    device: str = "auto"
    dtype: str = "float32"
    chunk: int | None = None
    envs: int | None = None

    def __post_init__(self) -> None:
        """Reject what no kind of run can do."""
        for name in ("runs", "share_batches", "steps", "save_count", "chunk", "envs"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        if self.save_points is not None and self.save_points not in SCHEDULES:
            raise ValueError(f"save_points must be one of {', '.join(SCHEDULES)}, got {self.save_points!r}")

    def saves(self, default: int, steps: int) -> int:
        """Checkpoints per run of so many steps."""
        count = self.save_count or min(default, steps + 1)
        if not 2 <= count <= steps + 1:
            raise ValueError(f"save_count must be 2 to steps + 1 = {steps + 1}, got {count}")
        return count

    def chunk_size(self, default: int) -> int:
        """Runs of a chunk: whole groups, and not more than are wanted."""
        size = self.chunk or max(1, default if self.runs is None else min(default, self.runs))
        return -(-size // self.share_batches) * self.share_batches


@dataclass(frozen=True)
class Options:
    """What decides, with the seed and the index, the content of a run; recorded in the zoo."""

    steps: int
    save_points: str
    save_count: int
    chunk: int
    device: str
    dtype: str
    strategy: str = "auto"
    share_batches: int = 1
    envs: int | None = None

    def recorded(self) -> dict[str, Any]:
        """The options that this kind of run has, by name."""
        return {name: value for name, value in asdict(self).items() if value is not None}


@dataclass(frozen=True)
class Forecast:
    """What a generation would cost (``dry_run``)."""

    runs: int
    model_steps: int
    seconds: float
    bytes: int
    strategy: str
    model_steps_per_second: dict[str, float]
    """By strategy, as the probe measured them."""


class Work(Protocol):
    """Runs of one task with fixed options, numbered from 0: each is a function of these, the seed and its number.

    Where runs are computed together, that also depends on the chunk, a function of its first and last number.
    """

    @property
    def task(self) -> Task:
        """Of the runs."""
        ...

    @property
    def layout(self) -> ParameterLayout:
        """Of a checkpoint."""
        ...

    @property
    def seed(self) -> int:
        """Of all runs."""
        ...

    @property
    def options(self) -> Options:
        """What the zoo records."""
        ...

    def decided(self) -> "Work":
        """The same with the strategy chosen, which may take a moment to measure."""
        ...

    def with_strategy(self, name: str) -> "Work":
        """The same with another strategy."""
        ...

    def train(self, runs: range, tick: Callable[[int], object]) -> list[Run]:
        """Train and judge one chunk; runs that are not finite are left out.

        Args:
            runs: Numbers of the runs.
            tick: Called with the steps made since the last call, all runs together; what it raises ends the training.
        """
        ...

    def forecast(self, runs: int) -> Forecast:
        """Time and disk of so many runs, from a short measurement."""
        ...


def data_name(task: Task) -> str:
    """The task without its metric: runs of ``digits_loss`` and ``digits_error`` are the same."""
    return task.name.removesuffix("_loss").removesuffix("_error")


def run_id(task: Task, seed: int, run: int) -> str:
    """Id of a run, unique for its task, seed and number."""
    return f"{data_name(task)}-s{seed}-{run:07d}"
