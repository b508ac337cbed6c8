"""The task ``cartpole``: actors, and the return that judges them."""

from pathlib import Path

import torch
from torch import Tensor, nn
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task

from gpt_diffusion.cartpole.policy import Actor
from gpt_diffusion.cartpole.simulator import EPISODE_STEPS
from gpt_diffusion.cartpole.training import mean_returns

ENVS = 512
"""Environments in which an actor is judged."""
SEED = 0
"""Of their starts and of the noise on the actions, the same for every actor."""


def mean_return(envs: int, seed: int, net: nn.Module) -> float:
    """Mean return of a noisy actor by the published protocol."""
    layout = ParameterLayout.from_module(net)
    return mean_returns_of(layout.flatten(net)[None], layout, envs=envs, seed=seed).item()


def mean_returns_of(vectors: Tensor, layout: ParameterLayout, *, envs: int, seed: int) -> Tensor:
    """The same of many actors (n, d) at once, (n,); the result of one does not depend on the others."""
    generator = torch.Generator(vectors.device).manual_seed(seed)
    return mean_returns(layout.unflatten(vectors), generator, envs=envs, common=True)


def cartpole(data_dir: Path | None = None) -> Task:
    """The task, as the registry asks for it; there are no data to read."""
    return Task(
        name="cartpole",
        constructor=Actor,
        data_fn=lambda: (ENVS, SEED),
        test_fn=mean_return,
        minimize=False,
        best_prompt=float(EPISODE_STEPS),
        recursive_prompt=float(EPISODE_STEPS),
        metric_name="train_ret",
        input_shape=(4,),
    )
