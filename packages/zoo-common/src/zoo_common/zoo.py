"""A zoo: many training runs of one task in one folder that any number of writers may fill at once.

Shapes: R runs in the zoo, C checkpoints of a run (runs may differ), D parameters, B entries of a batch. On disk::

    zoo.json                      format version, task, creator, default layout, split fractions, dtype, attributes,
                                  and the SHA-256 of all this (as JSON with sorted keys)
    layouts/<layout-id>.json      names, shapes, dtypes and offsets
    shards/<name>.safetensors     whole runs (see :mod:`zoo_common.shard`)

A shard exists whole or not at all, so writers need no locks and a killed one loses only the shard it was writing.
"""

import gc
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from zoo_common.coding import STORAGES, Rounding
from zoo_common.files import visible_files
from zoo_common.index import SPLITS, Column, Index, Indices, Metrics, Params, RunInfo
from zoo_common.layout import ParameterLayout
from zoo_common.manifest import FORMAT, VERSION, read_document, read_layout, write_document, write_layout
from zoo_common.shard import Run, Shard, check_name, write_shard
from zoo_common.statistics import Filtered, Moments, ZooStats
from zoo_common.verify import Report, verify_zoo

__all__ = ["Pairs", "Run", "RunInfo", "Zoo"]


class Pairs(NamedTuple):
    """Pairs of checkpoints of the same run, the start earlier than the target; (B,) int64 each."""

    run: np.ndarray
    start: np.ndarray
    target: np.ndarray


class Zoo:
    """A folder of runs. Made by :meth:`create` or :meth:`open`; shows the runs of one layout.

    Run indices hold for this object until :meth:`append` or :meth:`refresh`; run ids hold for ever.
    """

    def __init__(self, path: Path, document: dict[str, Any], layout: ParameterLayout) -> None:
        """Use :meth:`create` or :meth:`open`."""
        self.path = path
        self.layout = layout
        self.task: str | None = document["task"]
        self.creator: str = document["creator"]
        self.fractions: tuple[float, float, float] = tuple(document["split"])
        self.storage: str = document["dtype"]
        self.dtype: torch.dtype = STORAGES[self.storage]
        self.attributes: dict[str, Any] = document["attributes"]
        self._document = document
        self.shards: dict[str, Shard] = {}
        """All shards by name, those of other layouts too."""
        self._owners: dict[str, str] = {}
        self.refresh()

    @classmethod
    def create(
        cls,
        path: str | Path,
        *,
        layout: ParameterLayout,
        task: str | None = None,
        creator: str | None = None,
        split: Sequence[float] = (0.8, 0.1, 0.1),
        dtype: str = "float32",
        attributes: Mapping[str, object] | None = None,
        exist_ok: bool = False,
    ) -> "Zoo":
        """Make a zoo in a new folder.

        Args:
            path: Folder; its parents are made too.
            layout: Default layout.
            task: Name of the task.
            creator: Who made it; default: this package and its version.
            split: Fractions of training, validation and test runs; a run's split depends on its id alone.
            dtype: How parameters are stored: float32, float16, bfloat16, or delta10 (differences within a run, about 2.7
                times smaller than float32; read as float32). :meth:`rounding` tells what is lost.
            attributes: Anything that JSON can hold and that belongs to all runs.
            exist_ok: Open a zoo that is there already, if it was made with the same arguments (``creator`` aside).

        Raises:
            FileExistsError: There is a zoo already.
            ValueError: An argument is wrong, or differs from those of the zoo that is there.
        """
        if len(split) != 3 or min(split) < 0 or not abs(sum(split) - 1) <= 1e-9:  # NaN
            raise ValueError(f"split must be three fractions that sum to 1, got {tuple(split)}")
        if dtype not in STORAGES:
            raise ValueError(f"dtype must be one of {', '.join(STORAGES)}, got {dtype!r}")
        document = {
            "format": FORMAT,
            "version": VERSION,
            "task": task,
            "creator": creator or f"zoo-common {version('zoo-common')}",
            "layout": layout.id,
            "split": [float(fraction) for fraction in split],
            "dtype": dtype,
            "attributes": dict(attributes or {}),
        }
        document = json.loads(json.dumps(document))
        path = Path(path)
        if (path / "zoo.json").exists():
            if not exist_ok:
                raise FileExistsError(f"there is a zoo in {path} already: open it, or choose another folder")
            zoo = cls.open(path)
            wrong = [key for key, value in document.items() if key != "creator" and zoo._document[key] != value]
            if wrong:
                pairs = "; ".join(f"{key}: {zoo._document[key]!r} there, {document[key]!r} asked for" for key in wrong)
                raise ValueError(f"the zoo in {path} is another one ({pairs}): choose another folder")
            return zoo
        for folder in ("layouts", "shards"):
            (path / folder).mkdir(parents=True, exist_ok=True)
        write_layout(path, layout)
        write_document(path, document)
        return cls(path, document, layout)

    @classmethod
    def open(cls, path: str | Path) -> "Zoo":
        """Open a zoo; only the headers of its shards are read.

        Raises:
            FileNotFoundError: There is no zoo.
            ValueError: A file is damaged, or two shards hold the same run; the message names them.
        """
        path = Path(path)
        document = read_document(path)
        return cls(path, document, read_layout(path, document["layout"]))

    def with_layout(self, layout: ParameterLayout | str) -> "Zoo":
        """The same zoo, showing (and appending) the runs of another layout, given itself or by its id."""
        if isinstance(layout, ParameterLayout):
            write_layout(self.path, layout)
        else:
            layout = read_layout(self.path, layout)
        return Zoo(self.path, self._document, layout)

    @property
    def layout_ids(self) -> tuple[str, ...]:
        """Ids of all layouts of the zoo, the default first."""
        default = self._document["layout"]
        found = [path.stem for path in visible_files(self.path / "layouts", ".json")]
        return (default, *(name for name in found if name != default))

    def refresh(self) -> None:
        """Take in the shards that were written since the zoo was opened, by whomever."""
        with _uncollected():
            for path in visible_files(self.path / "shards", ".safetensors"):
                if path.stem not in self.shards:
                    self._take(self._open_shard(path))

    def _open_shard(self, path: Path) -> Shard:
        try:
            return Shard(path)
        except ValueError as error:
            raise ValueError(f"{error}; `zoo verify --repair {self.path}` moves it aside") from error

    def append(self, runs: Sequence[Run], name: str | None = None) -> str:
        """Write runs as one shard.

        Args:
            runs: At least one run of this layout, with ids that are new to the zoo.
            name: Shard name; default: a new one that sorts by time. A writer that repeats its work after a crash
                gives the same name again: if the shard is there with the same run ids and configs, it is kept.

        Returns:
            The shard's name.

        Raises:
            ValueError: A run does not fit, or its id is in the zoo already; nothing has been written.
        """
        if not runs:
            raise ValueError("append needs at least one run")
        name = name or f"{time.time_ns():020d}-{uuid.uuid4().hex[:12]}"
        check_name(name, "shard name")
        self.refresh()
        if name in self.shards:
            there = self.shards[name]
            if there.run_ids == [run.id for run in runs] and there.configs == [_plain(run.config) for run in runs]:
                return name
            raise ValueError(f"shard {name!r} is in {self.path} with other runs: choose another name")
        self._check_new([run.id for run in runs], name)
        path = self.path / "shards" / f"{name}.safetensors"
        write_shard(path, self.layout, runs, self.storage)
        self._take(Shard(path))
        return name

    def _take(self, shard: Shard) -> None:
        self._check_new(shard.run_ids, shard.name)
        self.shards[shard.name] = shard
        self._owners |= dict.fromkeys(shard.run_ids, shard.name)
        for cached in ("_index", "metrics", "params", "steps"):
            self.__dict__.pop(cached, None)

    def _check_new(self, run_ids: Sequence[str], shard: str) -> None:
        known: dict[str, str] = {}
        for run_id in run_ids:
            owner = self._owners.get(run_id) or known.get(run_id)
            if owner:
                raise ValueError(
                    f"run {run_id!r} of shard {shard!r} is in {self.path} already (shard {owner!r}): "
                    "run ids must be unique, delete one of the shards or choose another id"
                )
            known[run_id] = shard

    @cached_property
    def _index(self) -> Index:
        own = [shard for _, shard in sorted(self.shards.items()) if shard.layout_id == self.layout.id]
        return Index(own, self.fractions)

    @property
    def runs(self) -> tuple[RunInfo, ...]:
        """What is known of every run, without reading parameters."""
        return self._index.runs

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Ids of the runs, in order."""
        return self._index.ids

    def __contains__(self, run_id: object) -> bool:
        """Whether any shard, of whatever layout, holds this run."""
        return run_id in self._owners

    def __len__(self) -> int:
        """R, the number of runs of this layout."""
        return len(self._index)

    def index(self, run_id: str) -> int:
        """Index of a run; ``KeyError`` if there is none."""
        return self._index.position(run_id)

    def split(self, name: str) -> np.ndarray:
        """Indices of the runs of a split, int64, rising."""
        if name not in SPLITS:
            raise ValueError(f"split must be one of {', '.join(SPLITS)}, got {name!r}")
        return np.array([i for i, run in enumerate(self.runs) if run.split == name], dtype=np.int64)

    @cached_property
    def params(self) -> Params:
        """Parameter vectors by run and checkpoint."""
        return Params(self._index, self.layout.size)

    @cached_property
    def steps(self) -> Column:
        """Optimizer steps by run and checkpoint."""
        parts = [shard.column("step") for shard in self._index.shards]
        return Column(self._index, np.concatenate([np.zeros(0, np.int64), *parts]))

    @cached_property
    def metrics(self) -> Metrics:
        """Metrics by name, run and checkpoint."""
        return Metrics(self._index)

    def weights(self, run: int | str, checkpoint: int) -> dict[str, Tensor]:
        """Parameters and buffers of one checkpoint by name, as ``load_state_dict`` takes them."""
        position = self._index.position(run)
        row = int(self._index.rows([position], [checkpoint])[0])
        shard, first = self._index.locate(row)
        buffers = shard.buffers((spec.name for spec in self.layout.buffers), row - first)
        return self.layout.unflatten(shard.params[row - first].to(self.layout.dtype), buffers)

    def run(self, run: int | str) -> Run:
        """A whole run, as :meth:`append` takes it, to store it elsewhere or otherwise."""
        position = self._index.position(run)
        shard, first = self._index.locate(int(self._index.starts[position]))
        rows = slice(*(self._index.starts[position : position + 2] - first).tolist())
        metrics = {name: shard.column(f"metrics/{name}")[rows] for name in shard.metric_names}
        buffers = shard.buffers((spec.name for spec in self.layout.buffers), rows)
        info = self.runs[position]
        return Run(info.id, shard.params[rows], self.steps[position], metrics, info.config, buffers)

    def pairs(
        self,
        runs: Indices,
        generator: np.random.Generator | torch.Generator,
        *,
        min_spacing: int = 1,
        max_spacing: int | None = None,
    ) -> Pairs:
        """Draw an earlier and a later checkpoint for each run given; uniform in the spacing, then in the start.

        Args:
            runs: (B,) run indices, with repetitions as wanted.
            generator: Source of randomness.
            min_spacing: Smallest distance, in checkpoints.
            max_spacing: Largest distance; default (and limit): from the first checkpoint of a run to its last.

        Raises:
            ValueError: A run is too short for ``min_spacing``, or the spacings are not 1 <= min <= max.
        """
        if min_spacing < 1 or (max_spacing is not None and max_spacing < min_spacing):
            raise ValueError(f"spacings must be 1 <= min <= max, got {min_spacing} and {max_spacing}")
        run = np.asarray(runs, dtype=np.int64)
        lengths = self._index.lengths[run]
        if (short := lengths <= min_spacing).any():
            info = self.runs[run[short.argmax()]]
            raise ValueError(
                f"run {info.id!r} has {info.checkpoints} checkpoints, a spacing of {min_spacing} needs {min_spacing + 1}"
            )
        longest = lengths - 1 if max_spacing is None else np.minimum(lengths - 1, max_spacing)
        spacing = min_spacing + _integers(generator, longest - min_spacing + 1)
        start = _integers(generator, lengths - spacing)
        return Pairs(run, start, start + spacing)

    def stats(self, split: str = "train", runs: Indices | None = None) -> ZooStats:
        """Mean, standard deviation and range of all parameters, in one pass and bounded memory.

        Args:
            split: Whose runs to take.
            runs: Run indices to take instead, e.g. those that :meth:`filter` kept.

        Raises:
            ValueError: There is no run to take.
        """
        chosen = self.split(split) if runs is None else np.asarray(runs)
        moments = Moments(self.layout.size)
        for run in chosen:
            moments.add(self.params[int(run)])
        return moments.result()

    def filter(self, max_abs: float = 10.0) -> Filtered:
        """Find the runs whose parameters are all finite and at most ``max_abs`` in absolute value."""
        kept: list[int] = []
        dropped = {"non-finite": 0, f"above {max_abs:g}": 0}
        for run in range(len(self)):
            low, high = (bound.item() for bound in self.params[run].aminmax())
            if not np.isfinite([low, high]).all():
                dropped["non-finite"] += 1
            elif max(-low, high) > max_abs:
                dropped[f"above {max_abs:g}"] += 1
            else:
                kept.append(run)
        return Filtered(np.array(kept, dtype=np.int64), dropped)

    def rounding(self) -> Rounding | None:
        """What was lost when the parameters were stored; None if files of before this was recorded are among them."""
        parts = [shard.rounding for shard in self._index.shards]
        return None if None in parts else sum(filter(None, parts), Rounding())

    def verify(self, *, repair: bool = False) -> Report:
        """Read everything and check sums, structure and finite values (see :func:`zoo_common.verify.verify_zoo`)."""
        return verify_zoo(self.path, repair=repair)


@contextmanager
def _uncollected() -> Iterator[None]:
    """Pause the search for garbage: among the new objects of 10,000 headers it takes three times as long as the rest."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()


def _plain(config: Mapping[str, object]) -> Any:  # noqa: ANN401
    return json.loads(json.dumps(dict(config)))


def _integers(generator: np.random.Generator | torch.Generator, high: np.ndarray) -> np.ndarray:
    """Uniform integers from 0 to before ``high``, elementwise."""
    if isinstance(generator, np.random.Generator):
        return generator.integers(high)
    draws = torch.rand(high.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (draws.cpu().numpy() * high).astype(np.int64)
