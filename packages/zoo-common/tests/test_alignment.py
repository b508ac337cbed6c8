"""Weight matching of many networks at once against one pair and one term at a time."""

import pytest
import torch
import torch.nn.functional as F
from scipy.optimize import linear_sum_assignment
from torch import nn
from zoo_common import alignment
from zoo_common.alignment import axis_index
from zoo_common.symmetry import Symmetry


class Dense(nn.Module):
    """Concatenation, a flatten, and a residual stream that one layer reads and writes."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.norm = nn.Conv2d(2, 9, 3, padding=1), nn.Conv2d(9, 7, 3, padding=1), nn.BatchNorm2d(7)
        self.c, self.d, self.e = nn.Linear(16 * 4, 12), nn.Linear(12, 12), nn.Linear(12, 3)

    def forward(self, x):
        first = torch.relu(self.a(x))
        both = torch.cat([first, torch.relu(self.norm(self.b(first)))], 1)
        h = torch.relu(self.c(both.flatten(1)))
        return self.e(h + self.d(h))


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 12), nn.Linear(12, 2)
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True)

    def forward(self, x):
        h = F.relu(self.a(x))
        return self.b(h + self.attention(h, h, h, need_weights=False)[0])


def wide():
    return nn.Sequential(
        nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 50), nn.ReLU(), nn.Linear(50, 30), nn.ReLU(), nn.Linear(30, 3)
    )


NETWORKS = {"dense": (Dense, (2, 2, 2)), "heads": (Heads, (5, 3)), "wide": (wide, (6,))}


@pytest.fixture(params=NETWORKS)
def symmetry(request):
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    return Symmetry.from_module(make(), torch.zeros(2, *shape))


def vectors(symmetry, n, seed):
    return torch.randn(n, symmetry.layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def plain_match(symmetry, vector, reference, generator=None):
    """One network: every term of every similarity from permuted tensors, at every visit; gains measured on the whole."""
    layout, groups = symmetry.layout, symmetry.groups
    permutations = [torch.arange(group.size) for group in groups]

    def product(candidate):
        return symmetry.apply(vector[None], [p[None] for p in candidate])[0] @ reference

    while True:
        progress = False
        order = range(len(groups)) if generator is None else torch.randperm(len(groups), generator=generator).tolist()
        for g in order:
            scores = torch.zeros(groups[g].size, groups[g].size, dtype=torch.float64)
            for entry in groups[g].entries:
                shape = dict(zip(layout.names, layout.shapes, strict=True))[entry.tensor]
                ours, theirs = (x[layout.slices[entry.tensor]].reshape(shape) for x in (reference, vector))
                for axis, members in symmetry.moves[entry.tensor].items():
                    if axis != entry.axis:
                        rows = [p[None] for p in permutations]
                        theirs = theirs.index_select(axis, axis_index(members, shape[axis], rows)[0])
                rows = [x.movedim(entry.axis, 0)[entry.positions.flatten()] for x in (ours, theirs)]
                ours, theirs = (x.reshape(groups[g].size, -1) for x in rows)
                scores += ours @ theirs.T
            found = torch.from_numpy(linear_sum_assignment(scores.numpy(), maximize=True)[1])
            candidate = [found if i == g else p for i, p in enumerate(permutations)]
            if product(candidate) > product(permutations) + 1e-9:
                permutations, progress = candidate, True
        if not progress:
            return permutations


@pytest.mark.parametrize("drawn", [False, True])
def test_batched_matching_is_that_of_one_network_at_a_time(symmetry, drawn):
    networks, (reference,) = vectors(symmetry, 5, seed=0), vectors(symmetry, 1, seed=1)

    def generator():
        return torch.Generator().manual_seed(3) if drawn else None

    found = symmetry.match(networks, reference, generator=generator())
    for i, network in enumerate(networks):
        expected = plain_match(symmetry, network, reference, generator())
        assert all(torch.equal(p[i], q) for p, q in zip(found, expected, strict=True))


def test_chunks_of_networks_and_half_precision_do_not_change_the_result(symmetry, monkeypatch):
    networks, (reference,) = vectors(symmetry, 5, seed=0).float(), vectors(symmetry, 1, seed=1).float()
    whole = symmetry.align(networks, reference)
    monkeypatch.setattr(alignment, "_MEMORY", 2 * symmetry.layout.size)
    assert torch.equal(symmetry.align(networks, reference), whole)
    assert symmetry.align(networks[:0], reference).shape == (0, symmetry.layout.size)


def test_every_sweep_gains(symmetry):
    networks, (reference,) = vectors(symmetry, 4, seed=0), vectors(symmetry, 1, seed=1)
    previous = networks @ reference
    for sweeps in range(1, 6):
        now = symmetry.align(networks, reference, max_sweeps=sweeps) @ reference
        assert (now >= previous - 1e-9).all()
        previous = now


def test_a_planted_permutation_is_undone():
    torch.manual_seed(0)
    symmetry = Symmetry.from_module(wide(), torch.zeros(2, 6))
    (reference,) = vectors(symmetry, 1, seed=1)
    permuted = symmetry.permute(reference.expand(3, -1), torch.Generator().manual_seed(2))
    noisy = permuted + 0.1 * vectors(symmetry, 3, seed=3)
    aligned = symmetry.align(noisy, reference)
    assert ((aligned - reference).norm(dim=1) < 0.2 * (noisy - reference).norm(dim=1)).all()


def test_a_wrong_reference_is_named(symmetry):
    size = symmetry.layout.size
    with pytest.raises(ValueError, match=rf"expected a reference \({size},\), got \(3,\)"):
        symmetry.match(vectors(symmetry, 2, seed=0), torch.zeros(3))
