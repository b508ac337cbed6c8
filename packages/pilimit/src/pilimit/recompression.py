r"""Fewer atoms for nearly the same function: projection on a subset in the space of the arc-cosine kernel.

A layer is :math:`\sum_m C_m K(B_m, \cdot)` with :math:`C = \mathrm{Amult}\,A` and :math:`K = F_{00}`. For a subset S of
its atoms the best coefficients are :math:`K_{SS}^{-1} K_{S\cdot} C`; the distance to them is the operator norm of the
difference, computed exactly. For every input g of the layer, the output changes by at most that norm times
:math:`\lVert g \rVert / \sqrt 2`.

Shapes: ``m`` atoms, ``k`` kept directions, ``p`` columns of coefficients.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pilimit.atoms import Atoms, align
from pilimit.expectations import TWO_PI, wide
from pilimit.infinite import InfMLP
from pilimit.optim import PiSGD

_ROWS = 1024
"""Of the kernel at once."""
_CANDIDATES = 128
"""From which a few pivots at once are chosen."""
_JITTER = 1e-12
"""Of the trace of the kernel of the kept atoms."""


@dataclass(frozen=True)
class Compression:
    """What became of the atoms of one layer."""

    before: int
    after: int
    norm: float
    """Operator norm of the layer before."""
    error: float
    """Operator norm of the difference, exact for the numbers that are stored."""
    velocity_norm: float = 0.0
    velocity_error: float = 0.0


def gram(x: Tensor, y: Tensor) -> Tensor:
    """F00 of all pairs of unit rows (n, r) and (m, r)."""
    c = (x @ y.T).clamp_(-1, 1)
    angle = c.neg()
    root = (1 + c).mul_(angle + 1).sqrt_()
    return root.addcmul_(c, angle.acos_()).mul_(1 / TWO_PI)


def choose_pivots(b: Tensor, weights: Tensor, count: int) -> Tensor:
    """Indices of at most ``count`` of the unit rows ``b`` (m, r), by Cholesky with pivoting on their kernel.

    The next pivots are those with the largest remainder times weight (m,), a few at a time so that the work is products
    of matrices; rows that the chosen ones represent to rounding are never chosen.
    """
    count = min(count, len(b))
    factor = b.new_zeros(len(b), count)
    rest = b.new_full((len(b),), 0.5)
    floor, done, chosen = 100 * torch.finfo(b.dtype).eps, 0, []
    while done < count:
        score = torch.where(rest > floor, rest * weights, 0.0)
        best = score.topk(min(_CANDIDATES, len(b)))
        if not best.values[0] > 0:
            break
        columns, own = _local_pivots(b, best.indices, factor[:, :done], weights, count - done, floor)
        block = gram(b, b[columns])
        block -= factor[:, :done] @ factor[columns, :done].T
        block = torch.linalg.solve_triangular(own, block.T, upper=False).T
        factor[:, done : done + len(columns)] = block
        rest = (rest - block.square().sum(1)).clamp_(min=0)
        rest[columns] = 0
        chosen.append(columns)
        done += len(columns)
    return torch.cat(chosen) if chosen else torch.empty(0, dtype=torch.long, device=b.device)


def _local_pivots(
    b: Tensor, candidates: Tensor, factor: Tensor, weights: Tensor, limit: int, floor: float
) -> tuple[Tensor, Tensor]:
    """The best of some candidates while they are nearly as good as the best, and the factor of their remainder."""
    rows = b[candidates]
    remainder = (gram(rows, rows) - factor[candidates] @ factor[candidates].T).cpu()
    weight = weights[candidates].cpu()
    steps, picks = remainder.new_zeros(len(candidates), len(candidates)), []
    rest = remainder.diagonal().clone()
    first = float((rest * weight).max())
    for i in range(min(limit, len(candidates))):
        score, pick = (rest * weight).max(0)
        if i and (score < first / 4 or rest[pick] < floor):
            break
        column = remainder[:, pick] - steps[:, :i] @ steps[pick, :i]
        steps[:, i] = column / rest[pick].sqrt()
        rest = (rest - steps[:, i].square()).clamp_(min=0)
        rest[pick] = 0
        picks.append(int(pick))
    return candidates[picks], steps[picks, : len(picks)].tril().to(b)


def _project(b: Tensor, c: Tensor, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients (k, p) of the chosen rows that are nearest to all; their kernel (k, k), and with all times c (k, p)."""
    own, target = b.new_empty(len(chosen), len(chosen)), c.new_empty(len(chosen), c.shape[1])
    for start in range(0, len(chosen), _ROWS):
        rows = slice(start, start + _ROWS)
        values = gram(b[chosen[rows]], b)
        own[rows], target[rows] = values[:, chosen], values @ c
    own.fill_diagonal_(0.5)
    jitter = torch.eye(len(chosen), dtype=b.dtype, device=b.device) * (_JITTER * len(chosen) / 2)
    return torch.cholesky_solve(target, torch.linalg.cholesky(own + jitter)), target, own


def _square_norm(b: Tensor, c: Tensor) -> Tensor:
    """Diagonal sums of ``c^T K c`` per column, (p,)."""
    total = c.new_zeros(c.shape[1])
    for start in range(0, len(b), _ROWS):
        rows = slice(start, start + _ROWS)
        own = gram(b[rows], b[rows]).fill_diagonal_(0.5)
        total += (c[rows] * (own @ c[rows])).sum(0)
        if start:
            total += 2 * (c[rows] * (gram(b[rows], b[:start]) @ c[:start])).sum(0)
    return total


@torch.no_grad()
def recompress(
    atoms: Atoms, keep: int, velocity: list[Tensor] | None = None
) -> tuple[Compression, list[Tensor] | None]:
    """Replace the atoms of a layer by at most ``keep`` of them with new coefficients.

    With momentum, an atom is kept twice, once with what it contributes to the layer and once with its part of the
    velocity: multipliers then change in both as if the coefficients did, so training goes on by the same rules.

    Args:
        atoms: Of one layer; changed.
        keep: Number of atoms afterwards, at most.
        velocity: Multipliers of the velocity per block, as the optimizer has them.

    Returns:
        What happened, and the new velocity.
    """
    before, p = len(atoms), atoms.r_out
    a, rows, amult = atoms.tensors()
    b, a = F.normalize(rows.double(), dim=1), a.double()
    parts = [a * amult.double()[:, None]]
    if velocity is not None:
        v = torch.cat([part[: block.size] for part, block in zip(velocity, atoms.blocks, strict=True)])
        parts.append(a * v.double()[:, None])
    c = torch.cat(parts, 1)
    weights = torch.stack([part.square().sum(1) / part.square().sum().clamp(min=1e-300) for part in parts]).sum(0)
    chosen = choose_pivots(b.to(wide(atoms.dtype)), weights.to(wide(atoms.dtype)), keep // len(parts))
    found, target, own = _project(b, c, chosen)
    atoms.clear()
    scales = [part.norm(dim=1) for part in found.split(p, 1)]
    stored = []
    for i, (part, scale) in enumerate(zip(found.split(p, 1), scales, strict=True)):
        unit = (part / scale.clamp(min=1e-300)[:, None]).to(atoms.dtype)
        scale = scale.to(amult.dtype)
        atoms.append(unit, rows[chosen], scale if not i else torch.zeros_like(scale))
        stored.append(unit.double() * scale.double()[:, None])
    norms = _norms(b, c, chosen, torch.cat(stored, 1), target, own).view(2, len(parts), p).sum(2)
    compression = Compression(before, len(atoms), *norms.clamp(min=0).sqrt().T.flatten().tolist())
    if velocity is None:
        return compression, None
    return compression, align(torch.cat([torch.zeros_like(scales[1]), scales[1]]).to(amult.dtype), atoms)


def _norms(b: Tensor, c: Tensor, chosen: Tensor, stored: Tensor, target: Tensor, own: Tensor) -> Tensor:
    """Square norms per column, (2, p): of the layer, and of its difference from the chosen rows with new coefficients."""
    others = torch.ones(len(b), dtype=torch.bool, device=b.device)
    others[chosen] = False
    c_own = c[chosen]
    squares = (2 * c_own * target).sum(0) - (c_own * (own @ c_own)).sum(0) + _square_norm(b[others], c[others])
    distance = squares - 2 * (stored * target).sum(0) + (stored * (own @ stored)).sum(0)
    return torch.stack([squares, distance])


@dataclass(frozen=True)
class Reduction:
    """What a recompression did to a net."""

    layers: tuple[Compression, ...]
    output_change: float | None
    """Of the outputs on held-out inputs, relative, in the Euclidean norm; measured."""
    last_layer_bound: float | None
    """No output on the held-out inputs changed by more than that through the output layer; layers before it have no bound."""


@torch.no_grad()
def reduce_atoms(
    net: InfMLP, keep: int, *, optimizer: PiSGD | None = None, held_out: Tensor | None = None
) -> Reduction:
    """Recompress every layer of a net, velocities of its optimizer included.

    Args:
        net: The net; staged rows stay staged.
        keep: Atoms per layer afterwards, at most.
        optimizer: Of the net.
        held_out: Inputs (n, ...) on which the change of the outputs is measured.

    Raises:
        ValueError: ``keep`` is below 1 (2 with momentum).
    """
    layers = net.infinite_layers()
    states = [optimizer.state.get(layer.weight, {}) if optimizer else {} for layer in layers]
    least = 2 if any("velocity" in state for state in states) else 1
    if keep < least:
        raise ValueError(f"at least {least} atoms must be kept, got {keep}")
    before = None if held_out is None else net(held_out)
    done = []
    for layer, state in zip(layers, states, strict=True):
        velocity = align(state["velocity"], layer.atoms) if "velocity" in state else None
        compression, velocity = recompress(layer.atoms, keep, velocity)
        if velocity is not None:
            state["velocity"] = velocity
        done.append(compression)
    if held_out is None or before is None:
        return Reduction(tuple(done), None, None)
    change = (net(held_out) - before).norm() / before.norm().clamp(min=1e-30)
    g = net.pre_activations(held_out)
    largest = 1.0 if net.layernorm else float(g.norm(dim=1).max())
    bound = abs(net.last_layer_alpha) * done[-1].error * largest / math.sqrt(2)
    return Reduction(tuple(done), float(change), bound)
