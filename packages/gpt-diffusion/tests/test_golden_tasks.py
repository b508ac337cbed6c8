"""The task networks and their symmetries against the published numbers."""

import pytest
import torch
import torch.nn.functional as F
from support.golden import assert_close, assert_stats, fill
from torch import nn
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population
from zoo_common.symmetry import Symmetry
from zoo_common.tasks import classification_error, classification_loss, get_task


class CartpoleActor(nn.Module):
    """The published actor; ``log_std`` comes first in the state dict and takes no part in the mean action."""

    def __init__(self):
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(1))
        self.actor = nn.Sequential(nn.Linear(4, 32), nn.SELU(), nn.Linear(32, 32), nn.SELU(), nn.Linear(32, 1))

    def forward(self, observation):
        return self.actor(observation)


INPUTS = {"mnist": ("mnist_x", (1, 28, 28)), "cifar10": ("cifar_x", (3, 32, 32)), "cartpole": ("cart_obs", (4,))}


def network(task):
    return CartpoleActor() if task == "cartpole" else get_task(task).constructor()


def filled(task):
    """The network with the golden weights: fill('<task>/<key>', shape, 0.1)."""
    net = network(task)
    net.load_state_dict({key: fill(f"{task}/{key}", value.shape, 0.1) for key, value in net.state_dict().items()})
    return net


@pytest.mark.golden("parameter_layouts.json", cases="layouts")
def test_layout_of_the_task_networks(golden):
    layout = ParameterLayout.from_module(network(golden.case["task"]))
    assert layout.size == golden.case["n_params"]
    expected = [(t["key"], tuple(t["shape"]), t["offset"]) for t in golden.case["tensors"]]
    assert [(t.name, t.shape, t.offset) for t in layout.tensors] == expected
    assert_stats(layout.flatten(filled(golden.case["task"])), golden.case["flat"])


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
