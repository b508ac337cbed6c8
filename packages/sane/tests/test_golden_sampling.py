"""Draws of latents and conditioning of batch norms are the published ones."""

import re

import pytest
import torch
from sane.networks import build_network
from sane.population import Networks
from sane.sampling import KernelDensity
from support.autoencoders import filled_state
from support.golden import assert_close, assert_stats, fill
from zoo_common import ChannelTokenizer, HaloWindows, ParameterLayout


@pytest.mark.golden("kde_sampling.json", cases="cases")
def test_draws_and_networks_are_the_published_ones(golden):
    case, tag = golden.case, golden.case["tag"]
    tokens, size = case["tokens_shape"]
    scale = re.search(
        r"anchor_z',\([^)]*\),([\d.]+)\).*decoder_matrix',\([^)]*\),([\d.]+)\)", golden.document["recipe"]
    )
    anchors = fill(tag + "anchor_z", (case["n_anchors"], tokens, case["lat_dim"]), float(scale[1]))
    density = KernelDensity(case["mode"], case["bandwidth"], shared_noise=True)
    z = density.draw(anchors, case["repetitions"], case["random_state"])
    assert_stats(z, case["z"], "sane/kde", "latents")
    around = KernelDensity(case["mode"], 0.0, shared_noise=True).draw(
        anchors, case["repetitions"], case["random_state"]
    )
    assert torch.equal(around, anchors[case["chosen_anchor_index"]])
    for place, row in case["z_rows"].items():
        i, j = (int(part) for part in place.strip("[]").split(",")[:2])
        assert_close(z[i, j, : len(row)], row, "sane/kde", place)

    config = {"model::type": case["model_type"], "model::channels_in": case["channels_in"]}
    config["model::o_dim"] = case.get("o_dim", 10)
    state = filled_state(build_network(config).state_dict(), tag + "ref/")
    layout = ParameterLayout.from_state_dict(state)
    tokenizer = ChannelTokenizer.from_layout(layout, case["tokensize"] or "legacy-auto")
    assert tokenizer.shape == (tokens, size)
    matrix = fill(tag + "decoder_matrix", (size, case["lat_dim"]), float(scale[2]))
    if case["halo"]:
        windows = HaloWindows(tokens, *case["halo"])
        decoded = windows.merge(windows.split(z) @ matrix.T)
    else:
        decoded = z @ matrix.T
    vectors = tokenizer.detokenize(decoded, layout.flatten(state))
    for key, vector in (("checkpoint0", vectors[0]), ("checkpoint_last", vectors[-1])):
        checkpoint = {**state, **layout.unflatten(vector)}
        assert case[key]
        for name, stats in case[key].items():
            assert_stats(checkpoint[name], stats, "float32", f"{key} {name}")


@pytest.mark.golden("bn_conditioning.json", cases="cases")
def test_conditioned_statistics_are_the_published_ones(golden):
    case, tag = golden.case, golden.case["tag"]
    module = build_network({"model::type": case["model_type"], "model::o_dim": case["o_dim"]})
    state = filled_state(module.state_dict(), tag)
    module.load_state_dict(state)
    networks = Networks(module)
    vector = networks.layout.flatten(state)
    image = [int(size) for size in re.search(r"\(batch_size,([\d,]+)\)", golden.document["recipe"])[1].split(",")]
    count = min(case["iterations"], case["available_batches"])
    batches = [fill(f"{tag}batch{i}", (case["batch_size"], *image)) for i in range(count)]
    found = networks.condition(torch.stack([vector, 2 * vector]), batches)
    conditioned = networks.layout.unflatten(found.vectors[0])
    assert case["running_stats"]
    for name, stats in case["running_stats"].items():
        assert_stats(conditioned[name], stats, "float32", name)
    assert {name: int(value) for name, value in found.buffers.items()} == case["num_batches_tracked"]
    same = [name for name in networks.layout.names if "running" not in name]
    assert all(torch.equal(conditioned[name], state[name]) for name in same) == case["weights_unchanged"]
