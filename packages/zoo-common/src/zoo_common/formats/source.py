"""What all formats share: runs in a folder that are read one at a time.

Shapes: a run has C checkpoints of D parameters.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from zoo_common.coding import STORAGES
from zoo_common.files import allocate, read_json
from zoo_common.layout import ParameterLayout
from zoo_common.shard import Numbers, Run

DROPPED = "dropped_checkpoints"
"""Key of a run's config that lists the checkpoints left out, each with the reason."""


class BadRunError(ValueError):
    """A run of which nothing can be used; the others can."""


class OtherLayoutError(BadRunError):
    """A run of another architecture than the first one."""


class Source(ABC):
    """Runs in one folder: their ids are known when it is opened, and one at a time is in memory."""

    run_ids: tuple[str, ...]
    """Ids of all runs, in order."""
    task: str | None = None
    split: tuple[float, ...] = (0.8, 0.1, 0.1)
    attributes: Mapping[str, object] = {}
    scratch: Path | None = None
    """Folder for runs that are too large for memory; None: that of the system."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @property
    @abstractmethod
    def layout(self) -> ParameterLayout:
        """Layout of the first run that can be read."""

    @property
    def storage(self) -> str:
        """How a zoo stores these parameters without loss, float64 ones as float32."""
        name = str(self.layout.dtype).removeprefix("torch.")
        return name if name in STORAGES else "float32"

    @abstractmethod
    def read(self, run_id: str) -> Run:
        """Read one run.

        Checkpoints that are missing, damaged or not finite are left out; ``config["dropped_checkpoints"]`` lists them.

        Raises:
            BadRunError: Nothing of the run can be used.
            OtherLayoutError: The run has another layout.
        """

    def close(self) -> None:  # noqa: B027 (most have nothing to close)
        """Close files that are kept open; they are opened again when needed."""

    def check_layout(self, run_id: str, found: ParameterLayout) -> None:
        """Raise ``OtherLayoutError`` unless the tensors are those of :attr:`layout`; their order does not count."""
        expected, other = _table(self.layout), _table(found)
        for name in expected | other:
            if expected.get(name) != other.get(name):
                raise OtherLayoutError(
                    f"run {run_id!r} has another layout than the first run of {self.path}: {name!r} is "
                    f"{other.get(name, 'absent')} there and {expected.get(name, 'absent')} here"
                )

    def in_order(self, vectors: Tensor, found: ParameterLayout) -> Tensor:
        """Vectors (..., D) of a layout with the same tensors, in the order of :attr:`layout`."""
        return vectors if found.names == self.layout.names else self.layout.flatten(found.unflatten(vectors))


class Writer(Protocol):
    """Writes runs to a folder."""

    def holds(self, run_id: str) -> bool:
        """Whether a run is in the folder."""

    def write(self, run: Run) -> None:
        """Write a run, or keep it for :meth:`flush`."""

    def flush(self) -> None:
        """Write what was kept."""


class Checkpoints:
    """The checkpoints of a run while they are read: usable ones are stacked, others listed with the reason."""

    def __init__(self, source: Source, capacity: int) -> None:
        self.layout = source.layout
        self.params = allocate((capacity, self.layout.size), self.layout.dtype, source.scratch)
        self.kept: list[int] = []
        """Which of the checkpoints offered, by their number."""
        self.dropped: list[str] = []
        self._buffers: list[Mapping[str, Tensor]] = []

    def add(self, number: int, name: str, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Keep a checkpoint, or list it if a value is not finite."""
        if not vector.isfinite().all():
            parts = self.layout.unflatten(vector)
            bad = [repr(key) for key, part in parts.items() if not part.isfinite().all()]
            self.dropped.append(f"{name}: {', '.join(bad)} is not finite")
            return
        self.params[len(self.kept)].copy_(vector)
        self.kept.append(number)
        self._buffers.append(buffers or {})

    def run(self, run_id: str, steps: list[int], metrics: Mapping[str, Numbers], config: Mapping[str, object]) -> Run:
        """The run, from steps and metrics of the checkpoints kept; ``BadRunError`` if there is none."""
        if not self.kept:
            raise BadRunError(self.dropped[0] if self.dropped else f"run {run_id!r} has no checkpoints")
        noted = {**config, DROPPED: self.dropped} if self.dropped else config
        buffers = {spec.name: torch.stack([row[spec.name] for row in self._buffers]) for spec in self.layout.buffers}
        return Run(run_id, self.params[: len(self.kept)], steps, metrics, noted, buffers)


def folders(path: Path) -> list[Path]:
    """Sub-folders by name, hidden ones left out."""
    return sorted(entry for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))


def named(paths: Iterable[tuple[str, Path]]) -> dict[str, Path]:
    """Run id to its path; a character that no id can have becomes ``_``.

    Raises:
        ValueError: Two paths give the same id.
    """
    found: dict[str, Path] = {}
    for name, path in paths:
        run_id = clean(name)
        if run_id in found:
            raise ValueError(f"{found[run_id]} and {path} both hold a run {run_id!r}: rename or remove one of them")
        found[run_id] = path
    return found


def clean(name: str) -> str:
    """A name as run ids and metrics can have it."""
    return re.sub(r"^\.|[^\w.=+@,-]", "_", name, flags=re.ASCII)[:128]


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in a file of a run; ``BadRunError`` if there is none."""
    try:
        document = read_json(path)
    except (ValueError, RecursionError, FileNotFoundError) as error:
        raise BadRunError(f"{path} is missing" if isinstance(error, FileNotFoundError) else str(error)) from error
    if not isinstance(document, dict):
        raise BadRunError(f"{path} holds no JSON object: restore it from another copy")
    return document


def is_number(value: object) -> bool:
    """Whether a value of a JSON document is a number that a float can hold."""
    return isinstance(value, float) or (type(value) is int and abs(value) < 2**1023)


def rising(steps: Sequence[float]) -> bool:
    """Whether each step is above the one before."""
    return all(a < b for a, b in pairwise(steps))


def measured(metrics: Mapping[str, Numbers]) -> dict[str, Sequence[float]]:
    """Metrics as lists, without those that are NaN throughout (a shard fills up what only other runs have)."""
    columns = {name: torch.as_tensor(values, dtype=torch.float64) for name, values in metrics.items()}
    return {name: column.tolist() for name, column in columns.items() if not column.isnan().all()}


def _table(layout: ParameterLayout) -> dict[str, Any]:
    specs = {spec.name: f"{str(spec.dtype).removeprefix('torch.')} {spec.shape}" for spec in layout.tensors}
    specs |= {alias: specs[name] for alias, name in layout.aliases}
    return specs | {spec.name: f"{str(spec.dtype).removeprefix('torch.')} {spec.shape}" for spec in layout.buffers}
