"""Predicted parameters are the published ones, for every stored hypernetwork and architecture."""

import functools
import json

import numpy as np
import pytest
import torch
from ghn import GHN, GHN3, Graph, adjust_net
from support.golden import assert_close
from support.hypernetworks import filled, marked_model, torchvision_model

MARK = 7.0


def target_of(arch, num_classes, is_small):
    """A model of a golden; every parameter holds the same number."""
    options = {"aux_logits": False} if is_small and arch == "googlenet" else {}
    model = marked_model(arch, MARK, num_classes, **options)
    return adjust_net(model) if is_small else model


@functools.cache
def hypernetwork(config):
    """One that is filled by the recipe; ``config`` is JSON."""
    options = json.loads(config)
    return filled(GHN(**options) if "hypernet" in options else GHN3(**options))


def check(golden, config, arch, case, prefix):
    ghn = hypernetwork(json.dumps(config))
    model = target_of(arch, ghn.num_classes, ghn.num_classes == 10)
    if "error" in case:  # the original's graph code fails on it, ours does not
        ghn(model)
        assert not any((parameter == MARK).all() for parameter in model.parameters())
        return
    names = case
    if other := golden.document.get("names_from"):
        names = json.loads((golden.path.parent / other.split()[0]).read_text())["archs"][arch]
    graph = Graph(model, dialect=ghn.dialect, compat=True, ve_cutoff=50 if ghn.ve else 1)
    assert graph.n_nodes == case["n_nodes"]
    predicted, embeddings = ghn(model, graph, return_embeddings=True)
    assert predicted is model
    parameters = dict(model.named_parameters())
    untouched = [name for name, p in parameters.items() if (p == MARK).all()]
    assert sorted(untouched) == sorted(case["not_predicted"])
    arrays = golden.arrays
    for i, (name, shape) in enumerate(zip(names["names"], names["shapes"], strict=True)):
        values = parameters[name].detach().double()
        assert list(values.shape) == shape
        if name.endswith("pos_embedding"):
            values[0, 0] = 0
        flat = values.flatten().numpy()
        mean, std, norm = arrays[f"{prefix}/stats"][i]
        first, last = (row[~np.isnan(row)] for row in (arrays[f"{prefix}/first8"][i], arrays[f"{prefix}/last8"][i]))
        assert_close(flat[:8], first, "ghn/values", name)
        assert_close(flat[-8:], last, "ghn/values", name)
        assert_close(flat.mean(), mean, "ghn/values", f"mean of {name}")
        assert_close(flat.std(), std, "ghn/norms", f"standard deviation of {name}")
        assert_close(np.linalg.norm(flat), norm, "ghn/norms", f"norm of {name}")
    if f"{prefix}/embeddings" in arrays:
        assert_close(embeddings, arrays[f"{prefix}/embeddings"], "ghn/values", "embeddings")


@pytest.mark.filterwarnings("ignore:EfficientNet has no adjustment")
@pytest.mark.golden("models_pred_*.json", cases="archs")
def test_predictions_are_the_published_ones(golden):
    check(golden, golden.document["config"], golden.name, golden.case, golden.name)


@pytest.mark.golden("models_pred_*.json", cases="configs")
def test_predictions_of_the_older_hypernetworks_are_the_published_ones(golden):
    for arch, case in golden.case["archs"].items():
        check(golden, golden.case["config"], arch, case, f"{golden.name}/{arch}")


def test_nothing_but_the_parameters_changes():
    ghn = filled(GHN3((16, 16, 11, 11), 1000, 32, heads=4, layers=2))
    model = torchvision_model("resnet18").train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state, parameters = torch.get_rng_state(), dict(model.named_parameters())
    ghn(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
