"""Training a checkpoint diffusion model on one zoo: a loop to read, copy and change."""

import dataclasses
import json
import logging
import math
import shutil
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext, suppress
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
from zoo_common.population import Population
from zoo_common.tasks import Task, get_task

from gpt_diffusion.behaviour import BehaviourLoss
from gpt_diffusion.config import Config, config_to_yaml, load_config
from gpt_diffusion.dataset import Pairs, ParameterDataset, mix_seed
from gpt_diffusion.device import choose_device
from gpt_diffusion.diffusion.process import Losses
from gpt_diffusion.distributed import Processes, gather, joined, scatter, shard, synchronized, whole
from gpt_diffusion.loggers import Logger, open_logger
from gpt_diffusion.monitor import Monitor
from gpt_diffusion.optim import apply_gradients, averaged_copy, learning_rate, load_optimizer, make_optimizer
from gpt_diffusion.pretrained import ModelInfo, Pretrained, build_model, make_diffusion
from gpt_diffusion.published import open_runs
from gpt_diffusion.released import Released, find_released, read_released
from gpt_diffusion.training_data import good_runs, test_pairs, training_pairs


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

    The folder also receives ``config.yaml``, ``metrics.jsonl``, with ``vis.freq`` the model of the best prompt alignment on
    unseen runs as ``best.safetensors``, and ``state.safetensors``, from which a killed training resumes to the same result. Ctrl-C and ``limit_seconds`` save the state and stop.

    Args:
        config: All settings; ``config.folder`` must be new unless ``resume``.
        resume: Go on from the state in the folder (start, if there is none).
        data_dir: Data of the task, for prompting (``vis.freq``) and the behaviour term.
        limit_seconds: Stop after this time.
        quiet: No progress bar.

    Raises:
        FileNotFoundError: No zoo, or nothing to resume.
        ValueError: Zoo, configuration and saved state do not fit each other, or the loss is not finite.
    """
    logger = open_logger(config)
    with joined(choose_device(config.device)) as processes:
        run = _prepare_run(config, data_dir, processes)
        begin = None if config.resume_path is None else _beginning(config)
        folder = config.folder
        if processes.first:
            _open_folder(config, resume)
            _check_room(folder, 2 * _state_bytes(config, run.model))
        processes.wait()
        if resume and (folder / "state.safetensors").exists():
            run.load(folder / "state.safetensors")
        elif begin is not None:
            run.begin_from(begin)
        with logger(folder) if processes.first else nullcontext(Logger()) as run.logger:
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
    prompting_seconds: float
    """The part of it that ``vis.freq`` takes."""
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
    prompting = 0.0
    if run.monitor is not None and (times := run.monitor.times(run.steps, run.per_epoch)):
        prompting = times * run.monitor.seconds(run.average)
    return Forecast(run.steps, parameters, seconds + prompting, prompting, _state_bytes(config, run.model))


def _state_bytes(config: Config, model: nn.Module) -> int:
    """Weights, two AdamW moments and the average in the state; the average again in the model, and in the best one."""
    return (6 if config.vis.freq > 0 else 5) * 4 * sum(p.numel() for p in model.parameters())


def _check_room(folder: Path, needed: int) -> None:
    """Refuse to begin what the disk has no room for: the state and, while it is written, its successor."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(f"{folder} has {free / 1e9:.2f} GB left, the training needs {needed / 1e9:.2f} GB: make room")


def _prepare_run(config: Config, data_dir: Path | None, processes: Processes) -> "Training":
    task = get_task(config.dataset.name, data_dir)
    zoo, device = open_runs(config.dataset), processes.device
    dataset, info = training_pairs(config, zoo, task, device)
    measured = config.test.freq > 0 or (config.vis.freq > 0 and not config.debug_mode)
    unseen = good_runs(zoo, config.dataset, info.metric, "test") if measured else np.zeros(0, np.int64)
    test = test_pairs(config, zoo, unseen, info, device) if config.test.freq > 0 and len(unseen) else None
    monitor = None
    if config.vis.freq > 0:
        groups = {"training_set": dataset.runs} | ({} if config.debug_mode else {"test_set": unseen})
        try:
            monitor = Monitor(config, zoo, task, info, groups, processes)
        except FileNotFoundError as error:
            logging.getLogger(__name__).warning("the model is not prompted while it learns (vis.freq): %s", error)
    behaviour = _behaviour(config, task, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.rng_seed)
        return Training(config, dataset, info, processes, behaviour, test, monitor)


def _beginning(config: Config) -> Released:
    file = find_released(str(config.resume_path))
    if file is None:
        raise ValueError(f"resume_path: {config.resume_path} is neither a .pt file nor a released model")
    return read_released(file, config)


class _Interrupted(Exception):
    """Ctrl-C was pressed while the model was prompted."""


class Training:
    """State of one training: models, optimizer, step counter."""

    def __init__(
        self,
        config: Config,
        dataset: ParameterDataset,
        info: ModelInfo,
        processes: Processes,
        behaviour: BehaviourLoss | None,
        test: ParameterDataset | None = None,
        monitor: Monitor | None = None,
    ) -> None:
        self.config, self.dataset, self.info, self.behaviour, self.test = config, dataset, info, behaviour, test
        self.monitor, self.judged, self.best = monitor, 0, -math.inf  # the step judged last, the best score so far
        self.processes, self.device, self.optim, self.logger = processes, processes.device, config.train, Logger()
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
        self.save_every = self.optim.checkpoint_steps or self.optim.checkpoint_freq * self.per_epoch
        self.bf16 = config.amp or self.optim.precision == "bf16"
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
            with suppress(_Interrupted):
                while (self.step < self.steps or self.due) and not self.processes.any(interrupted()):
                    if not self.due:
                        self.advance()
                        bar.update()
                        if self.step % self.optim.log_freq == 0 or self.step == self.steps:
                            self.write_log(log, bar, time.monotonic() - began)
                        if self.test is not None and self.step % (self.config.test.freq * self.per_epoch) == 0:
                            self.write_test(log, self.test)
                    if self.due:
                        self.judge(folder, log, bar, interrupted)
                    if self.step % self.save_every == 0 and self.step < self.steps:
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
        terms = self.terms(self.forward, pairs, t, noise)
        loss, mse = terms.loss.mean(), terms.loss.detach().mean()
        if self.behaviour is not None:
            unnormalize = self.dataset.normalizer.unnormalize
            divergence = self.behaviour(unnormalize(terms.pred_xstart), unnormalize(pairs.target), generator)
            loss = loss + self.optim.behaviour_weight * divergence.mean()
        return loss, mse

    def terms(self, model: Callable[..., Tensor], pairs: Pairs, t: Tensor, noise: Tensor) -> Losses:
        """Terms of the published loss at given steps of the process (b,), with given noise (b, D)."""
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.bf16):
            return self.diffusion.training_losses(
                model,
                pairs.target,
                t,
                loss_target=pairs.target_metric,
                loss_prev=pairs.start_metric,
                x_prev=pairs.start,
                noise=noise,
            )

    @torch.no_grad()
    def write_test(self, log: Path, test: ParameterDataset) -> None:
        """Append the mean diffusion loss on one epoch of the test runs, the same pairs and noise each time."""
        model = self.average if self.config.test.use_ema else self.model.eval()
        size = min(self.config.test.mb_size, test.epoch_size)
        losses = []
        for k in range(test.batches_per_epoch(size)):
            generator = torch.Generator(self.device).manual_seed(mix_seed(self.config.rng_seed, 3, k))
            t = torch.randint(self.diffusion.num_timesteps, (size,), generator=generator, device=self.device)
            pairs = test.batch(size, k)
            noise = torch.randn(pairs.target.shape, generator=generator, device=self.device)
            losses.append(self.terms(model, pairs, t, noise).loss.mean())
        self.model.train()
        line = {"step": self.step, "epoch": self.step / self.per_epoch, "test_loss": torch.stack(losses).mean().item()}
        self.append(log, line)

    @property
    def due(self) -> bool:
        """Whether the model has reached an epoch at which it shall be prompted."""
        return self.monitor is not None and self.step > self.judged and self.monitor.due(self.step, self.per_epoch)

    def judge(self, folder: Path, log: Path, bar: tqdm, interrupted: Callable[[], bool]) -> None:
        """Prompt the model, append the scores, and keep it as ``best.safetensors`` if it is better than all before.

        Raises:
            _Interrupted: Ctrl-C; the prompting is done anew when the training goes on.
        """

        def progress(done: int, total: int) -> None:
            bar.set_postfix_str(f"prompting: step {done} of {total}")
            if self.processes.any(interrupted()):
                raise _Interrupted

        assert self.monitor is not None, "due says so"
        model: nn.Module = self.average if self.config.vis.use_ema else self.model
        if self.sharded:
            model = whole(model, build_model(self.config.transformer, self.info).to(self.device))
        try:
            judged = Pretrained(model.eval(), self.config, self.info)  # type: ignore[arg-type]
            verdict = self.monitor.judge(judged, progress)
        finally:
            self.model.train()
        self.append(log, {"step": self.step, "epoch": self.step / self.per_epoch, **verdict.scores})
        self.logger.log_curves(self.step, verdict.curves)
        if verdict.alignment is not None and verdict.alignment > self.best:
            self.best = verdict.alignment
            if self.processes.first:
                judged.save(folder / "best.safetensors")
        self.judged = self.step

    def append(self, log: Path, line: dict[str, float]) -> None:
        """Write a line of metrics, in the first process."""
        if not self.processes.first:
            return
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")
        self.logger.log(line)

    def write_log(self, log: Path, bar: tqdm, seconds: float) -> None:
        """Append the means since the last line."""
        self.check()
        loss, mse, count = self.processes.mean(self.sums).tolist()
        self.sums.zero_()
        self.last_loss = loss / count
        line = {
            "step": self.step,
            "epoch": self.step / self.per_epoch,
            "loss": self.last_loss,
            "mse": mse / count,
            "lr": self.optimizer.param_groups[0]["lr"],
            "seconds": round(seconds, 3),
        }
        self.append(log, line)
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
            numbers = {"step": self.step, "loss": self.last_loss, "judged": self.judged, "best": self.best}
            save_training(path, **parts, progress=numbers | {"sums": sums})
        self.processes.wait()

    def load(self, path: Path) -> None:
        """Go back to a saved state."""
        parts = self._replicas() if self.sharded else self.plain_parts()
        progress = load_training(path, **parts)
        if self.sharded:
            self._scatter(parts)
        self.step, self.last_loss = progress["step"], progress["loss"]
        self.judged, self.best = progress.get("judged", self.step), progress.get("best", -math.inf)
        self.sums.copy_(progress["sums"])

    def begin_from(self, released: Released) -> None:
        """Go on from a file in the published format: weights, average, optimizer (if it has them) and epoch.

        Raises:
            ValueError: It was trained for as long as this training shall take, or longer.
        """
        self.step = self.judged = released.epoch * self.per_epoch
        if self.step >= self.steps:
            raise ValueError(f"resume_path: trained for {released.epoch} epochs already; raise train.num_ep")
        parts = self._replicas() if self.sharded else self.plain_parts()
        parts["modules"]["model"].load_state_dict(released.raw)
        parts["modules"]["average"].load_state_dict(released.average or released.raw)
        if released.optimizer is not None and released.optimizer["state"]:
            load_optimizer(parts["optimizers"]["adamw"], released.optimizer)
        if self.sharded:
            self._scatter(parts)

    def _scatter(self, parts: dict[str, Any]) -> None:
        scatter(self.model, self.optimizer, parts["modules"]["model"], parts["optimizers"]["adamw"])
        scatter(self.average, None, parts["modules"]["average"], None)

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
            raise ValueError(
                f"{stored} differs from the configuration given: {', '.join(changed)}; use the same, or another exp_name"
            )
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(stored) as temporary:
        temporary.write_text(config_to_yaml(config))
    return folder


def _differences(stored: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """Dotted names of the keys that differ, with both values."""
    names = []
    for key, value in stored.items():
        if isinstance(value, dict):
            names += [f"{key}.{name}" for name in _differences(value, given[key])]
        elif value != given[key]:
            names.append(f"{key} ({value} there, {given[key]} given)")
    return names


def _trimmed_log(path: Path, step: int) -> Path:
    """Drop the lines that a killed session wrote after its last saved state."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))
    return path
