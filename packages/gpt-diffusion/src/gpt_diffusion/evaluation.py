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
from gpt_diffusion.pretrained import Pretrained
from gpt_diffusion.prompting import (
    MetricFn,
    PromptCurves,
    Sampler,
    one_by_one,
    one_step_prompting,
    prompt_alignment,
    recursive_prompting,
)


@dataclass(frozen=True)
class Evaluation:
    """Prompting curves of one group of starting networks."""

    one_step: PromptCurves
    recursive: PromptCurves
    shuffled_alignment: float
    """Alignment of the same samples with each network's prompts in another order: the control."""

    @property
    def alignment(self) -> float:
        """Prompt alignment, 1 is perfect."""
        return _alignment(self.one_step.desired, self.one_step.observed[:, 1:])

    def to_json(self) -> dict[str, Any]:
        """Scores and curves as plain values."""
        return {
            "prompt_alignment": self.alignment,
            "shuffled_prompt_alignment": self.shuffled_alignment,
            "networks": len(self.one_step.desired),
            "start_metric": self.one_step.observed[:, 0].mean().item(),
            "recursive_metric": self.recursive.observed.mean(0).tolist(),
            "one_step": {name: getattr(self.one_step, name).tolist() for name in PromptCurves._fields},
            "recursive": {name: getattr(self.recursive, name).tolist() for name in PromptCurves._fields},
        }


def evaluate(
    pretrained: Pretrained,
    task: Task,
    starts: Tensor,
    *,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """One-step and recursive prompting of starting networks (n, D), raw weights, with the settings of the model.

    Raises:
        ValueError: Starts of another layout or with non-finite values.
    """
    metric = batched_metric(task, pretrained.device)
    sampler = as_sampler(pretrained, seed, progress)
    starts = starts.to(pretrained.device)
    vis = pretrained.config.vis
    one_step = one_step_prompting(
        sampler,
        metric,
        starts,
        minimize=task.minimize,
        best_prompt=task.best_prompt,
        prompt_start_coeff=vis.prompt_start_coeff,
        steps=vis.dvo_steps,
    )
    recursive = recursive_prompting(
        sampler,
        metric,
        starts,
        minimize=task.minimize,
        best_prompt=task.best_prompt,
        recursive_prompt=task.recursive_prompt,
        steps=vis.recursive_steps,
    )
    order = torch.randperm(vis.dvo_steps, generator=torch.Generator().manual_seed(seed)).to(starts.device)
    shuffled = _alignment(one_step.desired[:, order], one_step.observed[:, 1:])
    return Evaluation(one_step, recursive, shuffled)


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
