"""The networks of the published zoos: names, shapes and outputs."""

import pytest
import torch
from sane.networks import build_network, input_shape
from support.autoencoders import filled_state, recipe_input
from support.golden import assert_close, assert_stats


def config_of(case):
    options = {key if "::" in key else f"model::{key}": value for key, value in case["config"].items()}
    return {"model::type": case["model_type"], **options}


@pytest.mark.golden("zoo_nets.json", cases="networks")
def test_networks_are_the_published_ones(golden):
    case = golden.case
    network = build_network(config_of(case)).eval()
    state = network.state_dict()
    assert {name: list(tensor.shape) for name, tensor in state.items()} == case["keys"]
    assert list(state) == list(case["keys"])
    assert sum(p.numel() for p in network.parameters()) == case["n_params"]
    network.load_state_dict(filled_state(state, case["tag"]))
    inputs = recipe_input(case["input"])
    with torch.no_grad():
        output = network(inputs)
        usual = network(torch.zeros(1, *input_shape(config_of(case))))  # ResNets take other sizes too
    assert usual.shape[1:] == output.shape[1:]
    expected = case["output_eval_mode"]
    compare = assert_stats if isinstance(expected, dict) else assert_close
    compare(output, expected, "float32", case["model_type"])
