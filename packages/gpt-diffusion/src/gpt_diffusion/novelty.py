"""Distance of networks to the checkpoints of a zoo, whatever the order and the scale of their hidden units.

Shapes: ``n`` networks asked about, ``m`` checkpoints of the zoo, ``D`` weights.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from zoo_common.symmetry import Symmetry
from zoo_common.zoo import Zoo

from gpt_diffusion.units import UnitTokens

#: Entries of the table of unit distances that is computed at once, and alignments of one network.
_TABLE, _ALIGNMENTS = 2**22, 48
#: Rounding of the bounds, relative to the squared norms.
_SLACK = 1e-5


class Nearest(NamedTuple):
    """The nearest checkpoint of each network, (n,) each."""

    distance: Tensor
    """Euclidean distance after alignment."""
    run: Tensor
    """Index of the run in the zoo."""
    checkpoint: Tensor
    """Index of the checkpoint within the run."""
    other_distance: Tensor
    """Distance to the nearest checkpoint of any other run; infinite if there is no other."""


@torch.no_grad()
def nearest_checkpoints(
    networks: Tensor,
    zoo: Zoo,
    runs: np.ndarray,
    symmetry: Symmetry,
    *,
    progress: Callable[[int, int], object] | None = None,
) -> Nearest:
    """Nearest checkpoint of the given runs up to permutations and positive ReLU scalings of hidden units.

    All vectors are brought to their canonical scales. A lower bound of the distance (the dual of the assignment of
    units, after one step of the Hungarian method) orders the checkpoints; they are aligned in this order until no bound
    is below the second best run found. With one hidden layer the result is exact; with more, distances are those of
    weight matching, upper bounds, and at most 48 checkpoints are aligned with each network.

    Args:
        networks: Weights (n, D), raw.
        zoo: Where the checkpoints are.
        runs: Indices of the runs to search; all their checkpoints are.
        symmetry: Of the task network.
        progress: Called with (checkpoints looked at, all of them).

    Raises:
        ValueError: No runs, or networks of another size.
    """
    if len(runs) == 0:
        raise ValueError("no runs to compare with")
    networks = symmetry.balance(networks.float().cpu())
    counts = [zoo.runs[int(run)].checkpoints for run in runs]
    run_of = np.repeat(runs, counts)
    checkpoint_of = np.concatenate([np.arange(count) for count in counts])
    tokens = UnitTokens.from_symmetry(symmetry)

    def stored(rows: np.ndarray | slice) -> Tensor:
        return symmetry.balance(zoo.params.gather(run_of[rows], checkpoint_of[rows]))

    bounds = torch.empty(len(networks), len(run_of))
    entries = len(networks) * max(len(index) for index in tokens.own) ** 2
    width = min(len(run_of), max(16, _TABLE // max(entries, 1)))
    for first in range(0, len(run_of), width):
        rows = slice(first, first + width)
        bounds[:, rows] = _lower_bound(networks, stored(rows), tokens)
        if progress is not None:
            progress(min(first + width, len(run_of)), len(run_of))
    found = [_search(network, bound, run_of, stored, symmetry) for network, bound in zip(networks, bounds, strict=True)]
    nearest = np.array([row for _, row, _ in found], dtype=np.int64)
    return Nearest(
        torch.tensor([distance for distance, _, _ in found]),
        torch.from_numpy(run_of[nearest]),
        torch.from_numpy(checkpoint_of[nearest]),
        torch.tensor([other for _, _, other in found]),
    )


def aligned_distances(networks: Tensor, symmetry: Symmetry) -> Tensor:
    """Distances of all pairs of networks (n, D), aligned and on canonical scales, (n (n - 1) / 2,)."""
    networks = symmetry.balance(networks.float().cpu())
    rows = [(symmetry.align(networks[i + 1 :], a) - a).norm(dim=1) for i, a in enumerate(networks[:-1])]
    return torch.cat([torch.zeros(0), *rows])


def _lower_bound(networks: Tensor, block: Tensor, tokens: UnitTokens) -> Tensor:
    """No alignment of a checkpoint comes nearer than this squared distance, (n, m)."""
    bound = _squared(networks[:, tokens.rest], block[:, tokens.rest])
    for index in tokens.own:
        a, b = networks[:, index], block[:, index]  # (n, u, k), (m, u, k)
        cost = _squared(a.flatten(0, 1), b.flatten(0, 1)).view(len(a), a.shape[1], len(b), b.shape[1])
        row = cost.amin(3)
        bound += row.sum(1) + cost.sub_(row[..., None]).amin(1).sum(2)
    return bound - _SLACK * (networks.square().sum(1)[:, None] + block.square().sum(1))


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of all rows of ``a`` (i, k) from all rows of ``b`` (j, k): (i, j)."""
    return torch.addmm(b.square().sum(1), a, b.T, alpha=-2).add_(a.square().sum(1)[:, None]).clamp_min_(0)


def _search(
    network: Tensor,
    bound: Tensor,
    run_of: np.ndarray,
    stored: Callable[[np.ndarray], Tensor],
    symmetry: Symmetry,
) -> tuple[float, int, float]:
    """Distance and row of the nearest checkpoint of one network, and the distance of the nearest other run."""
    best: dict[int, tuple[float, int]] = {}  # by run
    order = bound.argsort()[:_ALIGNMENTS] if len(symmetry.groups) > 1 else bound.argsort()
    first, width = 0, 16
    while first < len(order):
        ranked = sorted(best.values())
        if len(ranked) > 1 and bound[order[first]] >= ranked[1][0]:
            break
        rows = order[first : first + width].numpy()
        distances = (symmetry.align(stored(rows), network) - network).square().sum(1)
        for row, squared in zip(rows.tolist(), distances.tolist(), strict=True):
            run = int(run_of[row])
            best[run] = min(best.get(run, (math.inf, -1)), (squared, row))
        first, width = first + width, min(2 * width, 256)
    (nearest, row), *others = sorted(best.values())
    return nearest**0.5, row, (others[0][0] if others else math.inf) ** 0.5
