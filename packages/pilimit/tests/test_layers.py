"""Layers against the obvious dense formulas in float64, and torch's conventions."""

import copy
import io
import math
import warnings

import pytest
import torch
from pilimit import (
    InfMLP,
    InfPiInputLinearReLU,
    InfPiLinearReLU,
    PiSGD,
    clip_grad_norm_,
    grad_norms,
    mu_net,
    propagation,
)
from pilimit.atoms import Atoms
from torch.nn import functional as F


def dense(g, a, b, amult, layernorm):
    """The layer's formula as one expression of matrices, which autograd differentiates."""
    s = g.norm(dim=1, keepdim=True)
    q = g / s @ b.T
    f00 = (torch.sqrt(1 - q * q) + q * torch.acos(-q)) / (2 * math.pi)
    return (f00 * amult * (1 if layernorm else s)) @ a


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def make(d_in=6, d_out=3, r=5, **options):
    options = {"depth": 2, "dtype": torch.float64, "generator": torch.Generator().manual_seed(0)} | options
    return InfMLP(d_in, d_out, r, **options)


@pytest.mark.parametrize("layernorm", [False, True])
@pytest.mark.parametrize("kept", [0, 10**9, 5000])
@pytest.mark.parametrize(
    ("batch", "r", "r_out", "atoms"), [(1, 1, 1, 1), (3, 4, 2, 7), (8, 16, 16, 3000), (5, 3, 10, 0)]
)
def test_blocks_and_chunks_give_the_dense_formula(layernorm, kept, batch, r, r_out, atoms, monkeypatch):
    monkeypatch.setattr(propagation, "_FEWEST", 64)
    monkeypatch.setattr(propagation, "_ELEMENTS", {"cpu": 64 * batch})
    layer = InfPiLinearReLU(r, r_out, 0.5, layernorm=layernorm, dtype=torch.float64, initial_atoms=0)
    layer.atoms.block_size = 1000
    a, b, amult = random(atoms, r_out), F.normalize(random(atoms, r, seed=1)), random(atoms, seed=2)
    layer.atoms.append(a, b, amult)
    layer.atoms.decay(0.5)
    monkeypatch.setattr(type(layer.atoms), "bytes_per_atom", kept / 1000)
    g, weights = random(batch, r, seed=3).requires_grad_(), random(batch, r_out, seed=4)
    if r == 1:
        b = b * 0.9  # the formula that autograd differentiates has no derivative at correlation 1
        layer.atoms.clear()
        layer.atoms.append(a, b, amult * 0.5)
    y = layer(g)
    (actual,) = torch.autograd.grad((y * weights).sum(), g)
    truth = dense(g, a, b, amult * 0.5, layernorm) + 0.5 * layer.bias
    (expected,) = torch.autograd.grad((truth * weights).sum(), g)
    torch.testing.assert_close(y, truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(actual, expected, rtol=1e-11, atol=1e-11)
    s = g.norm(dim=1, keepdim=True)
    rows = layer.weight.pending()
    torch.testing.assert_close(rows[0], weights * (1 if layernorm else s), rtol=1e-12, atol=0)
    torch.testing.assert_close(rows[1], (g / s).detach(), rtol=1e-12, atol=0)


def test_growth_keeps_old_blocks_where_they_are():
    layer = InfPiLinearReLU(4, dtype=torch.float64)
    layer.atoms.block_size = 16
    layer.atoms.clear()
    addresses = []
    for _ in range(10):
        layer.atoms.append(random(5, 4), random(5, 4), 1.0)
        now = [block.A.data_ptr() for block in layer.atoms.blocks]
        assert now[: len(addresses)] == addresses
        addresses = now
    assert len(layer.atoms) == 50 and len(addresses) == 4
    assert layer.state_dict()["A"].shape == (50, 4)


def test_every_backward_appends_its_own_rows_and_evaluation_none():
    net, x = make(), random(4, 6)
    losses = [net(x[:2]).square().sum(), net(x[2:]).square().sum()]  # two forward passes of equal size first
    with torch.no_grad():
        net(random(9, 6))
    for loss in losses:
        loss.backward()
    twin = make()
    twin(x).square().sum().backward()
    for a, b in zip(net.infinite_layers(), twin.infinite_layers(), strict=True):
        (a_rows, a_units), (b_rows, b_units) = a.weight.pending(), b.weight.pending()
        torch.testing.assert_close(a_rows, b_rows)
        torch.testing.assert_close(a_units, b_units)
    torch.testing.assert_close(net.layers[0].A.grad, twin.layers[0].A.grad)
    optimizer = PiSGD(net.parameters(), 0.1)
    optimizer.step()
    assert [len(layer.atoms) for layer in net.infinite_layers()] == [9, 9]
    optimizer.zero_grad()
    assert all(p.grad is None for p in net.parameters())
    optimizer.step()
    assert [len(layer.atoms) for layer in net.infinite_layers()] == [9, 9]


def test_frozen_layers_stage_nothing_and_pass_gradients_on():
    net = make()
    net.layers[1].weight.requires_grad_(False)
    net(random(4, 6)).sum().backward()
    assert net.layers[1].weight.grad is None and net.layers[0].A.grad.abs().sum() > 0


def test_backward_after_a_step_is_an_error():
    net, x = make(), random(4, 6)
    optimizer = PiSGD(net.parameters(), 0.1)
    first, second = net(x).sum(), net(x).sum()
    first.backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="call backward before step"):
        second.backward()


def test_second_derivatives_are_refused_instead_of_wrong():
    net, x = make(), random(4, 6).requires_grad_()
    with pytest.raises(RuntimeError, match="no second derivatives: leave out create_graph"):
        torch.autograd.grad(net(x).sum(), x, create_graph=True)


def same(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_copies_and_pickles_are_independent_nets():
    net, x = make(), random(4, 6)
    net(x).sum().backward()
    file = io.BytesIO()
    torch.save(net, file)
    file.seek(0)
    before = copy.deepcopy(net.state_dict())
    for twin in (copy.deepcopy(net), torch.load(file, weights_only=False)):
        assert same(net, twin) and torch.equal(net(x), twin(x))
        assert twin.layers[2].weight.output_layer and not twin.layers[1].weight.output_layer
        assert torch.equal(twin.layers[1].weight.pending()[0], net.layers[1].weight.pending()[0])
        PiSGD(twin.parameters(), 0.1).step()
        assert len(twin.layers[1].atoms) == 9
        assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())


def test_state_dicts_have_the_published_keys_and_load_whatever_the_number_of_atoms():
    net, x = make(bias_alpha=0.25, last_layer_alpha=2.0), random(4, 6)
    optimizer = PiSGD(net.parameters(), 0.1)
    net(x).sum().backward()
    optimizer.step()
    state = net.state_dict()
    shapes = {name: tuple(value.shape) for name, value in state.items()}
    assert shapes == {
        "first_layer_alpha": (), "last_layer_alpha": (), "bias_alpha": (), "last_bias_alpha": (),
        "layers.0.A": (6, 5), "layers.0.bias": (5,), "layers.0.bias_alpha": (),
        "layers.1.A": (9, 5), "layers.1.Amult": (9,), "layers.1.B": (9, 5), "layers.1.bias": (5,),
        "layers.1.bias_alpha": (), "layers.1.layer_alpha": (),
        "layers.2.A": (9, 3), "layers.2.Amult": (9,), "layers.2.B": (9, 5), "layers.2.bias": (3,),
        "layers.2.bias_alpha": (), "layers.2.layer_alpha": (),
    }  # fmt: skip
    other = make(generator=torch.Generator().manual_seed(5))
    other.load_state_dict(state)
    assert same(net, other) and torch.equal(net(x), other(x))


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda s: s | {"layers.3.A": torch.ones(2, 2)}, "depth 3, this one has depth 2"),
        (lambda s: {k: v for k, v in s.items() if k != "layers.1.B"}, r"Missing key.*layers\.1\.B"),
        (lambda s: s | {"layers.1.A": torch.ones(5, 4)}, r"layers\.1\.A: expected \(5, 5\), got \(5, 4\)"),
        (lambda s: s | {"layers.1.Amult": torch.ones(4)}, r"layers\.1\.Amult: expected \(5,\), got \(4,\)"),
        (lambda s: s | {"layers.1.C": torch.ones(4)}, r"Unexpected key.*layers\.1\.C"),
    ],
)
def test_states_of_other_nets_are_one_line(change, match):
    net = make()
    with pytest.raises(ValueError, match=match) as error:
        net.load_state_dict(change(net.state_dict()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
@pytest.mark.parametrize("block_size", [3, 5000])
def test_a_block_is_one_piece_of_memory(block_size, dtype):
    atoms = Atoms(7, 5, dtype, block_size=block_size)
    rows = random(block_size, 5), random(block_size, 7)
    atoms.append(*rows, 0.5)
    (block,) = atoms.blocks
    assert len({t.untyped_storage().data_ptr() for t in (block.A, block.B, block.Amult)}) == 1
    assert block.A.untyped_storage().nbytes() == block_size * atoms.bytes_per_atom
    assert torch.equal(block.A, rows[0].to(dtype)) and torch.equal(block.B, rows[1].to(dtype))
    assert (block.Amult == 0.5).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_every_dtype_works_on_a_cpu_with_multipliers_of_float32_at_least(dtype, monkeypatch):
    monkeypatch.setattr(propagation, "_warned", False)
    exact, x = make(), random(8, 6)
    net = copy.deepcopy(exact).to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    assert {p.dtype for p in net.parameters()} == {wide}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            for each in (exact, net):
                optimizer = PiSGD(each.parameters(), 0.1)
                optimizer.zero_grad()
                each(x.to(each.dtype)).to(torch.float64).square().sum().backward()
                optimizer.step()
    assert len(caught) == (wide != dtype)
    state = net.state_dict()
    assert state["layers.1.A"].dtype == state["layers.1.B"].dtype == net(x.to(dtype)).dtype == dtype
    assert state["layers.1.Amult"].dtype == state["layers.0.A"].dtype == wide
    torch.testing.assert_close(net(x.to(dtype)).double(), exact(x), rtol=0, atol=20 * torch.finfo(dtype).eps)
    assert net.double().dtype == torch.float64


@pytest.mark.parametrize("layernorm", [False, True])
def test_zero_rows_give_zero_and_no_gradient(layernorm):
    net, x = make(bias_alpha=0, layernorm=layernorm), random(3, 6)
    x[1] = 0
    x.requires_grad_()
    net(x).square().sum().backward()
    assert torch.equal(net(x)[1], torch.zeros(3, dtype=torch.float64))
    assert torch.equal(x.grad[1], torch.zeros(6, dtype=torch.float64)) and x.grad.isfinite().all()
    for layer in net.infinite_layers():
        rows, units = layer.weight.pending()
        assert not rows[1].any() and not units[1].any()
    for _, norm in grad_norms(net.parameters()):
        assert norm.isfinite()
    clip_grad_norm_(net.parameters(), 0.1, per_param=True)
    PiSGD(net.parameters(), 0.1).step()
    assert net(x).isfinite().all()


def test_a_sample_that_meets_its_own_atom_has_finite_gradients():
    net, x = make(dtype=torch.float32), random(4, 6).float()
    optimizer = PiSGD(net.parameters(), 0.0, lr_mult=1.0)
    for group in optimizer.param_groups:
        group["lr"] = 1e-8
    for _ in range(3):
        optimizer.zero_grad()
        net(x).square().sum().backward()
        assert all(p.grad.isfinite().all() for p in net.parameters())
        optimizer.step()


@pytest.mark.parametrize(
    ("make_it", "match"),
    [
        (lambda: InfMLP(6, 3, 0), "r, the rank.* at least 1, got 0"),
        (lambda: InfMLP(6, 3, 5, depth=0), "depth must be at least 1, got 0"),
        (lambda: InfMLP(6, 3, 5, 1, depth=4), "depth=4 and L=1 contradict"),
        (lambda: InfMLP(0, 3, 5), "d_in must be at least 1, got 0"),
        (lambda: InfPiInputLinearReLU(0), "at least 1, got 0"),
        (lambda: InfPiLinearReLU(5, optim_mode="other"), "'other' does not exist"),
        (lambda: make()(torch.ones(2, 7, dtype=torch.float64)), r"expected a batch of shape \(b, 6\), got \(2, 7\)"),
        (lambda: make()(torch.ones(2, 6)), "expected a batch of torch.float64, got torch.float32"),
        (
            lambda: make()(torch.ones(2, 6, dtype=torch.float64, device="meta")),
            "the batch is on meta, the layer on cpu",
        ),
        (lambda: make()(torch.full((2, 6), torch.nan, dtype=torch.float64)), "row 0 of the batch.*not finite"),
        (lambda: PiSGD(make().parameters(), -1.0), "lr must not be negative, got -1"),
    ],
)
def test_bad_input_is_one_clear_line(make_it, match):
    with pytest.raises(ValueError, match=match):
        make_it()


def test_depth_and_published_L_mean_the_same():
    assert len(InfMLP(6, 3, 5, 1).layers) == len(InfMLP(6, 3, 5, depth=2).layers) == 3
    assert InfMLP(6, 3, 5, depth=1).L == 0 and len(InfMLP(6, 3, 5, readout_zero_init=True).layers[2].atoms) == 0


def test_mu_nets_have_gaussian_weights_and_plain_gradients():
    net = mu_net(50, 10, 400, depth=2, generator=torch.Generator().manual_seed(0))
    for layer in net.layers:
        assert abs(layer.weight.std() / (2 / layer.n_in) ** 0.5 - 1) < 0.05 and not layer.bias.any()
        assert not layer.project
    assert not any("omega" in name for name in net.state_dict())


def test_sine_is_learned():
    """The smallest task of the published repository."""
    net = InfMLP(2, 1, 20, depth=1, generator=torch.Generator().manual_seed(0))
    x = torch.linspace(-math.pi, math.pi, 100)
    inputs, optimizer = torch.stack([x, torch.ones(100)], 1), PiSGD(net.parameters(), 0.02)
    first = F.mse_loss(net(inputs)[:, 0], x.sin()).item()
    for _ in range(100):
        optimizer.zero_grad()
        loss = F.mse_loss(net(inputs)[:, 0], x.sin())
        loss.backward()
        optimizer.step()
    assert loss < 0.25 * first
