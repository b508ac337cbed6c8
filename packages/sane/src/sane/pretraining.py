"""Pretraining of the autoencoder on one prepared zoo: a loop to read, copy and change."""

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.checkpoint import load_training, save_training
from zoo_common.interrupts import deferred_interrupt

from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.config import Config
from sane.device import choose_device
from sane.distributed import Processes, joined
from sane.loggers import Sink, open_logger
from sane.losses import Objective, Terms
from sane.model import Halo, SaneModel, load_model
from sane.optimization import clip_gradients, make_optimizer, make_schedule
from sane.prediction import fit_ridge, r_squared
from sane.preparation import Prepared, facts_of, open_prepared
from sane.run_folder import append_line, open_folder, trimmed_log
from sane.windows import Batch, ViewConfig, WindowDataset

_LOGGED = ("loss", "contrast", "reconstruction", "rsq", "z_norm", "z_var")
_VALIDATION_BATCHES = 20
_TOGETHER = 2**24
"""Numbers of weights that a judgement embeds at once."""
_LONG = 4096
"""Tokens of a checkpoint from which on a judgement embeds it by windows: full attention takes a minute for a ResNet."""


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

    @property
    def finished(self) -> bool:
        """Whether all steps are done; else resume."""
        return self.step == self.steps


Callback = Callable[[SaneModel, int], Mapping[str, float]]
"""Called with the model and the number of epochs after every judgement; what it returns goes into the log."""


def pretrain(
    config: Config,
    *,
    resume: bool = False,
    limit_seconds: float | None = None,
    callbacks: Sequence[Callback] = (),
    quiet: bool = False,
) -> TrainReport:
    """Train the autoencoder of a configuration and write ``model.safetensors`` to its folder.

    The folder also receives ``config.yaml``, ``metrics.jsonl``, their curves in ``curves.png`` (with the extra ``plot``),
    and ``state.safetensors``, from which a killed training resumes to the same result. Ctrl-C and ``limit_seconds`` save
    the state and stop.

    Args:
        config: All settings; ``config.folder`` must be new unless ``resume``.
        resume: Go on from the state in the folder (start, if there is none).
        limit_seconds: Stop after this time.
        callbacks: Further judgements, by the first process.
        quiet: No progress bar.

    Raises:
        FileNotFoundError: No prepared zoo, or nothing to resume.
        ValueError: Zoo, configuration and saved state do not fit each other, or the loss is not finite.
    """
    with (
        joined(choose_device(config.device)) as processes,
        torch.random.fork_rng(devices=[processes.device] if processes.device.type == "cuda" else []),
    ):
        prepared = open_prepared(config.prepared, config.zoo)
        torch.manual_seed(config.seed)
        run = Pretraining(config, prepared, processes)
        run.callbacks = callbacks
        folder = config.folder
        state = folder / "state.safetensors"
        going_on = resume and state.exists()
        if config.start is not None and not going_on:
            run.begin_with(config.start)
        logger = open_logger(config) if processes.first else nullcontext(run.sink)
        if processes.first:
            open_folder(config, resume)
        processes.wait()
        if going_on:
            run.load(state)
        with logger as run.sink:
            report = run.loop(folder, limit_seconds, quiet or not processes.first)
        if report.finished and processes.first:
            run.saned().save(folder / "model.safetensors")
        log = folder / "metrics.jsonl"  # not there before the first line
        if processes.first and log.exists() and importlib.util.find_spec("matplotlib"):
            from sane.figures import draw_curves

            draw_curves(log, folder / "curves.png")
        processes.wait()
    return report


@dataclass(frozen=True)
class Forecast:
    """What a training will cost on this machine."""

    steps: int
    parameters: int
    seconds: float
    """Of all steps and judgements."""
    judging_seconds: float
    """Of the judgements alone (``training.test_every``)."""
    state_bytes: int
    """Disk for model and training state."""


def forecast(config: Config, timed_steps: int = 3) -> Forecast:
    """Time a few steps, and a judgement of a few checkpoints, without writing anything."""
    run = Pretraining(config, open_prepared(config.prepared, config.zoo), Processes(0, 1, choose_device(config.device)))
    run.advance()
    began = time.monotonic()
    for _ in range(timed_steps):
        run.advance()
    run.sums.tolist()
    training = (time.monotonic() - began) / timed_steps * run.steps
    judging = 0.0
    if every := config.training.test_every:
        began = time.monotonic()
        run.validation()
        validated = time.monotonic()
        run.downstream(most=2)
        embedded = (time.monotonic() - validated) * run.judged() / run.judged(2)
        judging = (1 + -(-config.training.epochs // every)) * (validated - began + embedded)
    parameters = sum(p.numel() for p in run.model.parameters())
    return Forecast(run.steps, parameters, training + judging, judging, 16 * parameters)


class Pretraining:
    """State of one training: model, optimizer, schedule, step counter."""

    def __init__(self, config: Config, prepared: Prepared, processes: Processes) -> None:
        self.config, self.prepared, self.processes = config, prepared, processes
        self.device = device = processes.device
        t, sizes, world = config.training, config.model, processes.world
        if t.precision != "fp32" and device.type != "cuda":
            raise ValueError(f"training.precision={t.precision} needs CUDA; use fp32 on the CPU")
        if t.batch % (world * t.accumulate):
            raise ValueError(
                f"training.batch ({t.batch}) must be a multiple of processes x accumulate ({world} x {t.accumulate})"
            )
        views = ViewConfig(t.views, (t.noise[0], t.noise[1]), t.erase, t.shared)
        self.data = WindowDataset(
            prepared, "train", window=sizes.window, views=views, supersample=t.supersample, seed=config.seed
        )
        self.per_epoch = self.data.batches_per_epoch(t.batch)
        self.steps = t.epochs * self.per_epoch
        shape = AutoencoderConfig(
            token_size=prepared.tokenizer.token_size,
            **{**dataclasses.asdict(sizes), "max_positions": sizes.max_positions or prepared.max_positions},
        )
        self.model = Autoencoder(shape).to(device).train()
        if t.gamma == 1:  # nothing trains the decoder
            for part in (self.model.decoder_comp, self.model.transformer_decoder, self.model.detokenizer):
                part.requires_grad_(False)
        self.seen = prepared.marks("train")
        """Runs that the model has been trained on."""
        self.saned()  # checks that the tokens fit
        self.model.train()
        self.forward: nn.Module = torch.compile(self.model) if t.compile else self.model  # type: ignore[assignment]
        self.trained = processes.wrap(self.forward)
        self.optimizer = make_optimizer(self.model, config.optim)
        self.schedule = make_schedule(self.optimizer, config.optim, self.steps)
        self.scaler = torch.amp.GradScaler(device.type, enabled=t.precision == "fp16")
        self.objective = Objective(
            t.gamma,
            t.temperature,
            t.contrast,
            t.reduction,
            t.mask_normalize,
            t.loss_normalization,
            t.z_var_penalty,
            t.z_norm_penalty,
        )
        self.cut = partial(self.data.batch, t.batch, rows=processes.windows(t.batch, t.accumulate))
        """The batch of a step, as far as this process needs it."""
        self.cutter = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[Batch]] = {}
        """Step -> its batch, which is being cut."""
        self.callbacks: Sequence[Callback] = ()
        self.sink: Sink = lambda line: None
        self.step = 0
        self.sums = torch.zeros(len(_LOGGED) + 1, dtype=torch.float64, device=device)
        self.last_loss = math.nan

    def saned(self) -> SaneModel:
        """The model as it is now, with all that using it needs."""
        p = self.prepared
        facts = {**facts_of(p.zoo), "align": p.config.align, "trained_on": self.seen}
        return SaneModel(self.model, p.tokenizer, p.normalization, p.reference, facts)

    def begin_with(self, path: str) -> None:
        """Take the weights of another autoencoder.

        Raises:
            ValueError: It has other sizes.
        """
        other = load_model(path)
        state = other.autoencoder.state_dict()
        here = {name: tuple(tensor.shape) for name, tensor in self.model.state_dict().items()}
        there = {name: tuple(tensor.shape) for name, tensor in state.items()}
        for name in {**here, **there}:
            if here.get(name) != there.get(name):
                raise ValueError(
                    f"start={path} has another autoencoder: {name} is {there.get(name, 'absent')} there, "
                    f"{here.get(name, 'absent')} here; use its token size and model.* settings"
                )
        self.model.load_state_dict(state)
        self.seen = sorted({*self.seen, *other.facts.get("trained_on", ())})

    def loop(self, folder: Path, limit_seconds: float | None, quiet: bool) -> TrainReport:
        """Train to the end, to the time limit or to Ctrl-C; the state is saved in each case."""
        began, t = time.monotonic(), self.config.training
        log = trimmed_log(folder / "metrics.jsonl", self.step) if self.processes.first else folder / "metrics.jsonl"
        bar = tqdm(
            total=self.steps,
            initial=self.step,
            desc="pretrain",
            unit="step",
            disable=quiet,
            leave=False,
            delay=1,
        )
        with bar, deferred_interrupt() as interrupted:
            if self.step == 0 and t.test_every:
                self.judge(log, quiet)
            while self.step < self.steps and not self.processes.any(interrupted()):
                self.advance()
                bar.update()
                if self.step % t.log_every == 0 or self.step == self.steps:
                    self.write_log(log, bar, time.monotonic() - began)
                if t.test_every and (self.step % (t.test_every * self.per_epoch) == 0 or self.step == self.steps):
                    self.judge(log, quiet)
                if self.step % t.save_every == 0 and self.step < self.steps:
                    self.save(folder / "state.safetensors")
                if limit_seconds is not None and self.processes.any(time.monotonic() - began > limit_seconds):
                    break
            self.save(folder / "state.safetensors")
        stopped = interrupted() and self.step < self.steps
        return TrainReport(folder, self.step, self.steps, self.last_loss, time.monotonic() - began, stopped)

    def batch(self) -> Batch:
        """The batch of this step; where a GPU computes, the CPU cuts that of the next step meanwhile."""
        ahead = self.ahead.pop(self.step, None)
        batch = self.cut(self.step) if ahead is None else ahead.result()
        if self.device.type != "cpu" and self.step + 1 < self.steps:
            self.ahead = {self.step + 1: self.cutter.submit(self.cut, self.step + 1)}
        return batch

    def advance(self) -> None:
        """One optimizer step, a function of the state and of the step number."""
        t = self.config.training
        parts = t.accumulate * self.processes.world
        batch = self.batch()
        dropout = np.random.SeedSequence([self.config.seed, 2, self.step, self.processes.rank]).generate_state(
            1, np.uint64
        )
        torch.manual_seed(int(dropout[0]) >> 1)
        self.optimizer.zero_grad(set_to_none=True)
        for k in range(t.accumulate):
            part = _part(batch, k * self.processes.world + self.processes.rank, parts)
            with self.processes.averaged(self.trained, k + 1 == t.accumulate):
                terms = self.terms(part, self.scale(part, batch, parts), training=True)
                self.scaler.scale(terms.loss / t.accumulate).backward()
            self.sums += (
                torch.stack([*(x.detach().double() for x in terms), torch.ones_like(self.sums[0])]) / t.accumulate
            )
        self.scaler.unscale_(self.optimizer)
        clip_gradients(self.model, self.config.optim)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.schedule is not None and self.step < self.steps:
            self.schedule.step()

    def scale(self, part: Batch, batch: Batch, parts: int) -> float | Tensor:
        """Factor of a part's reconstruction with which the mean over the parts is that of the whole batch."""
        if self.config.training.reduction == "sum":
            return parts
        return parts * part.mask.sum() / batch.mask.sum() if self.config.training.mask_normalize else 1.0

    def terms(self, batch: Batch, scale: float | Tensor = 1.0, training: bool = False) -> Terms:
        """The loss of a batch: both views go through the model together.

        Args:
            batch: Of this process.
            scale: Factor of the reconstruction, see :meth:`scale`.
            training: With all processes: the windows of all are contrasted, as one with the whole batch would.
        """
        t = self.config.training
        views, mask, positions = (x.to(self.device) for x in (batch.views, batch.mask, batch.positions))
        dtype = torch.float16 if t.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=t.precision != "fp32"):
            _, y, projected = (self.trained if training else self.forward)(views, positions.repeat(2, 1, 1))
        z_i, z_j = projected.float().chunk(2)
        if training:
            z_i, z_j = (self.processes.rows_of_all(z) for z in (z_i, z_j))
        target = views if t.target == "noised" else batch.clean.to(self.device)
        return self.objective(z_i, z_j, y.float(), target, mask.repeat(2, 1, 1), scale)

    @torch.no_grad()
    def judge(self, log: Path, quiet: bool = True) -> None:
        """Append the loss on validation windows, and how well the embeddings predict properties."""
        if not self.processes.first:
            return
        line: dict[str, Any] = {"step": self.step, "epoch": self.step / self.per_epoch}
        line |= self.validation() | self.downstream(quiet)
        for callback in self.callbacks:
            line |= callback(self.saned(), self.step // self.per_epoch)
        self.model.train()
        self.write(log, line)

    @torch.no_grad()
    def validation(self) -> dict[str, float]:
        """Means of the loss and its parts on validation windows, as far as there are any."""
        t = self.config.training
        if not len(self.prepared.samples["validation"].runs):
            return {}
        data = WindowDataset(
            self.prepared, "validation", window=self.config.model.window, views=self.data.views, seed=self.config.seed
        )
        size = min(t.batch // t.accumulate // self.processes.world, len(data))
        if size < 2:
            return {}
        self.model.eval()
        found = [self.terms(data.batch(size, k)) for k in range(min(_VALIDATION_BATCHES, data.batches_per_epoch(size)))]
        means = torch.stack([torch.stack([x.double() for x in terms]) for terms in found]).mean(0).tolist()
        return {f"{n}_validation": v for n, v in zip(_LOGGED, means, strict=True) if math.isfinite(v)}

    def judged(self, most: int | None = None) -> int:
        """Number of checkpoints that a judgement embeds; ``most`` of each split instead of ``test_checkpoints``."""
        limit = most or self.config.training.test_checkpoints
        return sum(min(len(samples.runs), limit) for samples in self.prepared.samples.values())

    def downstream(self, quiet: bool = True, most: int | None = None) -> dict[str, float]:
        """R2 on validation and test checkpoints of ridges from the mean latents, for the properties that there are."""
        model, t, window = self.saned(), self.config.training, self.config.model.window
        if not t.properties:
            return {}  # embedding large networks takes minutes
        halo = Halo(window, window // 2) if self.prepared.tokenizer.shape[0] > _LONG else None
        index = {}
        for split, samples in self.prepared.samples.items():
            count = len(samples.runs)
            index[split] = np.linspace(0, count - 1, min(count, most or t.test_checkpoints)).astype(np.int64)
        embedded, scores, step = {}, {}, max(1, _TOGETHER // self.prepared.zoo.layout.size)
        with tqdm(total=sum(map(len, index.values())), desc="judge", disable=quiet, leave=False, delay=1) as bar:
            for split, rows in index.items():
                parts = [torch.zeros(0, self.config.model.latent)]
                for start in range(0, len(rows), step):
                    parts.append(model.embed(self.prepared.vectors(split, rows[start : start + step]), halo))
                    bar.update(len(parts[-1]))
                embedded[split] = torch.cat(parts)
        for name in t.properties:
            try:
                values = {s: self.prepared.properties(s, name)[index[s]] for s in embedded}
            except KeyError:
                continue
            if any(v.dtype.kind == "U" for v in values.values()):
                continue  # a text is for `sane predict`
            known = {s: torch.from_numpy(v) for s, v in values.items()}
            if min(int(v.isfinite().sum()) for v in known.values()) < 2:
                continue
            fit = fit_ridge(embedded["train"], known["train"], embedded["validation"], known["validation"])
            for split in ("validation", "test"):
                good = known[split].isfinite()
                value = float(r_squared(fit(embedded[split][good]), known[split][good]))
                if math.isfinite(value):
                    scores[f"r2/{name}_{split}"] = value
        return scores

    def write_log(self, log: Path, bar: tqdm, seconds: float) -> None:
        """Append the means since the last line."""
        self.check()
        *means, count = self.processes.mean(self.sums).tolist()
        self.sums.zero_()
        values = [value / count for value in means]
        self.last_loss = values[0]
        line: dict[str, Any] = {"step": self.step, "epoch": self.step / self.per_epoch}
        line |= {name: value for name, value in zip(_LOGGED, values, strict=True) if math.isfinite(value)}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(seconds, 3)}
        if self.processes.first:
            self.write(log, line)
        bar.set_postfix(loss=f"{self.last_loss:.4f}", refresh=False)

    def write(self, log: Path, line: dict[str, Any]) -> None:
        """Append a line to the log, and hand it to the logger."""
        append_line(log, line)
        self.sink(line)

    def check(self) -> None:
        """Stop a training that has diverged, before it overwrites the last good state."""
        loss = self.processes.mean(self.sums)[0].item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss is {loss} at step {self.step}; lower optim.lr ({self.config.optim.lr}) or use "
                "training.precision=fp32"
            )

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs to go on."""
        self.check()
        sums = self.processes.mean(self.sums)
        if self.processes.first:
            progress = {"step": self.step, "loss": self.last_loss, "sums": sums, "data": self.prepared.identity}
            progress["seen"] = self.seen
            save_training(path, **self._parts(), progress=progress)
        self.processes.wait()

    def load(self, path: Path) -> None:
        """Go back to a saved state."""
        progress = load_training(path, **self._parts())
        if progress.get("data") != self.prepared.identity:
            raise ValueError(
                f"{self.config.prepared} is not the preparation that {path} was trained on: prepare the zoo as before, "
                "or use another name"
            )
        self.step, self.last_loss = progress["step"], progress["loss"]
        self.sums.copy_(progress["sums"])
        self.seen = progress.get("seen", self.seen)

    def _parts(self) -> dict[str, Any]:
        schedulers: dict[str, Any] = {"scaler": self.scaler}
        if self.schedule is not None:
            schedulers["schedule"] = self.schedule
        return {
            "modules": {"autoencoder": self.model},
            "optimizers": {"optimizer": self.optimizer},
            "schedulers": schedulers,
        }


def _part(batch: Batch, number: int, parts: int) -> Batch:
    """One of equal parts of a batch; both views of a window stay together."""
    if parts == 1:
        return batch
    size = len(batch.mask) // parts
    rows = slice(number * size, (number + 1) * size)
    views, clean = (torch.cat([half[rows] for half in x.chunk(2)]) for x in (batch.views, batch.clean))
    return Batch(views, clean, batch.mask[rows], batch.positions[rows])
