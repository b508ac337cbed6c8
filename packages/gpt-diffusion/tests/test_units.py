"""Unit tokens: derived from the symmetry, equivariant by construction."""

import json

import pytest
import torch
from gpt_diffusion.units import UnitModel, UnitTokens
from torch import nn
from zoo_common.symmetry import Symmetry

NETWORKS = {
    "one hidden layer": (nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 3)), (2, 6)),
    "three hidden layers": (
        nn.Sequential(
            nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 7), nn.ReLU(), nn.Linear(7, 3)
        ),
        (2, 6),
    ),
    "no biases": (
        nn.Sequential(
            nn.Linear(6, 5, bias=False),
            nn.ReLU(),
            nn.Linear(5, 4, bias=False),
            nn.ReLU(),
            nn.Linear(4, 3, bias=False),
            nn.ReLU(),
            nn.Linear(3, 2, bias=False),
        ),
        (2, 6),
    ),
    "convolutions": (
        nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Conv2d(4, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(3 * 4, 5)),
        (2, 2, 6, 6),
    ),
}


@pytest.fixture(params=NETWORKS)
def symmetry(request):
    net, shape = NETWORKS[request.param]
    return Symmetry.from_module(net, torch.zeros(shape))


def model_of(symmetry, **options):
    """A model in float64 whose zero-initialised layers are filled, so that everything is in play."""
    torch.manual_seed(0)
    model = UnitModel(UnitTokens.from_symmetry(symmetry), n_embd=16, n_layer=2, n_head=2, **options).double()
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model


def inputs(symmetry, n=3):
    generator = torch.Generator().manual_seed(1)
    x, start = torch.randn(2, n, symmetry.layout.size, generator=generator, dtype=torch.float64)
    return x, start, torch.tensor([0, 400, 999][:n]), torch.rand(n) + 0.1, torch.rand(n) + 2


def test_every_weight_stands_in_exactly_one_place(symmetry):
    flat = UnitTokens.from_symmetry(symmetry).flat()
    assert torch.equal(flat.sort().values, torch.arange(symmetry.layout.size))


def test_tokens_survive_json(symmetry):
    tokens = UnitTokens.from_symmetry(symmetry)
    again = UnitTokens.from_json(json.loads(json.dumps(tokens.to_json())))
    assert torch.equal(again.flat(), tokens.flat())
    assert [i.shape for i in again.own] == [i.shape for i in tokens.own]
    assert [(p.a, p.b, p.index.shape) for p in again.pairs] == [(p.a, p.b, p.index.shape) for p in tokens.pairs]


def test_permuting_the_hidden_units_permutes_the_prediction(symmetry):
    model, (x, start, t, prompt, metric) = model_of(symmetry), inputs(symmetry)
    permutations = symmetry.random_permutations(len(x), torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = model(x, t, prompt, loss_prev=metric, x_prev=start)
        moved = model(
            symmetry.apply(x, permutations), t, prompt, loss_prev=metric, x_prev=symmetry.apply(start, permutations)
        )
    assert not torch.allclose(moved, plain)
    torch.testing.assert_close(moved, symmetry.apply(plain, permutations), rtol=1e-10, atol=1e-10)


def test_every_output_depends_on_every_kind_of_input(symmetry):
    """Noise, start, prompt, metric and time all reach the prediction of every single weight."""
    model, (x, start, t, prompt, metric) = model_of(symmetry), inputs(symmetry)
    base = model(x, t, prompt, loss_prev=metric, x_prev=start) - start
    for changed in (
        model(x.flip(1), t, prompt, loss_prev=metric, x_prev=start) - start,
        model(x, t, prompt, loss_prev=metric, x_prev=start.flip(1)) - start.flip(1),
        model(x, t, prompt + 1, loss_prev=metric, x_prev=start) - start,
        model(x, t, prompt, loss_prev=metric + 1, x_prev=start) - start,
        model(x, (t + 100) % 1000, prompt, loss_prev=metric, x_prev=start) - start,
    ):
        assert (changed != base).all()


def test_units_of_one_layer_are_told_apart():
    """Without biases the middle units of a deep network have no weights of their own, only pairs."""
    net, shape = NETWORKS["no biases"]
    symmetry = Symmetry.from_module(net, torch.zeros(shape))
    model, (x, start, t, prompt, metric) = model_of(symmetry), inputs(symmetry)
    tokens = UnitTokens.from_symmetry(symmetry)
    assert tokens.own[1].shape == (4, 0)
    out = model(x, t, prompt, loss_prev=metric, x_prev=start) - start
    weights = out[:, tokens.pairs[0].index]  # (b, 5, 4, 1)
    assert weights.std(dim=(1, 2)).min() > 1e-3


def test_the_untrained_model_returns_the_start(symmetry):
    model = UnitModel(UnitTokens.from_symmetry(symmetry), n_embd=16, n_layer=1, n_head=2).double()
    x, start, t, prompt, metric = inputs(symmetry)
    assert torch.equal(model(x, t, prompt, loss_prev=metric, x_prev=start), start)


def test_metrics_may_be_negative_without_the_logarithm():
    net, shape = NETWORKS["one hidden layer"]
    symmetry = Symmetry.from_module(net, torch.zeros(shape))
    model = model_of(symmetry, metric_log=False, metric_scale=100.0)
    x, start, t, prompt, metric = inputs(symmetry)
    low = model(x, t, -300 * prompt, loss_prev=metric, x_prev=start)
    assert low.isfinite().all()
    assert not torch.allclose(low, model(x, t, 300 * prompt, loss_prev=metric, x_prev=start))


def test_a_loss_below_all_of_training_means_the_lowest_of_them():
    net, shape = NETWORKS["one hidden layer"]
    symmetry = Symmetry.from_module(net, torch.zeros(shape))
    model = model_of(symmetry, metric_floor=0.2)
    x, start, t, prompt, metric = inputs(symmetry)
    zero, lowest, more = (
        model(x, t, torch.full_like(prompt, value), loss_prev=metric, x_prev=start) for value in (0, 0.2, 0.3)
    )
    assert torch.equal(zero, lowest)
    assert not torch.allclose(zero, more)


def test_heads_must_divide_the_width():
    net, shape = NETWORKS["one hidden layer"]
    tokens = UnitTokens.from_symmetry(Symmetry.from_module(net, torch.zeros(shape)))
    with pytest.raises(ValueError, match=r"n_embd \(10\) must be a multiple of n_head \(4\)"):
        UnitModel(tokens, n_embd=10, n_head=4)


def test_a_network_without_hidden_units_is_refused():
    symmetry = Symmetry.from_module(nn.Sequential(nn.Linear(3, 2)), torch.zeros(2, 3))
    with pytest.raises(ValueError, match="hidden units"):
        UnitTokens.from_symmetry(symmetry)
