"""The growing state of an infinite layer: atoms in blocks of fixed size, so that growth copies nothing."""

import copy
import mmap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import chain
from typing import Any, Self

import torch
from torch import Tensor, nn

from pilimit.expectations import operator_norm, wide

Rows = tuple[Tensor, Tensor, Tensor]

_SCALES = (1e-6, 1e6)
"""Between these the common factor of all multipliers stays apart; beyond, it would cost them digits."""


@dataclass
class Block:
    """Room for some atoms, of which the first ``size`` are valid."""

    A: Tensor  # (capacity, r_out)
    B: Tensor  # (capacity, r), unit rows
    Amult: Tensor  # (capacity,), in float32 or better
    size: int = 0


def _mapped(count: int) -> Tensor:
    """So many bytes, all zero, from the system itself and in large pages if it has them: read up to twice as fast.

    The heap would grow by a few per cent more, for what other tensors leave between blocks.
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_ANONYMOUS") else {}
    room = mmap.mmap(-1, count, **private)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with suppress(OSError):  # a system without them
            room.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(room, dtype=torch.uint8)


@dataclass(frozen=True)
class Segment:
    """Where some rows of the atoms have been written: a file whose name no other content ever has."""

    name: str
    digest: str
    rows: int


class Atoms:
    r"""The operator :math:`\sum_m \mathrm{scale} \cdot \mathrm{Amult}_m A_m \otimes \mathrm{relu}\langle B_m, Z\rangle`.

    Rows of A and B never change once they are there; weight decay is in ``scale``, so it costs the same for any number
    of atoms.

    Args:
        r: Width of the rows of B.
        r_out: Width of the rows of A.
        dtype: Of A and B; multipliers have at least float32.
        device: Where they are.
        block_size: Atoms per block; default: 16,384, or 65,536 on a GPU.
    """

    def __init__(
        self,
        r: int,
        r_out: int,
        dtype: torch.dtype,
        device: torch.device | str | None = None,
        block_size: int | None = None,
    ) -> None:
        self.r, self.r_out, self.dtype = r, r_out, dtype
        self.device = torch.empty(0, device=device).device
        self.block_size = block_size or (16_384 if self.device.type == "cpu" else 65_536)
        self.blocks: list[Block] = []
        self.scale = 1.0
        self.pending: list[tuple[Tensor, Tensor]] = []
        """Rows (A, B) of each backward pass since the last step."""
        self.version = 0
        """Counts changes, so that a backward pass can tell that its forward pass saw another state."""
        self.segments: list[Segment] = []
        """Files that hold the first rows."""
        self.rewritten = False
        """Whether multipliers of rows in ``segments`` have changed since."""
        self.spare: Tensor | None = None
        """Room that backward passes have left for the next ones."""
        self.host = False
        """Whether the blocks stay in the memory of the host while the layer computes on a GPU."""

    def __len__(self) -> int:
        """Number of atoms."""
        return sum(block.size for block in self.blocks)

    @property
    def bytes_per_atom(self) -> int:
        """Of A, B and the multiplier."""
        return (self.r + self.r_out) * self.dtype.itemsize + wide(self.dtype).itemsize

    def stay_in_host_memory(self, chunk: int) -> None:
        """Keep the blocks, from now on of ``chunk`` atoms each, in the memory of the host: a GPU gets copies in turn."""
        self.host = True
        a, b, amult = self.tensors()
        segments, rewritten = self.segments, self.rewritten
        scale, self.block_size = self.scale, chunk
        self.clear()
        self.append(a, b, amult)
        self.segments, self.rewritten = segments, rewritten or scale != 1.0

    @property
    def home(self) -> torch.device:
        """Where the blocks are."""
        return torch.device("cpu") if self.host else self.device

    def pieces(self, length: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Views of (A, B, Amult) of at most ``length`` atoms each, in order, without ``scale``.

        If the blocks are elsewhere, copies on the device: the next is under way while one is used.
        """
        parts = self._views(length)
        return parts if self.home == self.device else self._streamed(parts)

    def _streamed(self, parts: Iterator[Rows]) -> Iterator[Rows]:
        stream = torch.cuda.Stream(self.device)
        waiting: tuple[Rows, torch.cuda.Event] | None = None
        for part in chain(parts, [None]):
            coming = None
            if part is not None:
                with torch.cuda.stream(stream):
                    a, b, amult = (t.to(self.device, non_blocking=True) for t in part)
                    coming = (a, b, amult), stream.record_event()
            if waiting is not None:
                current = torch.cuda.current_stream(self.device)
                current.wait_event(waiting[1])
                for t in waiting[0]:
                    t.record_stream(current)
                yield waiting[0]
            waiting = coming

    def _views(self, length: int) -> Iterator[Rows]:
        for block in self.blocks:
            for start in range(0, block.size, length):
                rows = slice(start, min(start + length, block.size))
                yield block.A[rows], block.B[rows], block.Amult[rows]

    def append(self, a: Tensor, b: Tensor, multiplier: float | Tensor) -> None:
        """Add atoms: ``a`` of shape (n, r_out), ``b`` (n, r), ``multiplier`` one for all or (n,)."""
        self.version += 1
        done = 0
        while done < len(a):
            if not self.blocks or self.blocks[-1].size == len(self.blocks[-1].A):
                self.blocks.append(self._new_block(self.block_size))
            block = self.blocks[-1]
            count = min(len(block.A) - block.size, len(a) - done)
            rows, source = slice(block.size, block.size + count), slice(done, done + count)
            block.A[rows], block.B[rows] = a[source], b[source]
            block.Amult[rows] = (multiplier[source] if isinstance(multiplier, Tensor) else multiplier) / self.scale
            block.size += count
            done += count

    def _new_block(self, n: int) -> Block:
        """Room for ``n`` atoms, in one piece."""
        size = self.dtype.itemsize
        sizes = [n * wide(self.dtype).itemsize, n * self.r_out * size, n * self.r * size]
        if self.device.type == "cpu":
            room = _mapped(sum(sizes))
        else:
            room = torch.empty(sum(sizes), dtype=torch.uint8, device=self.home, pin_memory=self.home != self.device)
        amult, a, b = room.split(sizes)
        a, b = a.view(self.dtype).view(n, self.r_out), b.view(self.dtype).view(n, self.r)
        return Block(a, b, amult.view(wide(self.dtype)))

    def _take(self, old: Block, n: int) -> Block:
        """A block with room for ``n`` atoms and the valid rows of another, which may be elsewhere or of another dtype."""
        block = self._new_block(n)
        for room, rows in ((block.A, old.A), (block.B, old.B), (block.Amult, old.Amult)):
            room[: old.size] = rows[: old.size]
        block.size = old.size
        return block

    def clear(self) -> None:
        """Remove all atoms."""
        self.blocks, self.scale, self.segments, self.rewritten = [], 1.0, [], False
        self.version += 1

    def adopt(self, a: Tensor, b: Tensor, amult: Tensor) -> None:
        """Make tensors (which may be mapped from a file) the next block, without a copy."""
        self.blocks.append(Block(a, b, amult, len(a)))
        self.version += 1

    def decay(self, factor: float) -> None:
        """Multiply all multipliers."""
        self.scale *= factor
        self.version += 1
        if not _SCALES[0] < self.scale < _SCALES[1]:
            self.fold()

    def fold(self) -> None:
        """Multiply ``scale`` into the multipliers, of which the caller will change each by itself."""
        if self.scale != 1.0:
            for block in self.blocks:
                block.Amult[: block.size] *= self.scale
        self.scale, self.rewritten = 1.0, True
        self.version += 1

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """Copies of A (M, r_out), B (M, r) and the multipliers (M,), decay included, where the blocks are."""
        options: dict[str, Any] = {"device": self.home, "dtype": self.dtype}
        a, b = torch.empty(0, self.r_out, **options), torch.empty(0, self.r, **options)
        amult = torch.empty(0, device=self.home, dtype=wide(self.dtype))
        parts = list(self._views(self.block_size))
        lists = ([first, *(part[i] for part in parts)] for i, first in enumerate((a, b, amult)))
        a, b, amult = (torch.cat(tensors) for tensors in lists)
        return a, b, amult * self.scale

    def to(self, dtype: torch.dtype, device: torch.device) -> None:
        """Move and convert, block by block."""
        if (dtype, device) == (self.dtype, self.device):
            return
        if dtype != self.dtype:
            self.segments = []
        self.dtype, self.device = dtype, device
        for i, block in enumerate(self.blocks):
            self.blocks[i] = self._take(block, len(block.A))
        self.pending = [(a.to(device, dtype), b.to(device, dtype)) for a, b in self.pending]
        self.version += 1

    def __getstate__(self) -> dict[str, Any]:
        """For pickles and copies: valid rows only."""
        blocks = [
            Block(b.A[: b.size].clone(), b.B[: b.size].clone(), b.Amult[: b.size].clone(), b.size) for b in self.blocks
        ]
        return self.__dict__ | {
            "blocks": blocks,
            "pending": copy.copy(self.pending),
            "segments": [*self.segments],
            "spare": None,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Give the last block its room again, so that sums keep their order."""
        self.__dict__ |= state
        if self.blocks and self.blocks[-1].size < self.block_size:
            self.blocks[-1] = self._take(self.blocks[-1], self.block_size)


class AtomsParameter(nn.Parameter):
    """What stands for the atoms of a layer among the parameters of a module: an empty tensor with attribute ``atoms``.

    ``grad`` is None, or the rows of A that the next step appends; setting it to None drops them.
    """

    atoms: Atoms
    output_layer: bool
    """Whether the layer gives the outputs of a net."""
    lr_mult: float
    """Multiplier of the learning rate."""

    def __new__(
        cls, atoms: Atoms, requires_grad: bool = True, output_layer: bool = False, lr_mult: float = 1.0
    ) -> Self:
        """An empty tensor on the device of the atoms, in the dtype of their multipliers."""
        data = torch.empty(0, device=atoms.device, dtype=wide(atoms.dtype))
        parameter = super().__new__(cls, data, requires_grad)
        parameter.atoms, parameter.output_layer, parameter.lr_mult = atoms, output_layer, lr_mult
        return parameter

    @property
    def grad(self) -> Tensor | None:
        """Rows of A to come, (n, r_out)."""
        pending = self.atoms.pending
        if len(pending) > 1:
            self.atoms.pending = pending = [(torch.cat([a for a, _ in pending]), torch.cat([b for _, b in pending]))]
        return pending[0][0] if pending else None

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        if value is not None:
            raise ValueError("the gradient of atoms is made by backward passes; it can only be set to None")
        self.atoms.pending = []

    def pending(self) -> tuple[Tensor, Tensor] | None:
        """The rows (A, B) that the next step appends, (n, r_out) and (n, r); None if there are none."""
        return self.atoms.pending[0] if self.grad is not None else None

    def gradient_norm(self) -> Tensor:
        """Hilbert-Schmidt norm of what the next step appends, before its learning rate."""
        rows = self.pending()
        return self.new_zeros(()) if rows is None else operator_norm(*rows)

    def _flags(self) -> tuple[Any, ...]:
        return self.requires_grad, self.output_layer, self.lr_mult

    def __deepcopy__(self, memo: dict[int, Any]) -> "AtomsParameter":
        """A parameter with atoms of its own."""
        if id(self) not in memo:
            memo[id(self)] = type(self)(copy.deepcopy(self.atoms, memo), *self._flags())
        return memo[id(self)]

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:  # noqa: ANN401
        """Pickled with its atoms."""
        return type(self), (self.atoms, *self._flags())

    def __repr__(self, **options: Any) -> str:  # type: ignore[override]  # noqa: ANN401
        """Number and widths of the atoms."""
        atoms = self.atoms
        return f"AtomsParameter({len(atoms)} atoms, r={atoms.r}, r_out={atoms.r_out}, {atoms.dtype})"


class AtomsModule(nn.Module):
    """A module with atoms as its ``weight``, which are A, B and Amult in its state dict: valid rows only."""

    weight: AtomsParameter

    @property
    def atoms(self) -> Atoms:
        """The state."""
        return self.weight.atoms

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move and convert, atoms included."""
        target = fn(torch.empty(0, dtype=self.atoms.dtype, device=self.atoms.device))
        super()._apply(fn, recurse)
        self.atoms.to(target.dtype, target.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[prefix + "weight"]
        a, b, amult = self.atoms.tensors()
        destination |= {prefix + "A": a, prefix + "Amult": amult, prefix + "B": b}

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing: list[str],
        *rest: Any,  # noqa: ANN401
    ) -> None:
        names = {name: prefix + name for name in ("A", "B", "Amult")}
        present = {name: state_dict.pop(key) for name, key in names.items() if key in state_dict}
        missing += [key for name, key in names.items() if name not in present]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *rest)
        if prefix + "weight" in missing:
            missing.remove(prefix + "weight")
        if len(present) == 3:
            problem = self._misfit(present)
            if problem:
                rest[-1].append(f"{prefix}{problem}")
            else:
                self.atoms.clear()
                self.atoms.append(present["A"], present["B"], present["Amult"].to(self.weight))

    def _misfit(self, tensors: Mapping[str, Tensor]) -> str | None:
        count = len(tensors["A"])
        for name, shape in (("A", (count, self.atoms.r_out)), ("B", (count, self.atoms.r)), ("Amult", (count,))):
            if tuple(tensors[name].shape) != shape:
                return f"{name}: expected {shape}, got {tuple(tensors[name].shape)}"
        return None


def align(velocity: "Tensor | Sequence[Tensor]", atoms: Atoms) -> list[Tensor]:
    """Split a vector with one entry per atom like the blocks, each part with the block's capacity."""
    if isinstance(velocity, Tensor):
        parts = velocity.split([block.size for block in atoms.blocks])
        velocity = [torch.cat([p, p.new_zeros(len(k.A) - len(p))]) for p, k in zip(parts, atoms.blocks, strict=True)]
    missing = atoms.blocks[len(velocity) :]
    return [*velocity, *(torch.zeros_like(block.Amult) for block in missing)]
