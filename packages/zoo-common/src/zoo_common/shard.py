"""One file of a zoo: whole runs, written once and never changed.

Shapes: a shard holds R runs with N checkpoints in all, a run C checkpoints of D parameters. Tensors of the file:
``params`` (N, D) or the tensors of :mod:`zoo_common.coding`, ``step`` (N,) int64, ``offsets`` (R + 1,) int64 (run r has
the rows from ``offsets[r]`` to before ``offsets[r + 1]``), ``metrics/<metric>`` (N,) float64, ``buffers/<name>``
(N, ...) in their own dtype, ``checksums`` (R, T) int64: CRC-32 of a run's rows in each of the T tensors that have rows,
these by name. Header metadata: ``layout`` (id), ``runs`` (ids), ``configs``, ``storage`` and ``rounding``.
"""

import hashlib
import json
import re
import zlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo_common.coding import STORAGES, DeltaParams, Rounding, encode, key_bounds, rounding, row_blocks
from zoo_common.files import TensorFile, allocate, write_tensors
from zoo_common.layout import ParameterLayout

_KIND = "weightspace-zoo-shard"
_NAME = re.compile(r"[\w=+@,-][\w.=+@,-]{0,127}", re.ASCII)

Numbers = Tensor | np.ndarray | Sequence[float]


@dataclass(frozen=True)
class Run:
    """All checkpoints of one training, ready to be stored."""

    id: str
    """Unique in the zoo; up to 128 of the characters A-Z a-z 0-9 . _ - = + @ ,"""
    params: Tensor
    """(C, D) floating-point."""
    steps: Numbers
    """(C,) optimizer steps, rising."""
    metrics: Mapping[str, Numbers] = field(default_factory=dict)
    """Metric name to (C,) values; NaN where a metric was not measured."""
    config: Mapping[str, object] = field(default_factory=dict)
    """What made this run (seed, learning rate, ...), as JSON can hold it."""
    buffers: Mapping[str, Tensor] = field(default_factory=dict)
    """Buffers beside the vector, (C, *shape) each, in the layout's dtypes."""


def check_name(name: str, what: str) -> None:
    """Raise ``ValueError`` unless a run id or shard name can stand in a file name on every system."""
    if not _NAME.fullmatch(name):
        raise ValueError(f"{what} {name!r}: use 1 to 128 of the characters A-Z a-z 0-9 . _ - = + @ , (no leading dot)")


def write_shard(path: str | Path, layout: ParameterLayout, runs: Sequence[Run], storage: str) -> None:
    """Write runs to a shard file, atomically.

    Args:
        path: File to create or replace.
        layout: Layout of all runs.
        runs: At least one run; all with the same metrics.
        storage: How parameters are stored: float32, float16, bfloat16 or delta10.

    Raises:
        ValueError: A run does not fit the layout or the other runs, or a value does not fit ``storage``; the message
            names the run and the tensor.
    """
    for run in runs:
        _check_run(run, layout)
    if odd := [run.id for run in runs if run.metrics.keys() != runs[0].metrics.keys()]:
        raise ValueError(f"run {odd[0]!r}: metrics differ from those of run {runs[0].id!r}: {sorted(runs[0].metrics)}")
    offsets = np.cumsum([0, *(len(run.params) for run in runs)])
    tensors, lost = _params(Path(path).parent, layout, runs, offsets, storage)
    tensors["offsets"] = torch.from_numpy(offsets)
    tensors["step"] = torch.cat([torch.as_tensor(run.steps, dtype=torch.int64) for run in runs])
    for name in runs[0].metrics:
        values = [torch.as_tensor(run.metrics[name], dtype=torch.float64).cpu() for run in runs]
        tensors[f"metrics/{name}"] = torch.cat(values)
    for spec in layout.buffers:
        tensors[f"buffers/{spec.name}"] = torch.cat([run.buffers[spec.name].cpu() for run in runs])
    tensors["checksums"] = torch.tensor([_checksums(tensors[name], name, offsets) for name in _with_rows(tensors)]).T
    metadata = {"layout": layout.id, "runs": [run.id for run in runs], "configs": [dict(run.config) for run in runs]}
    write_tensors(path, _KIND, tensors, metadata | {"storage": storage, "rounding": asdict(lost)})


def _with_rows(names: Iterable[str]) -> list[str]:
    """Names of the tensors that have rows of every run, in the order of the columns of ``checksums``."""
    return sorted(set(names) - {"offsets", "checksums", "params/groups"})


def _checksums(tensor: Tensor, name: str, offsets: np.ndarray) -> list[int]:
    """CRC-32 of the rows of every run."""
    content = tensor.contiguous().flatten().view(torch.uint8).numpy()
    width = len(content) // len(tensor)
    bounds = width * (key_bounds(offsets) if name == "params/keys" else offsets)
    return [zlib.crc32(content[start:stop].data) for start, stop in pairwise(bounds)]


def _check_run(run: Run, layout: ParameterLayout) -> None:
    check_name(run.id, "run id")
    count = len(run.params) if run.params.ndim else 0
    if run.params.shape != (count, layout.size) or not count or not run.params.is_floating_point():
        found = f"{run.params.dtype} {tuple(run.params.shape)}"
        raise ValueError(f"run {run.id!r}: params must be floating-point (checkpoints, {layout.size}), got {found}")
    steps = torch.as_tensor(run.steps)
    if steps.shape != (count,) or steps.is_floating_point() or (steps.diff() <= 0).any():
        raise ValueError(f"run {run.id!r}: steps must be {count} rising integers, got {steps.tolist()}")
    for name, values in run.metrics.items():
        check_name(name, f"run {run.id!r}: metric")
        if (shape := tuple(torch.as_tensor(values).shape)) != (count,):
            raise ValueError(f"run {run.id!r}: metric {name!r} must have shape ({count},), got {shape}")
    expected = {spec.name: (spec.dtype, (count, *spec.shape)) for spec in layout.buffers}
    found_buffers = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in run.buffers.items()}
    if found_buffers != expected:
        raise ValueError(f"run {run.id!r}: buffers must be {expected}, got {found_buffers}")
    try:
        json.dumps(dict(run.config))
    except (TypeError, ValueError) as error:
        raise ValueError(f"run {run.id!r}: config cannot be stored as JSON: {error}") from error


def _params(
    folder: Path, layout: ParameterLayout, runs: Sequence[Run], offsets: np.ndarray, storage: str
) -> tuple[dict[str, Tensor], Rounding]:
    """The tensors that store the parameters, in bounded memory where each is one number, and what is lost."""
    if storage == "delta10":
        given = torch.cat([run.params.detach().cpu() for run in runs])
        tensors = encode(given, offsets, layout.sizes, storage)
        return tensors, rounding(given, DeltaParams(tensors, offsets))
    params, lost = allocate((int(offsets[-1]), layout.size), STORAGES[storage], folder), Rounding()
    for run, (start, stop) in zip(runs, pairwise(offsets), strict=True):
        lost += _store(run, params[start:stop], layout)
    return {"params": params}, lost


def _store(run: Run, out: Tensor, layout: ParameterLayout) -> Rounding:
    """Cast the parameters of a run into ``out`` (C, D); a finite value that becomes infinite is an error."""
    overflow, lost = torch.zeros(layout.size, dtype=torch.bool), Rounding()
    for rows in row_blocks(*out.shape):
        given = run.params[rows].detach().cpu()
        out[rows] = given
        lost += rounding(given, out[rows])
        if torch.finfo(out.dtype).max < torch.finfo(given.dtype).max:
            overflow |= (out[rows].isinf() & given.isfinite()).any(dim=0)
    if overflow.any():
        bad = [name for name, part in layout.unflatten(overflow).items() if part.any()]
        limit = torch.finfo(out.dtype).max
        raise ValueError(
            f"run {run.id!r}: {', '.join(map(repr, bad))} does not fit {out.dtype} (largest {limit:g}); "
            "create the zoo with dtype='float32' or 'bfloat16'"
        )
    return lost


class Shard:
    """A shard file, opened: header and run offsets are read and checked, the payload is mapped when asked for.

    Raises:
        ValueError: The file is truncated, damaged or not a shard.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a shard file."""
        self.file = TensorFile(path, _KIND)
        self.name = self.file.path.stem
        self.layout_id: str = self.file.entry("layout")
        self.run_ids: list[str] = self.file.entry("runs")
        self.offsets = self.file.array("offsets")
        """(R + 1,) first row of every run, and N."""
        if hashlib.sha256(self.offsets.data).hexdigest() != self.file.table["offsets"]["sha256"]:
            raise ValueError(f"{path}: 'offsets' is damaged: restore the file from another copy, or delete it")

    def __len__(self) -> int:
        """N, the number of checkpoints."""
        return int(self.offsets[-1])

    @cached_property
    def configs(self) -> list[dict[str, Any]]:
        """What made each run."""
        return self.file.entry("configs")

    @property
    def storage(self) -> str:
        """How the parameters are stored."""
        return self.file.entry("storage") or self.file.table["params"]["dtype"]

    @cached_property
    def params(self) -> Tensor | DeltaParams:
        """(N, D), mapped; indexed by rows, which ``delta10`` decodes then."""
        if self.storage != "delta10":
            return self.file.tensor("params")
        parts = {name: self.file.tensor(name) for name in self.file.table if name.startswith("params/")}
        return DeltaParams(parts, self.offsets)

    @property
    def rounding(self) -> Rounding | None:
        """What was lost when the parameters were stored; None in files that do not tell."""
        recorded = self.file.entry("rounding")
        return recorded and Rounding(**recorded)

    def damaged(self) -> dict[str, list[str]]:
        """Tensors whose bytes are not those that were written, each with the runs in which the wrong bytes stand.

        Reads the whole file. All runs are named where the file has no sums of runs, or the tensor no rows.
        """
        damaged = self.file.damaged()
        names = _with_rows(self.file.table)
        if not damaged or "checksums" not in self.file.table:
            return dict.fromkeys(damaged, self.run_ids)
        wrong = {}
        for column, name in enumerate(names):
            found = _checksums(self.file.tensor(name), name, self.offsets)
            wrong[name] = np.array(found) != self.file.tensor("checksums")[:, column].numpy()
        wrong["checksums"] = np.any([wrong[name] for name in names if name not in damaged], axis=0)
        return {
            name: [run for run, bad in zip(self.run_ids, wrong.get(name, ()), strict=False) if bad] or self.run_ids
            for name in damaged
        }

    @cached_property
    def metric_names(self) -> list[str]:
        """Metrics that the runs of this shard have."""
        return [name.removeprefix("metrics/") for name in self.file.table if name.startswith("metrics/")]

    def column(self, name: str) -> np.ndarray:
        """``step`` or ``metrics/<metric>``, (N,)."""
        return self.file.array(name)

    def buffers(self, names: Iterable[str], rows: slice | int) -> dict[str, Tensor]:
        """Buffers of some checkpoints, (..., *shape), mapped."""
        return {name: self.file.tensor(f"buffers/{name}")[rows] for name in names}
