"""Prompting starting networks for a metric, and judging what comes out.

Shapes: ``n`` networks of ``d`` weights (in the space of the sampler), ``k`` prompts or steps. Metrics are in raw units.
The sampler is a function (targets (m,), metrics of the starts (m,), starts (m, d)) -> (m, d); the metric function maps
a batch (m, d) to (m,). For a function of a single network see :func:`one_by_one`.
"""

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

Sampler = Callable[[Tensor, Tensor, Tensor], Tensor]
MetricFn = Callable[[Tensor], Tensor]


class PromptCurves(NamedTuple):
    """Desired versus observed metrics of n networks."""

    desired: Tensor  # (n, k)
    observed: Tensor  # (n, 1 + k), column 0 = metric of the starting networks


def one_by_one(metric: Callable[[Tensor], Any]) -> MetricFn:
    """A batched metric function from one of a single vector (d,), which may return a tuple with the metric first."""

    def of_batch(vectors: Tensor) -> Tensor:
        results = [metric(vector) for vector in vectors]
        values = [float(r[0] if isinstance(r, tuple) else r) for r in results]
        return torch.tensor(values, device=vectors.device)

    return of_batch


def one_step_prompting(
    sampler: Sampler,
    metric: MetricFn,
    starts: Tensor,
    *,
    minimize: bool,
    best_prompt: float,
    prompt_start_coeff: float = 1.0,
    steps: int = 20,
    prompts: Tensor | None = None,
) -> PromptCurves:
    """Ask every starting network for a range of metrics, one sample each (the DVO curve of G.pt).

    Args:
        sampler: See above; called once with all n k pairs.
        metric: See above.
        starts: Starting networks (n, d).
        minimize: Whether lower is better; prompts go from best to worst then, else from worst to best.
        best_prompt: The best of the prompts.
        prompt_start_coeff: The worst of them, relative to the metric of the starting network.
        steps: k, evenly spaced prompts.
        prompts: Prompts (n, at least k) to use instead; the first of each row then passes for the metric of the start.

    Returns:
        Prompts and what was reached.
    """
    base = metric(starts)
    if prompts is None:
        desired = _lines(torch.full_like(base, best_prompt), base * prompt_start_coeff, steps)
        desired = desired if minimize else desired.flip(1)
        start_metric = base
    else:
        desired = prompts[:, :steps]
        start_metric = prompts[:, 0]
    n, k = desired.shape
    targets, repeated = desired.flatten(), start_metric.repeat_interleave(k)
    sampled = sampler(targets, repeated, starts.repeat_interleave(k, dim=0))
    return PromptCurves(desired, torch.cat([base[:, None], metric(sampled).view(n, k)], dim=1))


def recursive_prompting(
    sampler: Sampler,
    metric: MetricFn,
    starts: Tensor,
    *,
    mode: Literal["zero", "step"] = "zero",
    minimize: bool,
    best_prompt: float,
    recursive_prompt: float,
    steps: int = 2,
) -> PromptCurves:
    """Feed samples back as starts.

    Args:
        sampler: See above.
        metric: See above.
        starts: Starting networks (n, d).
        mode: ``zero``: always ask for ``recursive_prompt``; ``step``: ask for the current metric improved by
            ``best_prompt / 5``.
        minimize: Whether lower is better.
        best_prompt: Best prompt of the task.
        recursive_prompt: Prompt of mode ``zero``.
        steps: k, number of updates.

    Returns:
        Prompts and what was reached after each update.

    Raises:
        ValueError: Unknown mode.
    """
    if mode not in ("zero", "step"):
        raise ValueError(f"mode of recursive prompting {mode!r} is unknown; use zero or step")
    improvement = -best_prompt / 5 if minimize else best_prompt / 5
    vectors, observed, desired = starts, [metric(starts)], []
    for _ in range(steps):
        current = observed[-1]
        target = torch.full_like(current, recursive_prompt) if mode == "zero" else current + improvement
        vectors = sampler(target, current, vectors)
        desired.append(target)
        observed.append(metric(vectors))
    return PromptCurves(torch.stack(desired, dim=1), torch.stack(observed, dim=1))


def prompt_alignment(desired: Tensor, observed: Tensor) -> Tensor:
    """R^2 of each curve against the diagonal: 1 - sum_j (d_j - o_j)^2 / (sum_j (d_j - mean d)^2 + 1e-8).

    The score of a group of networks is the mean over its curves.

    Args:
        desired: Prompts (..., k).
        observed: Metrics reached (..., k), without the column of the starts.

    Returns:
        Scores (...), float64; 1 is perfect.

    Raises:
        ValueError: Different shapes.
    """
    if desired.shape != observed.shape:
        raise ValueError(f"desired {tuple(desired.shape)} and observed {tuple(observed.shape)} must have one shape")
    d, o = desired.double(), observed.double()
    spread = (d - d.mean(dim=-1, keepdim=True)).square().sum(dim=-1)
    return 1 - (d - o).square().sum(dim=-1) / (spread + 1e-8)


def spread_losses(losses: Tensor, steps: int, minimize: bool) -> Tensor:
    """Recorded metrics of runs nearest to a line from the first to the best one.

    Args:
        losses: Metrics of each run in chronological order (n, l).
        steps: Points on the line, k.
        minimize: Whether the best is the lowest.

    Returns:
        Chosen metrics (n, k); of equally near ones the first.
    """
    best = losses.amin(dim=1) if minimize else losses.amax(dim=1)
    targets = _lines(losses[:, 0], best, steps)
    nearest = (losses[:, None, :] - targets[:, :, None]).abs().argmin(dim=2)
    return losses.gather(1, nearest)


def _lines(first: Tensor, last: Tensor, steps: int) -> Tensor:
    """Evenly spaced values from first (n,) to last (n,), both included, (n, steps)."""
    w = torch.linspace(0, 1, steps, dtype=torch.float64, device=first.device)
    return torch.lerp(first.double()[:, None], last.double()[:, None], w).to(first.dtype)
