"""Weight matching: permutations of hidden units that bring networks near a reference (Ainsworth et al. 2023, alg. 1).

The similarity of a group is a sum of terms, one per tensor axis on which its units stand. A term depends on the
permutations of the tensor's other axis only, so it is kept until these change, and if few of them change it is corrected
by the difference. All networks are worked on at once.

Shapes: ``n`` networks; a term has ``s`` units, ``m`` positions on the other axis and ``r`` numbers for each pair.
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from zoo_common.layout import ParameterLayout
from zoo_common.tracing import Entry, Group

Moves = Mapping[str, Mapping[int, Sequence[tuple[int, Entry]]]]
"""For each tensor and axis the (group, entry) pairs that move it."""

_MEMORY = 2**27
"""Numbers in the working copies of the networks that are matched together."""

_WORTH_A_THREAD = 64
"""Units from which on an assignment takes longer than handing it to a thread."""

_TOGETHER = 2**20
"""Numbers of several networks' tensors that are worth one product for all of them."""

_SMALL = 2**14
"""Numbers of a tensor up to which all its positions are worth less time than finding those that moved."""


def _assign(similarity: Tensor, current: Tensor) -> tuple[Tensor, Tensor]:
    """Best assignments.

    Args:
        similarity: (n, s, s), of unit i of the reference and unit j of each network.
        current: Permutations (n, s) as they are.

    Returns:
        Permutations (n, s), and which of them gain (n,) on the current ones by more than rounding.
    """
    from scipy.optimize import linear_sum_assignment

    def best(table: np.ndarray) -> np.ndarray:
        columns: np.ndarray = linear_sum_assignment(table, maximize=True)[1]
        return columns

    tables, threads = similarity.cpu().numpy(), torch.get_num_threads()
    if threads == 1 or similarity.shape[1] < _WORTH_A_THREAD:
        chosen = list(map(best, tables))
    else:
        with ThreadPoolExecutor(threads) as pool:
            chosen = list(pool.map(best, tables))
    permutation = torch.from_numpy(np.reshape(chosen, current.shape)).to(current.device, torch.int64)
    values = [similarity.gather(2, p[..., None]).double().sum((1, 2)) for p in (permutation, current)]
    largest = torch.maximum(similarity.amax((1, 2)), -similarity.amin((1, 2)))
    rounding = 4 * current.shape[1] * torch.finfo(similarity.dtype).eps * largest
    gained = values[0] - values[1] > rounding
    return torch.where(gained[:, None], permutation, current), gained


class _Term:
    """Similarities that one tensor adds to a group, and the permutations of its other axis that they hold for."""

    def __init__(self, entry: Entry, shape: Sequence[int], other: int | None, reference: Tensor) -> None:
        self.entry, self.shape, self.other = entry, shape, other
        self.reference = self.arrange(reference[None])[0]  # (m, r, s)

    def arrange(self, tensors: Tensor) -> Tensor:
        """Stacked tensors (n, numel) as (n, m, r, s), the order that makes a permutation a copy of rows."""
        axis, values = self.entry.axis + 1, tensors.view(len(tensors), *self.shape)
        if not self.entry.block:
            values = values.index_select(axis, self.entry.positions.flatten().to(values.device))
        # the k positions of a unit take the place of its axis
        values = values.unflatten(axis, tuple(self.entry.positions.shape)).movedim(axis, -1)
        values = values.unsqueeze(1) if self.other is None else values.movedim(self.other + 1, 1)
        return values.flatten(2, -2).contiguous()

    def load(self, tensors: Tensor) -> None:
        """Take the tensors (n, numel) of the networks to match."""
        self.networks = self.arrange(tensors)
        self.index: Tensor | None = None
        self.stamp: list[int] | None = None

    def add(self, total: Tensor, index: Tensor) -> Tensor:
        """Bring the similarities ``total`` (n, s, s) up to permutations (n, m) of the other axis; which changed (n,)."""
        if self.index is None:
            every = torch.arange(len(index), device=index.device)
            _add_products(total, self.reference[None], self._taken(every, index))
            self.index = index
            return torch.ones_like(every, dtype=torch.bool)
        moved = index != self.index
        if self.networks[0].numel() <= _SMALL:
            rows = moved.any(1).nonzero()[:, 0]
            part = total[rows]
            new, old = (self._taken(rows, x[rows]) for x in (index, self.index))
            _add_products(part, self.reference[None], new.sub_(old))
            total[rows] = part
            self.index = index
            return moved.any(1)
        counts = moved.sum(1)
        order = counts.argsort()[(counts == 0).sum() :]
        for rows in order.split(max(1, _TOGETHER // self.networks[0].numel())):  # similar counts together
            if not len(rows):  # of nothing, split makes one part
                break
            # networks with fewer positions that moved have some that did not: they add nothing
            places = moved[rows].to(torch.int8).topk(int(counts[rows[-1]]), dim=1)[1]
            new, old = (self._taken(rows, x[rows].gather(1, places)) for x in (index, self.index))
            ours = self.reference.index_select(0, places.flatten()).view(new.shape)
            part = total[rows[0] : rows[0] + 1] if len(rows) == 1 else total[rows]
            _add_products(part, ours, new.sub_(old))
            if len(rows) > 1:
                total[rows] = part
        self.index = index
        return counts > 0

    def _taken(self, rows: Tensor, index: Tensor) -> Tensor:
        """Positions ``index`` (n', m') of some networks, (n', m', r, s)."""
        n, m, r, s = self.networks.shape
        taken = (rows[:, None] * m + index).flatten()
        return self.networks.view(n * m, r * s).index_select(0, taken).view(len(rows), -1, r, s)


def _add_products(total: Tensor, ours: Tensor, theirs: Tensor) -> None:
    """Add the inner products of (1 or n, m, r, s) and (n, m, r, s) to ``total`` (n, s, s)."""
    n, size = len(theirs), theirs.shape[-1]
    total.baddbmm_(ours.reshape(len(ours), -1, size).transpose(1, 2).expand(n, -1, -1), theirs.view(n, -1, size))


class Matching:
    """Matching of networks with one reference (d,), whose side of every term is arranged once."""

    def __init__(self, layout: ParameterLayout, groups: Sequence[Group], moves: Moves, reference: Tensor) -> None:
        self.layout, self.groups, self.moves, self.reference = layout, groups, moves, reference
        self.shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self.terms = [[self._term(entry) for entry in group.entries] for group in groups]
        self.paired = [
            any(g in (h for h, _ in self._others(e)) for e in group.entries) for g, group in enumerate(groups)
        ]
        """Whether some tensor has the group on two axes: that part of the objective is quadratic in its permutation."""

    def _others(self, entry: Entry) -> Sequence[tuple[int, Entry]]:
        """What moves the other axis of an entry's tensor."""
        return [pair for axis, pairs in self.moves[entry.tensor].items() if axis != entry.axis for pair in pairs]

    def _term(self, entry: Entry) -> _Term:
        others = {other.axis for _, other in self._others(entry)}
        assert len(others) < 2, f"{entry.tensor}: more than two axes are permuted"
        reference = self.reference[self.layout.slices[entry.tensor]]
        return _Term(entry, self.shapes[entry.tensor], min(others, default=None), reference)

    def run(self, vectors: Tensor, max_sweeps: int, generator: torch.Generator | None) -> list[Tensor]:
        """Permutations (n, s) per group for networks (n, d)."""
        step = max(1, _MEMORY // self.layout.size)
        parts = [self._run(vectors[i : i + step], max_sweeps, generator) for i in range(0, len(vectors), step)]
        if not parts:
            return [torch.zeros(0, group.size, dtype=torch.int64, device=vectors.device) for group in self.groups]
        return [torch.cat(rows) for rows in zip(*parts, strict=True)]

    def _run(self, vectors: Tensor, max_sweeps: int, generator: torch.Generator | None) -> list[Tensor]:
        permutations = [
            torch.arange(group.size, device=vectors.device).repeat(len(vectors), 1) for group in self.groups
        ]
        for term in (term for terms in self.terms for term in terms):
            term.load(vectors[:, self.layout.slices[term.entry.tensor]])
        count = len(self.groups)
        self.gains = [0] * count
        totals = [vectors.new_zeros(len(vectors), group.size, group.size) for group in self.groups]
        for _ in range(max_sweeps):
            order = range(count) if generator is None else torch.randperm(count, generator=generator).tolist()
            gained = [self._visit(g, permutations, totals[g], vectors) for g in order]
            if not any(gained):
                break
        return permutations

    def _visit(self, g: int, permutations: list[Tensor], total: Tensor, vectors: Tensor) -> bool:
        """Solve one group for the networks whose similarities have changed; whether any gained."""
        changed = torch.zeros(len(vectors), dtype=torch.bool, device=vectors.device)
        for term in self.terms[g]:
            stamp = [self.gains[h] for h, _ in self._others(term.entry)]
            if stamp == term.stamp:  # nothing that it depends on has changed
                continue
            term.stamp = stamp
            changed |= term.add(total, self._index(term, permutations))
        rows = changed.nonzero()[:, 0]
        if not len(rows):
            return False
        found, gained = _assign(total if len(rows) == len(total) else total[rows], permutations[g][rows])
        if self.paired[g]:
            gained &= self._gain(g, found, permutations, vectors, rows) > 0
            found = torch.where(gained[:, None], found, permutations[g][rows])
        permutations[g][rows] = found
        progress = bool(gained.any())
        self.gains[g] += progress
        return progress

    def _index(self, term: _Term, permutations: Sequence[Tensor]) -> Tensor:
        """Where the positions of a term's other axis are taken from, (n, m)."""
        if term.other is None:
            return torch.zeros_like(permutations[0][:, :1])
        return axis_index(self._others(term.entry), self.shapes[term.entry.tensor][term.other], permutations)

    def _gain(self, g: int, found: Tensor, permutations: Sequence[Tensor], vectors: Tensor, rows: Tensor) -> Tensor:
        """True change of the objective (n',) if group g takes the permutations ``found``."""
        values = []
        for candidate in (found, permutations[g][rows]):
            trial = [p[rows] for p in permutations]
            trial[g] = candidate
            total = torch.zeros(len(rows), dtype=torch.float64, device=vectors.device)
            for name in dict.fromkeys(entry.tensor for entry in self.groups[g].entries):
                span, shape = self.layout.slices[name], self.shapes[name]
                tensors = vectors[rows, span].view(len(rows), *shape)
                for axis, members in self.moves[name].items():
                    index = axis_index(members, shape[axis], trial)
                    index = index.view(len(rows), *[1] * axis, -1, *[1] * (len(shape) - axis - 1))
                    tensors = tensors.gather(axis + 1, index.expand(tensors.shape))
                total += tensors.flatten(1).double() @ self.reference[span].double()
            values.append(total)
        return values[0] - values[1]


def axis_index(members: Sequence[tuple[int, Entry]], size: int, permutations: Sequence[Tensor]) -> Tensor:
    """Where each position of an axis is taken from: (n, size), from one permutation (n, s) for each group."""
    n, device = len(permutations[0]), permutations[0].device
    index = torch.arange(size, device=device).repeat(n, 1)
    for g, entry in members:
        positions = entry.positions.to(device)
        index[:, positions] = positions[permutations[g]]
    return index
