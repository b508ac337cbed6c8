"""A zoo as a source of runs, and runs written to a zoo."""

import math
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from zoo_common.formats.source import Source
from zoo_common.layout import ParameterLayout
from zoo_common.manifest import read_layout
from zoo_common.shard import Run, Shard
from zoo_common.zoo import Zoo

_SHARD_BYTES, _SHARD_RUNS = 2**25, 1000


class ZooRuns(Source):
    """Runs of a zoo, those of other layouts included; every shard is checked before its first run is read."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._zoo = Zoo.open(path)
        shards = [shard for _, shard in sorted(self._zoo.shards.items())]
        self._rows: Mapping[str, tuple[Shard, int, int]] = {
            run_id: (shard, int(start), int(stop))
            for shard in shards
            for run_id, start, stop in zip(shard.run_ids, shard.offsets, shard.offsets[1:], strict=False)
        }
        self.run_ids = tuple(self._rows)
        self.task, self.split, self.attributes = self._zoo.task, self._zoo.fractions, self._zoo.attributes
        self._mapped: Shard | None = None

    @property
    def layout(self) -> ParameterLayout:
        """The default layout."""
        return self._zoo.layout

    @property
    def storage(self) -> str:
        """How the zoo stores parameters."""
        return self._zoo.storage

    def read(self, run_id: str) -> Run:
        """Views of one run."""
        known, start, stop = self._rows[run_id]
        layout = self.layout
        if known.layout_id != layout.id:
            layout = read_layout(self.path, known.layout_id)
            self.check_layout(run_id, layout)
        if self._mapped is None or self._mapped.name != known.name:
            self._mapped = Shard(known.file.path)  # a fresh mapping: the last one, with all its pages, goes
            self._mapped.file.check()
        shard, rows = self._mapped, slice(start, stop)
        metrics = {name: shard.column(f"metrics/{name}")[rows] for name in shard.metric_names}
        buffers = shard.buffers((spec.name for spec in self.layout.buffers), rows)
        config = shard.configs[shard.run_ids.index(run_id)]
        params = self.in_order(shard.params[rows], layout)
        return Run(run_id, params, shard.column("step")[rows].tolist(), metrics, config, buffers)


class ZooWriter:
    """Collects runs and writes shards of bounded size, each named after its first run."""

    def __init__(self, path: Path, source: Source, task: str | None = None, dtype: str | None = None) -> None:
        self.zoo = Zoo.create(
            path,
            layout=source.layout,
            task=task or source.task,
            split=source.split,
            dtype=dtype or source.storage,
            attributes=source.attributes,
            exist_ok=True,
        )
        self._waiting: list[Run] = []
        self._bytes = 0

    def holds(self, run_id: str) -> bool:
        """Whether a run is in the zoo."""
        return run_id in self.zoo

    def write(self, run: Run) -> None:
        """Take a run; a full shard is written."""
        size = run.params.numel() * run.params.dtype.itemsize
        if self._waiting and (self._bytes + size > _SHARD_BYTES or len(self._waiting) >= _SHARD_RUNS):
            self.flush()
        self._waiting.append(run)
        self._bytes += size

    def flush(self) -> None:
        """Write what waits; a metric that a run lacks and another one has is NaN."""
        if self._waiting:
            names = dict.fromkeys(name for run in self._waiting for name in run.metrics)
            full = [
                replace(run, metrics={name: run.metrics.get(name, [math.nan] * len(run.params)) for name in names})
                for run in self._waiting
            ]
            self.zoo.append(full, name=full[0].id)
        self._waiting, self._bytes = [], 0
