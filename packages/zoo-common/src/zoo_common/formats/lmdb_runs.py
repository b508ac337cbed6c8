"""The checkpoint datasets of G.pt: one LMDB environment and one JSON file per run, or per several runs ("fused").

::

    <run>/data.mdb    records "<run>/ep000_it00000.pt" (RL: "<run>/it00000.pt"): the vector, float32; the same with
                      "_arch": sizes of the tensors, float32; RL: with "_train_ret": the return, float32
    <run>/runs.json   {"checkpoints": {key: {metric: value}}, "metadata": {...}}; in a fused folder, such a record for
                      every run under its name
    <run>/DONE.txt    empty

Names of runs have six digits, the name of a fused folder joins several by "_". The record of a run that did not come
from here has one more entry, ``zoo``, with what the format has no place for; readers of the format pass over it.
"""

import itertools
import json
import math
import os
import re
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo_common.files import atomic_folder
from zoo_common.formats.source import (
    BadRunError,
    Checkpoints,
    OtherLayoutError,
    Source,
    clean,
    folders,
    is_number,
    measured,
    named,
    read_object,
    rising,
)
from zoo_common.layout import ParameterLayout
from zoo_common.shard import Run
from zoo_common.tasks import get_task

try:
    import lmdb
except ImportError as error:
    raise ImportError("the datasets of G.pt need LMDB: pip install 'zoo-common[lmdb]'") from error

_PUBLISHED: dict[str, dict[str, tuple[int, ...]]] = {
    "mnist": {"fc1.weight": (10, 784), "fc1.bias": (10,), "fc2.weight": (10, 10), "fc2.bias": (10,)},
    "cifar10": {
        "conv1.weight": (16, 3, 3, 3),
        "conv2.weight": (32, 16, 3, 3),
        "fc.weight": (10, 32),
        "fc.bias": (10,),
    },
    "cartpole": {
        "log_std": (1,),
        "actor.0.weight": (32, 4),
        "actor.0.bias": (32,),
        "actor.2.weight": (32, 32),
        "actor.2.bias": (32,),
        "actor.4.weight": (1, 32),
        "actor.4.bias": (1,),
    },
}
_RENAMED = {
    f"{part}_{own}": f"avg_{part}_{short}"
    for part in ("train", "val", "test")
    for own, short in (("loss", "loss"), ("error", "err"))
}
"""Metrics of this workspace and their published names; both count errors in percent."""
_HIGHER_IS_BETTER = ("ret", "return", "acc", "accuracy")
_LONG_EPOCH = 100_000
"""Steps from one epoch to the next where the true number is not known: more than the five digits of a key hold."""
_ORIGIN = "from_gpt"
"""Key of a run's config with what is needed to write the same keys and record again, where the rest does not say it."""
_MOST_OPEN = 8
_DAMAGE = (lmdb.InvalidError, lmdb.CorruptedError, lmdb.PageNotFoundError, lmdb.VersionMismatchError)


class LmdbRuns(Source):
    """Runs in the order of G.pt: folders by name, and the runs of a fused folder by name.

    The format holds sizes of tensors only. Names and shapes are those of the three published tasks where the sizes are
    theirs, those of ``task`` where one is given, else ``tensor0``, ``tensor1``, ... with one axis.

    The step of ``it00067`` is 67. That of ``ep003_it00067`` is 67 + 3 * ``steps_per_epoch`` (published: MNIST 468,
    CIFAR-10 390), or 300067 where this is not given, since the format does not say how long an epoch is.

    Args:
        path: Folder of the run folders.
        task: Name of the task whose network the runs have.
        steps_per_epoch: Iterations in an epoch.
        verify_done: Pass over folders without ``DONE.txt``.
    """

    def __init__(
        self, path: Path, task: str | None = None, steps_per_epoch: int | None = None, verify_done: bool = False
    ) -> None:
        super().__init__(path)
        self._task, self._epoch = task, steps_per_epoch
        self._last: tuple[Path | None, dict[str, Any]] = None, {}
        there = [f for f in folders(path) if (f / "data.mdb").exists() and (f / "DONE.txt").exists() >= verify_done]
        places = [(name, folder) for folder in there for name in _names(folder.name)]
        self._folders = named(places)
        self._names = dict(zip(self._folders, (name for name, _ in places), strict=True))
        if places and self._own(next(iter(self._folders)), "id"):  # written here: the runs get back the ids they had
            ids = [(str(self._own(run_id, "id") or run_id), folder) for run_id, folder in self._folders.items()]
            self._folders = named(ids)
            self._names = dict(zip(self._folders, self._names.values(), strict=True))
        self.run_ids = tuple(self._folders)

    @cached_property
    def layout(self) -> ParameterLayout:
        """Layout of the first run that can be read."""
        reason: Exception | None = None
        for run_id in self.run_ids:
            try:
                return self._layout(run_id)
            except OtherLayoutError:
                raise
            except BadRunError as error:
                reason = reason or error
        raise ValueError(f"none of the {len(self.run_ids)} runs in {self.path} can be read: {reason}")

    @property
    def task(self) -> str | None:  # type: ignore[override]
        """The task given, or the published one with this layout."""
        published = (name for name, shapes in _PUBLISHED.items() if _layout_of(shapes) == self.layout)
        return self._task or self._own(self.run_ids[0], "task") or next(published, None)

    @property
    def attributes(self) -> dict[str, object]:  # type: ignore[override]
        """A note if names and shapes are not known."""
        unknown = self.layout == _derived(self.layout.sizes, None) and self.task is None
        return {"note": "names and shapes of the tensors are not known, only their sizes"} if unknown else {}

    def read(self, run_id: str) -> Run:
        """Read one run."""
        name, record = self._names[run_id], self._record(run_id)
        layout = self._layout(run_id)
        self.check_layout(run_id, layout)
        keys = sorted(record["checkpoints"])
        found = Checkpoints(self, len(keys))
        with _records(self._folders[run_id]) as get:
            for position, key in enumerate(keys):
                value = get(key)
                if value is None or len(value) != 4 * self.layout.size:
                    size = "is missing" if value is None else f"has {len(value)} bytes, not {4 * self.layout.size}"
                    found.dropped.append(f"{self._folders[run_id]}: record {key!r} {size}")
                else:
                    vector = torch.from_numpy(np.frombuffer(value, "<f4").astype("f4"))
                    found.add(position, key, self.in_order(vector, layout))
        kept = [keys[position] for position in found.kept]
        rows = [record["checkpoints"][key] for key in kept]
        back = {short: own for own, short in _RENAMED.items()} if self._own(run_id, "renamed") else {}
        names = dict.fromkeys(metric for row in rows for metric in row)
        columns = {metric: [row.get(metric) for row in rows] for metric in names}
        metrics = {
            back.get(metric, clean(metric)): [float(v) if is_number(v) else math.nan for v in column]
            for metric, column in columns.items()
        }
        given = {"task": self._task, "steps_per_epoch": self._epoch}
        origin: dict[str, object] = {option: value for option, value in given.items() if value}
        run = found.run(run_id, _steps(kept, name, self._epoch), metrics, dict(self._own(run_id, "config") or {}))
        if not (found.dropped or "zoo" in record):  # what the rest does not say
            if _written(_with(run, origin), name, self.layout, {})[0] != kept:
                origin["keys"] = kept
            rebuilt = _written(_with(run, origin), name, self.layout, {})[1]
            if not _same(rebuilt, record):
                own, rest = record.get("metadata", {}), {**record, "metadata": rebuilt["metadata"]}
                odd = {key: value for key, value in own.items() if not _same(value, rebuilt["metadata"].get(key))}
                few = _same(rest, rebuilt) and own.keys() >= rebuilt["metadata"].keys()
                origin |= {"metadata": odd} if few else {"record": record}
        return _with(run, origin)

    def record(self, run_id: str) -> dict[str, Any]:
        """What ``runs.json`` holds of a run; ``BadRunError`` if that is nothing."""
        return self._record(run_id)

    def vectors(self, run_id: str, keys: Sequence[str]) -> Tensor:
        """Some checkpoints of a run, (len(keys), D) float32, without reading the others.

        Raises:
            ValueError: One is missing, or of another size; the message names it.
        """
        out = torch.empty(len(keys), self.layout.size)
        with _records(self._folders[run_id]) as get:
            for row, key in zip(out, keys, strict=True):
                value = get(key)
                if value is None or len(value) != 4 * self.layout.size:
                    size = "is missing" if value is None else f"has {len(value)} bytes, not {4 * self.layout.size}"
                    raise BadRunError(f"{self._folders[run_id]}: record {key!r} {size}")
                row.copy_(torch.from_numpy(np.frombuffer(value, "<f4").astype("f4")))
        return out

    def close(self) -> None:
        """Close the environments, so that others can open them."""
        for folder in self._folders.values():
            if environment := _open.pop(os.path.realpath(folder), None):
                environment.close()

    def _record(self, run_id: str) -> dict[str, Any]:
        folder, name = self._folders[run_id], self._names[run_id]
        if self._last[0] != folder:
            self._last = folder, read_object(folder / "runs.json")
        record = self._last[1].get(name, self._last[1])
        rows = record.get("checkpoints") if isinstance(record, dict) else None
        if not isinstance(rows, dict) or not rows or not all(isinstance(row, dict) for row in rows.values()):
            raise BadRunError(
                f"{folder / 'runs.json'} has no checkpoints of run {name!r}: restore it from another copy"
            )
        return dict(record)

    def _own(self, run_id: str, entry: str) -> Any:  # noqa: ANN401
        """What :class:`LmdbWriter` noted of a run; None if it did not write it."""
        try:
            noted = self._record(run_id).get("zoo")
        except BadRunError:
            return None
        return noted.get(entry) if isinstance(noted, dict) else None

    def _layout(self, run_id: str) -> ParameterLayout:
        folder, keys = self._folders[run_id], sorted(self._record(run_id)["checkpoints"])
        with _records(folder) as get:
            found = ((get(f"{key}_arch"), get(key)) for key in keys)
            arch, vector = next(((a, v) for a, v in found if a is not None and v is not None), (b"", b""))
            sizes = np.frombuffer(arch, "<f4")
            if not len(arch) or not (sizes >= 0).all() or sizes.sum(dtype=np.float64) * 4 != len(vector):
                raise BadRunError(f"{folder}: no record of run {self._names[run_id]!r} has the sizes of its tensors")
            counts = tuple(int(size) for size in sizes)
        noted = self._own(run_id, "layout")
        try:
            layout = ParameterLayout.from_json(json.dumps(noted)) if noted else _derived(counts, self._task)
        except ValueError as error:
            raise BadRunError(f"{folder / 'runs.json'}: {error}") from error
        if layout.sizes != counts:
            raise OtherLayoutError(
                f"the tensors of run {run_id!r} in {folder} have the sizes {list(counts)}, those of the network of "
                f"{self._task or 'its layout'} {list(layout.sizes)}: give the task that the runs have"
            )
        return layout


class LmdbWriter:
    """Writes runs as folders of G.pt, each of which appears whole or not at all.

    Args:
        path: Folder of the run folders.
        layout: Layout of all runs; buffers beside the vector are not stored.
        run_ids: All runs that will be there. Those named by six digits keep their name, others get free numbers.
        task: Name of the task, for runs with a layout that sizes alone do not give.
    """

    def __init__(self, path: Path, layout: ParameterLayout, run_ids: Sequence[str], task: str | None = None) -> None:
        self.path = path
        self._layout = ParameterLayout(layout.tensors, (), layout.aliases)
        own = {run_id for run_id in run_ids if re.fullmatch(r"\d{6}", run_id)}
        free = (name for name in map("{:06d}".format, itertools.count()) if name not in own)
        self._names = {run_id: run_id if run_id in own else next(free) for run_id in run_ids}
        self._noted = {"task": task} if len(own) == len(run_ids) else {"task": task, "id": True}

    def holds(self, run_id: str) -> bool:
        """Whether a run is in the folder; ``ValueError`` if another one has its place."""
        folder = self.path / self._names[run_id]
        if not (folder / "DONE.txt").exists():
            return False
        there = read_object(folder / "runs.json").get("zoo", {}).get("id") if "id" in self._noted else run_id
        if there != run_id:
            raise ValueError(f"{folder} holds run {there!r}, run {run_id!r} was to go there: choose another target")
        return True

    def flush(self) -> None:
        """Every run is written at once."""

    def write(self, run: Run) -> None:
        """Write one run."""
        name, sizes = self._names[run.id], np.array(self._layout.sizes)
        if (sizes.astype("<f4") != sizes).any():
            raise ValueError(f"tensors of {sizes.max()} numbers do not fit the format, which keeps sizes as float32")
        keys, record = _written(run, name, self._layout, self._noted)
        pages = len(keys) * (4 * self._layout.size // 4096 + 16)
        with atomic_folder(self.path / name) as folder:
            try:
                with lmdb.open(str(folder), map_size=2 * 4096 * pages + 2**20, sync=False) as environment:
                    self._put(environment, run, record["checkpoints"])
            except lmdb.Error as error:
                raise OSError(f"cannot write {self.path / name}: {error}") from error
            (folder / "runs.json").write_text(json.dumps(record, indent=2, sort_keys=True))
            (folder / "DONE.txt").touch()

    def _put(self, environment: lmdb.Environment, run: Run, rows: Mapping[str, Mapping[str, float]]) -> None:
        sizes = np.array(self._layout.sizes, "<f4").tobytes()
        for (key, row), vector in zip(rows.items(), run.params, strict=True):
            with environment.begin(write=True) as transaction:  # one for each, or else memory holds the run
                transaction.put(key.encode(), vector.float().numpy().astype("<f4").tobytes())
                transaction.put(f"{key}_arch".encode(), sizes)
                if "train_ret" in row:
                    transaction.put(f"{key}_train_ret".encode(), np.array([row["train_ret"]], "<f4").tobytes())


def _names(folder: str) -> list[str]:
    return folder.split("_") if re.fullmatch(r"\d+(_\d+)+", folder) else [folder]


def _layout_of(shapes: Mapping[str, tuple[int, ...]]) -> ParameterLayout:
    return ParameterLayout.from_state_dict({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})


@lru_cache(maxsize=16)
def _derived(sizes: tuple[int, ...], task: str | None) -> ParameterLayout:
    """Layout of a task's network, or else that of tensors of these sizes."""
    if task is not None:
        return ParameterLayout.from_module(get_task(task).constructor())
    published = (layout for layout in map(_layout_of, _PUBLISHED.values()) if layout.sizes == sizes)
    return next(published, None) or _layout_of({f"tensor{i}": (size,) for i, size in enumerate(sizes)})


def _steps(keys: Sequence[str], name: str, epoch: int | None) -> list[int]:
    """Steps of checkpoints by their keys; 0, 1, 2, ... where keys are not as published."""
    steps = []
    for key in keys:
        match = re.fullmatch(r"(?:ep(\d{1,9})_)?it(\d{1,9})\.pt", key.removeprefix(f"{name}/"))
        if match is None:
            return list(range(len(keys)))
        passes, iteration = int(match[1] or 0), int(match[2])
        if epoch is not None and passes and iteration > epoch:
            raise ValueError(f"{key!r} is beyond the end of an epoch of {epoch} steps: give the right number of steps")
        steps.append(passes * (epoch or _LONG_EPOCH) + iteration)
    return steps if rising(steps) else list(range(len(keys)))


def _written(
    run: Run, name: str, layout: ParameterLayout, noted: Mapping[str, object]
) -> tuple[list[str], dict[str, Any]]:
    """Keys of the checkpoints, and the record of a run, as they are written."""
    origin: Any = run.config.get(_ORIGIN, {})
    own = measured(run.metrics)
    renamed = own.keys() & _RENAMED.keys() if not own.keys() & set(_RENAMED.values()) else set()
    columns = {_RENAMED[metric] if metric in renamed else metric: column for metric, column in own.items()}
    steps = [int(step) for step in run.steps]
    keys = _keys(name, steps, origin.get("steps_per_epoch"), "train_ret" in columns)
    keys = [f"{name}/{key.partition('/')[2]}" for key in origin.get("keys", keys)]
    if keys != sorted(keys):
        raise ValueError(f"run {run.id!r}: steps up to {steps[-1]} do not fit the keys of the format")
    if "record" in origin and set(keys) == origin["record"]["checkpoints"].keys():
        return keys, origin["record"]
    low, high = (bound.item() for bound in run.params.aminmax())
    shown = {metric: column for metric, column in columns.items() if not metric.startswith("avg_train_")}
    best = {f"optimal_{metric.removeprefix('avg_')}": _best(metric, column) for metric, column in shown.items()}
    rows = {key: {metric: column[i] for metric, column in columns.items()} for i, key in enumerate(keys)}
    metadata = {**shown, **best, "min_parameter_val": low, "max_parameter_val": high} | origin.get("metadata", {})
    other = layout != _derived(layout.sizes, origin.get("task"))
    beside = {
        "id": noted.get("id") and run.id,
        "config": {key: value for key, value in run.config.items() if key != _ORIGIN},
        "layout": json.loads(layout.to_json()) if other else None,
        "task": noted.get("task") if other else None,
        "renamed": bool(renamed),
    }
    beside = {entry: value for entry, value in beside.items() if value}
    return keys, {"checkpoints": rows, "metadata": metadata} | ({"zoo": beside} if beside else {})


def _keys(name: str, steps: Sequence[int], epoch: int | None, single: bool) -> list[str]:
    if single and steps[-1] < _LONG_EPOCH:
        return [f"{name}/it{step:05d}.pt" for step in steps]
    pairs = [divmod(step, _LONG_EPOCH) if epoch is None else divmod(step - 1, epoch) for step in steps]
    first = 0 if epoch is None else 1
    return [
        f"{name}/ep{passes:03d}_it{rest + first:05d}.pt" if step else f"{name}/ep000_it00000.pt"
        for step, (passes, rest) in zip(steps, pairs, strict=True)
    ]


def _best(metric: str, column: Sequence[float]) -> float:
    return (np.nanmax if metric.endswith(_HIGHER_IS_BETTER) else np.nanmin)(column).item()


def _with(run: Run, origin: dict[str, object]) -> Run:
    return replace(run, config={**run.config, _ORIGIN: dict(origin)}) if origin else run


def _same(a: object, b: object) -> bool:
    return json.dumps(a, sort_keys=True) == json.dumps(b, sort_keys=True)


_open: OrderedDict[str, lmdb.Environment] = OrderedDict()


def _environment(folder: Path) -> lmdb.Environment:
    """The environment in a folder, shared in this process (LMDB refuses to open one twice) and open for a while."""
    place = os.path.realpath(folder)
    if place not in _open:
        while len(_open) >= _MOST_OPEN:
            _open.popitem(last=False)[1].close()
        size = (folder / "data.mdb").stat().st_size
        if size == 0:
            raise BadRunError(f"{folder / 'data.mdb'} is empty: restore it from another copy")
        _open[place] = lmdb.open(place, readonly=True, lock=False, readahead=False, create=False)
        if size < (_open[place].info()["last_pgno"] + 1) * _open[place].stat()["psize"]:
            _open.pop(place).close()  # reading beyond the end would end the process
            raise BadRunError(f"{folder / 'data.mdb'} is truncated: restore it from another copy")
    _open.move_to_end(place)
    return _open[place]


@contextmanager
def _records(folder: Path) -> Iterator[Callable[[str], Any]]:
    """A function that looks a record up, as a view that holds until the block ends."""
    try:
        with _environment(folder).begin(buffers=True) as transaction:
            yield lambda key: transaction.get(key.encode())
    except _DAMAGE as error:
        raise BadRunError(f"{folder / 'data.mdb'} is damaged ({error}): restore it from another copy") from error
    except lmdb.Error as error:
        raise OSError(f"cannot read {folder / 'data.mdb'}: {error}") from error
