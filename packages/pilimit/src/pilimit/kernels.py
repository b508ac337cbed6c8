r"""Kernels of infinitely wide ReLU networks that do not learn features, and of learned features.

Each takes inputs (n, d) and (m, d) and returns (n, m) in their dtype (at least float32); without the second batch, it is
compared with itself, and correlations of rows with themselves are exactly 1.
"""

from collections.abc import Callable, Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from pilimit.expectations import f00, f11, wide

Kernel = Callable[[Tensor, Tensor | None], Tensor]
"""Inputs (n, d), and (m, d) or None for the same, to values (n, m)."""


class _Moments:
    """Second moments of the pre-activations of two batches, from layer to layer."""

    def __init__(self, x: Tensor, y: Tensor | None) -> None:
        x = x.flatten(1).to(wide(x.dtype))
        other = x if y is None else y.flatten(1).to(x)
        if other.shape[1] != x.shape[1]:
            raise ValueError(f"inputs of widths {x.shape[1]} and {other.shape[1]} cannot be compared")
        d, self.same = x.shape[1], y is None
        self.cov = x @ other.T / d  # (n, m)
        self.vx, self.vy = x.square().sum(1)[:, None] / d, other.square().sum(1) / d  # (n, 1), (m,)

    def scale(self, varw: float, varb: float) -> None:
        """Weights and biases."""
        for moment in (self.cov, self.vx, self.vy):
            moment.mul_(varw).add_(varb)

    def relu(self) -> Tensor:
        """Activation; returns the correlations before it, (n, m)."""
        deviations = (self.vx * self.vy).sqrt()
        c = self.cov / torch.where(deviations > 0, deviations, 1.0)
        if self.same:
            c.diagonal().masked_fill_(deviations.diagonal() > 0, 1.0)
        self.cov = f00(c) * deviations
        self.vx, self.vy = self.vx / 2, self.vy / 2
        return c


def nngp(x: Tensor, y: Tensor | None = None, *, varws: Sequence[float], varbs: Sequence[float]) -> Tensor:
    """Covariance of the activations of a random net after its last ReLU (Lee et al., 2018).

    Args:
        x: (n, d).
        y: (m, d); default: ``x``.
        varws: Variance of the weights before each ReLU layer, times the fan-in.
        varbs: That of the biases.

    Raises:
        ValueError: Other numbers of entries, negative ones, or widths that differ.
    """
    _check_lengths(len(varws), varws=varws, varbs=varbs)
    moments = _Moments(x, y)
    for varw, varb in zip(varws, varbs, strict=True):
        moments.scale(varw, varb)
        moments.relu()
    return moments.cov


def ntk(
    x: Tensor,
    y: Tensor | None = None,
    *,
    varws: Sequence[float],
    varbs: Sequence[float],
    lrws: Sequence[float],
    lrbs: Sequence[float],
    mode: Literal["exact", "legacy"] = "exact",
) -> Tensor:
    """Neural tangent kernel (Jacot et al., 2018) of a net with one linear layer more than ReLU layers.

    Args:
        x: (n, d).
        y: (m, d); default: ``x``.
        varws: Variances of the weights of each linear layer, times the fan-in.
        varbs: Those of the biases.
        lrws: Learning rates of the weights of each linear layer.
        lrbs: Those of the biases.
        mode: ``legacy`` takes the derivative at the correlation after the activation, and without its factor 1/2, as the
            published NTK numbers do.

    Raises:
        ValueError: Other numbers of entries, negative ones, another mode, or widths that differ.
    """
    if mode not in ("exact", "legacy"):
        raise ValueError(f"mode must be 'exact' or 'legacy', got {mode!r}")
    _check_lengths(len(varws), varws=varws, varbs=varbs, lrws=lrws, lrbs=lrbs)
    moments = _Moments(x, y)
    total = lrws[0] * moments.cov + lrbs[0]
    for i in range(1, len(varws)):
        moments.scale(varws[i - 1], varbs[i - 1])
        c = moments.relu()
        derivative = f11(c) if mode == "exact" else 2 * f11(2 * f00(c))
        total = total * derivative * varws[i] + lrws[i] * moments.cov + lrbs[i]
    return total


def _check_lengths(expected: int, **lists: Sequence[float]) -> None:
    if expected < 1 or any(len(values) != expected for values in lists.values()):
        found = ", ".join(f"{name} {len(values)}" for name, values in lists.items())
        raise ValueError(f"the lists need one entry per layer each, at least one; got {found}")
    for name, values in lists.items():
        if not all(value >= 0 for value in values):
            raise ValueError(f"{name} must not be negative, got {list(values)}")


def feature_kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Kernel of the features (n, r) of an infinite net, unit rows from :meth:`InfMLP.features`: at most 1/2."""
    c = x @ (x if y is None else y).T
    return f00(c.fill_diagonal_(1.0) if y is None else c)


def cosine_kernel(x: Tensor, y: Tensor | None = None) -> Tensor:
    """Half the cosine of the features (n, width) of a finite net: the same kernel, sampled."""
    x = normalize(x, dim=1)
    return x @ (x if y is None else normalize(y, dim=1)).T / 2


def one_hidden_layer(
    varw: float, varb: float, varw2: float | None = None
) -> tuple[Callable[[Tensor, Tensor | None], Tensor], ...]:
    """Kernels whose sum is the limit of a net with one hidden layer, one per group of weights that is trained.

    Args:
        varw: Variance of the first weights (not divided by the fan-in: the published convention of these nets).
        varb: That of the first biases.
        varw2: That of the readout, if the first weights are trained too; default: only the readout is.

    Returns:
        The kernel of the readout, after that of the first weights if they are trained.
    """

    def readout(x: Tensor, y: Tensor | None = None) -> Tensor:
        moments = _Moments(x, y)
        moments.scale(varw * x.shape[1], varb)
        moments.relu()
        return moments.cov

    def weights(x: Tensor, y: Tensor | None = None) -> Tensor:
        moments = _Moments(x, y)
        products = moments.cov * x.shape[1]
        moments.scale(varw * x.shape[1], varb)
        return f11(moments.relu()) * products * (varw2 or 0.0)

    return (readout,) if varw2 is None else (weights, readout)
