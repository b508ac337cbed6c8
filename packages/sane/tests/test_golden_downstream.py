"""Features and regressions of the published property prediction."""

import re

import pytest
import torch
from sane.features import SPECTRAL, layer_statistics, spectral_features, to_polar
from sane.networks import build_network, input_shape
from sane.prediction import REGULARISATIONS, accuracy, fit_classifier, fit_ridge, r_squared, ridge_path
from support.autoencoders import filled_state
from support.golden import assert_close, fill
from zoo_common import ChannelTokenizer, ParameterLayout


def checkpoints(case, names):
    config = {"model::type": case["model_type"], "model::o_dim": case.get("o_dim", 10)}
    config["model::channels_in"] = case.get("channels_in", input_shape(config)[0])
    states = [filled_state(build_network(config).state_dict(), name) for name in names]
    layout = ParameterLayout.from_state_dict(states[0])
    return layout, layout.stack(states)


@pytest.mark.golden("downstream.json", cases="layer_quintiles")
def test_layer_statistics_are_the_published_ones(golden):
    case = golden.case
    layout, vectors = checkpoints(case, [f"{case['tag']}m{i}/" for i in range(case["n_models"])])
    tokenizer = ChannelTokenizer.from_layout(layout, case["tokensize"] or "legacy-auto")
    features = layer_statistics(tokenizer.tokenize(vectors), tokenizer, include_padding=True)
    assert list(tokenizer.shape) == case["tokens_shape"]
    assert (str(features.dtype), list(features.shape)) == (case["feature_dtype"], case["feature_shape"])
    assert_close(features, case["features"], "sane/features")


@pytest.mark.golden("downstream.json", cases="ridge")
def test_ridge_regressions_are_the_published_ones(golden):
    case, tag, recipe = golden.case, golden.case["tag"], golden.document["recipe"]
    offset, missing = re.search(r"X_k@w\+([\d.]+)", recipe)[1], re.search(r"y_train\[(\d+)\]=nan", recipe)[1]
    w = fill(tag + "w", (case["d"],))
    groups = {}
    for name, n in zip(("train", "test", "val"), case["n"], strict=True):
        x = fill(f"{tag}X_{name}", (n, case["d"]))
        groups[name] = (x, x @ w + float(offset) + fill(f"{tag}n_{name}", (n,), case["noise"]))
    groups["train"][1][int(missing)] = torch.nan
    known = groups["train"][1].isfinite()
    x, y = groups["train"][0][known], groups["train"][1][known]

    def scores(weights):
        pairs = {**groups, "train": (x, y)}
        ones = {name: torch.cat([a.double(), torch.ones(len(a), 1)], 1) for name, (a, _) in pairs.items()}
        return [float(r_squared(ones[n] @ weights, pairs[n][1])) for n in ("train", "test", "val")]

    for (strength, *stored), weights in zip(
        case["table"], ridge_path(x, y, [row[0] for row in case["table"]]), strict=True
    ):
        assert_close(scores(weights), stored, "sane/ridge", f"strength {strength}")
    for key, judged in (("with_val", groups["val"]), ("without_val", groups["train"])):
        fit = fit_ridge(*groups["train"], *judged)
        stored = case[key]
        assert fit.regularisation == pytest.approx(stored["best_reg"])
        names = ["r2_train", "r2_test"] + (["r2_val"] if key == "with_val" else [])
        assert_close(scores(fit.weights)[: len(names)], [stored[name] for name in names], "sane/ridge", key)


@pytest.mark.golden("downstream.json", cases="classification")
def test_the_linear_classifier_is_no_worse_than_the_published_one(golden):
    """That depends on the shuffling of its batches, so only the accuracies are compared, to two standard errors."""
    case = golden.case
    x = fill(case["tag"] + "X", (case["n"], case["d"]))
    y = ((x[:, 0] > 0).int() + (x[:, 1] > 0.5).int()).double()
    half = case["n"] // 2
    fit = fit_classifier(x[:half], y[:half], x[:half], y[:half])
    assert accuracy(fit(x[:half]), y[:half]) >= case["acc_train"] - half**-0.5
    assert accuracy(fit(x[half:]), y[half:]) >= case["acc_test"] - half**-0.5


def test_strengths_are_the_published_ones():
    published = [1e3, 3e2, 1e2, 3e1, 1e1, 3, 1, 3e-1, 1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5]
    assert pytest.approx(published) == list(REGULARISATIONS)


@pytest.mark.golden("downstream.json", cases="polar")
def test_polar_coordinates_are_the_published_ones(golden):
    stored = torch.tensor(golden.case["polar"])
    x = fill(golden.case["tag"] + "z", (len(stored), stored.shape[1] - 1))
    assert_close(to_polar(x), stored, "sane/forward")
    back = to_polar(x)[:, :1] * to_polar(x)[:, 1:].cos()
    assert (back - x).abs().max() <= 2 * golden.case["roundtrip_error"] + 1e-6


@pytest.mark.golden("downstream.json")
def test_spectral_features_are_those_of_the_published_package(golden):
    case = golden.case["weightwatcher"]
    layout, vectors = checkpoints(case, [case["tag"]])
    tokenizer = ChannelTokenizer.from_layout(layout, "auto", ignore_bn=True)
    ours = dict(zip(SPECTRAL, spectral_features(vectors, tokenizer, summary=True)[0].tolist(), strict=True))
    stored = dict(zip(case["keys"], case["values"], strict=True))
    assert list(stored) == list(ours)
    assert ours == pytest.approx(stored, rel=1e-6)
