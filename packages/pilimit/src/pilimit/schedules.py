"""Factors of the learning rate (or of the clipping threshold) per step, for ``torch.optim.lr_scheduler.LambdaLR``."""

import math
from collections.abc import Callable, Sequence

Factor = Callable[[int], float]
"""Step, from 0, to factor."""


def multistep(milestones: Sequence[int], ratio: float) -> Factor:
    """A factor ``ratio`` from each milestone on."""
    return lambda step: ratio ** sum(step >= milestone for milestone in milestones)


def cosine(steps: int) -> Factor:
    """From 1 to 0 along half a cosine."""
    return lambda step: (1 + math.cos(math.pi * step / steps)) / 2


def exponential(ratio: float) -> Factor:
    """A factor ``ratio`` per step."""
    return lambda step: ratio**step


def linear(steps: int) -> Factor:
    """From 1 to 0 along a line."""
    return lambda step: 1 - step / steps


def lagged(factor: Factor) -> Factor:
    """One step late, as the published code of infinite nets does it."""
    return lambda step: factor(step - 1) if step else 1.0
