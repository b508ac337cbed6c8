import torch
from hypothesis import given
from hypothesis import strategies as st
from zoo_common import statistics
from zoo_common.statistics import Moments


@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    size=st.integers(1, 4),
    shift=st.sampled_from([0.0, 1e6]),
    seed=st.integers(0, 2**32 - 1),
)
def test_streamed_moments_equal_those_of_all_numbers_at_once(lengths, size, shift, seed):
    generator = torch.Generator().manual_seed(seed)
    parts = [torch.randn(n, size, generator=generator, dtype=torch.float64) + shift for n in lengths]
    moments = Moments(size)
    for part in parts:
        moments.add(part)
    every, result = torch.cat(parts), moments.result()
    correction = 1 if len(every) > 1 else 0
    # float64 has 16 digits: a shift of 1e6 leaves 10 of a mean, and of a deviation of size 1
    torch.testing.assert_close(result.mean, every.mean(0), rtol=1e-14, atol=1e-12)
    torch.testing.assert_close(result.std, every.std(0, correction=correction), rtol=1e-9, atol=1e-9)
    assert result.count == len(every) and result.low == every.min() and result.high == every.max()


def test_large_inputs_are_taken_in_blocks(monkeypatch):
    every = torch.randn(100, 3, generator=torch.Generator().manual_seed(0))
    whole, blocks = Moments(3), Moments(3)
    whole.add(every)
    monkeypatch.setattr(statistics, "_BLOCK", 10)
    blocks.add(every)
    torch.testing.assert_close(blocks.result().std, whole.result().std, rtol=1e-12, atol=0)
    torch.testing.assert_close(blocks.result().mean, whole.result().mean, rtol=1e-12, atol=1e-14)
