"""Noise schedules and the constants that follow from them, as float64 NumPy arrays.

Notation of Ho et al. 2020 (DDPM): q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t), alpha_t = 1 - beta_t,
abar_t = alpha_1 ... alpha_t. Arrays are indexed by t = 0 ... T - 1.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

SCHEDULES = ("linear", "squaredcos_cap_v2")


def named_betas(name: str, steps: int) -> Array:
    """The schedules that a process is built from.

    ``linear`` is that of Ho et al. 2020 (1e-4 to 0.02 over 1000 steps), scaled to other numbers of steps.
    ``squaredcos_cap_v2`` is the cosine schedule of Nichol & Dhariwal 2021, eq. 17.

    Args:
        name: One of the two.
        steps: T, at least 1; at least 20 for ``linear``, whose betas would exceed 1 below that.

    Returns:
        beta_t, shape (T,).

    Raises:
        ValueError: Unknown name or too few steps.
    """
    if steps < 1:
        raise ValueError(f"a diffusion process needs at least 1 step, got {steps}")
    if name == "linear":
        scale = 1000 / steps
        if steps < 20:
            raise ValueError(
                f"the linear noise schedule needs at least 20 steps (beta would reach {scale * 0.02:.2f}), got {steps}; "
                "use squaredcos_cap_v2, or 1000 steps with respacing"
            )
        return betas_between("linear", steps, beta_start=scale * 0.0001, beta_end=scale * 0.02)
    if name == "squaredcos_cap_v2":
        return betas_for_alpha_bar(steps, lambda u: np.cos((u + 0.008) / 1.008 * np.pi / 2) ** 2)
    raise ValueError(f"noise schedule {name!r} is unknown; use one of {', '.join(SCHEDULES)}")


def betas_between(kind: str, steps: int, *, beta_start: float, beta_end: float) -> Array:
    """Schedules between two given betas.

    Args:
        kind: ``linear``; ``quad`` (square of a line between the roots); ``warmup10``, ``warmup50`` (line over the first
            10 or 50 %, then the end value); ``const`` (the end value); ``jsd`` (1/T, 1/(T-1), ..., 1).
        steps: T, at least 1.
        beta_start: First value.
        beta_end: Last value.

    Returns:
        beta_t, shape (T,).

    Raises:
        ValueError: Unknown kind.
    """
    if kind == "linear":
        return np.linspace(beta_start, beta_end, steps, dtype=np.float64)
    if kind == "quad":
        return np.square(np.linspace(beta_start**0.5, beta_end**0.5, steps, dtype=np.float64))
    if kind in ("warmup10", "warmup50"):
        betas = np.full(steps, beta_end, dtype=np.float64)
        ramp = int(steps * int(kind.removeprefix("warmup")) / 100)
        betas[:ramp] = np.linspace(beta_start, beta_end, ramp, dtype=np.float64)
        return betas
    if kind == "const":
        return np.full(steps, beta_end, dtype=np.float64)
    if kind == "jsd":
        return np.reciprocal(np.linspace(steps, 1, steps, dtype=np.float64))
    raise ValueError(f"kind of betas {kind!r} is unknown; use linear, quad, warmup10, warmup50, const or jsd")


def betas_for_alpha_bar(steps: int, alpha_bar: Callable[[float], float], max_beta: float = 0.999) -> Array:
    """beta_i = min(1 - abar((i + 1)/T) / abar(i/T), max_beta), for a function abar on [0, 1]."""
    betas = [min(1 - alpha_bar((i + 1) / steps) / alpha_bar(i / steps), max_beta) for i in range(steps)]
    return np.array(betas, dtype=np.float64)


@dataclass(frozen=True, eq=False)
class Schedule:
    """Everything about a Gaussian process that follows from its betas.

    Args:
        betas: beta_t in (0, 1], shape (T,).

    Raises:
        ValueError: No betas, or one outside of (0, 1].
    """

    betas: Array

    def __post_init__(self) -> None:
        """Reject what is no variance."""
        if self.betas.ndim != 1 or not len(self.betas) or not (0 < self.betas).all() or not (self.betas <= 1).all():
            raise ValueError(f"betas must be a non-empty vector of numbers in (0, 1], got {self.betas}")

    @cached_property
    def alphas_cumprod(self) -> Array:
        """abar_t."""
        return np.cumprod(1 - self.betas, dtype=np.float64)

    @cached_property
    def alphas_cumprod_prev(self) -> Array:
        """abar_{t-1}, 1 before the first step."""
        return np.append(1.0, self.alphas_cumprod[:-1])

    @cached_property
    def alphas_cumprod_next(self) -> Array:
        """abar_{t+1}, 0 after the last step."""
        return np.append(self.alphas_cumprod[1:], 0.0)

    @cached_property
    def sqrt_alphas_cumprod(self) -> Array:
        """sqrt(abar_t): mean of q(x_t | x_0) per unit of x_0."""
        return np.sqrt(self.alphas_cumprod)

    @cached_property
    def one_minus_alphas_cumprod(self) -> Array:
        """1 - abar_t: variance of q(x_t | x_0)."""
        return 1 - self.alphas_cumprod

    @cached_property
    def sqrt_one_minus_alphas_cumprod(self) -> Array:
        """sqrt(1 - abar_t)."""
        return np.sqrt(self.one_minus_alphas_cumprod)

    @cached_property
    def log_one_minus_alphas_cumprod(self) -> Array:
        """Logarithm of 1 - abar_t."""
        return np.log(self.one_minus_alphas_cumprod)

    @cached_property
    def sqrt_recip_alphas_cumprod(self) -> Array:
        """sqrt(1 / abar_t)."""
        return np.sqrt(1 / self.alphas_cumprod)

    @cached_property
    def sqrt_recipm1_alphas_cumprod(self) -> Array:
        """sqrt(1 / abar_t - 1)."""
        return np.sqrt(1 / self.alphas_cumprod - 1)

    @cached_property
    def posterior_variance(self) -> Array:
        """Variance of q(x_{t-1} | x_t, x_0), Ho et al. 2020 eq. 7."""
        return self.betas * (1 - self.alphas_cumprod_prev) / self.one_minus_alphas_cumprod

    @cached_property
    def posterior_log_variance_clipped(self) -> Array:
        """Its logarithm, the first entry (log 0) replaced by the second; empty for T = 1."""
        variance = self.posterior_variance
        return np.log(np.append(variance[1], variance[1:])) if len(variance) > 1 else np.array([])

    @cached_property
    def posterior_mean_coef1(self) -> Array:
        """Weight of x_0 in the mean of q(x_{t-1} | x_t, x_0)."""
        return self.betas * np.sqrt(self.alphas_cumprod_prev) / self.one_minus_alphas_cumprod

    @cached_property
    def posterior_mean_coef2(self) -> Array:
        """Weight of x_t in the mean of q(x_{t-1} | x_t, x_0)."""
        return (1 - self.alphas_cumprod_prev) * np.sqrt(1 - self.betas) / self.one_minus_alphas_cumprod

    @cached_property
    def large_variance(self) -> Array:
        """beta_t, the first entry replaced by that of the posterior variance at t = 1: "fixed large"."""
        return np.append(self.posterior_variance[1:2], self.betas[1:]) if len(self.betas) > 1 else self.betas

    @cached_property
    def large_log_variance(self) -> Array:
        """Logarithm of :attr:`large_variance`."""
        return np.log(self.large_variance)

    @cached_property
    def log_betas(self) -> Array:
        """Logarithm of beta_t."""
        return np.log(self.betas)

    @cached_property
    def extrapolation(self) -> Array:
        """Weight of DPM-Solver++(2M): half of this step over the last one in log(signal / noise); 0 for both ends."""
        log_ratio = 0.5 * np.log(self.alphas_cumprod / self.one_minus_alphas_cumprod)
        steps = -np.diff(log_ratio)
        weights = np.zeros_like(log_ratio)
        weights[1:-1] = steps[:-1] / (2 * steps[1:])
        return weights
