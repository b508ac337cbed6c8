"""Judging a model: does a prompt give networks that reach it?

Shapes: ``n`` starting networks, ``k`` prompts, ``D`` weights.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population
from zoo_common.tasks import Task, classification_error, classification_loss

from gpt_diffusion.cartpole.task import mean_return, mean_returns_of
from gpt_diffusion.config import VisConfig
from gpt_diffusion.pretrained import Pretrained
from gpt_diffusion.prompting import (
    MetricFn,
    PromptCurves,
    Sampler,
    one_by_one,
    one_step_prompting,
    prompt_alignment,
    recursive_prompting,
    spread_losses,
)


@dataclass(frozen=True)
class Evaluation:
    """Prompting curves of one group of starting networks."""

    one_step: PromptCurves
    recursive: PromptCurves
    shuffled_alignment: float
    """Alignment of the same samples with each network's prompts in another order: the control."""
    samples: Tensor
    """Networks (n, D), raw, sampled in one step for the best prompt of each row."""
    reached: Tensor
    """Their metric (n,)."""

    @property
    def alignment(self) -> float:
        """Prompt alignment, 1 is perfect."""
        return _alignment(self.one_step.desired, self.one_step.observed[:, 1:])

    def to_json(self) -> dict[str, Any]:
        """Scores and curves as plain values; bands are the half widths of :func:`mean_and_band`."""
        bands = {name: mean_and_band(curves.observed) for name, curves in self._curves.items()}
        return {
            "prompt_alignment": self.alignment,
            "shuffled_prompt_alignment": self.shuffled_alignment,
            "networks": len(self.one_step.desired),
            "start_metric": self.one_step.observed[:, 0].mean().item(),
            "recursive_metric": self.recursive.observed.mean(0).tolist(),
            **{
                name: {
                    **{field: getattr(curves, field).tolist() for field in PromptCurves._fields},
                    "mean": bands[name][0].tolist(),
                    "band": bands[name][1].tolist(),
                    "deviation": curves.observed.double().std(0, correction=min(1, len(curves.observed) - 1)).tolist(),
                }
                for name, curves in self._curves.items()
            },
        }

    @property
    def _curves(self) -> dict[str, PromptCurves]:
        return {"one_step": self.one_step, "recursive": self.recursive}


def mean_and_band(values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean over networks of values (n, k), and half width of its 95 % interval (Student's t; 0 for one network)."""
    from scipy.stats import t as student

    values, n = values.double(), len(values)
    if n < 2:
        return values.mean(0), torch.zeros(values.shape[1:], dtype=torch.float64)
    return values.mean(0), float(student.ppf(0.975, n - 1)) * values.std(0) / n**0.5


def evaluate(
    pretrained: Pretrained,
    task: Task,
    starts: Tensor,
    *,
    prompts: Tensor | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """One-step and recursive prompting of starting networks (n, D), raw weights, with the settings of the model.

    Args:
        pretrained: The model.
        task: Of the networks.
        starts: Weights (n, D), raw.
        prompts: Prompts (n, k) of the one-step curve, the metric of the start first; default: a line from the best
            prompt to the metric of the start.
        seed: Of the noise.
        progress: Called at every denoising step.

    Raises:
        ValueError: Starts of another layout or with non-finite values.
    """
    metric = batched_metric(task, pretrained.device)
    sampler = as_sampler(pretrained, seed, progress)
    drawn: list[Tensor] = []

    def recorded(targets: Tensor, metrics: Tensor, given: Tensor) -> Tensor:
        drawn.append(sampler(targets, metrics, given))
        return drawn[-1]

    starts, vis = starts.to(pretrained.device), pretrained.config.vis
    one_step = prompt_once(recorded, metric, starts, task, vis, prompts)
    (networks,) = drawn
    recursive = prompt_again(sampler, metric, starts, task, vis)
    order = torch.randperm(one_step.desired.shape[1], generator=torch.Generator().manual_seed(seed)).to(starts.device)
    shuffled = _alignment(one_step.desired[:, order], one_step.observed[:, 1:])
    best = one_step.desired.argmin(1) if task.minimize else one_step.desired.argmax(1)
    rows = torch.arange(len(best), device=best.device)
    samples = networks.view(*one_step.desired.shape, -1)[rows, best]
    return Evaluation(one_step, recursive, shuffled, samples.cpu(), one_step.observed[rows, 1 + best].cpu())


def prompt_once(
    sampler: Sampler, metric: MetricFn, starts: Tensor, task: Task, vis: VisConfig, prompts: Tensor | None = None
) -> PromptCurves:
    """One-step prompting as a configuration says."""
    return one_step_prompting(
        sampler,
        metric,
        starts,
        minimize=task.minimize,
        best_prompt=task.best_prompt,
        prompt_start_coeff=vis.prompt_start_coeff,
        steps=vis.dvo_steps,
        prompts=None if prompts is None else prompts.to(starts.device, torch.float32),
    )


def prompt_again(sampler: Sampler, metric: MetricFn, starts: Tensor, task: Task, vis: VisConfig) -> PromptCurves:
    """Recursive prompting as a configuration says."""
    return recursive_prompting(
        sampler,
        metric,
        starts,
        minimize=task.minimize,
        best_prompt=task.best_prompt,
        recursive_prompt=task.recursive_prompt,
        steps=vis.recursive_steps,
    )


def trajectory_prompts(metrics: Tensor, steps: int, minimize: bool) -> Tensor:
    """Prompts (n, steps) from the recorded metrics of runs (n, C; NaN after a run's end), the first checkpoint's first."""
    rows = [row[row.isfinite()] for row in metrics]
    return torch.cat([spread_losses(row[None], steps, minimize) for row in rows])


def best_metric(metrics: Tensor, minimize: bool) -> float:
    """Best metric of runs (n, C); the entries that a run does not have are NaN."""
    known = metrics[metrics.isfinite()]
    return (known.min() if minimize else known.max()).item()


def as_sampler(pretrained: Pretrained, seed: int, progress: Callable[[int, int], None] | None = None) -> Sampler:
    """The model as the sampler that prompting wants; every call draws new noise."""
    seeds = itertools.count(seed * 1_000_003)

    def draw(targets: Tensor, metrics: Tensor, starts: Tensor) -> Tensor:
        return pretrained.sample(starts, prompt=targets, start_metric=metrics, seed=next(seeds), progress=progress)

    return draw


def batched_metric(task: Task, device: torch.device) -> MetricFn:
    """The task's metric for many weight vectors (n, D) at once.

    Image classifiers and cart-pole actors are judged together; the test function of any other task is called once per
    network.
    """
    data: tuple[Any, ...] = tuple(part.to(device) if isinstance(part, Tensor) else part for part in task.data_fn())
    network = task.constructor()
    if task.test_fn in (classification_loss, classification_error):
        population = Population(network.to(device))
        kind = "loss" if task.test_fn is classification_loss else "error"
        return lambda vectors: getattr(population.metrics(vectors, *data), kind).float()
    layout = ParameterLayout.from_module(network)
    if task.test_fn is mean_return:
        envs, seed = data
        return lambda vectors: mean_returns_of(vectors.float(), layout, envs=envs, seed=seed)

    def single(vector: Tensor) -> Any:  # noqa: ANN401 (whatever the task's test function returns)
        layout.load_into(network, vector.cpu())
        return task.test_fn(*data, network)

    return one_by_one(single)


def _alignment(desired: Tensor, observed: Tensor) -> float:
    return prompt_alignment(desired, observed).mean().item()
