"""Kernels are those of wide random nets; regression is exact at any memory budget."""

import copy
from functools import partial

import pytest
import torch
from pilimit import FinMLP, InfMLP, KernelModel, fit_kernel, nngp, ntk
from pilimit.kernels import cosine_kernel, feature_kernel, one_hidden_layer
from pilimit.optim import PiSGD

DEEP = partial(nngp, varws=[2.0, 2.0], varbs=[0.1, 0.1])


def points(n, d=6, seed=0):
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def test_ntk_is_the_product_of_gradients_of_a_wide_net():
    x, generator, width, nets = points(4).float(), torch.Generator().manual_seed(1), 1024, 6
    lrws, lrbs, total = [1.0, 0.5, 2.0], [0.3, 0.2, 0.1], torch.zeros(4, 4)
    for _ in range(nets):
        parameters = []
        h = x
        for rows, columns in ((width, 6), (width, width), (1, width)):
            w = (1.5**0.5 * torch.randn(rows, columns, generator=generator)).requires_grad_()
            b = (0.4**0.5 * torch.randn(rows, generator=generator)).requires_grad_()
            parameters += [w, b]
            g = h @ w.T / columns**0.5 + b
            h = g.relu()
        gradients = [torch.autograd.grad(value, parameters, retain_graph=True) for value in g[:, 0]]
        for k, lr in enumerate(lr for pair in zip(lrws, lrbs, strict=True) for lr in pair):
            rows = torch.stack([gradient[k].flatten() for gradient in gradients])
            total += lr * rows @ rows.T / nets
    limit = ntk(x, varws=[1.5] * 3, varbs=[0.4] * 3, lrws=lrws, lrbs=lrbs)
    assert (total - limit).norm() < 0.05 * limit.norm()


@pytest.mark.parametrize("kernel", [DEEP, partial(ntk, varws=[1, 1], varbs=[0, 0], lrws=[1, 1], lrbs=[1, 1])])
def test_a_batch_with_itself_is_the_same_and_positive(kernel):
    x = torch.cat([points(20), torch.zeros(1, 6)])
    own = kernel(x)
    torch.testing.assert_close(own, kernel(x, x.clone()), rtol=1e-6, atol=1e-6)
    assert torch.isfinite(own).all() and torch.linalg.eigvalsh(own).min() > -1e-9
    torch.testing.assert_close(own, own.T)
    half = kernel(x.half())
    assert half.dtype == torch.float32 and (half - own).norm() < 2e-3 * own.norm()


def test_wrong_arguments_are_named():
    x = points(3)
    with pytest.raises(ValueError, match="varws 2, varbs 1"):
        nngp(x, varws=[1, 1], varbs=[0])
    with pytest.raises(ValueError, match="'exact' or 'legacy', got 'old'"):
        ntk(x, varws=[1], varbs=[1], lrws=[1], lrbs=[1], mode="old")
    with pytest.raises(ValueError, match="widths 6 and 5"):
        DEEP(x, points(3, 5))
    with pytest.raises(ValueError, match="ridge must be positive, got 0"):
        fit_kernel(DEEP, x, x, 0)
    with pytest.raises(ValueError, match="3 points and 2 targets"):
        fit_kernel(DEEP, x, x[:2], 1e-3)
    with pytest.raises(ValueError, match=r"0\.00 GB: raise it, or take fewer points"):
        fit_kernel(DEEP, x, x, 1e-3, memory_budget=10)


@pytest.mark.parametrize("ridge", [1e-1, 1e-4, 1e-7])
@pytest.mark.parametrize("single", [False, True])
def test_regression_in_panels_is_that_of_the_whole_matrix(monkeypatch, ridge, single):
    monkeypatch.setattr("pilimit.regression.TILE", 32)
    x, unseen = points(150), points(40, seed=1)
    targets = torch.stack([x[:, 0] * x[:, 1], x.norm(dim=1)], 1)
    fitted = fit_kernel(DEEP, x, targets, ridge, memory_budget=200_000 if single else None)
    assert fitted.dtype == (torch.float32 if single else torch.float64)
    alpha = torch.linalg.solve(DEEP(x) + ridge * torch.eye(150, dtype=torch.float64), targets)
    assert (fitted.predict(unseen) - DEEP(unseen, x) @ alpha).norm() < 1e-6 * targets.norm()
    assert fitted.residual < 1e-10 and fitted.iterations < (60 if single else 3)


def test_a_matrix_that_is_not_positive_is_named():
    x = torch.ones(4, 6, dtype=torch.float64)
    with pytest.raises(ValueError, match="not positive definite: raise the ridge"):
        fit_kernel(lambda x, y: -DEEP(x, y), x, x, 1e-3)


def test_learned_features_of_wide_nets_have_the_kernel_of_the_infinite_one():
    net = InfMLP(6, 3, 5, depth=2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    wide = FinMLP.sample(net, 4096, generator=torch.Generator().manual_seed(1))
    x = points(10)
    with torch.no_grad():
        limit, sampled = feature_kernel(net.features(x)), cosine_kernel(wide.features(x))
    assert (limit - sampled).norm() < 0.05 * limit.norm()


def test_one_hidden_layer_limits_are_those_of_wide_nets():
    x, generator = points(3), torch.Generator().manual_seed(0)
    w = torch.randn(200_000, 6, dtype=torch.float64, generator=generator) * 1.5**0.5
    b = torch.randn(200_000, dtype=torch.float64, generator=generator) * 0.5**0.5
    g = x @ w.T + b
    readout = g.relu() @ g.relu().T / 200_000
    steps = (g > 0).double()
    weights = 0.7 * (x @ x.T) * (steps @ steps.T) / 200_000
    for kernel, sampled in zip(one_hidden_layer(1.5, 0.5, 0.7), (weights, readout), strict=True):
        assert (kernel(x, None) - sampled).norm() < 0.02 * sampled.norm()


def test_a_kernel_model_is_copied_with_its_kernels_and_names_bad_batches():
    model = KernelModel([DEEP], 6, 2, dtype=torch.float64)
    optimizer = PiSGD(model.parameters(), 0.1)
    model(points(4)).sum().backward()
    optimizer.step()
    twin = copy.deepcopy(model)
    assert torch.equal(twin(points(3)), model(points(3))) and len(twin.atoms) == 4
    twin(points(2)).sum().backward()
    assert twin.weight.gradient_norm() > 0
    with pytest.raises(ValueError, match=r"\(b, 6\), got \(3, 5\)"):
        model(points(3, 5))
    with pytest.raises(ValueError, match="not finite"):
        model(points(3) / 0)


def test_the_state_of_a_kernel_model_is_its_atoms():
    models = [KernelModel([DEEP], 6, 2, dtype=torch.float64) for _ in range(2)]
    optimizer, x = PiSGD(models[0].parameters(), 0.5), points(8)
    for rows in x.split(4):
        optimizer.zero_grad()
        (models[0](rows) - 1).square().sum().backward()
        optimizer.step()
    state = models[0].state_dict()
    assert {name: tuple(value.shape) for name, value in state.items()} == {"A": (8, 2), "B": (8, 6), "Amult": (8,)}
    models[1].load_state_dict(state)
    assert torch.equal(models[1](x), models[0](x))
    half = copy.deepcopy(models[0]).to(torch.float32)
    assert half.atoms.dtype == torch.float32
    torch.testing.assert_close(half(x.float()).double(), models[0](x), rtol=1e-4, atol=1e-4)
    with pytest.raises(RuntimeError, match=r"B: expected \(8, 6\), got \(8, 7\)"):
        models[1].load_state_dict(state | {"B": torch.ones(8, 7)})
