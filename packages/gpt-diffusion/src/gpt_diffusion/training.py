"""Training a checkpoint diffusion model on one zoo: a loop to read, copy and change."""

import dataclasses
import json
import logging
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.checkpoint import load_training, save_training
from zoo_common.files import atomic_write, visible_files
from zoo_common.interrupts import deferred_interrupt
from zoo_common.layout import ParameterLayout
from zoo_common.population import Population
from zoo_common.tasks import Task, get_task
from zoo_common.zoo import Zoo

from gpt_diffusion.augmentation import Permuter, RulePermuter
from gpt_diffusion.behaviour import BehaviourLoss
from gpt_diffusion.config import Config, config_to_yaml, load_config
from gpt_diffusion.dataset import Pairs, ParameterDataset, mix_seed
from gpt_diffusion.device import choose_device
from gpt_diffusion.distributed import Processes, gather, joined, scatter, shard, synchronized
from gpt_diffusion.normalization import get_normalizer
from gpt_diffusion.optim import apply_gradients, averaged_copy, learning_rate, make_optimizer
from gpt_diffusion.preparation import excluded
from gpt_diffusion.pretrained import ModelInfo, Pretrained, build_model, make_diffusion
from gpt_diffusion.units import UnitTokens


@dataclass(frozen=True)
class TrainReport:
    """What a finished or interrupted training came to."""

    folder: Path
    step: int
    steps: int
    loss: float
    """Mean training loss since the last line of the log."""
    seconds: float
    """Of this session."""
    interrupted: bool = False
    """Whether Ctrl-C ended the session."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done; else resume."""
        return self.step == self.steps


def train(
    config: Config,
    *,
    resume: bool = False,
    data_dir: Path | None = None,
    limit_seconds: float | None = None,
    quiet: bool = False,
) -> TrainReport:
    """Train the denoiser of a configuration and write ``model.safetensors`` to its folder.

    The folder also receives ``config.yaml``, ``metrics.jsonl`` and ``state.safetensors``, from which a killed training
    resumes to the same result. Ctrl-C and ``limit_seconds`` save the state and stop.

    Args:
        config: All settings; ``config.folder`` must be new unless ``resume``.
        resume: Go on from the state in the folder (start, if there is none).
        data_dir: Data of the task, only for the behaviour term.
        limit_seconds: Stop after this time.
        quiet: No progress bar.

    Raises:
        FileNotFoundError: No zoo, or nothing to resume.
        ValueError: Zoo, configuration and saved state do not fit each other, or the loss is not finite.
    """
    with joined(choose_device(config.device)) as processes:
        run = _prepare_run(config, data_dir, processes)
        folder = _open_folder(config, resume) if processes.first else config.folder
        processes.wait()
        if resume and (folder / "state.safetensors").exists():
            run.load(folder / "state.safetensors")
        report = run.loop(folder, limit_seconds, quiet or not processes.first)
        if report.finished:
            average = run.plain_parts()["modules"]["average"]
            if processes.first:
                Pretrained(average, config, run.info).save(folder / "model.safetensors")
        processes.wait()
    return report


@dataclass(frozen=True)
class Forecast:
    """What a training will cost on this machine."""

    steps: int
    parameters: int
    """Of the denoiser."""
    seconds: float
    state_bytes: int
    """Disk for model and training state; the same again in memory."""


def forecast(config: Config, *, data_dir: Path | None = None, timed_steps: int = 5) -> Forecast:
    """Time a few steps without writing anything."""
    run = _prepare_run(config, data_dir, Processes(0, 1, choose_device(config.device)))
    run.advance()  # what happens only once
    began = time.monotonic()
    for _ in range(timed_steps):
        run.advance()
    run.sums.tolist()  # waits for the device
    seconds = (time.monotonic() - began) / timed_steps * run.steps
    parameters = sum(p.numel() for p in run.model.parameters())
    # weights, two AdamW moments and the average in the state; the average again in the model
    return Forecast(run.steps, parameters, seconds, 5 * 4 * parameters)


def _prepare_run(config: Config, data_dir: Path | None, processes: Processes) -> "Training":
    task = get_task(config.dataset.name, data_dir)
    dataset, info = prepare(config, Zoo.open(config.dataset.path), task, processes.device)
    behaviour = _behaviour(config, task, processes.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.rng_seed)
        return Training(config, dataset, info, processes, behaviour)


def prepare(config: Config, zoo: Zoo, task: Task, device: torch.device) -> tuple[ParameterDataset, ModelInfo]:
    """The training pairs of a zoo, and what the model must know of them."""
    data, units = config.dataset, config.transformer.tokens == "units"
    if not len(zoo):
        raise ValueError(f"{data.path}: the zoo is empty; fill it with `gpt-diffusion generate`")
    layout = ParameterLayout.from_module(task.constructor())
    if zoo.layout.shapes != layout.shapes:
        raise ValueError(f"{data.path}: the zoo holds {_sizes(zoo.layout)}, task {task.name!r} has {_sizes(layout)}")
    metric = data.train_metric or task.metric_name
    if metric not in zoo.metrics:
        raise ValueError(f"{data.path}: no metric {metric!r}; the zoo has {', '.join(zoo.metrics)}")
    for part in zoo.shards.values():
        part.file.check()
    runs = _good_runs(zoo, metric)[: data.max_train_runs]
    stats = zoo.stats(runs=runs)
    coeff = data.openai_coeff or 0.538 / stats.overall_std
    dataset = ParameterDataset(
        zoo,
        runs,
        metric=metric,
        normalizer=get_normalizer(data.normalizer, coeff),
        mode=data.pairs,
        min_spacing=data.min_step_spacing,
        max_spacing=data.max_step_spacing,
        epoch_size=data.target_epoch_size,
        augment=_permuter(task) if data.augment and not units else None,
        seed=config.rng_seed,
        device=device,
    )
    table = dataset.metrics[runs]
    last = table[np.arange(len(runs)), dataset.lengths[runs] - 1]
    info = ModelInfo(
        layout=zoo.layout,
        metric=metric,
        metric_log=metric.endswith("loss"),
        metric_scale=float(np.nanstd(table)),
        openai_coeff=coeff,
        weight_range=(stats.low, stats.high),
        best_metric=float(np.nanmin(table) if task.minimize else np.nanmax(table)),
        final_metric=float(np.median(last)),
        units=UnitTokens.from_symmetry(task.symmetry()) if units else None,
    )
    return dataset, info


def _good_runs(zoo: Zoo, metric: str) -> np.ndarray:
    """Training runs whose weights are finite and small and whose metric is known at every checkpoint."""
    runs, filtered = zoo.split("train"), zoo.filter()
    lengths = np.array([run.checkpoints for run in zoo.runs])
    known = np.flatnonzero(np.isfinite(zoo.metrics[metric].padded()).sum(1) == lengths)
    bad = excluded(zoo.path)
    listed = np.array([i for i, run in enumerate(zoo.runs) if run.id in bad], dtype=np.int64)
    good = np.setdiff1d(np.intersect1d(np.intersect1d(runs, filtered.kept), known), listed)
    if len(good) < len(runs):
        reasons = [f"{count} {reason}" for reason, count in filtered.dropped.items() if count]
        reasons += [f"{len(listed)} listed in prepared.json"] if len(listed) else []
        reasons += [f"{len(zoo) - len(known)} without a finite {metric} at every checkpoint"]
        message = "%s: %d of %d training runs are left out (in the whole zoo: %s)"
        logging.getLogger(__name__).warning(message, zoo.path, len(runs) - len(good), len(runs), ", ".join(reasons))
    return good


def _permuter(task: Task) -> Permuter:
    """The task's own rule if it has one, else the symmetry of its network."""
    return RulePermuter(task.constructor(), task.aug_fn) if task.aug_fn else task.symmetry()


def _sizes(layout: ParameterLayout) -> str:
    return ", ".join(f"{spec.name} {spec.shape}" for spec in layout.tensors)


class Training:
    """State of one training: models, optimizer, step counter."""

    def __init__(
        self,
        config: Config,
        dataset: ParameterDataset,
        info: ModelInfo,
        processes: Processes,
        behaviour: BehaviourLoss | None,
    ) -> None:
        self.config, self.dataset, self.info, self.behaviour = config, dataset, info, behaviour
        self.processes, self.device, self.optim = processes, processes.device, config.train
        self.rows = processes.rows(self.optim.mb_size)
        if (self.rows.stop - self.rows.start) % self.optim.accumulate:
            raise ValueError(
                f"train.accumulate ({self.optim.accumulate}) must divide the batch of a process "
                f"({self.rows.stop - self.rows.start}, train.mb_size / processes)"
            )
        self.model = build_model(config.transformer, info).to(self.device)
        self.average = averaged_copy(self.model)
        self.sharded = processes.world > 1 and self.optim.parallel == "fsdp"
        self.wrapped = processes.wrap(self.model, self.optim.parallel)
        if self.sharded:
            shard(self.average)
        self.optimizer = self._optimizer(self.model)
        self.forward: Callable[..., Tensor] = torch.compile(self.wrapped) if self.optim.compile else self.wrapped
        self.diffusion = make_diffusion(config)
        self.per_epoch = dataset.batches_per_epoch(self.optim.mb_size)
        self.steps = self.optim.max_steps or self.optim.num_ep * self.per_epoch
        self.step = 0
        self.sums = torch.zeros(3, dtype=torch.float64, device=self.device)  # loss, mse, number since the last log line
        self.last_loss = math.nan

    def loop(self, folder: Path, limit_seconds: float | None, quiet: bool) -> TrainReport:
        """Train to the end, to the time limit or to Ctrl-C; the state is saved in each case."""
        began = time.monotonic()
        log = _trimmed_log(folder / "metrics.jsonl", self.step)
        bar = tqdm(
            total=self.steps, initial=self.step, desc="train", unit="step", disable=quiet, file=sys.stderr, leave=False
        )
        with bar, deferred_interrupt() as interrupted:
            while self.step < self.steps and not self.processes.any(interrupted()):
                self.advance()
                bar.update()
                if self.step % self.optim.log_freq == 0 or self.step == self.steps:
                    self.write_log(log, bar, time.monotonic() - began)
                if self.step % self.optim.checkpoint_freq == 0 and self.step < self.steps:
                    self.save(folder / "state.safetensors")
                late = limit_seconds is not None and time.monotonic() - began > limit_seconds
                if limit_seconds is not None and self.processes.any(late):
                    break
            self.save(folder / "state.safetensors")
        seconds, stopped = time.monotonic() - began, interrupted() and self.step < self.steps
        return TrainReport(folder, self.step, self.steps, self.last_loss, seconds, stopped)

    def advance(self) -> None:
        """One optimizer step, a function of the state and of the step number."""
        optim, epoch = self.optim, self.step / self.per_epoch
        generator = torch.Generator(self.device).manual_seed(mix_seed(self.config.rng_seed, 2, self.step))
        pairs = self.dataset.batch(optim.mb_size, self.step, self.rows)
        lr = learning_rate(
            epoch,
            base_lr=optim.base_lr,
            num_epochs=self.steps / self.per_epoch,
            warmup_epochs=optim.warmup_epochs,
            warmup_factor=optim.warmup_factor,
            schedule=optim.lr_sch,
        )
        decay = min(optim.ema_decay, (1 + self.step) / (10 + self.step)) if optim.ema_warmup else optim.ema_decay
        if not self.config.transformer.ema:
            decay = 0.0
        times, shape = (optim.mb_size,), (optim.mb_size, pairs.target.shape[1])
        t = torch.randint(self.diffusion.num_timesteps, times, generator=generator, device=self.device)[self.rows]
        noise = torch.randn(shape, generator=generator, device=self.device)[self.rows]
        if optim.prompt_dropout:
            free = torch.rand(times, generator=generator, device=self.device)[self.rows] < optim.prompt_dropout
            pairs = pairs._replace(target_metric=torch.where(free, pairs.start_metric, pairs.target_metric))
        self.optimizer.zero_grad(set_to_none=True)
        drawn = generator.get_state()
        parts = [tensor.chunk(optim.accumulate) for tensor in (*pairs, t, noise)]
        for i, part in enumerate(zip(*parts, strict=True)):
            with synchronized(self.wrapped, i == optim.accumulate - 1):
                loss, mse = self.loss(Pairs(*part[:4]), part[4], part[5], generator.set_state(drawn))
                (loss / optim.accumulate).backward()
            self.sums += torch.stack([loss.detach(), mse, torch.ones_like(mse)]) / optim.accumulate
        apply_gradients(self.model, self.optimizer, lr=lr, grad_clip=optim.grad_clip, average=self.average, decay=decay)
        self.step += 1

    def loss(self, pairs: Pairs, t: Tensor, noise: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Objective and its part in weight space, two scalars.

        Args:
            pairs: Samples (b).
            t: Their diffusion steps (b,).
            noise: Their noise (b, D).
            generator: Draws the inputs of the behaviour term.
        """
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.optim.precision == "bf16"):
            terms = self.diffusion.training_losses(
                self.forward,
                pairs.target,
                t,
                loss_target=pairs.target_metric,
                loss_prev=pairs.start_metric,
                x_prev=pairs.start,
                noise=noise,
            )
        loss, mse = terms.loss.mean(), terms.loss.detach().mean()
        if self.behaviour is not None:
            unnormalize = self.dataset.normalizer.unnormalize
            divergence = self.behaviour(unnormalize(terms.pred_xstart), unnormalize(pairs.target), generator)
            loss = loss + self.optim.behaviour_weight * divergence.mean()
        return loss, mse

    def write_log(self, log: Path, bar: tqdm, seconds: float) -> None:
        """Append the means since the last line."""
        self.check()
        loss, mse, count = self.processes.mean(self.sums).tolist()
        self.sums.zero_()
        self.last_loss = loss / count
        if not self.processes.first:
            return
        line = {
            "step": self.step,
            "epoch": self.step / self.per_epoch,
            "loss": self.last_loss,
            "mse": mse / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
        }
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        bar.set_postfix(loss=f"{self.last_loss:.4f}")

    def check(self) -> None:
        """Stop a training that has diverged, before it overwrites the last good state."""
        loss = self.processes.mean(self.sums)[0].item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss is {loss} at step {self.step}; lower train.base_lr ({self.optim.base_lr}) or use "
                "train.precision=fp32"
            )

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs to go on, with any number of processes."""
        self.check()
        parts, sums = self.plain_parts(), self.processes.mean(self.sums)
        if self.processes.first:
            save_training(path, **parts, progress={"step": self.step, "sums": sums, "loss": self.last_loss})
        self.processes.wait()

    def load(self, path: Path) -> None:
        """Go back to a saved state."""
        parts = self._replicas() if self.sharded else self.plain_parts()
        progress = load_training(path, **parts)
        if self.sharded:
            scatter(self.model, self.optimizer, parts["modules"]["model"], parts["optimizers"]["adamw"])
            scatter(self.average, None, parts["modules"]["average"], None)
        self.step, self.last_loss = progress["step"], progress["loss"]
        self.sums.copy_(progress["sums"])

    def plain_parts(self) -> dict[str, Any]:
        """Models and optimizer whole, as they are saved; only the first process has them if they are sharded."""
        if not self.sharded:
            return {"modules": {"model": self.model, "average": self.average}, "optimizers": {"adamw": self.optimizer}}
        parts = self._replicas()
        gather(self.model, self.optimizer, parts["modules"]["model"], parts["optimizers"]["adamw"])
        gather(self.average, None, parts["modules"]["average"], None)
        return parts

    def _replicas(self) -> dict[str, Any]:
        model, average = (build_model(self.config.transformer, self.info) for _ in range(2))
        return {"modules": {"model": model, "average": average}, "optimizers": {"adamw": self._optimizer(model)}}

    def _optimizer(self, model: nn.Module) -> torch.optim.AdamW:
        optim = self.optim
        return make_optimizer(model, lr=optim.base_lr, weight_decay=optim.wd, beta2=optim.beta2)


def _behaviour(config: Config, task: Task, device: torch.device) -> BehaviourLoss | None:
    if config.train.behaviour_weight == 0:
        return None
    if task.splits is None:
        raise ValueError(f"train.behaviour_weight: task {task.name!r} has no training inputs; set it to 0")
    images = task.splits().train.images.to(device)
    return BehaviourLoss(Population(task.constructor()), images, config.train.behaviour_batch)


def _open_folder(config: Config, resume: bool) -> Path:
    """Create the run's folder with its ``config.yaml``, or check that a resumed one has the same."""
    folder = config.folder
    stored = folder / "config.yaml"
    if not resume and folder.exists() and visible_files(folder, ""):
        raise FileExistsError(f"{folder} already holds a run; use --resume to go on, or another exp_name or out_dir")
    if resume and not stored.exists():
        raise FileNotFoundError(f"nothing to resume in {folder}; start the run without --resume")
    if stored.exists():
        changed = _differences(dataclasses.asdict(load_config(stored)), dataclasses.asdict(config))
        if changed:
            raise ValueError(f"{stored} differs from the configuration given in {', '.join(changed)}; use the same")
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(stored) as temporary:
        temporary.write_text(config_to_yaml(config))
    return folder


def _differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Dotted names of the keys that differ."""
    names = []
    for key, value in stored.items():
        if isinstance(value, dict):
            names += [f"{key}.{name}" for name in _differences(value, given[key])]
        elif value != given[key]:
            names.append(key)
    return names


def _trimmed_log(path: Path, step: int) -> Path:
    """Drop the lines that a killed session wrote after its last saved state."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))
    return path
