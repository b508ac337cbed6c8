"""Predicted parameters are the published ones, for every stored hypernetwork and architecture."""

import json

import numpy as np
import pytest
import torch
from ghn import GHN, GHN3, Graph, adjust_net
from support.golden import assert_close
from support.hypernetworks import filled, torchvision_model

MARK = 7.0


def target_of(arch, num_classes, is_small):
    """A model of a golden; every parameter holds the same number."""
    options = {"aux_logits": False} if is_small and arch == "googlenet" else {}
    model = torchvision_model(arch, num_classes, **options).train()
    for parameter in model.parameters():
        parameter.data.fill_(MARK)
    return adjust_net(model) if is_small else model


def check(golden, ghn, arch, case, prefix, names_from=None):
    classes = ghn.num_classes
    model = target_of(arch, classes, classes == 10)
    if "error" in case:  # the original's graph code fails on it, ours does not
        ghn(model)
        return
    names = json.loads((golden.path.parent / names_from).read_text())["archs"][arch] if names_from else case
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


def cases(document, arrays):
    """(hypernetwork, architecture, case, key of the arrays) of either layout of these files."""
    if "configs" in document:
        for name, entry in document["configs"].items():
            for arch, case in entry["archs"].items():
                yield entry["config"], arch, case, f"{name}/{arch}"
    else:
        for arch, case in document["archs"].items():
            yield document["config"], arch, case, arch


@pytest.mark.golden("models_pred_*.json")
def test_predictions_are_the_published_ones(golden, subtests=None):
    made = {}
    for config, arch, case, prefix in cases(golden.document, golden.arrays):
        key = json.dumps(config)
        if key not in made:
            made[key] = filled(GHN(**config) if "hypernet" in config else GHN3(**config))
        check(golden, made[key], arch, case, prefix, golden.document.get("names_from"))


def test_nothing_but_the_parameters_changes():
    model = torchvision_model("resnet18").train()
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    state, parameters = torch.get_rng_state(), dict(model.named_parameters())
    filled(GHN3((16, 16, 11, 11), 1000, 32, heads=4, layers=2))(model)
    assert model.training and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, buffers[name]) for name, value in model.named_buffers())
    assert all(parameter is parameters[name] for name, parameter in model.named_parameters())
