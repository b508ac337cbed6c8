"""Checkpoint datasets in the published format, read where they lie, and the published order of splits and items.

Shapes: R runs, C checkpoints of a run, D parameters.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm
from zoo_common.formats import FORMATS, detect
from zoo_common.formats.source import BadRunError, is_number
from zoo_common.index import Indices, Params
from zoo_common.layout import ParameterLayout
from zoo_common.shard import Shard
from zoo_common.statistics import Filtered
from zoo_common.symmetry import Symmetry
from zoo_common.zoo import Zoo

from gpt_diffusion.config import DatasetConfig
from gpt_diffusion.dataset import pairs_per_epoch
from gpt_diffusion.downloads import dataset_name, find_checkpoints
from gpt_diffusion.normalization import Normalizer

_PARTS = ("train", "val", "test")
_SYNONYMS = {f"{part}_loss": f"avg_{part}_loss" for part in _PARTS}
_SYNONYMS |= {f"{part}_error": f"avg_{part}_err" for part in _PARTS}
_SYNONYMS |= {published: own for own, published in _SYNONYMS.items()}


def open_runs(data: DatasetConfig, path: str | Path | None = None) -> Zoo:
    """Open the folder of a configuration: a zoo, or runs in the published format; a published data set is fetched.

    Args:
        data: Its ``path``, ``name``, ``download`` and ``verify_done`` count.
        path: Another folder.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It holds something else, or runs of another network.
        ImportError: The extra ``lmdb`` is missing.
    """
    folder = Path(data.path if path is None else path)
    if not folder.exists() and data.download and dataset_name(folder):
        find_checkpoints(folder)
    if (folder / "zoo.json").exists() or not folder.is_dir() or not any(folder.iterdir()):
        return Zoo.open(folder)
    kind = detect(folder)
    if kind != "gpt":
        raise ValueError(f"{folder} holds {FORMATS[kind]}: convert it with `gpt-diffusion import`")
    return PublishedZoo(folder, task=data.name, verify_done=data.verify_done)


def split_runs(zoo: Zoo, data: DatasetConfig, split: str) -> np.ndarray:
    """Indices of the runs of a split, by the configuration's rule.

    Raises:
        ValueError: As many test runs as runs, or more.
    """
    if data.split == "zoo" or (data.split == "auto" and not isinstance(zoo, PublishedZoo)):
        return zoo.split(split)
    first_test = len(zoo) - data.num_test_runs
    if first_test < 1 or data.num_test_runs < 0:
        raise ValueError(
            f"dataset.num_test_runs ({data.num_test_runs}) must be at least 0 and below the number of runs in "
            f"{zoo.path} ({len(zoo)})"
        )
    spans = {"train": range(first_test), "validation": range(0), "test": range(first_test, len(zoo))}
    return np.array(spans[split], dtype=np.int64)


def find_metric(zoo: Zoo, name: str) -> str:
    """The zoo's name of a metric given by its own or its published name (``test_error``, ``avg_test_err``).

    Raises:
        ValueError: The zoo has no such metric.
    """
    for known in (name, _SYNONYMS.get(name)):
        if known in zoo.metrics:
            return str(known)
    has = ", ".join(zoo.metrics) or "none"
    raise ValueError(f"{zoo.path}: no metric {name!r}; the zoo has {has}: set dataset.train_metric to one of them")


class PublishedZoo(Zoo):
    """Runs in the published format, read only, seen as a zoo; a checkpoint is read when it is asked for.

    Opening reads every ``runs.json``. Runs without one are passed over, with a warning. Memory holds the metrics and
    the names of the checkpoints, about 60 bytes for each.

    Args:
        path: Folder of the runs.
        task: Name of the task, where the sizes of the tensors do not tell it.
        verify_done: Pass over folders without ``DONE.txt``.

    Raises:
        ValueError: There are no runs, or the first one is not of the task's network.
        ImportError: The extra ``lmdb`` is missing.
    """

    def __init__(self, path: str | Path, *, task: str | None = None, verify_done: bool = False) -> None:
        from zoo_common.formats.lmdb_runs import LmdbRuns

        self.source = LmdbRuns(Path(path), task=task, verify_done=verify_done)
        if not self.source.run_ids:
            raise ValueError(f"{path} holds no finished runs in the published format")
        layout = self.source.layout
        document = {"task": self.source.task, "creator": "G.pt", "split": (1.0, 0.0, 0.0), "dtype": "float32"}
        super().__init__(Path(path), document | {"layout": layout.id, "attributes": {}}, layout)
        self._records = _Records(self.source, layout)
        self.shards = {self._records.name: self._records}

    def refresh(self) -> None:
        """The runs are those that were there when the folder was opened."""

    @property
    def params(self) -> "PublishedParams":
        """Parameter vectors by run and checkpoint."""
        return PublishedParams(self)

    def weights(self, run: int | str, checkpoint: int) -> dict[str, Tensor]:
        """Parameters of one checkpoint by name."""
        return self.layout.unflatten(self.params[run, checkpoint])

    def keys(self, run: int) -> list[str]:
        """Names of the records of a run, in order."""
        return [name.decode() for name in self._records.keys[run]]

    def ranges(self, runs: Indices) -> np.ndarray:
        """Smallest and largest parameter of each run (n, 2): those of ``runs.json``, or else read."""
        table = self._records.ranges
        for run in np.asarray(runs):
            if not np.isfinite(table[run]).all():
                table[run] = [bound.item() for bound in self.params[int(run)].aminmax()]
        return table[np.asarray(runs)]

    def filter(self, max_abs: float = 10.0) -> Filtered:
        """As :meth:`zoo_common.zoo.Zoo.filter`, from the ranges that ``runs.json`` tells."""
        low, high = self.ranges(range(len(self))).T
        finite, small = np.isfinite(low) & np.isfinite(high), np.maximum(-low, high) <= max_abs
        dropped = {"non-finite": int((~finite).sum()), f"above {max_abs:g}": int((finite & ~small).sum())}
        return Filtered(np.flatnonzero(finite & small), dropped)


class PublishedParams(Params):
    """Parameter vectors of a :class:`PublishedZoo`: ``params[run]`` (C, D), ``params[run, checkpoint]`` (D,)."""

    def __init__(self, zoo: PublishedZoo) -> None:
        super().__init__(zoo._index, zoo.layout.size)
        self._zoo = zoo

    def __getitem__(self, key: int | str | tuple[int | str, int]) -> Tensor:
        """Read a run, or one checkpoint (may be negative)."""
        run = self._index.position(key[0] if isinstance(key, tuple) else key)
        if isinstance(key, tuple):
            return self.gather([run], [key[1]])[0]
        return self._read(run, range(int(self._index.lengths[run])))

    def gather(self, runs: Indices, checkpoints: Indices) -> Tensor:
        """Vectors of (run, checkpoint) pairs, (B, D) float32; every run that is touched is opened once."""
        rows = self._index.rows(runs, checkpoints)
        owners = np.searchsorted(self._index.starts, rows, side="right") - 1
        out = torch.empty(len(rows), self._size)
        for run in np.unique(owners):
            entries = np.flatnonzero(owners == run)
            out[torch.from_numpy(entries)] = self._read(int(run), rows[entries] - self._index.starts[run])
        return out

    def parts(self, runs: Indices, checkpoints: Indices) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All in one part, read."""
        everything = torch.arange(len(runs))
        yield everything, self.gather(runs, checkpoints), everything

    def _read(self, run: int, checkpoints: Sequence[int] | np.ndarray) -> Tensor:
        keys = self._zoo._records.keys[run]
        return self._zoo.source.vectors(self._zoo.runs[run].id, [keys[i].decode() for i in checkpoints])


class _Records(Shard):
    """What the ``runs.json`` of all runs tell, in the form in which a zoo indexes its shards."""

    def __init__(self, source: Any, layout: ParameterLayout) -> None:  # noqa: ANN401 (LmdbRuns; LMDB is an extra)
        self.name, self.layout_id = "published", layout.id
        self.run_ids, self.keys = [], []
        ranges: list[np.ndarray] = []
        curves: list[dict[str, np.ndarray]] = []
        bad: list[str] = []
        for run_id in tqdm(source.run_ids, desc=f"open {source.path.name}", unit="run", delay=2, leave=False):
            try:
                record = source.record(run_id)
            except BadRunError as error:
                bad.append(str(error))
                continue
            keys = sorted(record["checkpoints"])
            metadata = record.get("metadata", {})
            self.run_ids.append(run_id)
            self.keys.append(np.array([key.encode() for key in keys]))
            rows = [record["checkpoints"][key] for key in keys]
            curves.append({name: _numbers(row.get(name) for row in rows) for name in set().union(*rows)})
            ranges.append(_numbers(metadata.get(f"{end}_parameter_val") for end in ("min", "max")))
        if bad:
            log = logging.getLogger(__name__)
            log.warning("%s: %d runs are passed over, the first: %s", source.path, len(bad), bad[0])
        self.configs = [{} for _ in self.run_ids]
        self.offsets = np.cumsum([0, *map(len, self.keys)])
        self.ranges = np.array(ranges).reshape(-1, 2)
        self._columns = {
            f"metrics/{name}": np.concatenate(
                [curve.get(name, np.full(len(keys), np.nan)) for curve, keys in zip(curves, self.keys, strict=True)]
            )
            for name in sorted(set().union(*curves))
        }

    @cached_property
    def metric_names(self) -> list[str]:
        """Metrics that any run has."""
        return [name.removeprefix("metrics/") for name in self._columns]

    def column(self, name: str) -> np.ndarray:
        """``step`` (the number of the checkpoint) or ``metrics/<metric>``, (N,)."""
        if name == "step":
            return np.concatenate([np.arange(len(keys)) for keys in self.keys])
        return self._columns[name]


def _numbers(values: Iterable[Any]) -> np.ndarray:
    return np.array([float(value) if is_number(value) else np.nan for value in values])


class Item(NamedTuple):
    """A training pair of the published dataset."""

    parameters_0: Tensor  # (D,) float32, normalised and permuted
    parameters_1: Tensor  # (D,) float32, the later one
    metric_0: float
    metric_1: float
    checkpoint_key_0: str
    checkpoint_key_1: str
    run_name: str
    step_spacing: int


class PublishedDataset(Dataset[Item]):
    """The items of a dataset one by one, drawn from torch's global generator in the published order.

    For comparisons with the original; :class:`gpt_diffusion.dataset.ParameterDataset` draws whole batches from the
    same distribution.

    Args:
        zoo: Runs in the published format.
        runs: Indices of the runs of the split.
        metric: Name of the metric that conditions.
        normalizer: Applied to both vectors.
        epoch_size: Items, rounded down to a multiple of the number of runs.
        min_spacing: Smallest distance of the two checkpoints.
        max_spacing: Largest one; None: from the first to the last checkpoint.
        augment: Its hidden units are permuted; the groups in the order of the layers.

    Raises:
        ValueError: No runs, or an epoch smaller than their number.
    """

    def __init__(
        self,
        zoo: PublishedZoo,
        runs: np.ndarray,
        *,
        metric: str,
        normalizer: Normalizer,
        epoch_size: int,
        min_spacing: int = 1,
        max_spacing: int | None = None,
        augment: Symmetry | None = None,
    ) -> None:
        self.zoo, self.runs, self.metric, self.normalizer = zoo, runs, metric, normalizer
        self.min_spacing, self.max_spacing, self.augment = min_spacing, max_spacing, augment
        self._length = pairs_per_epoch(len(runs), epoch_size)

    def __len__(self) -> int:
        """Items in an epoch."""
        return self._length

    def __getitem__(self, i: int) -> Item:
        """Item ``i`` belongs to run i modulo R: first the distance is drawn, then the start, then the permutations."""
        run = int(self.runs[i % len(self.runs)])
        count = self.zoo.runs[run].checkpoints
        longest = count - 1 if self.max_spacing is None else self.max_spacing
        spacing = int(torch.randint(self.min_spacing, longest + 1, ()))
        start = int(torch.randint(0, count - spacing, ()))
        pair = [start, start + spacing]
        first, second = self._permuted(self.normalizer.normalize(self.zoo.params.gather([run, run], pair)))
        before, after = self.zoo.metrics[self.metric][run][pair].tolist()
        keys = self.zoo.keys(run)
        return Item(first, second, before, after, keys[pair[0]], keys[pair[1]], self.zoo.runs[run].id, spacing)

    @property
    def weight_range(self) -> tuple[float, float]:
        """Smallest and largest parameter of the runs."""
        ranges = self.zoo.ranges(self.runs)
        return float(ranges[:, 0].min()), float(ranges[:, 1].max())

    def best_metric(self, minimize: bool) -> float:
        """Best metric of any checkpoint."""
        curves = np.concatenate([self.run_losses(i) for i in range(len(self.runs))])
        return float(np.nanmin(curves) if minimize else np.nanmax(curves))

    def run_losses(self, run: int) -> np.ndarray:
        """Metric of all checkpoints of a run (C,), the run counted in the split."""
        column: np.ndarray = self.zoo.metrics[self.metric][int(self.runs[run])]
        return column

    def run_network(self, run: int, checkpoint: int = 0, *, normalize: bool = True, augment: bool = False) -> Tensor:
        """One checkpoint (D,) of a run, the run counted in the split."""
        vector = self.zoo.params.gather([int(self.runs[run])], [checkpoint])
        vector = self.normalizer.normalize(vector) if normalize else vector
        return self._permuted(vector)[0] if augment else vector[0]

    def _permuted(self, vectors: Tensor) -> Tensor:
        if self.augment is None:
            return vectors
        once = [torch.randperm(group.size) for group in self.augment.groups]
        return self.augment.apply(vectors, [p.expand(len(vectors), -1) for p in once])
