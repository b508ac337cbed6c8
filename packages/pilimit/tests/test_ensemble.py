"""Ensembles are the same nets one by one; finite nets approach the infinite one like the root of the width."""

import pytest
import torch
from pilimit import FinEnsemble, FinMLP, InfMLP, PiSGD, clip_grad_norm_, mu_net, param_groups, width_study
from torch.nn import functional as F


def nets(count=3, make=None, **options):
    generator = torch.Generator().manual_seed(0)
    net = InfMLP(6, 3, 4, depth=2, bias_alpha=0.5, dtype=torch.float64, generator=generator, **options)
    return [FinMLP.sample(net, 32, generator=generator) for _ in range(count)]


def train(model, steps=3, ensemble=False, per_param=True):
    groups = param_groups(model, first_layer_lr_mult=0.3, bias_lr_mult=0.5)
    optimizer = PiSGD(groups, 0.5, momentum=0.5, weight_decay=0.01)
    for t in range(steps):
        x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(t))
        optimizer.zero_grad()
        output = model(x) if ensemble else model(x)[None]
        labels = (torch.arange(5) % 3).expand(len(output), -1)
        F.cross_entropy(output.movedim(-1, 1), labels, reduction="none").mean(1).sum().backward()
        clip_grad_norm_(model.parameters(), 0.1, per_param=per_param, ensemble=ensemble)
        optimizer.step()


@pytest.mark.parametrize("per_param", [True, False])
@pytest.mark.parametrize("layernorm", [True, False])
def test_an_ensemble_trains_like_its_nets_one_by_one(layernorm, per_param):
    members = nets(layernorm=layernorm)
    ensemble = FinEnsemble(members)
    train(ensemble, ensemble=True, per_param=per_param)
    for i, net in enumerate(members):
        train(net, per_param=per_param)
        for (name, p), (other, q) in zip(net.named_parameters(), ensemble.named_parameters(), strict=True):
            assert name == other
            torch.testing.assert_close(q[i], p, rtol=1e-10, atol=1e-12)


def test_an_ensemble_is_converted_as_a_whole():
    x, ensemble = torch.randn(5, 6), FinEnsemble(nets())
    exact = ensemble(x.double())
    for dtype, distance in ((torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        output = ensemble.to(dtype)(x.to(dtype))
        assert output.dtype == dtype and (output - exact).norm() < distance * exact.norm()


def test_mu_nets_form_ensembles_and_other_shapes_do_not():
    ensemble = FinEnsemble([mu_net(6, 3, 16, generator=torch.Generator().manual_seed(i)) for i in range(2)])
    assert ensemble(torch.randn(5, 6)).shape == (2, 5, 3)
    with pytest.raises(ValueError, match="nets of one shape"):
        FinEnsemble([mu_net(6, 3, 16), mu_net(6, 3, 17)])
    with pytest.raises(ValueError, match="at least one"):
        FinEnsemble([])


def test_the_error_falls_like_the_root_of_the_width():
    generator = torch.Generator().manual_seed(0)
    net = InfMLP(6, 3, 4, depth=2, dtype=torch.float64, generator=generator)
    x = torch.randn(64, 6, dtype=torch.float64, generator=generator)
    study = width_study(net, x, x[:, :3].argmax(1), [32, 128, 512], nets=8, steps=5)
    assert -0.8 < study.slope < -0.3
    assert len(study.errors) == 3 and len(study.errors[0]) == 8
    assert len(net.layers[1].atoms) == 4
    with pytest.raises(ValueError, match="a slope needs two widths"):
        width_study(net, x, x[:, :3].argmax(1), [32, 32])
