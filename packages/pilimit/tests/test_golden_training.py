"""Infinite nets: outputs, gradients, norms, states and trajectories of the published implementation."""

import numpy as np
import pytest
import torch
from pilimit import grad_norms
from safetensors.torch import load_file
from support.golden import assert_close, assert_stats, fill
from support.infinite import golden_clip, golden_loss, golden_net, golden_optimizer, golden_step, stats

# In stored gradients of quantities with a value near |q| = 1 rounding is amplified: specification, section 14.
TRAJECTORIES = {"float64": "pilimit/float64", "float32": "pilimit/float32", "float16_storage": "pilimit/float16"}


def staged(net):
    """Gradients under the names of the goldens."""
    found = {}
    for name, p in net.named_parameters():
        if name.endswith(".weight"):
            found[name.replace("weight", "A.pi")], found[name.replace("weight", "B.pi")] = p.pending()
        else:
            found[name] = p.grad
    return found


@pytest.mark.golden("infmlp_training.json", cases="cases")
def test_first_step_is_the_published_one(golden):
    config, stored = golden.case["config"], golden.case["step0"]
    net = golden_net(config)
    net.return_hidden = True
    case, x = config["case"], fill(f"{config['case']}:X:0", (config["batch"], config["d_in"])).double()
    _, hidden = net(x)
    net.return_hidden = False
    assert_stats(config["first_layer_alpha"] * net.layers[0](x), stats(stored["hidden"]["g_out.layers.0"]), "float64")
    for n, layer in enumerate(hidden, 1):
        found = {"s_in": layer.s, "gbar_in": layer.gbar, "q_in": layer.q, "g_out": layer.g}
        for kind, value in found.items():
            key = f"{kind}.layers.{n}"
            if key in stored["hidden"]:
                assert_stats(value, stats(stored["hidden"][key]), "float64", key)

    loss, output = golden_loss(config, net, 0)
    loss.backward()
    assert_close(output, stored["output"], "float64", "output")
    assert_close(loss, stored["loss"], "float64", "loss")
    assert_close(output.grad, stored["dloss_doutput"], "float64", "gradient of the output")
    found = staged(net)
    assert set(found) == set(stored["grad"])
    for name, values in stored["grad"].items():
        assert_stats(found[name], stats(values), "float64", name)
    arrays = golden.path.with_name("infmlp_step0.safetensors")
    arrays = load_file(arrays) if arrays.exists() else {}
    for name, value in found.items():
        if f"{case}/grad/{name}" in arrays:
            assert_close(value, arrays[f"{case}/grad/{name}"], "float64", name)

    names = {id(p): name.replace("weight", "A") for name, p in net.named_parameters()}
    norms = {names[id(p)]: norm for p, norm in grad_norms(net.parameters())}
    assert set(norms) == set(stored["grad_norms"])
    for name, norm in stored["grad_norms"].items():
        assert_close(norms[name], norm, "pilimit/float64", f"norm of {name}")
    total = golden_clip(config, net)
    excluded = config["gclip_exclude_last_layer"]
    assert_close(
        total, stored["grad_norm_total" + ("_without_last_weight" if excluded else "")], "float64", "total norm"
    )
    for name, values in stored.get("grad_after_clip", {}).items():
        assert_stats(staged(net)[name], stats(values), "pilimit/float64", f"{name} clipped")
    norms = {names[id(p)]: norm for p, norm in grad_norms(net.parameters())}
    for name, norm in stored.get("grad_norms_after_clip", {}).items():
        assert_close(norms[name], norm, "pilimit/float64", f"norm of {name} after clipping")


@pytest.mark.filterwarnings("ignore:torch.float16 on a CPU")
@pytest.mark.golden("infmlp_training.json", cases="cases")
def test_training_follows_the_published_trajectories(golden):
    case = golden.case
    for key in [key for key in case if key.startswith("loss_trajectory_")]:
        kind = key.removeprefix("loss_trajectory_")
        net = golden_net(case["config"], getattr(torch, kind.split("_")[0]))
        optimizer = golden_optimizer(case["config"], net)
        losses = []
        for t in range(len(case[key])):
            losses.append(golden_step(case["config"], net, optimizer, t))
            if kind == "float64" and str(t + 1) in case["state_after_step"]:
                state = net.state_dict()
                stored = case["state_after_step"][str(t + 1)]
                assert set(stored) == {name for name, value in state.items() if value.ndim}
                for name, values in stored.items():
                    assert_stats(state[name], stats(values), TRAJECTORIES[kind], f"{name} after step {t + 1}")
        assert_close(losses, case[key], TRAJECTORIES[kind], key)
        if (probe := f"probe_output_after_20_steps_{kind}") in case:
            x = fill(f"{case['config']['case']}:probe", (5, case["config"]["d_in"]))
            with torch.no_grad():
                assert_close(net(x.to(net.dtype)), np.array(case[probe]), TRAJECTORIES[kind], probe)
