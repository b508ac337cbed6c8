import pytest
import torch
import torch.nn.functional as F
from gpt_diffusion.attention import attention


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)])
def test_all_ways_are_the_same_function(dtype, tolerance):
    q, k, v = (torch.randn(3, 2, tokens, 8, dtype=torch.float64) for tokens in (5, 7, 7))
    expected = torch.softmax(q @ k.mT / 8**0.5, dim=-1) @ v
    found = attention(*(x.to(dtype) for x in (q, k, v)))
    assert found.dtype == dtype
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


def test_dropout_leaves_out_weights_and_keeps_the_mean():
    torch.manual_seed(0)
    q, k = torch.zeros(2, 1, 1, 4, 8, dtype=torch.bfloat16)
    v = torch.ones(1, 1, 4, 8, dtype=torch.bfloat16)
    found = torch.stack([attention(q, k, v, 0.5) for _ in range(200)])
    assert found.min() == 0 and found.float().mean().item() == pytest.approx(1, abs=0.1)
    assert torch.equal(attention(q, k, v), F.scaled_dot_product_attention(q, k, v))
