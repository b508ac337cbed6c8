"""Kernel limits: values, trajectories and the regression of the published implementation."""

from functools import partial

import pytest
import torch
from pilimit import KernelModel, clip_grad_norm_, fit_kernel, nngp, ntk
from pilimit.expansion import expansion_norm
from pilimit.kernels import feature_kernel, one_hidden_layer
from pilimit.optim import PiSGD
from support.golden import assert_close, assert_stats
from support.infinite import golden_net, golden_optimizer, golden_step, stats
from support.recipe import recipe_inputs, recipe_list, recipe_net, recipe_number
from torch.nn import functional as F


@pytest.mark.golden("kernels.json", cases="gp")
def test_nngp_is_the_published_kernel(golden):
    x, y = recipe_inputs(golden.document["recipe"]).values()
    kernel = partial(nngp, varws=golden.case["varws"], varbs=golden.case["varbs"])
    assert_close(kernel(x, y), golden.case["KXY"], "float64")
    assert_close(kernel(x), golden.case["KXX"], "pilimit/float64")


@pytest.mark.golden("kernels.json", cases="ntk")
def test_ntk_is_the_exact_one_and_on_request_the_published_one(golden):
    x, y = recipe_inputs(golden.document["recipe"]).values()
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
        found = recipe_inputs(case["recipe"], t, d=case["d"], dout=case["dout"])
        loss = F.mse_loss(model(found["X"]), found["Y"])
        loss.backward()
        norms = [expansion_norm(kernel, *model.weight.pending()) for kernel in kernels]
        assert_close(model.weight.gradient_norm(), torch.stack(norms).norm(), "float64")
        if kind == "ntk":
            norms[0] /= case["varw2"] ** 0.5  # the published norm is that of the gradient, ours that of the function
        assert_close(torch.stack(norms), stored["grad_norms"][t], "pilimit/float64", f"norms {t}")
        optimizer.step()
        losses.append(loss.item())
    assert_close(losses, stored["loss_trajectory"], "float64", "losses")
    assert_close(model(found["probe"]), stored["probe_output"], "float64", "probe")

    a, x, amult = model.atoms.tensors()
    s = (case["varw"] * x.square().sum(1) + case["varb"]).sqrt()[:, None]
    published = {"A": x / s, "B": 1 / s, "C": a * amult[:, None] * s}
    for name, value in published.items():  # the published state begins with an atom of zeros
        assert_stats(torch.cat([torch.zeros_like(value[:1]), value]), stats(stored["state"][name]), "float64", name)


@pytest.mark.golden("kernels.json", cases=None)
def test_the_kernel_model_follows_the_published_training(golden):
    stored = golden.case["kernel_model"]
    recipe = stored["recipe"]
    kernel = partial(nngp, **{name: recipe_list(recipe, name) for name in ("varws", "varbs")})
    sizes = [value.shape[1] for value in recipe_inputs(recipe).values()]
    model = KernelModel([kernel], *sizes, dtype=torch.float64)
    decay = recipe_number(recipe, "weight decay", 0.0)
    optimizer, losses = PiSGD(model.parameters(), recipe_number(recipe, "lr"), weight_decay=decay), []
    for t in range(len(stored["loss_trajectory"])):
        optimizer.zero_grad()
        x, y = recipe_inputs(recipe, t).values()
        loss = F.mse_loss(model(x), y)
        loss.backward()
        norm = clip_grad_norm_(model.parameters(), recipe_number(recipe, "clip norm", 0.0))
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
    recipe = stored["recipe"]
    config = recipe_net(recipe) | {"batch": int(recipe_number(recipe, "batch")), "lr": recipe_number(recipe, "lr")}
    net = golden_net(config)
    optimizer = golden_optimizer(config, net)
    for t in range(int(recipe_number(recipe, "trained"))):
        golden_step(config, net, optimizer, t)
    x, w = recipe_inputs(recipe).values()
    labels, known = (x @ w).argmax(1), int(recipe_number(recipe, "first"))
    with torch.no_grad():
        features = net.features(x)
    assert_stats(features, stats(stored["features"]), "float64", "features")
    assert_stats(feature_kernel(features), stats(stored["kernel"]), "pilimit/float64", "kernel")
    targets = F.one_hot(labels[:known], config["d_out"]).double() - 0.5
    ridge = recipe_number(recipe, "ridge")
    output = fit_kernel(feature_kernel, features[:known], targets, ridge).predict(features[known:])
    assert_close(output, stored["output"], "pilimit/float64", "output")
    assert output.argmax(1).tolist() == stored["predictions"]
    accuracy = (output.argmax(1) == labels[known:]).double().mean()
    assert_close(accuracy, stored["accuracy"], "exact", "accuracy")
