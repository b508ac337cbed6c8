"""Prompting while a model learns: do its samples reach what was asked for, and when did they best?"""

import dataclasses
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from zoo_common.tasks import Task
from zoo_common.zoo import Zoo

from gpt_diffusion.config import Config
from gpt_diffusion.curves import Curves, curve_name, dvo_curves, recursive_curves
from gpt_diffusion.distributed import Processes
from gpt_diffusion.evaluation import (
    as_sampler,
    batched_metric,
    best_metric,
    prompt_again,
    prompt_once,
    trajectory_prompts,
)
from gpt_diffusion.pretrained import ModelInfo, Pretrained
from gpt_diffusion.prompting import PromptCurves, prompt_alignment

_HOPELESS = 1e9  # metric of a network without a finite one, so that prompting can go on


@dataclass(frozen=True)
class Verdict:
    """What prompting has shown."""

    scores: dict[str, float]
    """For ``metrics.jsonl``: of each group the prompt alignment, and the mean metric reached."""
    curves: dict[str, Curves]
    """By their published names."""
    alignment: float | None
    """Prompt alignment on unseen runs, if there are any."""


@dataclass(frozen=True)
class _Group:
    """Starting networks of this process: n of N in all."""

    total: int
    starts: Tensor  # (n, D)
    prompts: Tensor | None  # (n, k)
    optimum: float


class Monitor:
    """Prompts the initialisations of some runs at certain epochs of a training, as the published one does.

    Args:
        config: Of the training; with ``debug_mode``, prompts come from the recorded metrics of each run.
        zoo: Where the runs are.
        task: Of the networks.
        info: Of the model.
        groups: Runs of each group; a group without runs is left out.
        processes: Each of them takes ``vis.num_nets_per_gpu`` networks per group.

    Raises:
        FileNotFoundError: The task's data are missing.
    """

    def __init__(
        self,
        config: Config,
        zoo: Zoo,
        task: Task,
        info: ModelInfo,
        groups: Mapping[str, np.ndarray],
        processes: Processes,
    ) -> None:
        self.config, self.task, self.info, self.processes = config, task, info, processes
        self._measure = batched_metric(task, processes.device)
        table = torch.from_numpy(zoo.metrics[info.metric].padded())
        self.groups = {name: self._group(zoo, table, runs) for name, runs in groups.items() if len(runs)}

    def _group(self, zoo: Zoo, table: Tensor, runs: np.ndarray) -> _Group:
        vis, world = self.config.vis, self.processes.world
        total = min(vis.num_nets_per_gpu * world, len(runs))
        places = self.processes.rank + world * np.arange(-(-total // world))
        own = runs[places % total]  # as many for every process: they work in step
        minimize = self.task.minimize
        prompts = trajectory_prompts(table[own], vis.dvo_steps, minimize) if self.config.debug_mode else None
        starts = zoo.params.gather(own, np.zeros_like(own)).to(self.processes.device)
        return _Group(total, starts, prompts, best_metric(table[runs], minimize))

    def due(self, step: int, per_epoch: int) -> bool:
        """Whether to prompt after ``step`` steps: after the first epoch and after every ``vis.freq``."""
        epoch, rest = divmod(step, per_epoch)
        return rest == 0 and (epoch == 1 or epoch % self.config.vis.freq == 0)

    def times(self, steps: int, per_epoch: int) -> int:
        """How often that is in a training."""
        return sum(self.due(step, per_epoch) for step in range(per_epoch, steps + 1, per_epoch))

    def judge(self, pretrained: Pretrained, progress: Callable[[int, int], None] | None = None) -> Verdict:
        """Prompt all groups; draws from generators of its own."""
        scores: dict[str, float] = {}
        curves: dict[str, Curves] = {}
        vis = self.config.vis
        for name, group in self.groups.items():
            sampler = as_sampler(pretrained, self.processes.rank, progress)
            with torch.random.fork_rng(devices=[]):  # a task's own test function may draw from the global one
                once = prompt_once(sampler, self._metric, group.starts, self.task, vis, group.prompts)
                again = (
                    prompt_again(sampler, self._metric, group.starts, self.task, vis) if vis.recursive_probe else None
                )
            once = self._of_all(once, group.total)
            curves[curve_name("dvo", name)] = dvo_curves(once, name, group.optimum)
            alignment = prompt_alignment(once.desired, once.observed[:, 1:]).mean().item()
            best = once.desired.argmin(1) if self.task.minimize else once.desired.argmax(1)
            reached = once.observed.gather(1, 1 + best[:, None]).mean().item()
            scores |= {f"prompt_alignment_{name}": alignment, f"one_step_{name}": reached}
            if again is not None:
                again = self._of_all(again, group.total)
                curves[curve_name("recursive", name)] = recursive_curves(again, name, group.optimum)
                scores[f"recursive_{name}"] = again.observed[:, -1].mean().item()
        return Verdict(scores, curves, scores.get("prompt_alignment_test_set"))

    def seconds(self, model: nn.Module) -> float:
        """Estimate of the time of :meth:`judge`, from one denoising step for one network."""
        vis, sampling = self.config.vis, self.config.sampling
        once = dataclasses.replace(self.config, sampling=dataclasses.replace(sampling, steps=1))
        group = next(iter(self.groups.values()))
        starts = group.starts[:1].expand(vis.dvo_steps, -1)
        began = time.monotonic()
        Pretrained(model, once, self.info).sample(starts, prompt=1.0, start_metric=torch.ones(len(starts)))  # type: ignore[arg-type]
        a_step = (time.monotonic() - began) * sum(len(group.starts) for group in self.groups.values())
        return a_step * sampling.steps * (1 + vis.recursive_probe * vis.recursive_steps / vis.dvo_steps)

    def _metric(self, vectors: Tensor) -> Tensor:
        worst = _HOPELESS if self.task.minimize else -_HOPELESS
        return self._measure(vectors).nan_to_num(worst, worst, worst)

    def _of_all(self, prompted: PromptCurves, total: int) -> PromptCurves:
        """The networks of all processes, in the order of the runs."""
        desired, observed = (self.processes.collect(values)[:total].cpu() for values in prompted)
        return PromptCurves(desired, observed)
