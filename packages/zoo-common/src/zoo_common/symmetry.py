"""Symmetries of a network: hidden units may change places, or be scaled, and the function stays the same.

:meth:`Symmetry.from_module` finds the units by tracing (:mod:`zoo_common.tracing`) and proves every claim in float64.

Shapes: ``n`` networks, ``d`` parameters each, ``s`` units in a group.
"""

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from zoo_common.alignment import Matching, Moves, axis_index
from zoo_common.layout import ParameterLayout
from zoo_common.tracing import Entry, Group, trace

__all__ = ["Entry", "Group", "Symmetry"]

#: Largest difference (relative to the largest output, at least 1) that the float64 proof of a group accepts.
PROOF_TOLERANCE = 1e-10

_CACHED = 2**19
"""Numbers that are permuted together, so that intermediate copies stay in the cache."""

_LONG = 1024
"""Bytes of a row from which on it goes to its place at once, not through the cache."""


@dataclass(frozen=True, eq=False)
class Symmetry:
    """What can be done to the flat vector of a network without changing its function."""

    layout: ParameterLayout
    groups: tuple[Group, ...]
    """Units that may be permuted among each other."""
    scales: tuple[Group, ...] = ()
    """Units that may be scaled by positive factors, each by its own."""
    fixed: Mapping[str, str] = field(default_factory=dict)
    """Modules whose units must keep their places, and why."""

    @classmethod
    def from_module(cls, module: nn.Module, example_input: Tensor | Sequence[Tensor]) -> "Symmetry":
        """Find the symmetries of a network in evaluation mode, and prove them.

        Known are linear and convolutional layers (grouped and depthwise ones too), normalisations, attention, sums,
        products, concatenation, reshaping, pooling and element-wise functions. Units that meet anything else keep their
        places; :attr:`fixed` names them with the reason.

        Args:
            module: The network; it is not changed.
            example_input: Its inputs, as a batch of at least two; small images make the proof cheap.

        Raises:
            ValueError: The network cannot be traced (the message has the line of its code), or a group does not pass
                its proof.
        """
        examples = [example_input] if isinstance(example_input, Tensor) else list(example_input)
        permuted, scaled = trace(module, examples), trace(module, examples, scaling=True)
        layout = ParameterLayout.from_module(module)
        symmetry = cls(layout, permuted.groups, scaled.groups, permuted.fixed)
        _Proof(symmetry, module, examples).check()
        return symmetry

    def index(self, permutations: Sequence[Tensor]) -> Tensor:
        """Gather index of one permutation per group: ``vector[index]`` is the permuted network.

        Args:
            permutations: For each group (s,), or (n, s) for n networks at once.

        Returns:
            (d,) or (n, d) int64. To permute many networks use :meth:`apply`, which needs no such index.
        """
        many = permutations[0].ndim == 2 if permutations else False
        rows = [p if many else p[None] for p in permutations]
        start = torch.arange(self.layout.size, device=rows[0].device if rows else None)
        index = self.apply(start.expand(len(rows[0]) if rows else 1, -1), rows)
        return index if many else index[0]

    def random_permutations(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Independent uniform permutations for ``n`` networks: (n, s) per group, on the generator's device."""
        device = generator.device if generator is not None else torch.device("cpu")
        draws = (torch.rand(n, g.size, generator=generator, device=device, dtype=torch.float32) for g in self.groups)
        return [_orders(x) for x in draws]

    def apply(
        self,
        vectors: Tensor,
        permutations: Sequence[Tensor],
        *,
        rows: Tensor | None = None,
        out: Tensor | None = None,
        write: Callable[[Tensor, Tensor], object] | None = None,
    ) -> Tensor:
        """Permute each network of ``vectors`` (N, d) with its own row of ``permutations`` ((n, s) per group).

        Args:
            vectors: Networks.
            permutations: Of these n networks.
            rows: Which of ``vectors``, (n,) int64; they are read where they lie, also in a mapped file. Default: all.
                Or (k, n), then k networks share a permutation.
            out: Where the permuted networks (n, d) or (k, n, d) go; default: a new tensor.
            write: Puts permuted values (m, l) to their place in ``out`` (m, l); default: copies them.
        """
        self._check(vectors)
        vectors = vectors.contiguous()
        rows = torch.arange(len(vectors), device=vectors.device) if rows is None else rows
        n = rows.shape[-1]
        for group, permutation in zip(self.groups, permutations, strict=True):
            if permutation.shape != (n, group.size):
                raise ValueError(
                    f"group {group.name!r}: permutations must be {(n, group.size)}, got {tuple(permutation.shape)}"
                )
        out = vectors.new_empty(*rows.shape, self.layout.size) if out is None else out
        direct = write is None and not vectors.requires_grad and (out.dtype, out.stride(-1)) == (vectors.dtype, 1)
        rooms = (None, None) if vectors.requires_grad else vectors.new_empty(2, self._room(n)).unbind()
        networks, target = (rows, out) if rows.ndim == 2 else (rows[None], out[None])
        indices: dict[tuple[tuple[int, int], ...], Tensor] = {}
        for name, span, shape in self._stretches:
            values, places = vectors[:, span], target[..., span]
            steps = self._steps(name, shape, permutations, indices)
            if direct and [axis for axis, _, _ in steps] == [0]:
                row = steps[0][1] * math.prod(shape[1:])
                if row * vectors.element_size() >= _LONG:
                    for k, chosen in enumerate(networks):
                        _move_rows(values, chosen, steps[0][2], row, places[k])
                    continue
            count = max(1, _CACHED // math.prod(shape))
            for i in range(0, n, count):
                part = slice(i, i + count)
                moves = _Moves(shape, [(axis, block, order[part]) for axis, block, order in steps], rooms)
                for k, chosen in enumerate(networks):
                    moved, place = moves.take(values, chosen[part]), places[k, part]
                    place.copy_(moved) if write is None else write(moved, place)
        return out

    def _room(self, n: int) -> int:
        """Numbers that one chunk of :meth:`apply` holds at most."""
        largest = max((math.prod(shape) for _, _, shape in self._stretches), default=0)
        return min(n * largest, max(_CACHED, largest))

    def _steps(
        self,
        tensor: str,
        shape: Sequence[int],
        permutations: Sequence[Tensor],
        indices: dict[tuple[tuple[int, int], ...], Tensor],
    ) -> list[tuple[int, int, Tensor]]:
        """What moves in a tensor: axis, size of the blocks that move, and their order (n, blocks)."""
        steps = []
        for axis, members in sorted(self.moves.get(tensor, {}).items()):  # the largest rows first
            g, entry = members[0]
            if len(members) == 1 and entry.block:
                steps.append((axis, entry.block, permutations[g]))
                continue
            key = tuple((g, id(entry.positions)) for g, entry in members)
            if key not in indices:
                indices[key] = axis_index(members, shape[axis], permutations)
            steps.append((axis, 1, indices[key]))
        return steps

    def permute(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Permute the hidden units of each network of ``vectors`` (n, d) independently; functions stay the same."""
        permutations = [p.to(vectors.device) for p in self.random_permutations(len(vectors), generator)]
        return self.apply(vectors, permutations)

    def match(
        self,
        vectors: Tensor,
        reference: Tensor,
        *,
        max_sweeps: int = 100,
        generator: torch.Generator | None = None,
    ) -> list[Tensor]:
        """Permutations that bring each network near ``reference`` (d,): weight matching (Ainsworth et al. 2023).

        Coordinate descent over the groups: each step solves the assignment that maximises the inner product with the
        reference, the other groups held fixed, until no network gains. The inner product never decreases.

        Args:
            vectors: (n, d).
            reference: (d,).
            max_sweeps: Passes over all groups at most.
            generator: Draws the order of the groups anew in every pass, as published; default: in order.

        Returns:
            (n, s) per group, for :meth:`apply`.
        """
        self._check(vectors)
        if reference.shape != (self.layout.size,):
            raise ValueError(f"expected a reference ({self.layout.size},), got {tuple(reference.shape)}")
        matching = Matching(self.layout, self.groups, self.moves, reference.to(vectors))
        return matching.run(vectors, max_sweeps, generator)

    def align(
        self,
        vectors: Tensor,
        reference: Tensor,
        *,
        max_sweeps: int = 100,
        generator: torch.Generator | None = None,
    ) -> Tensor:
        """Permute each network of ``vectors`` (n, d) towards ``reference`` (d,); see :meth:`match`."""
        return self.apply(vectors, self.match(vectors, reference, max_sweeps=max_sweeps, generator=generator))

    def balance(self, vectors: Tensor, *, max_sweeps: int = 1000) -> Tensor:
        """Scale every ReLU unit positively so that the norms of its incoming and outgoing weights are equal.

        A unit's incoming weights and bias (those of its normalisation, if it has one) times a, its outgoing weights
        divided by a > 0, compute the same function; the balanced network is the one of least norm among these and
        therefore canonical. Units without incoming or without outgoing weights stay as they are.
        """
        self._check(vectors)
        vectors = vectors.clone()
        for _ in range(max_sweeps):
            change = 0.0
            for group in self.scales:
                norm_in, norm_out = (self._norms(vectors, group, reads=reads) for reads in (False, True))
                alive = (norm_in > 0) & (norm_out > 0)
                factors = torch.where(alive, (norm_out / norm_in).sqrt(), 1.0)
                self._scale(vectors, group, factors)
                change = max(change, (factors - 1).abs().max().item()) if factors.numel() else change
            if len(self.scales) < 2 or change < 4 * torch.finfo(vectors.dtype).eps:
                break
        return vectors

    def _norms(self, vectors: Tensor, group: Group, *, reads: bool) -> Tensor:
        """Norms (n, s) of all weights that make the units, or of all that read them."""
        total = vectors.new_zeros(len(vectors), group.size)
        for entry in (entry for entry in group.entries if entry.reads == reads):
            squares = self._rows(vectors, entry).square().sum((1, 3))
            total += squares[:, entry.positions.to(vectors.device)].sum(2)
        return total.sqrt()

    def _scale(self, vectors: Tensor, group: Group, factors: Tensor) -> None:
        """Multiply what makes the units by ``factors`` (n, s), and divide what reads them, in place."""
        for entry in group.entries:
            rows = self._rows(vectors, entry)
            positions = entry.positions.to(vectors.device)
            scale = vectors.new_ones(len(vectors), rows.shape[2])
            scale[:, positions] = (1 / factors if entry.reads else factors)[:, :, None].expand(-1, *positions.shape)
            rows *= scale[:, None, :, None]

    def _rows(self, vectors: Tensor, entry: Entry) -> Tensor:
        """View (n, before, axis, after) of the tensor of an entry."""
        shape = self._shapes[entry.tensor]
        sizes = (math.prod(shape[: entry.axis]), shape[entry.axis], math.prod(shape[entry.axis + 1 :]))
        return vectors[:, self.layout.slices[entry.tensor]].view(len(vectors), *sizes)

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.layout.size:
            raise ValueError(f"expected vectors (n, {self.layout.size}), got {tuple(vectors.shape)}")

    @cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return dict(zip(self.layout.names, self.layout.shapes, strict=True))

    @cached_property
    def _stretches(self) -> list[tuple[str, slice, tuple[int, ...]]]:
        """The tensors, with their places in the vector; neighbours that never move are one."""
        found: list[tuple[str, slice, tuple[int, ...]]] = []
        for spec in self.layout.tensors:
            span, shape = self.layout.slices[spec.name], spec.shape
            if found and spec.name not in self.moves and found[-1][0] not in self.moves:
                span = slice(found.pop()[1].start, span.stop)
                shape = (span.stop - span.start,)
            found.append((spec.name, span, shape))
        return found

    @cached_property
    def moves(self) -> Moves:
        """What permutations move, tensor by tensor."""
        moves: dict[str, dict[int, list[tuple[int, Entry]]]] = {}
        for g, group in enumerate(self.groups):
            for entry in group.entries:
                moves.setdefault(entry.tensor, {}).setdefault(entry.axis, []).append((g, entry))
        return moves


def _orders(draws: Tensor) -> Tensor:
    """For each row of different numbers in [0, 1), (n, s) float32, their places in rising order."""
    size = draws.shape[1]
    # non-negative floats are in the order of their bits; sorting integers (NumPy's is the fastest) beats argsort
    keys = draws.view(torch.int32).long() * size + torch.arange(size, device=draws.device)
    ordered = keys.sort(1)[0] if keys.device.type != "cpu" else torch.from_numpy(np.sort(keys.numpy(), axis=1))
    return ordered % size


def _move_rows(values: Tensor, chosen: Tensor, permutation: Tensor, row: int, out: Tensor) -> None:
    """Permute the rows of ``chosen`` stacked tensors (N, s * row) with a permutation (n, s) for each."""
    size = values.element_size()
    offsets = [x.data_ptr() | size * (x.storage_offset() | x.stride(0) | row) for x in (values, out)]
    if all(offset % 16 == 0 for offset in offsets):  # 16 bytes at a time, whatever they mean
        values, out, row = values.view(torch.complex128), out.view(torch.complex128), size * row // 16
    index = [chosen[:, None], permutation]
    torch.ops.aten.index.Tensor_out(values.unflatten(1, (-1, row)), index, out=out.unflatten(1, (-1, row)))


class _Moves:
    """Permutes n stacked tensors, (n, prod(shape)), with intermediate copies in two rooms.

    Each step gives an axis, the size of the blocks that move and their order (n, s) for each tensor; axes ascend.
    """

    def __init__(
        self, shape: Sequence[int], steps: Sequence[tuple[int, int, Tensor]], rooms: Sequence[Tensor | None]
    ) -> None:
        numbers = len(steps) > 0 and steps[-1][:2] == (len(shape) - 1, 1)  # not rows, but single numbers move last
        self.shape, self.rooms, self.rows = shape, rooms, steps[:-1] if numbers else steps
        self.order = steps[-1][2] if numbers else None
        self.index: Tensor | None = None  # places of the rows in tensors that were read, the same for all networks

    def take(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Permute ``chosen`` (n,) of stacked tensors (N, prod(shape))."""
        row = self.rows[-1][1] * math.prod(self.shape[self.rows[-1][0] + 1 :]) if self.rows else 0
        if row * values.element_size() >= _LONG:
            values = _copy_rows(values, self._places(values, chosen), row, self.rooms[1])
        else:  # short rows are read from the cache
            values = _copy_rows(values, chosen * values.stride(0), values.shape[1], self.rooms[0])
            if self.rows:
                if self.index is None:
                    self.index = self._places(values, torch.arange(len(values), device=values.device))
                values = _copy_rows(values, self.index, row, self.rooms[1])
        return values if self.order is None else _copy_numbers(values, self.order, self.rooms[0 if self.rows else 1])

    def _places(self, values: Tensor, chosen: Tensor) -> Tensor:
        """Where the rows of the permuted tensors, (n, rows), lie in the memory of ``values``; all steps in one."""
        kind = torch.int32 if len(values) * values.stride(0) < 2**31 else torch.int64
        places, inner = (chosen[:, None] * values.stride(0)).to(kind), math.prod(self.shape)
        for axis, block, order in self.rows:
            if (size := math.prod(self.shape[axis:])) < inner:
                outer = torch.arange(0, inner, size, dtype=kind, device=values.device)
                places = (places[..., None] + outer).flatten(1)
            inner = block * math.prod(self.shape[axis + 1 :])
            places = (places[..., None] + (order * inner).to(kind)[:, None]).flatten(1)
        return places


def _copy_rows(values: Tensor, places: Tensor, row: int, room: Tensor | None) -> Tensor:
    """The ``row`` numbers from each of ``places`` (n, ...) on, counted in the memory of stacked tensors; (n, numbers)."""
    windows = values.as_strided(((len(values) - 1) * values.stride(0) + values.shape[1] - row + 1, row), (1, 1))
    out = None if room is None else room[: places.numel() * row].view(-1, row)
    return torch.index_select(windows, 0, places.flatten(), out=out).view(len(places), -1)


def _copy_numbers(values: Tensor, order: Tensor, room: Tensor | None) -> Tensor:
    """Stacked tensors (n, ...) with the numbers of the last axis in the order (n, s)."""
    values = values.unflatten(1, (-1, order.shape[1]))
    where = order[:, None].expand(values.shape)  # a view, no index in memory
    out = None if room is None else room[: values.numel()].view(values.shape)
    return torch.gather(values, 2, where, out=out).flatten(1)


class _Proof:
    """Permutes and scales a float64 copy with random weights, and compares the outputs."""

    def __init__(self, symmetry: Symmetry, module: nn.Module, examples: Sequence[Tensor]) -> None:
        self.symmetry = symmetry
        self.replica = copy.deepcopy(module).cpu().double().eval()
        self.generator = torch.Generator().manual_seed(0)
        self.inputs = [self._normal(x.shape) if x.is_floating_point() else x.cpu() for x in examples]
        self.vector = self._varied()
        self.before = self._outputs(self.vector)

    def check(self) -> None:
        """Permute, then scale, all units at once; if the output changes, look for the group that does it.

        Raises:
            ValueError: A group's claim is wrong; the message names its module.
        """
        symmetry, generator = self.symmetry, self.generator
        permutations = [torch.randperm(group.size, generator=generator)[None] for group in symmetry.groups]
        if permutations and self._changed(symmetry.apply(self.vector[None], permutations)):
            for g, group in enumerate(symmetry.groups):
                alone = [p if i == g else p.sort()[0] for i, p in enumerate(permutations)]
                if change := self._changed(symmetry.apply(self.vector[None], alone)):
                    raise ValueError(f"module {group.name!r}: permuting its units changes the output by {change:.1e}")
            raise ValueError("permuting the units of several modules at once changes the output")
        scaled = self.vector[None].clone()
        factors = [self._normal((1, group.size)).mul(0.3).exp() for group in symmetry.scales]
        for group, factor in zip(symmetry.scales, factors, strict=True):
            symmetry._scale(scaled, group, factor)
        if symmetry.scales and self._changed(scaled):
            for group, factor in zip(symmetry.scales, factors, strict=True):
                scaled = self.vector[None].clone()
                symmetry._scale(scaled, group, factor)
                if change := self._changed(scaled):
                    raise ValueError(f"module {group.name!r}: scaling its units changes the output by {change:.1e}")
            raise ValueError("scaling the units of several modules at once changes the output")

    def _normal(self, shape: Sequence[int]) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator)

    def _varied(self) -> Tensor:
        """The network's own weights with noise on top, so that no two units are alike."""
        layout = self.symmetry.layout
        vector = layout.flatten(self.replica).detach()
        for spec in layout.tensors:
            own = vector[layout.slices[spec.name]]
            scale = 0.1 if len(spec.shape) < 2 else math.sqrt(spec.shape[0] / spec.size)
            own += (torch.rand(spec.size, generator=self.generator) - 0.5) * scale
            if spec.name.endswith("running_var"):
                own.abs_().add_(0.1)
        return vector

    def _changed(self, vectors: Tensor) -> float:
        """How much the output of another vector (1, d) differs, 0 if it is within the tolerance."""
        difference = (
            (self._outputs(vectors[0]) - self.before).abs().max() / self.before.abs().max().clamp(min=1)
        ).item()
        return 0.0 if difference < PROOF_TOLERANCE else difference

    @torch.no_grad()
    def _outputs(self, vector: Tensor) -> Tensor:
        weights = self.symmetry.layout.unflatten(vector)
        output = torch.func.functional_call(self.replica, weights, tuple(self.inputs))
        return torch.cat([leaf.flatten() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)])
