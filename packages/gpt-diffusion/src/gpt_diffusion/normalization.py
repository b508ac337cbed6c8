"""Scaling of checkpoints to the unit-sized numbers that a diffusion process expects."""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Normalizer(Protocol):
    """An invertible map of weights (..., d)."""

    def normalize(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Weights to normalised space, written to ``out`` if it is given."""
        ...

    def unnormalize(self, weights: Tensor) -> Tensor:
        """Back again."""
        ...

    def range(self, low: float, high: float) -> tuple[float, float]:
        """Normalised range of weights between two values."""
        ...


@dataclass(frozen=True)
class Scaling:
    """Multiply by one coefficient, so that the weights of a zoo have the standard deviation 0.538 of ImageNet pixels.

    Published coefficients: MNIST 4.185, CIFAR-10 1.646, Cartpole 2.06.
    """

    coeff: float

    def __post_init__(self) -> None:
        """Reject what cannot be inverted."""
        if not self.coeff > 0:
            raise ValueError(f"the normalisation coefficient must be positive, got {self.coeff}")

    def normalize(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Weights to normalised space."""
        return torch.mul(weights, self.coeff, out=out)

    def unnormalize(self, weights: Tensor) -> Tensor:
        """Back again."""
        return weights / self.coeff

    def range(self, low: float, high: float) -> tuple[float, float]:
        """Normalised range of weights between two values."""
        return low * self.coeff, high * self.coeff

    def __str__(self) -> str:
        """The published message."""
        return f"OpenAI(openai_coeff={self.coeff})"


@dataclass(frozen=True)
class Identity:
    """Weights as they are."""

    def normalize(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """Weights as they are."""
        return weights if out is None else out.copy_(weights)

    def unnormalize(self, weights: Tensor) -> Tensor:
        """Back again."""
        return weights

    def range(self, low: float, high: float) -> tuple[float, float]:
        """Normalised range of weights between two values."""
        return low, high

    def __str__(self) -> str:
        """The published message."""
        return "Identity"


def get_normalizer(name: str, openai_coeff: float | None = None) -> Normalizer:
    """The normaliser called ``openai`` (needs its coefficient) or ``none``.

    Raises:
        ValueError: Any other name, or no coefficient.
    """
    if name == "none":
        return Identity()
    if name != "openai":
        raise ValueError(f"normalizer {name!r} is unknown; use openai or none")
    if openai_coeff is None:
        raise ValueError("normalizer 'openai' needs openai_coeff, 0.538 / standard deviation of the weights")
    return Scaling(openai_coeff)
