"""Accuracy of the Gaussian expectations near correlation 1 and -1, in every dtype, against many digits."""

import mpmath
import pytest
import torch
from pilimit.expectations import f00, f02, f11, operator_norm

mpmath.mp.dps = 60


def exact(c):
    c = mpmath.mpf(float(c))
    angle, sine = mpmath.acos(-c), mpmath.sqrt(1 - c * c)
    return [x / (2 * mpmath.pi) for x in (sine + c * angle, angle, sine)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_expectations_have_full_relative_accuracy_up_to_the_ends(dtype):
    distances = 10.0 ** -torch.arange(0, 17, 0.25, dtype=torch.float64)
    c = torch.cat([1 - distances, distances - 1, torch.tensor([1.0, -1.0]), torch.linspace(-1, 1, 41)]).to(dtype)
    eps = torch.finfo(dtype).eps
    for values, index in ((f00(c), 0), (f11(c), 1), (f02(c), 2)):
        assert values.dtype == dtype
        for x, value in zip(c.tolist(), values.double().tolist(), strict=True):
            truth = exact(x)[index]
            # 60 roundings: the sine and the angle are of size 1, their combination is 0.04 where the series ends
            assert abs(value - truth) <= 60 * eps * abs(truth) + torch.finfo(dtype).tiny, (x, index)


def test_rounding_beyond_one_and_gradients_of_one_are_harmless():
    c = torch.tensor([1 + 1e-7, -1 - 1e-7, 5.0])
    assert torch.equal(f00(c), torch.tensor([0.5, 0.0, 0.5]))
    assert torch.equal(f11(c), torch.tensor([0.5, 0.0, 0.5]))
    assert torch.equal(f02(c), torch.zeros(3))


def test_expectations_are_those_of_samples():
    z = torch.randn(400_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for c in (-0.7, 0.1, 0.8):
        x, y = z[:, 0], c * z[:, 0] + (1 - c * c) ** 0.5 * z[:, 1]
        assert abs((x.relu() * y.relu()).mean() - f00(torch.tensor(c))) < 4e-3
        assert abs(((x > 0) & (y > 0)).double().mean() - f11(torch.tensor(c))) < 4e-3
    c = torch.linspace(-0.99, 0.99, 31, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(torch.autograd.grad(f00(c).sum(), c)[0], f11(c))


def test_operator_norm_is_that_of_a_wide_net():
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    b = torch.nn.functional.normalize(torch.randn(6, 4, generator=generator, dtype=torch.float64))
    units = torch.relu(torch.randn(400_000, 4, generator=generator, dtype=torch.float64) @ b.T)
    sampled = ((units @ a) ** 2).sum(1).mean().sqrt()
    assert abs(operator_norm(a, b) / sampled - 1) < 5e-3
