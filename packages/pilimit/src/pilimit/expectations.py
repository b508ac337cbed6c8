r"""Gaussian expectations of the ReLU and its derivatives, for unit variances and correlation ``c``.

With :math:`\theta = \arccos(-c)`, the angle of Cho & Saul (2009) seen from -1:
:math:`2\pi F_{11} = \theta`, :math:`2\pi F_{02} = \sqrt{1-c^2}` and :math:`2\pi F_{00} = \sqrt{1-c^2} + c\,\theta`.
For standard deviations a and b, ``E[relu relu] = a b F00``, ``E[relu relu''] = (a / b) F02``; ``E[step step] = F11``.
"""

import math

import torch
from torch import Tensor

TWO_PI = 2 * math.pi
_SERIES = [(-1) ** (k + 1) * 2 * k / math.factorial(2 * k + 1) for k in range(7, 0, -1)]
"""Coefficients of sin x - x cos x = x^3 / 3 - x^5 / 30 + ..., the highest first; exact to rounding for x < 1/2."""


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums and multipliers: the same, but at least float32."""
    return torch.promote_types(dtype, torch.float32)


def f00(c: Tensor) -> Tensor:
    """E[relu(x) relu(y)] of a pair with correlation ``c``; values beyond 1 by rounding count as 1, anything else too.

    Computed in float32 or better, accurate relative to the result at both ends; same shape and dtype as ``c``.
    """
    x = c.to(wide(c.dtype)).clamp(-1, 1)
    theta = torch.acos(-x)
    small = theta.clamp(max=0.5)
    square, series = small * small, torch.zeros_like(x)
    for coefficient in _SERIES:
        series = series * square + coefficient
    plain = torch.sqrt((1 - x) * (1 + x)) + x * theta
    return (torch.where(theta < 0.5, series * square * small, plain) / TWO_PI).to(c.dtype)


def f11(c: Tensor) -> Tensor:
    """E[step(x) step(y)]: the derivative of :func:`f00`."""
    return (torch.acos(-c.to(wide(c.dtype)).clamp(-1, 1)) / TWO_PI).to(c.dtype)


def f02(c: Tensor) -> Tensor:
    """E[relu(x) relu''(y)], where relu'' is the Dirac delta."""
    x = c.to(wide(c.dtype)).clamp(-1, 1)
    return (torch.sqrt((1 - x) * (1 + x)) / TWO_PI).to(c.dtype)


def operator_norm(a: Tensor, b: Tensor) -> Tensor:
    r"""Hilbert-Schmidt norm of :math:`\sum_i a_i \otimes \mathrm{relu}\langle b_i, Z\rangle`, in float32 or better.

    Args:
        a: Coefficients, ``(n, r_out)``.
        b: Unit rows, ``(n, r)``; a row may be zero where that of ``a`` is.

    Returns:
        A scalar; nothing waits for the device.
    """
    a, b = a.to(wide(a.dtype)), b.to(wide(b.dtype))
    moments = f00(b @ b.T).fill_diagonal_(0.5)
    return (moments * (a @ a.T)).sum().clamp(min=0).sqrt()
