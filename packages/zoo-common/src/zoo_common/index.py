"""The runs of a zoo, numbered through all its shards, and the columns of numbers and vectors that stand beside them.

Shapes: R runs, C checkpoints of a run (runs may differ), D parameters, B entries of a batch.
"""

import bisect
import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from zoo_common.shard import Shard

SPLITS = ("train", "validation", "test")

Indices = np.ndarray | Tensor | Sequence[int]


@dataclass(frozen=True)
class RunInfo:
    """What the headers tell about a run."""

    id: str
    split: str
    """``train``, ``validation`` or ``test``."""
    config: dict[str, Any]
    checkpoints: int
    shard: str


def split_of(run_id: str, fractions: Sequence[float]) -> str:
    """Split of a run: a hash of its id, uniform in [0, 1), against the cumulative fractions."""
    draw = int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:6]) / 2**48
    return SPLITS[sum(draw >= bound for bound in accumulate(fractions[:-1]))]


class Index:
    """Runs of one layout, numbered through all shards; a row is a checkpoint, numbered likewise."""

    def __init__(self, shards: Sequence[Shard], fractions: Sequence[float]) -> None:
        self.shards = tuple(shards)
        self.bounds = np.cumsum([0, *(len(shard) for shard in shards)])
        """(shards + 1,) first row of every shard."""
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(shard.offsets) for shard in shards)])
        """(R,) checkpoints per run."""
        self.starts = np.cumsum([0, *self.lengths])
        """(R + 1,) first row of every run."""
        self.ids = tuple(run_id for shard in shards for run_id in shard.run_ids)
        self.positions = {run_id: position for position, run_id in enumerate(self.ids)}
        self._fractions = fractions

    def __len__(self) -> int:
        """R."""
        return len(self.ids)

    @cached_property
    def runs(self) -> tuple[RunInfo, ...]:
        """What the headers tell about every run."""
        entries = [(config, shard.name) for shard in self.shards for config in shard.configs]
        return tuple(
            RunInfo(run_id, split_of(run_id, self._fractions), config, int(length), shard)
            for run_id, (config, shard), length in zip(self.ids, entries, self.lengths, strict=True)
        )

    def position(self, run: int | str) -> int:
        """Index of a run given by its index (may be negative) or its id."""
        if isinstance(run, str):
            if run not in self.positions:
                raise KeyError(f"there is no run {run!r} in the zoo")
            return self.positions[run]
        if not -len(self) <= run < len(self):
            raise IndexError(f"run {run} is out of range: the zoo has {len(self)} runs")
        return int(run) % len(self)

    def rows(self, runs: Indices, checkpoints: Indices) -> np.ndarray:
        """Rows of (run, checkpoint) pairs, both (B,) or broadcastable; checkpoints may be negative."""
        run, checkpoint = np.broadcast_arrays(np.asarray(runs, np.int64), np.asarray(checkpoints, np.int64))
        if run.size and not (-len(self) <= run.min() and run.max() < len(self)):
            raise IndexError(f"runs {run.min()} to {run.max()} are out of range: the zoo has {len(self)} runs")
        lengths = self.lengths[run]
        if (bad := (checkpoint < -lengths) | (checkpoint >= lengths)).any():
            first = bad.argmax()
            name, count = self.ids[run.flat[first]], lengths.flat[first]
            raise IndexError(f"checkpoint {checkpoint.flat[first]} is out of range: run {name!r} has {count}")
        return self.starts[:-1][run] + checkpoint % lengths

    def locate(self, row: int) -> tuple[Shard, int]:
        """Shard of a row, and its first row."""
        shard = bisect.bisect_right(self.bounds, row) - 1
        return self.shards[shard], int(self.bounds[shard])


class Column:
    """One number per checkpoint: ``column[run]`` (C,), ``column[run, checkpoint]`` or :meth:`gather`."""

    def __init__(self, index: Index, values: np.ndarray) -> None:
        """Values in row order."""
        self._index = index
        self._values = values

    @overload
    def __getitem__(self, key: int | str) -> np.ndarray: ...
    @overload
    def __getitem__(self, key: tuple[int | str, int]) -> Any: ...  # noqa: ANN401
    def __getitem__(self, key: int | str | tuple[int | str, int]) -> Any:
        """Values of a run (C,), or of one checkpoint; the run by index or id."""
        if isinstance(key, tuple):
            return self._values[self._index.rows([self._index.position(key[0])], [key[1]])[0]]
        run = self._index.position(key)
        return self._values[self._index.starts[run] : self._index.starts[run + 1]]

    def gather(self, runs: Indices, checkpoints: Indices) -> np.ndarray:
        """Values of (run, checkpoint) pairs, (B,)."""
        return self._values[self._index.rows(runs, checkpoints)]

    def padded(self) -> np.ndarray:
        """(R, largest C) float64, NaN where a run has no further checkpoint."""
        lengths = self._index.lengths
        inside = np.arange(lengths.max(initial=0)) < lengths[:, None]
        table = np.full(inside.shape, np.nan)
        table[inside] = self._values
        return table


class Metrics(Mapping[str, Column]):
    """Metric name to :class:`Column`; NaN for runs without that metric."""

    def __init__(self, index: Index) -> None:
        """Metrics of the runs of an index."""
        self._index = index
        self._columns: dict[str, Column] = {}
        self._names = list(dict.fromkeys(name for shard in index.shards for name in shard.metric_names))

    def __getitem__(self, name: str) -> Column:
        """The column of a metric, read when first asked for."""
        if name not in self._names:
            raise KeyError(f"there is no metric {name!r} in the zoo; it has {', '.join(self._names) or 'none'}")
        if name not in self._columns:
            parts = [
                shard.column(f"metrics/{name}") if name in shard.metric_names else np.full(len(shard), np.nan)
                for shard in self._index.shards
            ]
            self._columns[name] = Column(self._index, np.concatenate(parts))
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        """Names, in order of first appearance."""
        return iter(self._names)

    def __len__(self) -> int:
        """Number of metrics."""
        return len(self._names)


class Params:
    """Parameter vectors: ``params[run]`` (C, D), ``params[run, checkpoint]`` (D,), mapped; or :meth:`gather`."""

    def __init__(self, index: Index, size: int) -> None:
        """Vectors of the runs of an index."""
        self._index = index
        self._size = size

    def __getitem__(self, key: int | str | tuple[int | str, int]) -> Tensor:
        """Vectors of a run, or of one checkpoint (may be negative), in the stored dtype, without a copy."""
        run = self._index.position(key[0] if isinstance(key, tuple) else key)
        shard, first = self._index.locate(int(self._index.starts[run]))
        if isinstance(key, tuple):
            return shard.params[int(self._index.rows([run], [key[1]])[0]) - first]
        return shard.params[int(self._index.starts[run]) - first : int(self._index.starts[run + 1]) - first]

    def gather(self, runs: Indices, checkpoints: Indices) -> Tensor:
        """Vectors of (run, checkpoint) pairs, (B, D) float32; one indexed copy per shard that is touched."""
        # NumPy takes huge pages for large arrays: without them, providing the memory takes longer than the reading.
        out = torch.from_numpy(np.empty((len(runs), self._size), np.float32))
        for entries, table, rows in self.parts(runs, checkpoints):
            if len(rows) == len(out):
                torch.index_select(table, 0, rows, out=out)
            else:
                out.index_copy_(0, entries, table.index_select(0, rows))
        return out

    def parts(self, runs: Indices, checkpoints: Indices) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Where the vectors of B (run, checkpoint) pairs lie, shard by shard.

        Yields:
            ``entries``: which of the pairs, rising; ``table`` (N, D) float32, mapped where it is stored so;
            ``rows``: the pair ``entries[i]`` is ``table[rows[i]]``.
        """
        rows = self._index.rows(runs, checkpoints)
        shards = np.searchsorted(self._index.bounds, rows, side="right") - 1
        order = np.argsort(shards, kind="stable")
        for entries in np.split(order, np.flatnonzero(np.diff(shards[order])) + 1) if len(rows) else []:
            shard = shards[entries[0]]
            local, params = (
                torch.from_numpy(rows[entries] - self._index.bounds[shard]),
                self._index.shards[shard].params,
            )
            if not isinstance(params, Tensor) or params.dtype != torch.float32:
                selected = params.index_select(0, local) if isinstance(params, Tensor) else params[local]
                params, local = selected.float(), torch.arange(len(local))
            yield torch.from_numpy(entries), params, local
