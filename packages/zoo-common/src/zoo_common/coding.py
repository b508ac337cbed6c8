"""How the parameters of runs are stored, and what that costs in precision.

Shapes: N checkpoints of D parameters, of which K are keys; G groups of coordinates. ``float32``, ``float16`` and
``bfloat16`` are one tensor ``params`` (N, D). ``delta10`` stores differences within a run: each checkpoint as a small
step from a line through two keys, which are every sixteenth checkpoint of the run from the first. Checkpoint n of the
file, whose last key before it (or itself) is k, has at a coordinate i of group g the value ::

    keys[k, i] + weight[n] * (keys[k + 1, i] - keys[k, i]) + scale[n, g] * (4 * coarse[n, i] + fine[n, i])

with the tensors ``params/keys`` (K, D) float16, ``params/weight`` (N,) float32 (0 behind the last key of a run),
``params/scale`` (N, G) float32, ``params/coarse`` (N, D) int8, ``params/fine`` (N, ceil(D / 4)) uint8, which holds the
numbers 0 to 3 of four coordinates in a byte, the first one in the lowest bits, and ``params/groups`` (G + 1,) int64,
where the groups begin: each tensor of the layout in pieces of 128. These are 11.3 bits per parameter in long runs, any
checkpoint is read without its predecessors, and no error is larger than half the scale of its group (beyond rounding in
float32). A group with a value that is not finite is NaN.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

STORAGES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16, "delta10": torch.float32}
"""How parameters may be stored, and the dtype in which they are read."""
_KEY_EVERY, _GROUP = 16, 128
_LEVELS = 511
"""Largest number of ten bits."""
_SHIFTS = torch.tensor([0, 2, 4, 6], dtype=torch.uint8)
_BLOCK = 1 << 22
"""Numbers that are coded or compared at once."""


@dataclass(frozen=True)
class Rounding:
    """How far stored parameters are from those that were given; values that are not finite do not count."""

    largest: float = 0.0
    """Largest absolute difference."""
    squares: float = 0.0
    """Sum of the squared differences."""
    total: float = 0.0
    """Sum of the squared parameters."""

    @property
    def relative_rms(self) -> float:
        """Root mean square of the differences, as a fraction of that of the parameters."""
        return (self.squares / self.total) ** 0.5 if self.total else 0.0

    def __add__(self, other: "Rounding") -> "Rounding":
        """That of both together."""
        largest = max(self.largest, other.largest)
        return Rounding(largest, self.squares + other.squares, self.total + other.total)


class DeltaParams:
    """Vectors stored as ``delta10``, decoded when they are indexed; stands for a matrix (N, D)."""

    def __init__(self, tensors: Mapping[str, Tensor], offsets: np.ndarray) -> None:
        """Vectors from the tensors of a shard, and the first row of every run."""
        self.shape = tensors["params/coarse"].shape
        self._keys, self._coarse, self._fine = (tensors[f"params/{name}"] for name in ("keys", "coarse", "fine"))
        self._weight, self._scale = tensors["params/weight"], tensors["params/scale"]
        self._widths = tensors["params/groups"].diff()
        self._key = torch.from_numpy(_key_of_rows(offsets))

    def __len__(self) -> int:
        """N."""
        return len(self._coarse)

    def __getitem__(self, rows: slice | int | Tensor) -> Tensor:
        """Rows (..., D) in float32, by number, slice or index (B,)."""
        key = self._key[rows]
        here, there = self._keys[key].float(), self._keys[(key + 1).clamp(max=len(self._keys) - 1)].float()
        scale = self._scale[rows].repeat_interleave(self._widths, dim=-1, output_size=self.shape[1])
        fine = (self._fine[rows][..., None] >> _SHIFTS).bitwise_and_(3).flatten(-2)[..., : self.shape[1]]
        steps = self._coarse[rows].float().mul_(4).add_(fine)
        return steps.mul_(scale).add_(here.lerp_(there, self._weight[rows][..., None]))


def encode(params: Tensor, offsets: np.ndarray, sizes: Sequence[int], storage: str) -> dict[str, Tensor]:
    """The tensors that store parameters.

    Args:
        params: (N, D), floating-point.
        offsets: (R + 1,) first row of every run, and N.
        sizes: Numbers of elements of the layout's tensors, D in all.
        storage: One of :data:`STORAGES`.
    """
    if storage != "delta10":
        return {"params": params.to(STORAGES[storage])}
    key = _key_of_rows(offsets)
    first = np.unique(key, return_index=True)[1]  # row of every key
    limit = torch.finfo(torch.float16).max
    groups = np.cumsum([0, *(min(_GROUP, size - at) for size in sizes for at in range(0, size, _GROUP))])
    tensors = {
        "params/keys": params[first].float().nan_to_num(0).clamp(-limit, limit).half(),
        "params/groups": torch.from_numpy(groups),
        "params/weight": torch.zeros(len(params)),
        "params/scale": torch.zeros(len(params), len(groups) - 1),
        "params/coarse": torch.zeros(params.shape, dtype=torch.int8),
        "params/fine": torch.zeros(len(params), -(-params.shape[1] // 4), dtype=torch.uint8),
    }
    decoded = DeltaParams(tensors, offsets)
    ends = torch.from_numpy(np.isin(key + 1, key[offsets[:-1]]) | (key == key[-1]))  # no further key in the run
    for rows in row_blocks(*params.shape):
        given = params[rows].float()
        start = decoded[rows]  # the key alone, as all else is zero yet
        tensors["params/weight"][rows] = 1
        step = decoded[rows] - start
        weight = ((given - start) * step).sum(dim=1) / step.square().sum(dim=1)
        tensors["params/weight"][rows] = weight.where(weight.isfinite() & ~ends[rows], 0)
        rest = given - decoded[rows]
        scale = torch.from_numpy(np.maximum.reduceat(rest.abs().numpy(), groups[:-1], axis=1)) / _LEVELS
        tensors["params/scale"][rows] = scale.where(scale.isfinite(), torch.nan)
        unit = scale.where(scale > 0, 1).repeat_interleave(decoded._widths, dim=1)
        steps = (rest / unit).round_().nan_to_num_(0).clamp_(-_LEVELS, _LEVELS).to(torch.int16)
        tensors["params/coarse"][rows] = (steps >> 2).to(torch.int8)
        fine = F.pad((steps & 3).to(torch.uint8), (0, -steps.shape[1] % 4)).unflatten(1, (-1, 4))
        tensors["params/fine"][rows] = (fine << _SHIFTS).sum(dim=2, dtype=torch.uint8)
    return tensors


def key_bounds(offsets: np.ndarray) -> np.ndarray:
    """(R + 1,) first key of every run, and K."""
    return np.cumsum([0, *-(-np.diff(offsets) // _KEY_EVERY)])


def stored_shapes(storage: str, offsets: np.ndarray, sizes: Sequence[int]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that :func:`encode` makes."""
    rows, size, groups = int(offsets[-1]), sum(sizes), sum(-(-n // _GROUP) for n in sizes)
    if storage != "delta10":
        return {"params": (rows, size)}
    shapes = {"keys": (int(key_bounds(offsets)[-1]), size), "groups": (groups + 1,), "weight": (rows,)}
    shapes |= {"scale": (rows, groups), "coarse": (rows, size), "fine": (rows, -(-size // 4))}
    return {f"params/{name}": shape for name, shape in shapes.items()}


def rounding(given: Tensor, stored: Tensor | DeltaParams) -> Rounding:
    """What was lost between given and stored parameters, (N, D) both."""
    if isinstance(stored, Tensor) and torch.promote_types(given.dtype, stored.dtype) == stored.dtype:
        return Rounding()
    lost = Rounding()
    for rows in row_blocks(*given.shape):
        exact = given[rows].double()
        error = stored[rows].double() - exact
        error, exact = error.where(error.isfinite(), 0), exact.where(error.isfinite(), 0)
        lost += Rounding(error.abs().max().item(), error.square().sum().item(), exact.square().sum().item())
    return lost


def _key_of_rows(offsets: np.ndarray) -> np.ndarray:
    """(N,) index of the key that is a row's own, or the last before it in its run."""
    run = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
    return key_bounds(offsets)[run] + (np.arange(offsets[-1]) - offsets[run]) // _KEY_EVERY


def row_blocks(rows: int, size: int) -> list[slice]:
    """The rows of a matrix in blocks of bounded memory."""
    step = max(1, _BLOCK // max(1, size))
    return [slice(start, start + step) for start in range(0, rows, step)]
