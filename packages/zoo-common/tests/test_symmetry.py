import copy

import pytest
import torch
from torch import nn
from zoo_common import rules
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import Cnn, Mlp


class ConvFlatten(nn.Module):
    """Bias, pooling, flattening with blocks, three activations."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(2, 5, 3), nn.Conv2d(5, 4, 2)
        self.pool, self.drop = nn.MaxPool2d(2), nn.Dropout(0.5)
        self.c, self.d = nn.Linear(16, 6), nn.Linear(6, 3)

    def forward(self, x):
        x = self.pool(torch.relu(self.a(x)))
        x = torch.tanh(self.b(x))
        x = x.view(x.size(0), -1)
        return self.d(nn.functional.gelu(self.c(self.drop(x))))


def deep_mlp():
    return nn.Sequential(
        nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 7), nn.ReLU(), nn.Linear(7, 5), nn.ReLU(), nn.Linear(5, 3)
    )


NETWORKS = {
    "mlp": (lambda: Mlp(12, 7, 4), (3, 12)),
    "cnn": (Cnn, (3, 3, 8, 8)),
    "deep": (deep_mlp, (3, 6)),
    "flatten": (ConvFlatten, (3, 2, 8, 8)),
}


@pytest.fixture(params=NETWORKS)
def case(request):
    make, shape = NETWORKS[request.param]
    torch.manual_seed(0)
    net = make().double().eval()
    return net, Symmetry.from_module(net, torch.randn(shape)), torch.randn(shape, dtype=torch.float64)


def weights(symmetry, n, seed=0):
    return torch.randn(n, symmetry.layout.size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def outputs(symmetry, net, vectors, x):
    net = copy.deepcopy(net)
    results = []
    for vector in vectors:
        symmetry.layout.load_into(net, vector)
        results.append(net(x))
    return torch.stack(results)


def test_permuted_networks_differ_and_compute_the_same(case):
    net, symmetry, x = case
    vectors = weights(symmetry, 5)
    permuted = symmetry.permute(vectors, torch.Generator().manual_seed(1))
    assert (permuted != vectors).any(1).all()
    torch.testing.assert_close(
        outputs(symmetry, net, permuted, x), outputs(symmetry, net, vectors, x), rtol=1e-12, atol=1e-12
    )


def test_apply_is_the_gather_with_the_index(case):
    _, symmetry, _ = case
    vectors = weights(symmetry, 4)
    permutations = symmetry.random_permutations(4, torch.Generator().manual_seed(2))
    index = symmetry.index(permutations)
    torch.testing.assert_close(symmetry.apply(vectors, permutations), vectors.gather(1, index), rtol=0, atol=0)
    alone = torch.stack([symmetry.index([p[i] for p in permutations]) for i in range(4)])
    assert torch.equal(alone, index)
    assert all((row.sort()[0] == torch.arange(symmetry.layout.size)).all() for row in index)


def test_networks_may_share_a_permutation(case):
    _, symmetry, _ = case
    vectors, rows = weights(symmetry, 9), torch.tensor([[8, 1, 1], [0, 2, 7]])
    permutations = symmetry.random_permutations(3, torch.Generator().manual_seed(2))
    shared = symmetry.apply(vectors, permutations, rows=rows)
    for which, permuted in zip(rows, shared, strict=True):
        assert torch.equal(permuted, symmetry.apply(vectors[which], permutations))
        assert torch.equal(permuted, symmetry.apply(vectors, permutations, rows=which))


def test_gradients_go_back_to_where_the_weights_came_from(case):
    _, symmetry, _ = case
    vectors, cotangents = weights(symmetry, 4).requires_grad_(), weights(symmetry, 4, seed=1)
    permutations = symmetry.random_permutations(4, torch.Generator().manual_seed(2))
    (gradient,) = torch.autograd.grad(symmetry.apply(vectors, permutations), vectors, cotangents)
    assert torch.equal(symmetry.apply(gradient, permutations), cotangents)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("inputs", [511, 512])  # 512: rows of whole 16 bytes
@pytest.mark.parametrize("start", [0, 1])
def test_long_rows_move_straight_to_their_place(dtype, inputs, start):
    symmetry = Symmetry.from_module(Mlp(inputs, 6, 4), torch.randn(3, inputs))
    n, d, generator = 9, symmetry.layout.size, torch.Generator().manual_seed(0)
    vectors = torch.randn(start + n * d, generator=generator).to(dtype)[start:].view(n, d)
    rows = torch.tensor([4, 4, 0, 8])
    permutations = symmetry.random_permutations(len(rows), generator)
    expected = symmetry.apply(vectors[rows], permutations, write=lambda values, out: out.copy_(values))
    wider = torch.zeros(len(rows), d + 1, dtype=torch.float64)
    assert not torch.equal(expected, vectors[rows])
    assert torch.equal(symmetry.apply(vectors, permutations, rows=rows), expected)
    assert torch.equal(symmetry.apply(vectors[rows], permutations, out=wider[:, 1:]), expected.double())
    assert torch.equal(symmetry.apply(vectors[rows], permutations, out=wider.to(dtype)[:, :d]), expected)


def test_groups_of_a_network_with_blocks():
    symmetry = Symmetry.from_module(ConvFlatten(), torch.randn(2, 2, 8, 8))
    assert [(g.name, g.size) for g in symmetry.groups] == [("a", 5), ("b", 4), ("c", 6)]
    places = [(entry.tensor, entry.axis, entry.block) for entry in symmetry.groups[1].entries]
    assert places == [("b.weight", 0, 1), ("b.bias", 0, 1), ("c.weight", 1, 4)]
    assert [g.name for g in symmetry.scales] == ["a"]  # tanh and gelu are not homogeneous
    assert list(symmetry.fixed) == ["d"]


def test_permutations_are_uniform():
    """Chi-square over the 24 permutations of 4 units: 23 degrees of freedom, 99.99 % quantile 57.6."""
    symmetry = Symmetry.from_module(nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 1)), torch.randn(2, 2))
    p = symmetry.random_permutations(12000, torch.Generator().manual_seed(0))[0]
    counts = torch.unique(p @ torch.tensor([64, 16, 4, 1]), return_counts=True)[1].double()
    assert len(counts) == 24
    assert ((counts - 500) ** 2 / 500).sum() < 57.6


def test_alignment_undoes_a_permutation(case):
    _, symmetry, _ = case
    reference = weights(symmetry, 1)[0]
    permuted = symmetry.permute(reference.expand(6, -1), torch.Generator().manual_seed(3))
    if len(symmetry.groups) == 1:  # a single assignment problem: the optimum is found
        assert torch.equal(symmetry.align(permuted, reference), reference.expand(6, -1))
    near = symmetry.align(permuted, reference)
    assert ((near - reference).norm(dim=1) <= (permuted - reference).norm(dim=1) + 1e-9).all()


def test_alignment_never_lowers_the_objective_and_keeps_the_function(case):
    net, symmetry, x = case
    vectors, reference = weights(symmetry, 8), weights(symmetry, 1, seed=9)[0]
    previous = vectors @ reference
    for sweeps in (1, 2, 3, 100):
        aligned = symmetry.align(vectors, reference, max_sweeps=sweeps)
        assert (aligned @ reference >= previous - 1e-9).all()
        previous = aligned @ reference
    assert (previous > vectors @ reference).all()
    torch.testing.assert_close(
        outputs(symmetry, net, aligned, x), outputs(symmetry, net, vectors, x), rtol=1e-12, atol=1e-12
    )


def test_alignment_finds_the_best_permutation_of_a_small_network():
    from itertools import permutations

    symmetry = Symmetry.from_module(nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2)), torch.randn(2, 3))
    vectors, reference = weights(symmetry, 3), weights(symmetry, 1, seed=5)[0]
    everything = [vectors[:, symmetry.index([torch.tensor(p)])] @ reference for p in permutations(range(5))]
    best = torch.stack(everything).amax(0)
    torch.testing.assert_close(symmetry.align(vectors, reference) @ reference, best)


def test_balance_is_canonical_and_keeps_the_function(case):
    net, symmetry, x = case
    vectors = weights(symmetry, 4)
    balanced = symmetry.balance(vectors)
    torch.testing.assert_close(
        outputs(symmetry, net, balanced, x), outputs(symmetry, net, vectors, x), rtol=1e-9, atol=1e-9
    )
    scaled = vectors.clone()
    views = symmetry.layout.unflatten(scaled)
    for group in symmetry.scales:
        factor = torch.rand(group.size, dtype=torch.float64) + 0.5
        for entry in group.entries:
            units = factor.repeat_interleave(entry.block)
            views[entry.tensor].movedim(entry.axis + 1, -1).mul_(1 / units if entry.reads else units)
    torch.testing.assert_close(symmetry.balance(scaled), balanced, rtol=1e-9, atol=1e-9)
    assert (balanced.norm(dim=1) <= vectors.norm(dim=1) + 1e-12).all()


def test_balance_leaves_dead_units_alone():
    symmetry = Symmetry.from_module(Mlp(3, 2, 2), torch.randn(2, 3))
    vector = torch.zeros(1, symmetry.layout.size)
    assert torch.equal(symmetry.balance(vector), vector)


def test_parameters_without_use_belong_to_no_group():
    class WithExtra(nn.Module):
        def __init__(self):
            super().__init__()
            self.log_std, self.net = nn.Parameter(torch.zeros(1)), deep_mlp()

        def forward(self, x):
            return self.net(x)

    symmetry = Symmetry.from_module(WithExtra(), torch.randn(2, 6))
    vectors = weights(symmetry, 3)
    assert torch.equal(symmetry.permute(vectors)[:, 0], vectors[:, 0])


def test_wrong_shapes_are_named():
    symmetry = Symmetry.from_module(Mlp(3, 2, 2), torch.randn(2, 3))
    with pytest.raises(ValueError, match=r"\(n, 14\), got \(2, 5\)"):
        symmetry.permute(torch.zeros(2, 5))
    with pytest.raises(ValueError, match=r"group 'fc1': permutations must be \(2, 2\), got \(1, 2\)"):
        symmetry.apply(torch.zeros(2, 14), [torch.zeros(1, 2, dtype=torch.int64)])


def test_a_wrong_group_does_not_pass_the_proof(monkeypatch):
    """A layer that treats every unit in its own way, claimed to be element-wise."""

    class PerUnit(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("factors", torch.arange(1.0, 7.0), persistent=False)

        def forward(self, x):
            return x * self.factors

    net = nn.Sequential(nn.Linear(4, 6), PerUnit(), nn.Linear(6, 2))
    assert not Symmetry.from_module(net, torch.randn(2, 4)).groups
    monkeypatch.setattr("torch.fx.Tracer.is_leaf_module", lambda *_: True)
    monkeypatch.setitem(rules.RULES, PerUnit, rules._element_wise)
    with pytest.raises(ValueError, match="module '0': permuting its units changes the output"):
        Symmetry.from_module(net, torch.randn(2, 4))


def test_a_wrong_scale_does_not_pass_the_proof(monkeypatch):
    monkeypatch.setitem(rules.RULES, nn.Tanh, rules._pass)
    with pytest.raises(ValueError, match="module '0': scaling its units changes the output"):
        Symmetry.from_module(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)), torch.randn(2, 4))
