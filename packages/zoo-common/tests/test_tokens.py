import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelTokenizer, LayerTokenizer

groups = st.lists(st.lists(st.integers(1, 30), min_size=1, max_size=4), min_size=1, max_size=4)
policies = st.sampled_from(["chunk", "layer_by_layer", "chunk_within_layer", "chunk_within_input"])


@given(groups, policies, st.integers(1, 40))
def test_tokens_cover_the_vector_once_and_cross_no_border(groups, policy, chunk):
    tokenizer = LayerTokenizer(groups, policy, chunk)
    vectors = torch.arange(2 * tokenizer.size).view(2, -1)
    tokens = tokenizer.split(vectors)
    assert torch.equal(torch.cat(tokens, 1), vectors)
    assert tuple(t.shape[1] for t in tokens) == tokenizer.lengths
    layers = [size for group in groups for size in group]
    pieces = {"chunk": [sum(layers)], "chunk_within_input": [sum(g) for g in groups]}.get(policy, layers)
    borders = set(torch.tensor(pieces).cumsum(0).tolist())
    stops = torch.tensor(tokenizer.lengths).cumsum(0).tolist()
    assert borders <= set(stops)
    if policy == "layer_by_layer":
        assert tokenizer.lengths == tuple(layers)
    else:
        # a token is shorter than the chunk only where a piece ends
        assert all(
            n == chunk or (n < chunk and stop in borders) for n, stop in zip(tokenizer.lengths, stops, strict=True)
        )


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ((((3,),), "rows", 2), "split policy 'rows' is unknown; use one of chunk, layer_by_layer, chunk_within"),
        ((((3,),), "chunk", 0), "chunk size must be at least 1 for split policy 'chunk', got 0"),
        ((((3,),), "chunk_within_layer", None), "chunk size must be at least 1.*None"),
        ((((3, 0),), "layer_by_layer", None), "layer sizes must be positive"),
        (((), "chunk", 3), "layer sizes must be positive and at least one"),
    ],
)
def test_bad_settings_are_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        LayerTokenizer(*arguments)


def test_a_vector_of_another_length_is_named():
    with pytest.raises(ValueError, match="vectors have 6 scalars, expected 5"):
        LayerTokenizer(((2, 3),), "chunk", 2).split(torch.zeros(6))


def plain_tokens(layout, state, size):
    """Tokens, mask and positions of one model, one channel after the other, as the specification words it."""
    tokens, mask, positions, layer = [], [], [], 0
    for name in layout.names:
        if not any(kind in name for kind in ("weight", "running_mean", "running_var")):
            continue
        shape = tuple(state[name].shape) or (1,)
        weight = state[name].reshape(shape[0], math.prod(shape[1:]))
        bias = state.get(name.replace("weight", "bias")) if "weight" in name else None
        for channel, row in enumerate(weight.tolist()):
            row = row + ([bias[channel].item()] if bias is not None else [])
            for start in range(0, len(row), size):
                piece = row[start : start + size]
                positions.append([len(tokens), layer, channel])
                mask.append([True] * len(piece) + [False] * (size - len(piece)))
                tokens.append(piece + [0.0] * (size - len(piece)))
        layer += 1
    return torch.tensor(tokens, dtype=torch.float64), torch.tensor(mask), torch.tensor(positions)


LAYERS = {
    "conv": {"weight": (3, 2, 2, 3), "bias": (3,)},
    "conv_nb": {"weight": (4, 3, 1, 2)},
    "linear": {"weight": (2, 7), "bias": (2,)},
    "one_row": {"weight": (1, 5), "bias": (1,)},
    "bn": {"weight": (3,), "bias": (3,), "running_mean": (3,), "running_var": (3,), "num_batches_tracked": ()},
    "scalar": {"weight": ()},
    "plain": {"pos_embed": (2, 3)},
    "scale": {"gamma": ()},
    "lonely": {"bias": (4,)},
    "transposed": {"weight": (2, 3, 2), "bias": (3,)},
    "empty": {"weight": (0, 3), "bias": (0,)},
}
COVERED = {"conv", "conv_nb", "linear", "one_row", "bn", "scalar", "empty"}


def made_layout(kinds):
    shapes = {f"{i}.{kind}.{name}": shape for i, kind in enumerate(kinds) for name, shape in LAYERS[kind].items()}
    return ParameterLayout.from_state_dict(
        {
            name: torch.empty(shape, dtype=torch.int64 if name.endswith("tracked") else torch.float64)
            for name, shape in shapes.items()
        }
    )


layouts = st.lists(st.sampled_from(sorted(LAYERS)), min_size=1, max_size=6).map(
    lambda kinds: (made_layout(["conv_nb", *kinds]), kinds)
)
batches = st.sampled_from([(), (1,), (3,), (2, 2), (0,)])


@given(layouts, st.integers(1, 20), batches, st.sampled_from([torch.float64, torch.float32, torch.bfloat16]))
def test_the_inverse_is_bitwise(made, size, batch, dtype):
    layout, kinds = made
    tokenizer = ChannelTokenizer(layout, size)
    vectors = torch.randn(*batch, layout.size).to(dtype)
    tokens = tokenizer.tokenize(vectors)
    assert tokens.dtype == dtype
    padding = torch.where(tokenizer.mask, tokens, torch.tensor(torch.nan, dtype=dtype))  # whatever a decoder writes
    assert torch.equal(tokenizer.detokenize(padding, base=vectors), vectors)
    assert tokenizer.mask.sum() == layout.size - sum(layout.sizes[layout.names.index(n)] for n in tokenizer.uncovered)
    if set(kinds) <= COVERED:
        assert tokenizer.mask.sum() == layout.size
        assert torch.equal(tokenizer.detokenize(padding), vectors)


@given(layouts.filter(lambda made: "transposed" not in made[1]), st.integers(1, 20), st.integers(1, 4))
def test_a_batch_is_a_loop_over_models_and_channels(made, size, count):
    layout, _ = made
    tokenizer = ChannelTokenizer(layout, size)
    vectors = torch.randn(count, layout.size, dtype=torch.float64)
    batched = tokenizer.tokenize(vectors)
    for vector, tokens in zip(vectors, batched, strict=True):
        expected, mask, positions = plain_tokens(layout, layout.unflatten(vector), size)
        assert torch.equal(tokens, expected)
        assert torch.equal(tokenizer.mask, mask)
        assert torch.equal(tokenizer.positions.long(), positions)
    together = tokenizer.detokenize(batched, base=vectors[0])
    assert all(torch.equal(tokenizer.detokenize(t, vectors[0]), v) for t, v in zip(batched, together, strict=True))


def test_a_dirty_buffer_and_strided_vectors_give_the_same_tokens():
    tokenizer = ChannelTokenizer.from_module(nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3)), 5)
    vectors = torch.randn(tokenizer.layout.size, 4).T
    out = torch.full((4, *tokenizer.shape), torch.nan)
    assert tokenizer.tokenize(vectors, out=out) is out
    assert torch.equal(out, tokenizer.tokenize(vectors.contiguous()))
    assert torch.equal(tokenizer.detokenize(out.transpose(0, 1).contiguous().transpose(0, 1)), vectors)


def test_gradients_flow_through_tokens_and_back():
    tokenizer = ChannelTokenizer.from_module(nn.Sequential(nn.Conv2d(1, 2, 2), nn.Linear(3, 2)), 4)
    vectors = torch.randn(2, tokenizer.layout.size, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(tokenizer.tokenize, vectors)
    assert torch.autograd.gradcheck(tokenizer.detokenize, tokenizer.tokenize(vectors.detach()).requires_grad_())


def test_batch_norms_are_found_by_type_in_modules_and_by_name_in_layouts():
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.LayerNorm(4))
    net.add_module("bnlike", nn.Linear(4, 2))
    by_type = ChannelTokenizer.from_module(net, ignore_bn=True)
    assert [layer.weight for layer in by_type.layers] == ["0.weight", "2.weight", "bnlike.weight"]
    assert by_type.uncovered == ("1.weight", "1.bias", "1.running_mean", "1.running_var")
    by_name = ChannelTokenizer.from_layout(by_type.layout, ignore_bn=True)
    assert by_name.uncovered == ("bnlike.weight", "bnlike.bias")
    assert ChannelTokenizer.from_module(net).uncovered == ()
    alone = nn.Sequential(nn.BatchNorm1d(2), nn.Linear(2, 2))
    assert ChannelTokenizer.from_module(alone, ignore_bn=True).skipped[0] == "0.weight"
    with pytest.raises(ValueError, match="no weight to cut into tokens among weight, bias, running_mean"):
        ChannelTokenizer.from_module(nn.BatchNorm1d(2), ignore_bn=True)


def test_automatic_sizes():
    net = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4), nn.Linear(8, 2))
    assert ChannelTokenizer.from_module(net).token_size == 27
    assert ChannelTokenizer.from_module(net, "legacy-auto").token_size == 9  # looks only at layers with a bias
    norm = nn.BatchNorm2d(4, affine=False)
    assert ChannelTokenizer.from_module(norm, "auto").token_size == 1
    assert ChannelTokenizer.from_module(norm, "legacy-auto").token_size == 2  # counts a bias that is not there
    with pytest.raises(ValueError, match="'legacy-auto' needs a layer with a bias; use 'auto' or a number"):
        ChannelTokenizer.from_module(nn.Linear(3, 2, bias=False), "legacy-auto")


def test_tied_weights_are_cut_once():
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    tokenizer = ChannelTokenizer.from_module(net)
    assert [layer.weight for layer in tokenizer.layers] == ["0.weight"]
    assert tokenizer.uncovered == ("1.bias",)


def test_positions_grow_to_int32():
    layout = ParameterLayout.from_state_dict({"weight": torch.empty(2**15, 1)})
    assert ChannelTokenizer(layout, 1).positions.dtype == torch.int16
    layout = ParameterLayout.from_state_dict({"weight": torch.empty(2**15 + 1, 1)})
    positions = ChannelTokenizer(layout, 1).positions
    assert (positions.dtype, positions[-1].tolist()) == (torch.int32, [2**15, 0, 2**15])


def test_equal_tokenizers_are_one_key():
    made = [ChannelTokenizer.from_module(nn.Linear(3, 2), 4) for _ in range(2)]
    assert len({*made, ChannelTokenizer.from_module(nn.Linear(3, 2), 5)}) == 2


def test_wrong_channel_settings_and_tensors_are_named():
    tokenizer = ChannelTokenizer.from_module(nn.Linear(3, 2), 4)
    layout = ParameterLayout.from_state_dict({"weight": torch.ones(2, 3), "cls_token": torch.ones(4)})
    partial = ChannelTokenizer(layout, 4)
    for call, match in [
        (lambda: ChannelTokenizer(layout, 0), "token size must be at least 1, got 0"),
        (lambda: ChannelTokenizer.from_layout(layout, "longest"), "'longest' is unknown; use a number, 'auto' or"),
        (lambda: ChannelTokenizer(layout, 4, ("fc",)), "cannot skip fc: not among weight, cls_token"),
        (lambda: ChannelTokenizer(layout, 4, ("weight",)), "no weight to cut into tokens among weight, cls_token"),
        (lambda: tokenizer.tokenize(torch.ones(7)), "vectors have 7 scalars, expected 8"),
        (lambda: tokenizer.tokenize(torch.tensor(1.0)), "vectors have 0 scalars, expected 8"),
        (lambda: tokenizer.tokenize(torch.ones(8), out=torch.ones(2, 3)), r"out must be .*\(2, 4\), .*got \(\(2, 3\)"),
        (lambda: tokenizer.tokenize(torch.ones(8), out=torch.ones(4, 2).T), "out must be .*True.*got .*False"),
        (lambda: tokenizer.detokenize(torch.ones(3, 4)), r"expected tokens of shape \('...', 2, 4\), got \(3, 4\)"),
        (lambda: partial.detokenize(torch.ones(2, 4)), "no token holds cls_token; give a base vector"),
        (lambda: partial.detokenize(torch.ones(2, 4), torch.ones(6)), "vectors have 6 scalars, expected 10"),
    ]:
        with pytest.raises(ValueError, match=match):
            call()
