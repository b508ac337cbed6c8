"""Distance of networks to the checkpoints of a zoo, whatever the order and the scale of their hidden units.

Shapes: ``n`` networks asked about, ``m`` checkpoints of the zoo, ``D`` weights.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from zoo_common.symmetry import Symmetry
from zoo_common.zoo import Zoo

from gpt_diffusion.units import UnitTokens

#: Checkpoints compared at once, and candidates aligned at once.
_BLOCK, _CANDIDATES = 1024, 16


class Nearest(NamedTuple):
    """The nearest checkpoint of each network, (n,) each."""

    distance: Tensor
    """Euclidean distance after alignment."""
    run: Tensor
    """Index of the run in the zoo."""
    checkpoint: Tensor
    """Index of the checkpoint within the run."""


@torch.no_grad()
def nearest_checkpoints(networks: Tensor, zoo: Zoo, runs: np.ndarray, symmetry: Symmetry) -> Nearest:
    """Nearest checkpoint of the given runs up to permutations and positive ReLU scalings of hidden units.

    All vectors are brought to their canonical scales. A lower bound of the distance (each unit goes to its cheapest
    counterpart, whether or not that is a permutation) orders the checkpoints; they are aligned in this order until no
    bound is below the best distance found. With one hidden layer the result is exact; with more, the distance is that
    of weight matching, an upper bound.

    Args:
        networks: Weights (n, D), raw.
        zoo: Where the checkpoints are.
        runs: Indices of the runs to search; all their checkpoints are.
        symmetry: Of the task network.

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
    stored = torch.cat(
        [
            symmetry.balance(zoo.params.gather(run_of[i : i + _BLOCK], checkpoint_of[i : i + _BLOCK]))
            for i in range(0, len(run_of), _BLOCK)
        ]
    )
    bounds = torch.cat([_lower_bound(networks, block, tokens) for block in stored.split(_BLOCK)], 1)  # (n, m)
    found = [_search(network, stored, bound, symmetry) for network, bound in zip(networks, bounds, strict=True)]
    rows = np.array([row for _, row in found])
    return Nearest(
        torch.tensor([distance for distance, _ in found]),
        torch.from_numpy(run_of[rows]),
        torch.from_numpy(checkpoint_of[rows]),
    )


def _lower_bound(networks: Tensor, block: Tensor, tokens: UnitTokens) -> Tensor:
    """No alignment of a checkpoint comes nearer than this squared distance, (n, m)."""
    bound = _squared(networks[:, tokens.rest], block[:, tokens.rest])
    for index in tokens.own:
        a, b = networks[:, index], block[:, index]  # (n, u, k), (m, u, k)
        cost = _squared(a.flatten(0, 1), b.flatten(0, 1)).view(len(a), a.shape[1], len(b), b.shape[1])
        bound += cost.amin(3).sum(1)
    return bound


def _squared(a: Tensor, b: Tensor) -> Tensor:
    """Squared distances of all rows of ``a`` (i, k) from all rows of ``b`` (j, k): (i, j)."""
    return (a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T).clamp_min(0)


def _search(network: Tensor, stored: Tensor, bound: Tensor, symmetry: Symmetry) -> tuple[float, int]:
    """Distance and row of the nearest checkpoint of one network."""
    best, nearest = float("inf"), -1
    for rows in bound.argsort().split(_CANDIDATES):
        if bound[rows[0]] >= best:
            break
        distances = (symmetry.align(stored[rows], network) - network).square().sum(1)
        i = int(distances.argmin())
        if distances[i] < best:
            best, nearest = float(distances[i]), int(rows[i])
    return best**0.5, nearest
