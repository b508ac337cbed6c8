"""The task networks and their symmetries against the published numbers."""

import pytest
import torch
import torch.nn.functional as F
from support.golden import assert_close, assert_stats, fill
from support.networks import INPUTS, filled, network
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import classification_error, classification_loss


@pytest.mark.golden("parameter_layouts.json", cases="layouts")
def test_flat_vectors_are_the_published_ones(golden):
    case = golden.case
    state = {t["key"]: fill(f"{case['task']}/{t['key']}", t["shape"], 0.1) for t in case["tensors"]}
    layout = ParameterLayout.from_state_dict(state)
    assert layout.size == case["n_params"]
    expected = [(t["key"], tuple(t["shape"]), t["size"], t["offset"]) for t in case["tensors"]]
    assert [(t.name, t.shape, t.size, t.offset) for t in layout.tensors] == expected
    assert_stats(layout.flatten(state), case["flat"])
    if case["task"] in INPUTS:
        assert ParameterLayout.from_module(network(case["task"])) == layout
        assert torch.equal(layout.flatten(filled(case["task"])), layout.flatten(state))


@pytest.mark.golden("task_models.json", cases="results")
@torch.no_grad()
def test_forward_values_of_the_task_networks(golden):
    task, case = golden.name, golden.case
    n, tag = golden.document["n"], golden.document["tag"]
    tensor, shape = INPUTS[task]
    x, labels, net = fill(f"{tag}/{tensor}", (n, *shape)), torch.arange(n) % 10, filled(task)
    if "action_mean" in case:
        assert_close(net(x)[:, 0], case["action_mean"], "gpt-diffusion/forward")
        return
    logits = net(x)
    assert_stats(logits, case["logits"], "gpt-diffusion/forward")
    assert_close(logits[0], case["logits_row0"], "gpt-diffusion/forward")
    assert_close(F.cross_entropy(logits, labels, reduction="none"), case["inst_loss"], "gpt-diffusion/loss")
    if "inst_err" in case:
        assert_close(100.0 * (logits.argmax(1) != labels), case["inst_err"], "exact")
    assert_close(classification_loss(x, labels, net), case["loss"], "gpt-diffusion/loss")
    assert_close(classification_error(x, labels, net), case["error"], "gpt-diffusion/loss")
    population = Population(net)
    metrics = population.metrics(population.layout.flatten(net)[None], x, labels)
    assert_close(metrics.loss, [case["loss"]], "gpt-diffusion/loss")
    assert_close(metrics.error, [case["error"]], "gpt-diffusion/loss")


@pytest.mark.golden("augmentation.json", cases="permutations")
def test_gather_index_of_permutations(golden):
    task = golden.name.split("/")[0]
    symmetry = Symmetry.from_module(network(task), torch.randn(2, *INPUTS[task][1]))
    index = symmetry.index([torch.tensor(p) for p in golden.case])
    assert_close(index, golden.arrays[golden.name], "exact", golden.name)
