"""Channel tokens are bitwise those of the original, for every stored network and size."""

import json
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from support.golden import assert_close, assert_stats, fill
from torch import nn
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelTokenizer

# kind: convolutions (channels, kernel), features after them; the networks of SANE's zoos
CNNS = {
    "CNN": ([(8, 5), (6, 5), (4, 2)], 36),
    "CNN2": ([(6, 5), (9, 5), (6, 2)], 54),
    "CNN3": ([(16, 3), (32, 3), (15, 3)], 60),
}


def shapes(case, folder):
    """Name -> shape of the network of a case: listed in it, a zoo network, or one of torchvision."""
    if "handmade_keys" in case:
        return case["handmade_keys"]
    kind, channels, classes = case["model_type"], case["channels_in"], case["o_dim"]
    if kind in CNNS:
        convolutions, features = CNNS[kind]
        places = (0, 4, 8, 13, 16) if kind == "CNN3" else (0, 3, 6, 9, 11)
        inputs = [channels, *(n for n, _ in convolutions)]
        weights = [(n, i, k, k) for i, (n, k) in zip(inputs, convolutions, strict=False)]
        weights += [(20, features), (classes, 20)]
        pairs = zip(places, weights, strict=True)
        return {f"module_list.{i}.{name}": shape for i, w in pairs for name, shape in (("weight", w), ("bias", w[:1]))}
    listed = {net["model_type"]: net for net in json.loads(zoo_nets(folder).read_text())["networks"]}
    if kind in listed and listed[kind]["config"] == {"channels_in": channels, "o_dim": classes}:
        return listed[kind]["keys"]
    with torch.device("meta"):
        net = getattr(torchvision.models, kind.lower())(num_classes=classes)
        if kind.startswith("Resnet"):
            net.conv1 = nn.Conv2d(channels, 64, 3, padding=1, bias=False)
    return {name: tuple(tensor.shape) for name, tensor in net.state_dict().items()}


def zoo_nets(folder):
    own = Path(__file__).parent / "golden"
    return next(path for path in (folder / "zoo_nets.json", own / "zoo_nets.json") if path.exists())


def state_of(case, folder):
    def value(name, shape):
        if name.endswith("num_batches_tracked"):
            return torch.tensor(100)
        values = fill(case["model_tag"] + name, shape, 0.1)
        return values.abs() + 0.5 if name.endswith("running_var") else values

    return {name: value(name, shape) for name, shape in shapes(case, folder).items()}


@pytest.mark.golden("tokens.json", cases="cases")
def test_tokens_masks_and_positions_are_the_published_ones(golden):
    case, arrays, tag = golden.case, golden.tensors(), golden.case["tag"]
    state = state_of(case, golden.path.parent)
    layout = ParameterLayout.from_state_dict(state)
    size = case["tokensize_requested"] or "legacy-auto"
    tokenizer = ChannelTokenizer.from_layout(layout, size, ignore_bn=case["ignore_bn"])
    vector = layout.flatten(state)
    tokens, mask, positions = tokenizer.tokenize(vector), tokenizer.mask, tokenizer.positions

    assert list(tokens.shape) == list(tokenizer.shape) == case["tokens_shape"]
    assert (str(positions.dtype), str(mask.dtype)) == (case["pos_dtype"], case["mask_dtype"])
    assert positions.amax(0).tolist() == case["pos_max"]
    assert mask.sum() == case["mask_sum"]
    assert all(positions[int(i)].tolist() == row for i, row in case["pos_rows"].items())
    if "pos_crc32_int32_le" in case:
        assert zlib.crc32(positions.numpy().astype("<i4").tobytes()) == case["pos_crc32_int32_le"]
    assert len(tokenizer.layers) == len(case["layers"])
    for layer, stored in zip(tokenizer.layers, case["layers"], strict=True):
        rows = tokens[layer.start : layer.stop].double()
        counts = [layer.start, layer.stop - layer.start, layer.rows - 1, mask[layer.start : layer.stop].sum()]
        assert counts == [stored[key] for key in ("first_index", "n_tokens", "max_channel", "unmasked")]
        assert_close(rows.norm(), stored["l2"], "float64", f"l2 of {layer.weight}")
        assert abs(rows.sum() - stored["sum"]) <= 1e-9 * stored["l2"]
    for key, index in (("token0", 0), ("token_mid", case["token_mid"]["index"]), ("token_last", -1)):
        assert_stats(tokens[index], case[key], "float64", key)
        np.testing.assert_array_equal(tokens[index, : len(case[key]["first"])].double(), case[key]["first"])
    for key, actual in (("tokens", tokens), ("pos", positions), ("mask", mask), ("token_mask_count", mask.sum(1))):
        if f"{tag}.{key}" in arrays:
            assert torch.equal(actual, arrays[f"{tag}.{key}"].to(actual.dtype)), key
    if f"{tag}.token_l2" in arrays:
        assert_close(tokens.double().norm(dim=1), arrays[f"{tag}.token_l2"], "float32", "norms of the tokens")


@pytest.mark.golden("tokens.json", cases="cases")
def test_the_inverse_writes_the_published_tensors(golden):
    case = golden.case
    state = state_of(case, golden.path.parent)
    layout = ParameterLayout.from_state_dict(state)
    size = case["tokensize_requested"] or "legacy-auto"
    tokenizer = ChannelTokenizer.from_layout(layout, size, ignore_bn=case["ignore_bn"])
    missing = [name for name in state if name in {*tokenizer.uncovered, *(spec.name for spec in layout.buffers)}]
    stored = case["keys_not_written_by_detokenize"]
    if isinstance(stored, dict):
        assert (len(missing), missing[: len(stored["first"])]) == (stored["count"], stored["first"])
    else:
        assert missing == stored
    assert case["roundtrip_into_zero_reference_exact"] == (not missing)

    vector = layout.flatten(state)
    back = layout.unflatten(tokenizer.detokenize(tokenizer.tokenize(vector), base=torch.zeros_like(vector)))
    assert all(torch.equal(back[name], state[name]) for name in layout.names if name not in missing)
    assert not any(back[name].any() for name in tokenizer.uncovered)
