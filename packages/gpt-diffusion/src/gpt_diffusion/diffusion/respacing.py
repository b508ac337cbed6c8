"""Fewer steps out of a long process (Nichol & Dhariwal 2021, section 4; Song et al. 2021 for the "ddim" strides)."""

from collections.abc import Sequence

import numpy as np

from gpt_diffusion.diffusion.schedule import Array


def space_timesteps(steps: int, respacing: str | Sequence[int]) -> set[int]:
    """Choose the steps of a process that are kept.

    Args:
        steps: T of the original process.
        respacing: ``"ddimN"``: the integer stride that gives N steps. Else a number of steps for each of several equal
            sections, as a list or separated by commas: ``"10,15,20"``; half-integer positions are rounded to even.

    Returns:
        Steps that are kept, in 0..T-1.

    Raises:
        ValueError: No stride gives N steps, more steps than a section has, or not a list of positive numbers.
    """
    if isinstance(respacing, str) and respacing.startswith("ddim"):
        wanted = _count(respacing.removeprefix("ddim"), respacing)
        for stride in range(1, steps):
            kept = range(0, steps, stride)
            if len(kept) == wanted:
                return set(kept)
        raise ValueError(f"respacing {respacing!r}: no integer stride gives {wanted} of {steps} steps")
    parts = respacing.split(",") if isinstance(respacing, str) else respacing
    counts = [_count(part, respacing) for part in parts]
    if not counts:
        raise ValueError("respacing needs at least one section")
    kept_steps: set[int] = set()
    first = 0
    for i, count in enumerate(counts):
        size = steps // len(counts) + (i < steps % len(counts))
        if size < count:
            raise ValueError(f"respacing {respacing!r}: section {i} has {size} of {steps} steps, cannot keep {count}")
        spacing = (size - 1) / (count - 1) if count > 1 else 1.0
        position = 0.0
        for _ in range(count):
            kept_steps.add(first + round(position))
            position += spacing
        first += size
    return kept_steps


def respaced_betas(alphas_cumprod: Array, kept: Sequence[int]) -> Array:
    """Betas of the process that visits only some steps: 1 - abar_i / abar_(the step kept before i)."""
    retained = alphas_cumprod[list(kept)]
    return 1 - retained / np.append(1.0, retained[:-1])


def _count(text: str | int, respacing: str | Sequence[int]) -> int:
    """A positive number of steps."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"respacing {respacing!r}: {text!r} is not a positive number of steps")
    return count
