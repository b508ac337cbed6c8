r"""Forward and backward pass of an infinite layer, chunk by chunk.

For pre-activations g with norms s and directions u = g / s, the layer computes

.. math:: y = \sigma \sum_m F_{00}(\langle u, B_m\rangle) c_m A_m, \qquad \sigma = s \text{ (or 1 with layernorm).}

The backward pass uses that y is homogeneous of degree one in g (of degree zero with layernorm), so that the part of the
gradient along g is ``<D, y> / s`` (or 0), and only F11 remains to be summed over the atoms.
"""

import threading
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from pilimit.atoms import Atoms, AtomsParameter, Rows
from pilimit.expectations import TWO_PI, wide

_ELEMENTS = {"cpu": 2**17}
"""Entries of a temporary: in float32, half of the cache that is close to a CPU core; on a GPU, launches decide."""
_FEWEST = 1024
PANEL = 2**19
"""Entries of a panel on a CPU. Measured: smaller ones cost calls, larger ones have left the cache when they are used."""
_ONE = torch.ones(())


class Propagate(torch.autograd.Function):
    """Pre-activations (b, r) to those of the next layer (b, r_out), without bias. Backward stages the new atoms."""

    @staticmethod
    def forward(
        ctx: Any,  # noqa: ANN401
        g: Tensor,
        parameter: Tensor,
        atoms: Atoms,
        layernorm: bool,
        recording: bool,
    ) -> Tensor:
        """Compute y; keep the angles of as many atoms as fit in the bytes of one block."""
        s, u = directions(g)
        keep = atoms.block_size * atoms.bytes_per_atom if recording else 0
        angles = Angles(atoms, u, keep)
        y = _sum_forward(atoms, u, angles)
        y *= (s.sign() if layernorm else s) * (atoms.scale / TWO_PI)
        ctx.atoms, ctx.version, ctx.layernorm = atoms, atoms.version, layernorm
        ctx.angles = angles
        ctx.save_for_backward(u, s, y)
        return y

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, None, None, None, None]:  # noqa: ANN401
        """Gradient of g; the rows of A and B go to ``atoms.pending``."""
        if torch.is_grad_enabled():
            raise RuntimeError("infinite layers have no second derivatives: leave out create_graph")
        atoms: Atoms = ctx.atoms
        if atoms.version != ctx.version:
            raise RuntimeError("the atoms have changed since this forward pass: call backward before step, load or to")
        u, s, y = ctx.saved_tensors
        present = s.sign()  # 0 for a row of zeros
        if ctx.needs_input_grad[1]:
            sigma = present if ctx.layernorm else s
            atoms.pending.append(((d * sigma).to(atoms.dtype), u.to(atoms.dtype)))
        if not ctx.needs_input_grad[0]:
            return None, None, None, None, None
        inverse = present / _at_least_tiny(s)
        x = _sum_backward(atoms, u, d, ctx.angles)
        x *= (inverse if ctx.layernorm else present) * (atoms.scale / TWO_PI)
        along = -(x * u).sum(1, keepdim=True)
        if not ctx.layernorm:
            along += (d * y).sum(1, keepdim=True) * inverse
        return x.addcmul_(along, u), None, None, None, None


def propagate(g: Tensor, parameter: AtomsParameter, layernorm: bool) -> Tensor:
    """Pre-activations (b, r) to those of the next layer (b, r_out), without bias."""
    recording = torch.is_grad_enabled() and (g.requires_grad or parameter.requires_grad)
    return Propagate.apply(g, parameter, parameter.atoms, layernorm, recording)


def directions(g: Tensor) -> tuple[Tensor, Tensor]:
    """Norms (b, 1) and unit rows (b, r) of pre-activations; a zero row has direction zero."""
    s = torch.linalg.vector_norm(g, dim=1, keepdim=True)
    return s, g / _at_least_tiny(s)


def _at_least_tiny(s: Tensor) -> Tensor:
    return s.clamp(min=torch.finfo(s.dtype).tiny)


def chunk(atoms: Atoms, rows: int) -> int:
    """Atoms that are worked on at once for a batch of this size."""
    longest = _ELEMENTS.get(atoms.device.type, 2**22) // max(rows, 1)
    return min(atoms.block_size, max(_FEWEST, longest))


def panels(rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pieces of rows of A or B (n, r), and where they are: on a CPU in its cache, in float32 or better.

    Products with few rows read the large factor in an order that memory is slow for, so it is read once before, from
    one end to the other. A piece is valid until the next.
    """
    narrow = rows.dtype != wide(rows.dtype)
    if rows.device.type != "cpu":
        yield slice(len(rows)), rows.to(wide(rows.dtype))
        return
    length, r = 1 << max(PANEL // rows.shape[1], 1).bit_length() - 1, rows.shape[1]
    room = _widened.take(length * r, wide(rows.dtype), rows.device) if narrow else rows
    if narrow:
        _warn_once(rows.dtype)
    for start in range(0, len(rows), length):
        where = slice(start, start + length)
        panel = rows[where]
        if narrow:
            panel = room[: panel.numel()].view(-1, r).copy_(panel)
        else:
            panel.sum()
        yield where, panel


def products(x: Tensor, rows: Tensor, out: Tensor) -> Tensor:
    """``x rows^T``, (b, n), of x (b, r) and rows (n, r)."""
    for where, panel in panels(rows):
        torch.mm(x, panel.t(), out=out[:, where])
    return out


def add_products(total: Tensor, weights: Tensor, rows: Tensor) -> None:
    """Add ``weights rows``, (b, r), of weights (b, n) and rows (n, r)."""
    for where, panel in panels(rows):
        total.addmm_(weights[:, where], panel)


class Angles:
    """Room for the angles arccos(-q) of the first atoms, borrowed from the layer for as long as a graph lives.

    Fresh memory costs more than the arithmetic: the system clears it page by page.

    Args:
        atoms: The layer's.
        u: Unit rows (b, r).
        limit: Bytes of all angles at most.
    """

    def __init__(self, atoms: Atoms, u: Tensor, limit: int) -> None:
        length = chunk(atoms, len(u))
        size = max(len(u), 1) * length
        chunks = sum(-(-block.size // length) for block in atoms.blocks)
        count = min(int(limit) // (size * u.itemsize), chunks)
        self._atoms, spare, atoms.spare = atoms, atoms.spare, None
        fits = (
            spare is not None and spare.dtype == u.dtype and spare.device == u.device and spare.numel() >= count * size
        )
        self._room = spare if spare is not None and fits else u.new_empty(count * size)
        self._parts: Any = self._room[: count * size].view(count, size) if count else ()

    def __getitem__(self, i: int) -> Tensor | None:
        """Flat room for the angles of chunk ``i``; None if it has none."""
        return self._parts[i] if i < len(self._parts) else None

    def __del__(self) -> None:
        """Give the room back."""
        self._atoms.spare = self._room


class _Scratch(threading.local):
    """Room for temporaries, one per thread."""

    room: Tensor | None = None

    def take(self, count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """Flat, with undefined values; valid until the next call."""
        room = self.room
        if room is None or room.numel() < count or room.dtype != dtype or room.device != device:
            self.room = room = torch.empty(count, dtype=dtype, device=device)
        return room[:count]


_scratch = _Scratch()
_widened = _Scratch()


def _sum_forward(atoms: Atoms, u: Tensor, angles: Angles) -> Tensor:
    """The sum of 2 pi F00 c A, (b, r_out); fills ``angles``."""
    y = u.new_zeros(len(u), atoms.r_out)
    opposite = -u
    for (a, b, amult), (q, f, angle) in _chunks(atoms, u, angles):
        products(opposite, b, q).clamp_(-1, 1)
        torch.add(q, 1, out=f)
        torch.sub(_ONE, q, out=angle)
        f.mul_(angle).sqrt_()  # (1 + q)(1 - q): 1 - q * q would lose half of the digits
        torch.acos(q, out=angle)
        f.addcmul_(q, angle, value=-1).mul_(amult)
        add_products(y, f, a)
    return y


def _sum_backward(atoms: Atoms, u: Tensor, d: Tensor, angles: Angles) -> Tensor:
    """The sum of 2 pi F11 c <d, A> B, (b, r)."""
    x = torch.zeros_like(u)
    for i, ((a, b, amult), (w, _, angle)) in enumerate(_chunks(atoms, u, angles)):
        if angles[i] is None:
            products(-u, b, angle).clamp_(-1, 1).acos_()
        products(d, a, w).mul_(amult).mul_(angle)
        add_products(x, w, b)
    return x


def _chunks(atoms: Atoms, u: Tensor, angles: Angles) -> Iterator[tuple[Rows, list[Tensor]]]:
    """Chunks of atoms, each with room for three temporaries (b, n), the last of which holds its angles if there are."""
    rows, length = len(u), chunk(atoms, len(u))
    room = _scratch.take(3 * rows * length, u.dtype, u.device).view(3, -1)
    for i, chunk_rows in enumerate(atoms.pieces(length)):
        kept, n = angles[i], len(chunk_rows[0])
        buffers = (room[0], room[1], room[2] if kept is None else kept)
        yield chunk_rows, [buffer[: rows * n].view(rows, n) for buffer in buffers]


_warned = False


def _warn_once(dtype: torch.dtype) -> None:
    global _warned
    if not _warned:
        _warned = True
        warnings.warn(f"{dtype} on a CPU is converted chunk by chunk, which is slow: float32 is faster", stacklevel=2)
