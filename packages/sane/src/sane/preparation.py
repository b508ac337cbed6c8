"""Making a zoo ready for training: splits, alignment and normalisation, without a copy of the weights.

What is stored in one small file are permutations, one row for each run (or checkpoint), statistics and the lists of
checkpoints; the weights stay in the memory-mapped zoo and are permuted, normalised and cut when they are read.

Shapes: ``n`` checkpoints of ``d`` numbers, ``s`` units in a group, ``k`` tokens of ``i`` scalars.
"""

import dataclasses
import hashlib
import json
import math
import os
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.files import TensorFile, write_tensors
from zoo_common.index import SPLITS
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import get_task
from zoo_common.tokens import ChannelTokenizer
from zoo_common.zoo import Zoo

from sane.networks import build_network, input_shape
from sane.normalization import Mode, Normalization, measure
from sane.progress import track
from sane.properties import read_property

_KIND = "sane-preparation"
_TOGETHER = 2**25
"""Numbers of weights that are worked on at once."""
_MARK = 1024
"""Numbers at each end of a checkpoint, and all over it, that tell a run from others."""


@dataclass(frozen=True)
class PrepareConfig:
    """What is taken from a zoo, and how it is brought to one form."""

    steps: tuple[int, ...] = ()
    """Steps (epochs, in imported trials) of the checkpoints to take; default: all."""
    token_size: int | Literal["auto", "legacy-auto"] = "auto"
    """Scalars in a token; auto: the longest row, legacy-auto: the original's choice."""
    ignore_bn: bool = False
    """Leave batch norms out of the tokens."""
    normalization: Mode = "standardize"
    align: Literal["last", "each", "none"] = "last"
    """Permute hidden units towards the reference: by each run's last checkpoint (as published), or each checkpoint."""
    split: Literal["zoo", "published"] = "zoo"
    """published: names sorted, shuffled by Python's generator with seed 42, and cut by ``fractions``."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Training, validation and test runs, for split=published."""
    max_runs: int = 0
    """Take at most this many runs; 0: all."""
    max_abs: float = math.inf
    """A checkpoint with a larger value is left out (published: 15 to 25,000), like one that is not finite."""
    min_quantile: float = 0.0
    """Keep the runs whose last test_acc is at least this quantile of all runs."""
    legacy_double_bn: bool = False
    """Normalise running statistics twice, as published files with batch norms need it."""

    def __post_init__(self) -> None:
        """Reject what cannot be done."""
        if isinstance(self.token_size, int) and self.token_size < 1:
            raise ValueError(f"token_size must be at least 1, auto or legacy-auto, got {self.token_size}")
        if min(self.fractions) < 0 or not abs(sum(self.fractions) - 1) <= 1e-8:  # NaN
            raise ValueError(f"fractions must be three that sum to 1, got {self.fractions}")
        if not 0 <= self.min_quantile < 1:
            raise ValueError(f"min_quantile must be from 0 to below 1, got {self.min_quantile}")
        if self.max_runs < 0 or not self.max_abs > 0:
            raise ValueError(
                f"max_runs must not be negative and max_abs must be positive, got {self.max_runs} and {self.max_abs}"
            )


class Samples(NamedTuple):
    """Checkpoints of a split, (n,) int64 each."""

    runs: np.ndarray
    """Index of the run in the zoo."""
    checkpoints: np.ndarray
    """Index within the run."""
    rows: np.ndarray
    """Row of the table of permutations."""


class Prepared:
    """A zoo with what was found out about it; gives aligned, normalised checkpoints and their tokens."""

    def __init__(
        self,
        zoo: Zoo,
        config: PrepareConfig,
        tokenizer: ChannelTokenizer,
        normalization: Normalization,
        samples: Mapping[str, Samples],
        permutations: Sequence[Tensor],
        reference: Tensor,
        dropped: Mapping[str, int],
    ) -> None:
        """Use :func:`prepare` or :func:`open_prepared`."""
        self.zoo, self.config, self.tokenizer, self.normalization = zoo, config, tokenizer, normalization
        self.samples, self.permutations, self.reference = dict(samples), list(permutations), reference
        self.dropped = dict(dropped)
        """Reason -> checkpoints left out."""

    @cached_property
    def symmetry(self) -> Symmetry:
        """Permutations of hidden units of the zoo's network."""
        return symmetry_of(self.zoo)

    @property
    def identity(self) -> str:
        """SHA-256 of what a training sees: tokens, statistics, checkpoints and settings."""
        seen = [self.zoo.layout.id, self.tokenizer.token_size, self.tokenizer.skipped, self.normalization.to_document()]
        taken = [[self.zoo.run_ids[run] for run in s.runs] + s.checkpoints.tolist() for s in self.samples.values()]
        return hashlib.sha256(json.dumps([seen, taken, str(self.config)]).encode()).hexdigest()

    def marks(self, split: str) -> list[str]:
        """What tells the runs of a split from others: digests of parts of their last checkpoints.

        Ends and places all over a checkpoint take part: runs may share most of their layers, as after a transfer.
        """
        size = self.zoo.layout.size
        ends = np.r_[: min(_MARK, size), max(0, size - _MARK) : size]
        places = torch.from_numpy(np.r_[ends, np.linspace(0, size - 1, _MARK).astype(np.int64)])
        runs = np.unique(self.samples[split].runs).tolist()
        last = [self.zoo.params[run, len(self.zoo.steps[run]) - 1][places].float().numpy() for run in runs]
        return sorted(hashlib.blake2b(vector.tobytes(), digest_size=8).hexdigest() for vector in last)

    @property
    def max_positions(self) -> tuple[int, int, int]:
        """Largest position of each column, plus one."""
        first, layer, channel = (int(column) + 1 for column in self.tokenizer.positions.amax(0))
        return first, layer, channel

    def vectors(self, split: str, index: np.ndarray | slice) -> Tensor:
        """Aligned checkpoints of a split, (n, d) float32, not normalised."""
        samples = self.samples[split]
        vectors = self.zoo.params.gather(samples.runs[index], samples.checkpoints[index])
        if self.config.align == "none" or not self.permutations:
            return vectors
        rows = torch.from_numpy(samples.rows[index])
        return self.symmetry.apply(vectors, [table[rows].long() for table in self.permutations])

    def blocks(self, split: str, limit: int | None = None) -> Iterator[tuple[np.ndarray, Tensor]]:
        """The aligned checkpoints of a split in blocks that fit memory, with their places; at most ``limit``, spread evenly."""
        count = len(self.samples[split].runs)
        places = np.linspace(0, count - 1, count if limit is None else min(limit, count)).astype(np.int64)
        step = max(1, _TOGETHER // self.tokenizer.layout.size)
        blocks = [places[start : start + step] for start in range(0, len(places), step)]
        for place in track(blocks, f"{split} checkpoints"):
            yield place, self.vectors(split, place)

    def tokens(self, vectors: Tensor) -> Tensor:
        """Tokens (n, k, i) of checkpoints as they are in the zoo: normalised and cut."""
        return self.tokenizer.tokenize(self.normalization.normalize(vectors))

    def align_with(self, reference: Tensor, align: str, *, quiet: bool = True) -> None:
        """Align the checkpoints with a reference (d,) from elsewhere, that of a model; not at all if ``align`` is none."""
        self.reference, self.permutations = reference, []
        if align == "none" or self.config.align == "none":
            self.config = dataclasses.replace(self.config, align="none" if align == "none" else "last")
        if align != "none":
            self.permutations = _match(self, quiet)

    def measured(self, split: str) -> Normalization:
        """Normalisation with the statistics of a split (the original took each split's own; ours are of ``train``)."""
        samples = self.samples[split]
        blocks = (
            self.zoo.params.gather(samples.runs[place], samples.checkpoints[place])
            for place in _places(len(samples.runs), self.zoo.layout.size)
        )
        config = self.config
        return measure(blocks, self.tokenizer, config.normalization, legacy_double_bn=config.legacy_double_bn)

    def properties(self, split: str, name: str) -> np.ndarray:
        """Values of a property for the checkpoints of a split, (n,) float64."""
        return read_property(self.zoo, name, self.samples[split].runs, self.samples[split].checkpoints)

    def save(self, path: str | Path) -> None:
        """Write everything but the weights, atomically."""
        tensors = {f"permutation/{g}": table for g, table in enumerate(self.permutations)}
        for split, samples in self.samples.items():
            if len(samples.runs):  # the format has no empty tensors
                tensors |= {f"{split}/{n}": torch.tensor(v) for n, v in samples._asdict().items() if n != "runs"}
        document = {
            "zoo": str(self.zoo.path.absolute()),
            "from_here": os.path.relpath(self.zoo.path, Path(path).parent),
            "layout": self.zoo.layout.id,
            "config": {**dataclasses.asdict(self.config), "max_abs": str(self.config.max_abs)},
            "token_size": self.tokenizer.token_size,
            "skipped": list(self.tokenizer.skipped),
            "runs": {split: [self.zoo.run_ids[run] for run in s.runs] for split, s in self.samples.items()},
            "normalization": self.normalization.to_document(),
            "dropped": self.dropped,
        }
        write_tensors(path, _KIND, tensors, document)


def open_prepared(path: str | Path, zoo: Zoo | str | Path | None = None) -> Prepared:
    """Read a file of :meth:`Prepared.save`.

    Args:
        path: The file.
        zoo: Where the zoo is, if it was moved.

    Raises:
        FileNotFoundError: The file or the zoo is not there.
        ValueError: The file is damaged, or belongs to another zoo.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}: give the one that `sane preprocess` has written")
    file = TensorFile(path, _KIND)
    document, tensors = file.metadata, file.load()
    places = [Path(document["zoo"]), Path(path).parent / document.get("from_here", document["zoo"])]  # moved together
    if zoo is None and not (found := [place for place in places if place.is_dir()]):
        raise FileNotFoundError(
            f"the zoo of {path} is not in {places[0]}: move it back or prepare it again; pretraining also takes zoo=FOLDER"
        )
    zoo = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo if zoo is not None else found[0])
    if zoo.layout.id != document["layout"]:
        zoo = zoo.with_layout(document["layout"])
    settings = document["config"]
    config = PrepareConfig(
        **{
            **settings,
            "max_abs": float(settings["max_abs"]),
            "steps": tuple(settings["steps"]),
            "fractions": tuple(settings["fractions"]),
        }
    )
    tokenizer = ChannelTokenizer(zoo.layout, document["token_size"], tuple(document["skipped"]))
    normalization = Normalization.from_document(
        document["normalization"], tokenizer, legacy_double_bn=config.legacy_double_bn
    )
    if missing := {run for runs in document["runs"].values() for run in runs}.difference(zoo.run_ids):
        raise ValueError(
            f"the zoo {zoo.path} lacks {len(missing)} runs of {path}, as {min(missing)}: restore its shards, or prepare it again"
        )
    empty = torch.zeros(0, dtype=torch.int64)
    samples = {
        split: Samples(
            np.array([zoo.index(run) for run in runs], np.int64),
            tensors.get(f"{split}/checkpoints", empty).numpy(),
            tensors.get(f"{split}/rows", empty).numpy(),
        )
        for split, runs in document["runs"].items()
    }
    tables = [tensors[f"permutation/{g}"] for g in range(sum(name.startswith("permutation/") for name in tensors))]
    reference = _reference(zoo, samples["train"])
    return Prepared(zoo, config, tokenizer, normalization, samples, tables, reference, document["dropped"])


def prepare(zoo: Zoo | str | Path, config: PrepareConfig | None = None, *, quiet: bool = True) -> Prepared:
    """Split, check, align and measure a zoo.

    Args:
        zoo: The zoo, or its folder.
        config: What to take, and how.
        quiet: No progress bar.

    Raises:
        FileNotFoundError: There is no zoo.
        ValueError: No training checkpoint is left, the network is not known (see :func:`network_of`), or a setting does
            not fit.
    """
    zoo = zoo if isinstance(zoo, Zoo) else Zoo.open(zoo)
    config = config or PrepareConfig()
    tokenizer = _tokenizer(zoo, config)
    chosen = _good_runs(zoo, split_runs(zoo, config), config)
    dropped: dict[str, int] = {}
    samples: dict[str, Samples] = {}
    count = rows = 0
    with tqdm(total=sum(map(len, chosen.values())), desc="check", disable=quiet, leave=False, delay=1) as bar:
        for split, runs in chosen.items():
            found = []
            for run in runs.tolist():
                kept = _good_checkpoints(zoo, run, config, dropped)
                bar.update()
                if len(kept):
                    row = np.full(len(kept), count) if config.align != "each" else rows + np.arange(len(kept))
                    found.append((np.full(len(kept), run), kept, row))
                    count, rows = count + 1, rows + len(kept)
            columns = zip(*found, strict=True) if found else ((np.zeros(0, np.int64),),) * 3
            samples[split] = Samples(*(np.concatenate(column).astype(np.int64) for column in columns))
    if not len(samples["train"].runs):
        raise ValueError(
            f"no training checkpoint of {zoo.path} is left"
            + "".join(f"; {number} {reason}" for reason, number in dropped.items())
            + ": choose other steps, a larger max_abs, more runs or split=published"
        )
    unmeasured = Normalization("none", {}, zoo.layout, tokenizer.skipped)
    prepared = Prepared(zoo, config, tokenizer, unmeasured, samples, [], _reference(zoo, samples["train"]), dropped)
    if config.align != "none":
        prepared.permutations = _match(prepared, quiet)
    prepared.normalization = prepared.measured("train")
    return prepared


def split_runs(zoo: Zoo, config: PrepareConfig) -> dict[str, np.ndarray]:
    """Indices of the runs of each split, at most ``max_runs`` in all."""
    if config.split == "published":
        names = sorted(zoo.run_ids)
        random.Random(42).shuffle(names)
        order = np.array([zoo.index(name) for name in names[: config.max_runs or None]], np.int64)
        first = int(config.fractions[0] * len(order))
        second = first + int(config.fractions[1] * len(order))
        return dict(zip(SPLITS, np.split(order, [first, second]), strict=True))
    kept = set(range(config.max_runs or len(zoo)))
    return {name: np.array([run for run in zoo.split(name) if run in kept], np.int64) for name in SPLITS}


def network_of(zoo: Zoo) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Constructor of the zoo's networks, and the shape of one input.

    Raises:
        ValueError: The zoo names no task, and its runs have no ``model::type``.
    """
    return known_network(facts_of(zoo), f"the zoo {zoo.path}")


def facts_of(zoo: Zoo) -> dict[str, Any]:
    """What a zoo tells about its networks: the name of the task, or the configuration of a published type and the data set."""
    if zoo.task is not None:
        return {"task": zoo.task}
    config = zoo.runs[0].config if len(zoo) else {}
    facts: dict[str, Any] = {"network": {key: value for key, value in config.items() if key.startswith("model::")}}
    return facts | ({"data": config["dataset::name"]} if "dataset::name" in config else {})


def known_network(facts: Mapping[str, Any], what: str) -> tuple[Callable[[], nn.Module], tuple[int, ...]]:
    """Constructor and input shape from the facts of :func:`facts_of`; ``ValueError`` if they do not say it."""
    if facts.get("task"):
        task = get_task(facts["task"])
        return task.constructor, task.input_shape
    config = facts.get("network", {})
    if "model::type" in config:
        plain = {key: value for key, value in config.items() if key != "model::init_type"}
        return (lambda: build_network(plain)), input_shape(plain)
    raise ValueError(
        f"how the networks of {what} compute is not known (no task, and no model::type in its runs): "
        "prepare the zoo with align=none"
    )


def symmetry_of(zoo: Zoo) -> Symmetry:
    """Symmetry of the zoo's network.

    Raises:
        ValueError: The network is not known, or is not that of the zoo.
    """
    constructor, shape = network_of(zoo)
    with torch.random.fork_rng(devices=[]):
        symmetry = Symmetry.from_module(constructor().eval(), torch.zeros(2, *shape))
    if symmetry.layout.names != zoo.layout.names or symmetry.layout.shapes != zoo.layout.shapes:
        raise ValueError(f"the network of the zoo {zoo.path} has other tensors than its checkpoints")
    return symmetry


def _tokenizer(zoo: Zoo, config: PrepareConfig) -> ChannelTokenizer:
    try:
        constructor, _ = network_of(zoo)
        with torch.device("meta"):
            found = ChannelTokenizer.from_module(constructor(), config.token_size, config.ignore_bn)
        if found.layout.names == zoo.layout.names and found.layout.shapes == zoo.layout.shapes:
            return ChannelTokenizer(zoo.layout, found.token_size, found.skipped)
    except ValueError:
        if config.align != "none":
            raise
    return ChannelTokenizer.from_layout(zoo.layout, config.token_size, config.ignore_bn)


def _good_runs(zoo: Zoo, chosen: Mapping[str, np.ndarray], config: PrepareConfig) -> dict[str, np.ndarray]:
    if config.min_quantile == 0:
        return dict(chosen)
    everyone = np.concatenate(list(chosen.values()))
    values = read_property(zoo, "test_acc", everyone, np.full(len(everyone), -1))
    least = np.nanquantile(values, config.min_quantile)
    good = set(everyone[values >= least].tolist())
    return {split: np.array([run for run in runs.tolist() if run in good], np.int64) for split, runs in chosen.items()}


def _good_checkpoints(zoo: Zoo, run: int, config: PrepareConfig, dropped: dict[str, int]) -> np.ndarray:
    """Indices of the checkpoints of a run that can be used; the others are counted by reason."""
    steps = np.asarray(zoo.steps[run])
    index = np.flatnonzero(np.isin(steps, config.steps)) if config.steps else np.arange(len(steps))
    if not len(index):
        return index
    vectors = zoo.params[run]  # mapped, not copied
    low, high = (bound.float().numpy()[index] for bound in vectors.aminmax(dim=1))
    finite = np.isfinite(low) & np.isfinite(high)
    small = np.maximum(-low, high) <= config.max_abs
    for reason, bad in (("not finite", ~finite), (f"above {config.max_abs:g}", finite & ~small)):
        if bad.any():
            dropped[reason] = dropped.get(reason, 0) + int(bad.sum())
    return index[finite & small]


def _reference(zoo: Zoo, train: Samples) -> Tensor:
    """The last checkpoint taken of the first training run (d,)."""
    last = np.flatnonzero(train.runs == train.runs[0])[-1]
    return zoo.params[int(train.runs[0]), int(train.checkpoints[last])].float().clone()


def _match(prepared: Prepared, quiet: bool) -> list[Tensor]:
    """Permutations (rows, s) of every group towards the reference, as small integers."""
    samples, zoo = list(prepared.samples.values()), prepared.zoo
    runs, checkpoints, rows = (np.concatenate(column) for column in zip(*samples, strict=True))
    _, first_from_behind = np.unique(rows[::-1], return_index=True)
    pick = len(rows) - 1 - first_from_behind  # the last checkpoint of every row of the table
    symmetry, parts = prepared.symmetry, []
    with tqdm(total=len(pick), desc="align", disable=quiet, leave=False, delay=1) as bar:
        for place in _places(len(pick), zoo.layout.size):
            vectors = zoo.params.gather(runs[pick[place]], checkpoints[pick[place]])
            parts.append(symmetry.match(vectors, prepared.reference))
            bar.update(len(vectors))
    small = [torch.int16 if group.size <= 2**15 else torch.int32 for group in symmetry.groups]
    return [torch.cat(tables).to(dtype) for dtype, *tables in zip(small, *parts, strict=True)]


def _places(count: int, size: int) -> list[slice]:
    step = max(1, _TOGETHER // size)
    return [slice(start, start + step) for start in range(0, count, step)]
