"""Pretraining of the autoencoder on one prepared zoo: a loop to read, copy and change."""

import dataclasses
import datetime
import importlib.util
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.checkpoint import load_training, save_training
from zoo_common.files import atomic_write, visible_files
from zoo_common.interrupts import deferred_interrupt

from sane.autoencoder import Autoencoder, AutoencoderConfig
from sane.config import Config, config_to_yaml, load_config
from sane.device import choose_device
from sane.loggers import Sink, open_logger
from sane.losses import Objective, Terms
from sane.model import Halo, SaneModel, load_model
from sane.optimization import clip_gradients, make_optimizer, make_schedule
from sane.prediction import fit_ridge, r_squared
from sane.preparation import Prepared, facts_of, open_prepared
from sane.windows import Batch, ViewConfig, WindowDataset

_LOGGED = ("loss", "contrast", "reconstruction", "rsq", "z_norm", "z_var")
_VALIDATION_BATCHES = 20
_TOGETHER = 2**24
"""Numbers of weights that a judgement embeds at once."""
_MOVABLE = ("name", "out_dir", "prepared", "zoo", "start", "wandb")
"""Settings that may be others when a training resumes."""
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
        joined(choose_device(config.device)) as (rank, world, device),
        torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
    ):
        prepared = open_prepared(config.prepared, config.zoo)
        torch.manual_seed(config.seed)
        run = Pretraining(config, prepared, device, rank, world)
        run.callbacks = callbacks
        folder = config.folder
        state = folder / "state.safetensors"
        going_on = resume and state.exists()
        if config.start is not None and not going_on:
            _begin_with(run.model, config.start)
        logger = open_logger(config) if run.first else nullcontext(run.sink)
        if run.first:
            open_folder(config, resume)
        run.wait()
        if going_on:
            run.load(state)
        with logger as run.sink:
            report = run.loop(folder, limit_seconds, quiet or not run.first)
        if report.finished and run.first:
            run.saned().save(folder / "model.safetensors")
        log = folder / "metrics.jsonl"  # not there before the first line
        if run.first and log.exists() and importlib.util.find_spec("matplotlib"):
            from sane.figures import draw_curves

            draw_curves(log, folder / "curves.png")
        run.wait()
    return report


@dataclass(frozen=True)
class Forecast:
    """What a training will cost on this machine."""

    steps: int
    parameters: int
    seconds: float
    state_bytes: int
    """Disk for model and training state."""


def forecast(config: Config, timed_steps: int = 3) -> Forecast:
    """Time a few steps without writing anything."""
    run = Pretraining(config, open_prepared(config.prepared, config.zoo), choose_device(config.device))
    run.advance()
    began = time.monotonic()
    for _ in range(timed_steps):
        run.advance()
    run.sums.tolist()
    parameters = sum(p.numel() for p in run.model.parameters())
    return Forecast(run.steps, parameters, (time.monotonic() - began) / timed_steps * run.steps, 16 * parameters)


class Pretraining:
    """State of one training: model, optimizer, schedule, step counter."""

    def __init__(self, config: Config, prepared: Prepared, device: torch.device, rank: int = 0, world: int = 1) -> None:
        self.config, self.prepared, self.device, self.rank, self.world = config, prepared, device, rank, world
        t, sizes = config.training, config.model
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
        self.saned()  # checks that the tokens fit
        self.model.train()
        self.forward: nn.Module = torch.compile(self.model) if t.compile else self.model  # type: ignore[assignment]
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
        self.cutter = ThreadPoolExecutor(1)
        self.ahead: dict[int, Future[Batch]] = {}
        """Step -> its batch, which is being cut."""
        self.callbacks: Sequence[Callback] = ()
        self.sink: Sink = lambda line: None
        self.step = 0
        self.sums = torch.zeros(len(_LOGGED) + 1, dtype=torch.float64, device=device)
        self.last_loss = math.nan

    @property
    def first(self) -> bool:
        """Whether this process writes files."""
        return self.rank == 0

    def saned(self) -> SaneModel:
        """The model as it is now, with all that using it needs."""
        p = self.prepared
        facts = {**facts_of(p.zoo), "align": p.config.align}
        return SaneModel(self.model, p.tokenizer, p.normalization, p.reference, facts)

    def loop(self, folder: Path, limit_seconds: float | None, quiet: bool) -> TrainReport:
        """Train to the end, to the time limit or to Ctrl-C; the state is saved in each case."""
        began, t = time.monotonic(), self.config.training
        log = trimmed_log(folder / "metrics.jsonl", self.step) if self.first else folder / "metrics.jsonl"
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
            while self.step < self.steps and not self.any(interrupted()):
                self.advance()
                bar.update()
                if self.step % t.log_every == 0 or self.step == self.steps:
                    self.write_log(log, bar, time.monotonic() - began)
                if t.test_every and (self.step % (t.test_every * self.per_epoch) == 0 or self.step == self.steps):
                    self.judge(log, quiet)
                if self.step % t.save_every == 0 and self.step < self.steps:
                    self.save(folder / "state.safetensors")
                if limit_seconds is not None and self.any(time.monotonic() - began > limit_seconds):
                    break
            self.save(folder / "state.safetensors")
        stopped = interrupted() and self.step < self.steps
        return TrainReport(folder, self.step, self.steps, self.last_loss, time.monotonic() - began, stopped)

    def batch(self) -> Batch:
        """The batch of this step; where a GPU computes, the CPU cuts that of the next step meanwhile."""
        size, ahead = self.config.training.batch, self.ahead.pop(self.step, None)
        batch = self.data.batch(size, self.step) if ahead is None else ahead.result()
        if self.device.type != "cpu" and self.step + 1 < self.steps:
            self.ahead = {self.step + 1: self.cutter.submit(self.data.batch, size, self.step + 1)}
        return batch

    def advance(self) -> None:
        """One optimizer step, a function of the state and of the step number."""
        t = self.config.training
        parts = t.accumulate * self.world
        batch = self.batch()
        dropout = np.random.SeedSequence([self.config.seed, 2, self.step, self.rank]).generate_state(1, np.uint64)
        torch.manual_seed(int(dropout[0]) >> 1)
        self.optimizer.zero_grad(set_to_none=True)
        for k in range(t.accumulate):
            part = _part(batch, k * self.world + self.rank, parts)
            terms = self.terms(part, self.scale(part, batch, parts), self.world > 1)
            self.scaler.scale(terms.loss / t.accumulate).backward()
            self.sums += (
                torch.stack([*(x.detach().double() for x in terms), torch.ones_like(self.sums[0])]) / t.accumulate
            )
        if self.world > 1:
            for gradient in (p.grad for p in self.model.parameters() if p.grad is not None):
                dist.all_reduce(gradient)
                gradient /= self.world
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

    def terms(self, batch: Batch, scale: float | Tensor = 1.0, gather: bool = False) -> Terms:
        """The loss of a batch: both views go through the model together.

        Args:
            batch: Of this process.
            scale: Factor of the reconstruction, see :meth:`scale`.
            gather: Contrast the windows of all processes, as one process with the whole batch would.
        """
        t = self.config.training
        views, mask, positions = (x.to(self.device) for x in (batch.views, batch.mask, batch.positions))
        dtype = torch.float16 if t.precision == "fp16" else torch.bfloat16
        with torch.autocast(self.device.type, dtype, enabled=t.precision != "fp32"):
            _, y, projected = self.forward(views, positions.repeat(2, 1, 1))
        z_i, z_j = projected.float().chunk(2)
        if gather:
            z_i, z_j = (_of_all(z) for z in (z_i, z_j))
        target = views if t.target == "noised" else batch.clean.to(self.device)
        return self.objective(z_i, z_j, y.float(), target, mask.repeat(2, 1, 1), scale)

    @torch.no_grad()
    def judge(self, log: Path, quiet: bool = True) -> None:
        """Append the loss on validation windows, and how well the embeddings predict properties."""
        if not self.first:
            return
        t = self.config.training
        line: dict[str, Any] = {"step": self.step, "epoch": self.step / self.per_epoch}
        self.model.eval()
        if len(self.prepared.samples["validation"].runs):
            data = WindowDataset(
                self.prepared,
                "validation",
                window=self.config.model.window,
                views=self.data.views,
                seed=self.config.seed,
            )
            size = min(t.batch // t.accumulate // self.world, len(data))
            if size > 1:
                count = min(_VALIDATION_BATCHES, data.batches_per_epoch(size))
                found = [self.terms(data.batch(size, k)) for k in range(count)]
                means = torch.stack([torch.stack([x.double() for x in terms]) for terms in found]).mean(0).tolist()
                line |= {f"{n}_validation": v for n, v in zip(_LOGGED, means, strict=True) if math.isfinite(v)}
        line |= self.downstream(quiet)
        for callback in self.callbacks:
            line |= callback(self.saned(), self.step // self.per_epoch)
        self.model.train()
        self.write(log, line)

    def downstream(self, quiet: bool = True) -> dict[str, float]:
        """R2 on validation and test checkpoints of ridges from the mean latents, for the properties that there are."""
        model, t, window = self.saned(), self.config.training, self.config.model.window
        if not t.properties:
            return {}  # embedding large networks takes minutes
        halo = Halo(window, window // 2) if self.prepared.tokenizer.shape[0] > _LONG else None
        index = {}
        for split, samples in self.prepared.samples.items():
            count = len(samples.runs)
            index[split] = np.linspace(0, count - 1, min(count, t.test_checkpoints)).astype(np.int64)
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
        *means, count = self.mean(self.sums).tolist()
        self.sums.zero_()
        values = [value / count for value in means]
        self.last_loss = values[0]
        line: dict[str, Any] = {"step": self.step, "epoch": self.step / self.per_epoch}
        line |= {name: value for name, value in zip(_LOGGED, values, strict=True) if math.isfinite(value)}
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "seconds": round(seconds, 3)}
        if self.first:
            self.write(log, line)
        bar.set_postfix(loss=f"{self.last_loss:.4f}", refresh=False)

    def write(self, log: Path, line: dict[str, Any]) -> None:
        """Append a line to the log, and hand it to the logger."""
        _append(log, line)
        self.sink(line)

    def check(self) -> None:
        """Stop a training that has diverged, before it overwrites the last good state."""
        loss = self.mean(self.sums)[0].item()
        if not math.isfinite(loss):
            raise ValueError(
                f"the training loss is {loss} at step {self.step}; lower optim.lr ({self.config.optim.lr}) or use "
                "training.precision=fp32"
            )

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs to go on."""
        self.check()
        sums = self.mean(self.sums)
        if self.first:
            progress = {"step": self.step, "loss": self.last_loss, "sums": sums, "data": self.prepared.identity}
            save_training(path, **self._parts(), progress=progress)
        self.wait()

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

    def _parts(self) -> dict[str, Any]:
        schedulers: dict[str, Any] = {"scaler": self.scaler}
        if self.schedule is not None:
            schedulers["schedule"] = self.schedule
        return {
            "modules": {"autoencoder": self.model},
            "optimizers": {"optimizer": self.optimizer},
            "schedulers": schedulers,
        }

    def mean(self, values: Tensor) -> Tensor:
        """Mean over all processes."""
        if self.world == 1:
            return values
        total = values.clone()
        dist.all_reduce(total)
        return total / self.world

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return bool(self.mean(torch.tensor(float(flag), device=self.device)) > 0)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


@contextmanager
def joined(device: torch.device) -> Iterator[tuple[int, int, torch.device]]:
    """Rank, number of processes and device; joins the processes that ``torchrun`` has started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world == 1:
        yield 0, 1, device
        return
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    waits = datetime.timedelta(days=1)  # for the judgements of the first process
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=waits)
    try:
        yield dist.get_rank(), world, device
    finally:
        dist.destroy_process_group()


def _of_all(z: Tensor) -> Tensor:
    """Rows of all processes; the gradient is so large that its mean over them is that of one process with all rows."""
    parts = [torch.empty_like(z) for _ in range(dist.get_world_size())]
    dist.all_gather(parts, z.detach().contiguous())
    parts[dist.get_rank()] = z.detach() + len(parts) * (z - z.detach())
    return torch.cat(parts)


def _part(batch: Batch, number: int, parts: int) -> Batch:
    """One of equal parts of a batch; both views of a window stay together."""
    if parts == 1:
        return batch
    size = len(batch.mask) // parts
    rows = slice(number * size, (number + 1) * size)
    views, clean = (torch.cat([half[rows] for half in x.chunk(2)]) for x in (batch.views, batch.clean))
    return Batch(views, clean, batch.mask[rows], batch.positions[rows])


def _begin_with(model: Autoencoder, path: str) -> None:
    """Give an autoencoder the weights of another one.

    Raises:
        ValueError: It has other sizes.
    """
    state = load_model(path).autoencoder.state_dict()
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    there = {name: tuple(tensor.shape) for name, tensor in state.items()}
    for name in {**here, **there}:
        if here.get(name) != there.get(name):
            raise ValueError(
                f"start={path} has another autoencoder: {name} is {there.get(name, 'absent')} there, "
                f"{here.get(name, 'absent')} here; use its token size and model.* settings"
            )
    model.load_state_dict(state)


def _append(log: Path, line: dict[str, Any]) -> None:
    with log.open("a") as file:
        file.write(json.dumps(line) + "\n")


def open_folder(config: Config, resume: bool) -> None:
    """Create the run's folder with its ``config.yaml``, or check that a resumed one has the same.

    Raises:
        FileExistsError: The folder holds a run.
        FileNotFoundError: There is nothing to resume.
        ValueError: The settings differ; the message names them.
    """
    folder, stored = config.folder, config.folder / "config.yaml"
    if not resume and folder.exists() and visible_files(folder, ""):
        raise FileExistsError(f"{folder} already holds a run; use --resume to go on, or another name or out_dir")
    if resume and not stored.exists():
        raise FileNotFoundError(f"nothing to resume in {folder}; start the run without --resume")
    if stored.exists():
        there, given = (_flat(dataclasses.asdict(c)) for c in (load_config(stored), config))
        changed = [
            f"{key} ({there[key]} there, {given[key]} given)"
            for key in there
            if there[key] != given[key] and key not in _MOVABLE
        ]
        if changed:
            raise ValueError(f"{stored} differs from the configuration given: {', '.join(changed)}; use another name")
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(stored) as temporary:
        temporary.write_text(config_to_yaml(config))


def _flat(tree: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        flat |= _flat(value, f"{where}{key}.") if isinstance(value, dict) else {where + key: value}
    return flat


def trimmed_log(path: Path, step: int) -> Path:
    """Drop the lines that a killed session wrote after its last saved state, and those that are damaged."""

    def step_of(line: str) -> float:
        try:
            return float(json.loads(line)["step"])
        except (ValueError, TypeError, KeyError):
            return math.inf

    if path.exists():
        lines = [line for line in path.read_text(errors="replace").splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if step_of(line) <= step] if step else []
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))
    return path
