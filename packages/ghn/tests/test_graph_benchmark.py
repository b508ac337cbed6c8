"""The benchmark of graphs runs, and its plain construction agrees with ours."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from ghn import Graph, resolve_model

FOLDER = Path(__file__).parents[1] / "benchmarks"


def plain_graph(model):
    spec = importlib.util.spec_from_file_location("plain_graphs", FOLDER / "plain_graphs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.PlainGraph(model)


def assert_plain_is_ours(name):
    model = resolve_model(name)
    plain, ours = plain_graph(model), Graph(model, compat=True)
    assert plain.types == ours.node_types and plain.params == ours.node_params
    np.testing.assert_array_equal(plain.distances, ours.distances.numpy())


@pytest.mark.parametrize("name", ["resnet18", "squeezenet1_1", "mnasnet0_5"])
def test_the_plain_construction_gives_our_graphs(name):
    assert_plain_is_ours(name)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "swin_v2_t",
        "maxvit_t",
        "inception_v3",
        "efficientnet_b0",
        "shufflenet_v2_x0_5",
        "regnet_y_400mf",
        "vit_b_32",
        "alexnet",
    ],
)
def test_the_plain_construction_gives_our_graphs_of_every_family(name):
    assert_plain_is_ours(name)


@pytest.mark.slow
def test_the_benchmark_prints_one_object():
    command = [sys.executable, FOLDER / "graphs.py", "--models", "resnet18", "--rounds", "1", "--json"]
    found = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert found["models"]["resnet18"]["ratio"] > 1 and found["geometric mean"] > 1
