"""A zoo: many training runs of one task in one folder that any number of writers may fill at once.

Shapes: R runs in the zoo, C checkpoints of a run (runs may differ), D parameters, B entries of a batch. On disk::

    zoo.json                      format version, task, creator, default layout, split fractions, dtype, attributes,
                                  and the SHA-256 of all this (as JSON with sorted keys)
    layouts/<layout-id>.json      names, shapes, dtypes and offsets
    shards/<name>.safetensors     whole runs (see :mod:`zoo_common.shard`)

A shard exists whole or not at all, so writers need no locks and a killed one loses only the shard it was writing.
"""

import bisect
import hashlib
import json
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from zoo_common.files import atomic_write, read_json, visible_files, write_json
from zoo_common.layout import ParameterLayout
from zoo_common.shard import Run, Shard, check_name, write_shard
from zoo_common.statistics import Filtered, Moments, ZooStats
from zoo_common.verify import Report, verify_zoo

__all__ = ["Pairs", "Run", "RunInfo", "Zoo"]

SPLITS = ("train", "validation", "test")
_FORMAT = "weightspace-zoo"
_VERSION = 1
_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}

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


class Pairs(NamedTuple):
    """Pairs of checkpoints of the same run, the start earlier than the target; (B,) int64 each."""

    run: np.ndarray
    start: np.ndarray
    target: np.ndarray


def split_of(run_id: str, fractions: Sequence[float]) -> str:
    """Split of a run: a hash of its id, uniform in [0, 1), against the cumulative fractions."""
    draw = int.from_bytes(hashlib.sha256(run_id.encode()).digest()[:6]) / 2**48
    position = sum(draw >= bound for bound in np.cumsum(fractions)[:-1])
    return SPLITS[position]


class _Index:
    """Runs of one layout, numbered through all shards; a row is a checkpoint, numbered likewise."""

    def __init__(self, shards: Sequence[Shard], fractions: Sequence[float]) -> None:
        self.shards = tuple(shards)
        self.bounds = np.cumsum([0, *(len(shard) for shard in shards)])
        """(shards + 1,) first row of every shard."""
        self.lengths = np.concatenate([np.zeros(0, np.int64), *(np.diff(shard.offsets) for shard in shards)])
        """(R,) checkpoints per run."""
        self.starts = np.cumsum([0, *self.lengths])
        """(R + 1,) first row of every run."""
        entries = [
            (i, config, shard) for shard in shards for i, config in zip(shard.run_ids, shard.configs, strict=True)
        ]
        self.runs = tuple(
            RunInfo(run_id, split_of(run_id, fractions), config, int(length), shard.name)
            for (run_id, config, shard), length in zip(entries, self.lengths, strict=True)
        )
        self.positions = {run.id: position for position, run in enumerate(self.runs)}

    def position(self, run: int | str) -> int:
        """Index of a run given by its index (may be negative) or its id."""
        if isinstance(run, str):
            if run not in self.positions:
                raise KeyError(f"there is no run {run!r} in the zoo")
            return self.positions[run]
        if not -len(self.runs) <= run < len(self.runs):
            raise IndexError(f"run {run} is out of range: the zoo has {len(self.runs)} runs")
        return int(run) % len(self.runs)

    def rows(self, runs: Indices, checkpoints: Indices) -> np.ndarray:
        """Rows of (run, checkpoint) pairs, both (B,) or broadcastable; checkpoints may be negative."""
        run, checkpoint = np.broadcast_arrays(np.asarray(runs, np.int64), np.asarray(checkpoints, np.int64))
        if run.size and not (-len(self.runs) <= run.min() and run.max() < len(self.runs)):
            raise IndexError(f"runs {run.min()} to {run.max()} are out of range: the zoo has {len(self.runs)} runs")
        lengths = self.lengths[run]
        if (bad := (checkpoint < -lengths) | (checkpoint >= lengths)).any():
            first = bad.argmax()
            name, count = self.runs[run.flat[first]].id, lengths.flat[first]
            raise IndexError(f"checkpoint {checkpoint.flat[first]} is out of range: run {name!r} has {count}")
        return self.starts[:-1][run] + checkpoint % lengths

    def locate(self, row: int) -> tuple[Shard, int]:
        """Shard of a row, and its first row."""
        shard = bisect.bisect_right(self.bounds, row) - 1
        return self.shards[shard], int(self.bounds[shard])


class Column:
    """One number per checkpoint: ``column[run]`` (C,), ``column[run, checkpoint]`` or :meth:`gather`."""

    def __init__(self, index: _Index, values: np.ndarray) -> None:
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

    def __init__(self, index: _Index) -> None:
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

    def __init__(self, index: _Index, size: int) -> None:
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
        rows = self._index.rows(runs, checkpoints)
        shards = np.searchsorted(self._index.bounds, rows, side="right") - 1
        touched = np.unique(shards)
        if len(touched) == 1:
            return self._select(touched[0], rows)
        out = torch.empty(len(rows), self._size)
        for shard in touched:
            entries = np.flatnonzero(shards == shard)
            out.index_copy_(0, torch.from_numpy(entries), self._select(shard, rows[entries]))
        return out

    def _select(self, shard: int, rows: np.ndarray) -> Tensor:
        """Rows of one shard, copied."""
        local = torch.from_numpy(rows - self._index.bounds[shard])
        return self._index.shards[shard].params.index_select(0, local).float()


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
        self.dtype: torch.dtype = _DTYPES[document["dtype"]]
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
            dtype: How parameters are stored: float32, float16 or bfloat16.
            attributes: Anything that JSON can hold and that belongs to all runs.
            exist_ok: Open a zoo that is there already, if it was made with the same arguments (``creator`` aside).

        Raises:
            FileExistsError: There is a zoo already.
            ValueError: An argument is wrong, or differs from those of the zoo that is there.
        """
        if len(split) != 3 or min(split) < 0 or abs(sum(split) - 1) > 1e-9:
            raise ValueError(f"split must be three fractions that sum to 1, got {tuple(split)}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype must be one of {', '.join(_DTYPES)}, got {dtype!r}")
        document = {
            "format": _FORMAT,
            "version": _VERSION,
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
        _write_layout(path, layout)
        write_json(path / "zoo.json", document | {"sha256": _digest(document)})
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
            _write_layout(self.path, layout)
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
        for path in visible_files(self.path / "shards", ".safetensors"):
            if path.stem not in self.shards:
                self._take(Shard(path))

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
        write_shard(path, self.layout, runs, self.dtype)
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
    def _index(self) -> _Index:
        own = [shard for _, shard in sorted(self.shards.items()) if shard.layout_id == self.layout.id]
        return _Index(own, self.fractions)

    @property
    def runs(self) -> tuple[RunInfo, ...]:
        """What is known of every run, without reading parameters."""
        return self._index.runs

    @property
    def run_ids(self) -> tuple[str, ...]:
        """Ids of the runs, in order."""
        return tuple(self._index.positions)

    def __contains__(self, run_id: object) -> bool:
        """Whether any shard, of whatever layout, holds this run."""
        return run_id in self._owners

    def __len__(self) -> int:
        """R, the number of runs of this layout."""
        return len(self._index.runs)

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

    def verify(self) -> Report:
        """Read everything and check sums, structure and finite values (see :func:`zoo_common.verify.verify_zoo`)."""
        return verify_zoo(self.path)


def read_document(path: Path) -> dict[str, Any]:
    """The content of ``zoo.json``.

    Raises:
        FileNotFoundError: There is none.
        ValueError: It is damaged, something else, or of a newer format.
    """
    if not (path / "zoo.json").is_file():
        raise FileNotFoundError(f"there is no zoo in {path} (no zoo.json): check the path, or make one there first")
    document = read_json(path / "zoo.json")
    if not isinstance(document, dict) or document.get("format") != _FORMAT or "version" not in document:
        raise ValueError(f"{path / 'zoo.json'} does not describe a zoo")
    if document["version"] != _VERSION:
        raise ValueError(
            f"{path} has format version {document['version']}, this zoo-common reads {_VERSION}: upgrade it"
        )
    if document.pop("sha256", None) not in (None, _digest(document)):
        raise ValueError(
            f"{path / 'zoo.json'} is damaged (wrong SHA-256): restore it from another copy, or, if it was edited on "
            "purpose, remove its entry 'sha256'"
        )
    missing = {"task", "creator", "layout", "split", "dtype", "attributes"} - document.keys()
    if missing or document["dtype"] not in _DTYPES:
        raise ValueError(
            f"{path / 'zoo.json'} is damaged: {', '.join(sorted(missing)) or 'dtype'} is missing or unknown"
        )
    return document


def read_layout(path: Path, layout_id: str) -> ParameterLayout:
    """A layout of the zoo in ``path``, by its id, checked against it."""
    file = path / "layouts" / f"{layout_id}.json"
    if not file.is_file():
        raise FileNotFoundError(f"the zoo in {path} has no layout {layout_id!r} ({file} is missing)")
    layout = ParameterLayout.from_json(json.dumps(read_json(file)))
    if layout.id != layout_id:
        raise ValueError(f"{file} is damaged: its content has the id {layout.id}: restore it from another copy")
    return layout


def _write_layout(path: Path, layout: ParameterLayout) -> None:
    file = path / "layouts" / f"{layout.id}.json"
    if not file.exists():
        with atomic_write(file) as temporary:
            temporary.write_text(layout.to_json() + "\n")


def _digest(document: Mapping[str, object]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


def _plain(config: Mapping[str, object]) -> Any:  # noqa: ANN401
    return json.loads(json.dumps(dict(config)))


def _integers(generator: np.random.Generator | torch.Generator, high: np.ndarray) -> np.ndarray:
    """Uniform integers from 0 to before ``high``, elementwise."""
    if isinstance(generator, np.random.Generator):
        return generator.integers(high)
    draws = torch.rand(high.shape, generator=generator, dtype=torch.float64, device=generator.device)
    return (draws.cpu().numpy() * high).astype(np.int64)
