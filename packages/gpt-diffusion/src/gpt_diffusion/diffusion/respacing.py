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
        wanted = step_count(respacing.removeprefix("ddim"), respacing)
        for stride in range(1, steps):
            kept = range(0, steps, stride)
            if len(kept) == wanted:
                return set(kept)
        raise ValueError(f"respacing {respacing!r}: no integer stride gives {wanted} of {steps} steps")
    parts = respacing.split(",") if isinstance(respacing, str) else respacing
    counts = [step_count(part, respacing) for part in parts]
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


def even_in_log_snr(alphas_cumprod: Array, count: int) -> list[int]:
    """Steps at about equal distances in log(signal / noise), first and last included; best for DPM-Solver++ (Lu et al. 2022).

    Args:
        alphas_cumprod: abar_t (T,), decreasing.
        count: Number of steps, 1..T; where they would fall together, the next free ones are taken.

    Returns:
        ``count`` steps in 0..T-1, increasing; the last one alone for ``count`` 1.
    """
    log_snr = np.log(alphas_cumprod) - np.log1p(-alphas_cumprod)
    wanted = np.linspace(log_snr[-1], log_snr[0], count)
    nearest = np.interp(wanted, log_snr[::-1], np.arange(len(log_snr))[::-1]).round()[::-1].astype(int)
    numbers = np.arange(count)
    apart = np.maximum.accumulate(nearest - numbers) + numbers
    return [int(t) for t in np.minimum(apart, len(log_snr) - count + numbers)]


def respaced_betas(alphas_cumprod: Array, kept: Sequence[int]) -> Array:
    """Betas of the process that visits only some steps: 1 - abar_i / abar_(the step kept before i)."""
    retained = alphas_cumprod[list(kept)]
    return 1 - retained / np.append(1.0, retained[:-1])


def step_count(text: str | int, respacing: str | Sequence[int], most: int | None = None) -> int:
    """A positive number of steps, at most ``most``."""
    try:
        count = int(text)
    except ValueError:
        count = 0
    if count < 1:
        raise ValueError(f"respacing {respacing!r}: {text!r} is not a positive number of steps")
    if most is not None and count > most:
        raise ValueError(f"respacing {respacing!r}: cannot keep {count} of {most} steps")
    return count
