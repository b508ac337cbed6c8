"""Runs of the cart-pole: actors trained by PPO, as many at once as there is work for."""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from zoo_common.layout import ParameterLayout
from zoo_common.tasks import Task
from zoo_common.zoo import Run

from gpt_diffusion.cartpole.policy import Actor
from gpt_diffusion.cartpole.ppo import PpoConfig
from gpt_diffusion.cartpole.training import train_actors
from gpt_diffusion.device import choose_device
from gpt_diffusion.generation.batches import derive_seed
from gpt_diffusion.generation.schedule import saves_of
from gpt_diffusion.generation.work import Forecast, Options, Request, run_id

SAVE_COUNT = 200
"""Published number of checkpoints."""
CHUNK_ENVS = {"cpu": 2**12, "cuda": 2**19}
"""Environments that are stepped together, by device, when ``chunk`` is not given."""


@dataclass(frozen=True)
class Actors:
    """Checked :class:`~gpt_diffusion.generation.work.Work`; a step is an iteration of PPO."""

    task: Task
    layout: ParameterLayout
    seed: int
    options: Options
    config: PpoConfig
    device: torch.device

    def decided(self) -> "Actors":
        """The same: all actors of a chunk are always trained together."""
        return self

    def with_strategy(self, name: str) -> "Actors":
        """The same: there is one."""
        return self

    def saves(self, runs: range) -> Tensor:
        """Save points (n, c) of these runs."""
        o = self.options
        return saves_of(o.save_points, o.save_count, o.steps, [derive_seed(self.seed, "save", run) for run in runs])

    def train(self, runs: range, tick: Callable[[int], object]) -> list[Run]:
        """Train one chunk; environments and noise are drawn from a seed of the chunk."""
        starts, saves = [derive_seed(self.seed, "init", run) for run in runs], self.saves(runs)
        chunk_seed = derive_seed(self.seed, "chunk", runs.start)
        generator = torch.Generator(self.device).manual_seed(chunk_seed)
        vectors, returns = train_actors(starts, saves, self.config, generator, tick=tick)
        good = vectors.isfinite().all(2).all(1) & returns.isfinite().all(1)
        return [
            Run(
                id=run_id(self.task, self.seed, run),
                params=vectors[i],
                steps=saves[i],
                metrics={"train_ret": returns[i]},
                config={"index": run, "init_seed": starts[i], "chunk_seed": chunk_seed},
            )
            for i, run in enumerate(runs)
            if good[i]
        ]

    def forecast(self, runs: int) -> Forecast:
        """Time and disk from training a chunk for three and for one iteration."""
        o, actors = self.options, min(runs, self.options.chunk)
        start, third = (self._seconds(actors, iterations) for iterations in (1, 3))
        per_iteration = max(third - start, 1e-9) / 2 / actors
        seconds = runs * (o.steps * per_iteration + max(0.0, start / actors - per_iteration))
        disk = runs * o.save_count * (4 * self.layout.size + 8 + 8)
        return Forecast(runs, runs * o.steps, seconds, disk, "stacked", {"stacked": 1 / per_iteration})

    def _seconds(self, actors: int, iterations: int) -> float:
        generator = torch.Generator(self.device).manual_seed(0)
        saves = torch.tensor([[0, iterations]]).expand(actors, -1)
        began = time.perf_counter()
        train_actors(range(actors), saves, replace(self.config, iterations=iterations), generator)
        return time.perf_counter() - began


def prepare(task: Task, request: Request) -> Actors:
    """Check the options."""
    for name, value, only in (("share_batches", request.share_batches, 1), ("dtype", request.dtype, "float32")):
        if value != only:
            raise ValueError(f"{name} must be {only} for {task.name}, got {value}")
    if request.strategy not in ("auto", "stacked"):
        raise ValueError(f"strategy must be one of auto, stacked for {task.name}, got {request.strategy!r}")
    config = PpoConfig(envs=request.envs or PpoConfig.envs, iterations=request.steps or PpoConfig.iterations)
    device = choose_device(request.device)
    options = Options(
        steps=config.iterations,
        save_points=request.save_points or "random",
        save_count=request.saves(SAVE_COUNT, config.iterations),
        chunk=request.chunk_size(CHUNK_ENVS[device.type] // config.envs),
        device=device.type,
        dtype=request.dtype,
        strategy="stacked",
        envs=config.envs,
    )
    return Actors(task, ParameterLayout.from_module(Actor()), request.seed, options, config, device)
