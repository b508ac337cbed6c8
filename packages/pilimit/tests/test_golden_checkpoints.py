"""The published checkpoint formats: all hold the net that the goldens describe."""

import pytest
import torch
from pilimit import load_net
from support.golden import assert_close, assert_stats
from support.infinite import stats
from support.recipe import recipe_inputs, recipe_net


@pytest.mark.golden("checkpoints.json")
def test_published_files_hold_the_published_net(golden):
    recipe = golden.case["recipe"]
    x, config = recipe_inputs(recipe)["probe"].float(), recipe_net(recipe)
    paths = sorted(golden.path.parent.glob("*.th"))
    assert len(paths) >= 3
    for path in paths:
        net = load_net(path)
        with torch.no_grad():
            assert_close(net(x), golden.case["probe_output"], "pilimit/float32", path.name)
        state = net.state_dict()
        assert set(golden.case["state"]) == {name for name, value in state.items() if value.ndim}
        for name, values in golden.case["state"].items():
            assert_stats(state[name], stats(values), "pilimit/float32", f"{path.name} {name}")
        assert {str(i): len(layer.atoms) for i, layer in enumerate(net.layers) if i} == {
            key: count for key, count in golden.case["M"].items()
        }
        assert {name: getattr(net, name) for name in config if name != "case"} == {
            name: value for name, value in config.items() if name != "case"
        }
