"""Windows with a halo: the published ones, and the sequence back for every length."""

import pytest
import torch
from zoo_common.windows import HaloWindows


@pytest.mark.golden("halo.json", cases="cases")
def test_windows_are_the_published_ones(golden):
    """Where the original stops with an error, the windows are moved inside."""
    case = golden.case
    windows = HaloWindows(case["seq_len"], case["windowsize"], case["halosize"])
    sequence = torch.arange(case["seq_len"])[None, :, None]
    split = windows.split(sequence)
    same = torch.equal(windows.merge(split), sequence)
    if "original_raises" in case:
        assert same
        return
    assert list(split.shape) == case["shape"]
    assert split[0, :, [0, -1], 0].tolist() == case["first_last_index_per_window"]
    assert same == case["roundtrip_identity"]


@pytest.mark.parametrize("length", [*range(1, 40), 128])
@pytest.mark.parametrize(("window", "halo"), [(8, 3), (8, 0), (5, 9), (1, 1)])
def test_every_token_comes_back_with_its_context(length, window, halo):
    windows = HaloWindows(length, window, halo)
    tokens = torch.arange(2 * length * 3).reshape(2, length, 3)
    split = windows.split(tokens)
    assert split.shape == (2, -(-length // window), windows.size, 3)
    assert torch.equal(windows.merge(split), tokens)
    marked = torch.arange(len(windows.starts))[None, :, None, None].expand(split.shape)
    assert torch.equal(windows.merge(marked)[0, :, 0], torch.arange(length) // window)
    for start, first in zip(windows.starts.tolist(), range(0, length, window), strict=True):
        assert start <= max(0, first - halo) or start == length - windows.size
        assert start + windows.size >= min(length, first + window)


def test_one_axis_of_tokens_and_wrong_shapes():
    windows = HaloWindows(10, 4, 1)
    assert torch.equal(windows.merge(windows.split(torch.arange(10), axis=0), axis=0), torch.arange(10))
    with pytest.raises(ValueError, match=r"axis -2 of \(1, 9, 2\) must have 10 entries"):
        windows.split(torch.zeros(1, 9, 2))
    with pytest.raises(ValueError, match="window must be at least 1, got 0"):
        HaloWindows(10, 0, 1)
