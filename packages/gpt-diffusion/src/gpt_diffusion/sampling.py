"""Sampling checkpoints from a trained denoiser.

Shapes: ``n`` samples, ``d`` weights of the task network.
"""

import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

from gpt_diffusion.diffusion import Diffusion, Flow
from gpt_diffusion.model import Denoiser


@torch.no_grad()
def sample(
    model: Denoiser,
    diffusion: Diffusion | Flow,
    *,
    start: Tensor,
    prompt: Tensor,
    start_metric: Tensor,
    sampler: Literal["ddpm", "ddim", "dpm++"] = "ddpm",
    eta: float = 0.0,
    guidance: float = 1.0,
    clip: tuple[float, float] | None = None,
    generator: torch.Generator | None = None,
    noise: Iterable[Tensor] | None = None,
    batch_size: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Tensor:
    """Sample checkpoints that should reach the prompted metric, from their starting checkpoints.

    Starts from x_T ~ N(0, 1) and visits every step of the process: ancestral sampling (DDPM; Ho et al. 2020,
    algorithm 2), DDIM (Song et al. 2021) or DPM-Solver++(2M) (Lu et al. 2022), which needs fewer steps. With DDIM and
    ``eta = 0``, and with DPM-Solver++, the first draw is the only one.

    Args:
        model: The denoiser; its mode (training or evaluation) is left as it is.
        diffusion: The process; respaced for fewer steps. A flow is followed by Euler steps; its first draw is the only one.
        start: Starting checkpoints (n, d), normalised.
        prompt: Metric asked for (n,), raw units.
        start_metric: Metric of ``start`` (n,), raw units.
        sampler: Which of the three.
        eta: Noise of DDIM, 0 = deterministic, 1 = as much as DDPM.
        guidance: Weight w of the prompt: the prediction is that without a prompt plus w times the difference that the
            prompt makes. 1 = the plain prediction.
        clip: Range that the predicted x_0 is clamped to ("static" thresholding), in normalised space.
        generator: Source of the noise, on the device of ``start``.
        noise: The normal draws (n, d) themselves: the initial state, then one for each step, also those that use none.
        batch_size: Rows that go through the model at a time; bounds memory, the result does not depend on it.
        progress: Called as ``progress(steps done, steps in all)`` after each step.

    Returns:
        Sampled checkpoints (n, d), normalised.

    Raises:
        ValueError: Unknown sampler, or shapes that do not fit.
    """
    n = len(start)
    if sampler not in ("ddpm", "ddim", "dpm++"):
        raise ValueError(f"sampler {sampler!r} is unknown; use ddpm, ddim or dpm++")
    for name, value in (("prompt", prompt), ("start_metric", start_metric)):
        if value.shape != (n,):
            raise ValueError(f"{name}: expected ({n},), one per start, got {tuple(value.shape)}")
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    draws = _normal_draws(start, generator) if noise is None else _given_draws(noise, diffusion.num_timesteps + 1)
    denoise = _in_batches(model, prompt, start_metric, start, batch_size or max(n, 1))
    if guidance != 1:
        denoise = _guided(
            denoise, _in_batches(model, start_metric, start_metric, start, batch_size or max(n, 1)), guidance
        )
    denoised_fn = None if clip is None else lambda x_start: x_start.clamp(*clip)
    x, last = next(draws), None
    for done, step in enumerate(reversed(range(diffusion.num_timesteps)), start=1):
        t = torch.full((n,), step, device=start.device)
        if isinstance(diffusion, Flow):
            x = diffusion.euler_sample(denoise, x, t, denoised_fn=denoised_fn)
        elif sampler == "ddpm":
            x = diffusion.p_sample(denoise, x, t, next(draws), clip_denoised=False, denoised_fn=denoised_fn).sample
        elif sampler == "dpm++":
            x, last = diffusion.dpm_sample(denoise, x, t, last, clip_denoised=False, denoised_fn=denoised_fn)
        else:
            eps = None if eta == 0 and noise is None else next(draws)
            x = diffusion.ddim_sample(denoise, x, t, eps, eta=eta, clip_denoised=False, denoised_fn=denoised_fn).sample
        if progress is not None:
            progress(done, diffusion.num_timesteps)
    return x


def _guided(
    prompted: Callable[[Tensor, Tensor], Tensor], free: Callable[[Tensor, Tensor], Tensor], weight: float
) -> Callable[[Tensor, Tensor], Tensor]:
    """Classifier-free guidance; without a prompt means: prompted for the metric of the start."""
    return lambda x, t: torch.lerp(free(x, t), prompted(x, t), weight)


def _normal_draws(like: Tensor, generator: torch.Generator | None) -> Iterator[Tensor]:
    """Endless standard normal tensors of one shape."""
    for _ in itertools.count():
        yield torch.randn(like.shape, dtype=like.dtype, device=like.device, generator=generator)


def _given_draws(noise: Iterable[Tensor], count: int) -> Iterator[Tensor]:
    """The given draws, and a clear error if they end too early."""
    yield from itertools.islice(noise, count)
    raise ValueError(f"noise: {count} draws needed, the initial state and one for each step; fewer were given")


def _in_batches(
    model: Denoiser, prompt: Tensor, start_metric: Tensor, start: Tensor, batch_size: int
) -> Callable[[Tensor, Tensor], Tensor]:
    """The model bound to its conditions, run over at most ``batch_size`` rows at a time."""
    rows = [slice(i, i + batch_size) for i in range(0, max(len(start), 1), batch_size)]
    bound = [model.condition(prompt[r], start_metric[r], start[r]) for r in rows]
    if len(rows) == 1:
        return bound[0]
    return lambda x, t: torch.cat([f(x[r], t[r]) for f, r in zip(bound, rows, strict=True)])
