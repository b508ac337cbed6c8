"""Channel tokens are bitwise those of the original, for every stored network and size."""

import zlib

import numpy as np
import pytest
import torch
from sane.networks import build_network
from support.autoencoders import filled_state
from support.golden import assert_close, assert_stats
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelTokenizer


def state_of(case):
    """The filled state dict of a case: of shapes that are listed in it, or of one of SANE's networks."""
    if "handmade_keys" in case:
        return filled_state(case["handmade_keys"], case["model_tag"])
    names = {"model_type": "model::type", "channels_in": "model::channels_in", "o_dim": "model::o_dim"}
    config = {name: case[key] for key, name in names.items()} | {k: v for k, v in case.items() if "::" in k}
    with torch.device("meta"):
        network = build_network(config)
    return filled_state(network.state_dict(), case["model_tag"])


@pytest.mark.golden("tokens.json", cases="cases")
def test_tokens_masks_and_positions_are_the_published_ones(golden):
    case, arrays, tag = golden.case, golden.tensors(), golden.case["tag"]
    state = state_of(case)
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
    if f"{tag}.pos" not in arrays:
        assert zlib.crc32(positions.numpy().astype("<i4").tobytes()) == case["pos_crc32_int32_le"]
    assert len(tokenizer.layers) == len(case["layers"])
    for layer, stored in zip(tokenizer.layers, case["layers"], strict=True):
        rows = tokens[layer.start : layer.stop].double()
        counts = [layer.start, layer.stop - layer.start, layer.rows - 1, mask[layer.start : layer.stop].sum()]
        assert counts == [stored[key] for key in ("first_index", "n_tokens", "max_channel", "unmasked")]
        assert (positions[layer.start : layer.stop, 1] == stored["layer"]).all()
        assert_close(rows.norm(), stored["l2"], "float64", f"l2 of {layer.weight}")
        assert abs(rows.sum() - stored["sum"]) <= 1e-9 * stored["l2"]
    for key, index in (("token0", 0), ("token_mid", case["token_mid"]["index"]), ("token_last", -1)):
        assert_stats(tokens[index], case[key], "float64", key)
        np.testing.assert_array_equal(tokens[index, : len(case[key]["first"])].double(), case[key]["first"])
    whole = {f"{tag}.{key}" for key in ("tokens", "pos", "mask")}
    assert whole <= arrays.keys() or f"{tag}.token_mask_count" in arrays
    for key, actual in (("tokens", tokens), ("pos", positions), ("mask", mask), ("token_mask_count", mask.sum(1))):
        if f"{tag}.{key}" in arrays:
            assert torch.equal(actual, arrays[f"{tag}.{key}"].to(actual.dtype)), key
    if f"{tag}.token_l2" in arrays:
        assert_close(tokens.double().norm(dim=1), arrays[f"{tag}.token_l2"], "float32", "norms of the tokens")


@pytest.mark.golden("tokens.json", cases="cases")
def test_the_inverse_writes_the_published_tensors(golden):
    case = golden.case
    state = state_of(case)
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
