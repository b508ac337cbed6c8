"""Kernel limits: values, trajectories and the regression of the published implementation."""

from functools import partial

import pytest
import torch
from pilimit import KernelModel, clip_grad_norm_, fit_kernel, nngp, ntk
from pilimit.expansion import expansion_norm
from pilimit.kernels import feature_kernel, one_hidden_layer
from pilimit.optim import PiSGD
from support.golden import assert_close, assert_stats, fill
from support.infinite import golden_net, golden_optimizer, golden_step, stats
from torch.nn import functional as F


def inputs():
    return fill("pk:X", (5, 7)).double(), fill("pk:Y", (4, 7)).double()


@pytest.mark.golden("kernels.json", cases="gp")
def test_nngp_is_the_published_kernel(golden):
    x, y = inputs()
    kernel = partial(nngp, varws=golden.case["varws"], varbs=golden.case["varbs"])
    assert_close(kernel(x, y), golden.case["KXY"], "float64")
    assert_close(kernel(x), golden.case["KXX"], "pilimit/float64")


@pytest.mark.golden("kernels.json", cases="ntk")
def test_ntk_is_the_exact_one_and_on_request_the_published_one(golden):
    x, y = inputs()
    kernel = partial(ntk, **{name: golden.case[name] for name in ("varws", "varbs", "lrws", "lrbs")})
    assert_close(kernel(x, y), golden.case["exact_KXY"], "float64")
    assert_close(kernel(x, y, mode="legacy"), golden.case["legacy_KXY"], "float64")


@pytest.mark.golden("kernels.json", cases="one_hidden_layer_limits")
@pytest.mark.parametrize("kind", ["gp", "ntk"])
def test_one_hidden_layer_limits_follow_the_published_training(golden, kind):
    case, stored = golden.case, golden.case[kind]
    kernels = one_hidden_layer(case["varw"], case["varb"], case["varw2"] if kind == "ntk" else None)
    model = KernelModel(kernels, case["d"], case["dout"], dtype=torch.float64)
    optimizer, losses = PiSGD(model.parameters(), case["lr"], weight_decay=case["wd"]), []
    for t in range(len(stored["loss_trajectory"])):
        optimizer.zero_grad()
        x, y = fill(f"pk_1lp:X:{t}", (4, case["d"])).double(), fill(f"pk_1lp:Y:{t}", (4, case["dout"])).double()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        norms = [expansion_norm(kernel, *model.weight.pending()) for kernel in kernels]
        assert_close(model.weight.gradient_norm(), torch.stack(norms).norm(), "float64")
        if kind == "ntk":
            norms[0] /= case["varw2"] ** 0.5  # the published norm is that of the gradient, ours that of the function
        assert_close(torch.stack(norms), stored["grad_norms"][t], "pilimit/float64", f"norms {t}")
        optimizer.step()
        losses.append(loss.item())
    assert_close(losses, stored["loss_trajectory"], "float64", "losses")
    assert_close(model(fill("pk_1lp:probe", (3, case["d"])).double()), stored["probe_output"], "float64", "probe")

    a, x, amult = model.atoms.tensors()
    s = (case["varw"] * x.square().sum(1) + case["varb"]).sqrt()[:, None]
    published = {"A": x / s, "B": 1 / s, "C": a * amult[:, None] * s}
    for name, value in published.items():  # the published state begins with an atom of zeros
        assert_stats(torch.cat([torch.zeros_like(value[:1]), value]), stats(stored["state"][name]), "float64", name)


@pytest.mark.golden("kernels.json", cases=None)
def test_the_kernel_model_follows_the_published_training(golden):
    stored = golden.case["kernel_model"]
    model = KernelModel([partial(nngp, varws=[1, 1], varbs=[1, 1])], 7, 3, dtype=torch.float64)
    optimizer, losses = PiSGD(model.parameters(), 0.4, weight_decay=0.01), []
    for t in range(len(stored["loss_trajectory"])):
        optimizer.zero_grad()
        x, y = fill(f"pk_km:X:{t}", (4, 7)).double(), fill(f"pk_km:Y:{t}", (4, 3)).double()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), 0.5)
        optimizer.step()
        losses.append(loss.item())
    assert_close(losses, stored["loss_trajectory"], "float64", "losses")
    assert_close(norm, stored["last_grad_norm_before_clip"], "float64", "norm")
    a, x, amult = model.atoms.tensors()
    for name, value in (("A", a * amult[:, None]), ("B", x)):
        assert_stats(torch.cat([torch.zeros_like(value[:1]), value]), stats(stored[name]), "float64", name)


@pytest.mark.golden("kernels.json", cases=None)
def test_regression_with_learned_features_is_the_published_one(golden):
    stored = golden.case["feature_kernel_regression"]
    config = {"case": "pfk", "d_in": 10, "r": 8, "d_out": 3, "L": 1, "bias_alpha": 0.5, "batch": 6, "lr": 0.3}
    net = golden_net(config)
    optimizer = golden_optimizer(config, net)
    for t in range(5):
        golden_step(config, net, optimizer, t)
    x = fill("pfk:X", (90, 10)).double()
    labels = (x @ fill("pfk:W", (10, 3)).double()).argmax(1)
    with torch.no_grad():
        features = net.features(x)
    assert_stats(features, stats(stored["features"]), "float64", "features")
    assert_stats(feature_kernel(features), stats(stored["kernel"]), "pilimit/float64", "kernel")
    targets = F.one_hot(labels[:60], 3).double() - 0.5
    output = fit_kernel(feature_kernel, features[:60], targets, 1e-4).predict(features[60:])
    assert_close(output, stored["output"], "pilimit/float64", "output")
    assert output.argmax(1).tolist() == stored["predictions"]
    accuracy = (output.argmax(1) == labels[60:]).double().mean()
    assert_close(accuracy, stored["accuracy"], "exact", "accuracy")
