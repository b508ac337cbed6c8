import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo_common.tokens import LayerTokenizer

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
    with pytest.raises(ValueError, match="vectors have 6 scalars, the tokens cover 5"):
        LayerTokenizer(((2, 3),), "chunk", 2).split(torch.zeros(6))
