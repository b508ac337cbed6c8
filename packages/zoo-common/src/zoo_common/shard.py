"""One file of a zoo: whole runs, written once and never changed.

Shapes: a shard holds R runs with N checkpoints in all, a run C checkpoints of D parameters. Tensors of the file:
``params`` (N, D), ``step`` (N,) int64, ``offsets`` (R + 1,) int64 (run r has the rows from ``offsets[r]`` to before
``offsets[r + 1]``), ``metrics/<metric>`` (N,) float64, ``buffers/<name>`` (N, ...) in their own dtype. Header metadata:
``layout`` (id), ``runs`` (ids), ``configs``.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from zoo_common.files import TensorFile, allocate, sha256, write_tensors
from zoo_common.layout import ParameterLayout

_KIND = "weightspace-zoo-shard"
_NAME = re.compile(r"[\w=+@,-][\w.=+@,-]{0,127}", re.ASCII)

_BLOCK = 2**22
"""Numbers that are cast and checked at a time."""

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


def write_shard(path: str | Path, layout: ParameterLayout, runs: Sequence[Run], dtype: torch.dtype) -> None:
    """Write runs to a shard file, atomically.

    Args:
        path: File to create or replace.
        layout: Layout of all runs.
        runs: At least one run; all with the same metrics.
        dtype: How parameters are stored: float32, float16 or bfloat16.

    Raises:
        ValueError: A run does not fit the layout or the other runs, or a value does not fit ``dtype``; the message
            names the run and the tensor.
    """
    for run in runs:
        _check_run(run, layout)
    if odd := [run.id for run in runs if run.metrics.keys() != runs[0].metrics.keys()]:
        raise ValueError(f"run {odd[0]!r}: metrics differ from those of run {runs[0].id!r}: {sorted(runs[0].metrics)}")
    lengths = [len(run.params) for run in runs]
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    params = allocate((sum(lengths), layout.size), dtype, Path(path).parent)
    for run, start in zip(runs, offsets, strict=False):
        _store(run, params[start : start + len(run.params)], layout)
    tensors = {"params": params, "offsets": torch.from_numpy(offsets)}
    tensors["step"] = torch.cat([torch.as_tensor(run.steps, dtype=torch.int64) for run in runs])
    for name in runs[0].metrics:
        values = [torch.as_tensor(run.metrics[name], dtype=torch.float64).cpu() for run in runs]
        tensors[f"metrics/{name}"] = torch.cat(values)
    for spec in layout.buffers:
        tensors[f"buffers/{spec.name}"] = torch.cat([run.buffers[spec.name].cpu() for run in runs])
    metadata = {"layout": layout.id, "runs": [run.id for run in runs], "configs": [dict(run.config) for run in runs]}
    write_tensors(path, _KIND, tensors, metadata)


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


def _store(run: Run, out: Tensor, layout: ParameterLayout) -> None:
    """Cast the parameters of a run into ``out`` (C, D); a finite value that becomes infinite is an error."""
    overflow = torch.zeros(layout.size, dtype=torch.bool)
    narrow = torch.finfo(out.dtype).max < torch.finfo(run.params.dtype).max
    rows = max(1, _BLOCK // layout.size)
    for part, given in zip(out.split(rows), run.params.detach().split(rows), strict=True):
        part.copy_(given)
        if narrow:
            overflow |= (part.isinf() & given.cpu().isfinite()).any(dim=0)
    if overflow.any():
        bad = [name for name, part in layout.unflatten(overflow).items() if part.any()]
        limit = torch.finfo(out.dtype).max
        raise ValueError(
            f"run {run.id!r}: {', '.join(map(repr, bad))} does not fit {out.dtype} (largest {limit:g}); "
            "create the zoo with dtype='float32' or 'bfloat16'"
        )


class Shard:
    """A shard file, opened: header and run offsets are read and checked, the payload is mapped when asked for.

    Raises:
        ValueError: The file is truncated, damaged or not a shard.
    """

    def __init__(self, path: str | Path) -> None:
        """Open a shard file."""
        self.file = TensorFile(path, _KIND)
        self.name = self.file.path.stem
        self.layout_id: str = self.file.metadata["layout"]
        self.run_ids: list[str] = self.file.metadata["runs"]
        self.configs: list[dict[str, Any]] = self.file.metadata["configs"]
        offsets = self.file.tensor("offsets")
        if sha256(offsets) != self.file.table["offsets"]["sha256"]:
            raise ValueError(f"{path}: 'offsets' is damaged: restore the file from another copy, or delete it")
        self.offsets = offsets.numpy()
        """(R + 1,) first row of every run, and N."""

    def __len__(self) -> int:
        """N, the number of checkpoints."""
        return int(self.offsets[-1])

    @cached_property
    def params(self) -> Tensor:
        """(N, D), mapped."""
        return self.file.tensor("params")

    @cached_property
    def metric_names(self) -> list[str]:
        """Metrics that the runs of this shard have."""
        return [name.removeprefix("metrics/") for name in self.file.table if name.startswith("metrics/")]

    def column(self, name: str) -> np.ndarray:
        """``step`` or ``metrics/<metric>``, (N,)."""
        return self.file.tensor(name).numpy()

    def buffers(self, names: Iterable[str], rows: slice | int) -> dict[str, Tensor]:
        """Buffers of some checkpoints, (..., *shape), mapped."""
        return {name: self.file.tensor(f"buffers/{name}")[rows] for name in names}
