"""Training from the command line: a loop that can be killed at any moment and goes on exactly."""

import dataclasses
import importlib.util
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from zoo_common.checkpoint import load_training, save_training
from zoo_common.datasets import Splits
from zoo_common.files import atomic_write, write_json
from zoo_common.interrupts import deferred_interrupt

from pilimit.building import build_net, choose_device, open_net
from pilimit.checkpoint import load_metadata, load_net, load_optimizer, save_net
from pilimit.config import TrainConfig, milestones
from pilimit.data import augment, choose_data
from pilimit.evaluation import evaluate, plain_loss
from pilimit.forecast import Forecast, atoms_bytes, forecast
from pilimit.infinite import InfMLP
from pilimit.optim import PiSGD, clip_grad_norm_, param_groups
from pilimit.recompression import reduce_atoms
from pilimit.run_folder import CONFIG, CURVES, METRICS, NET, STATE, Log, check_folder
from pilimit.schedules import Factor, cosine, lagged, multistep

HELD_OUT = 256
"""Images on which the change of the outputs by a recompression is measured."""


@dataclass(frozen=True)
class TrainReport:
    """What a training came to."""

    step: int
    steps: int
    epoch: float
    test_loss: float | None
    """After the last whole epoch, or at the end."""
    test_acc: float | None
    max_test_acc: float | None
    max_test_acc_epoch: float | None
    min_test_loss: float | None
    min_test_loss_epoch: float | None
    atoms: list[int]
    """Per layer; none in a finite net."""
    gb: float
    """Of the atoms."""
    seconds: float
    """Of this session."""
    interrupted: bool
    """Whether Ctrl-C ended it."""


def train(config: TrainConfig, note: Callable[[str], None] = lambda text: None) -> TrainReport:
    """Train a net; everything that the command does.

    Args:
        config: All options.
        note: Takes a line for people: the forecast, the result of each epoch.

    Raises:
        FileNotFoundError: No data, or nothing to resume.
        ValueError: Options contradict each other or the saved run, memory will run out, or the loss is not finite.
    """
    config.check()
    folder = config.save_dir
    if folder is not None:
        check_folder(config, folder)
    run = Training(config, choose_data(config))
    if folder is not None and config.resume:
        run.load(folder)
    if isinstance(run.net, InfMLP):
        run.forecast = forecast(run.net, config, run.step, run.steps, run.appended)
        if not config.quiet:
            note(run.forecast.text())
    if folder is not None and not config.resume:
        folder.mkdir(parents=True, exist_ok=True)
        document = {"config": config.to_json(), "shape": run.shape, "torch": torch.__version__}
        write_json(folder / CONFIG, document)
    return run.loop(note)


class Training:
    """State of one training."""

    forecast: Forecast | None = None

    def __init__(self, config: TrainConfig, data: Splits) -> None:
        self.config, self.device = config, choose_device(config)
        self.data = data
        images = data.train.images
        self.shape = images[0].numel(), 10
        self.net = build_net(config, self.shape[0], self.shape[1], self.device)
        self.dtype = self.net.dtype
        self.images, self.labels = images.to(self.device), data.train.labels.to(self.device)
        self.background = self.images.amin((0, 2, 3)) if config.data_augment else self.images.new_zeros(0)
        self.test_images = data.test.images.flatten(1).to(self.device, self.dtype)
        self.test_labels = data.test.labels.to(self.device)
        self.teacher = (
            None if config.teacher_path is None else open_net(config.teacher_path, self.device).to(self.dtype)
        )
        self.samples = config.batch_size * config.accum_steps
        self.per_epoch = math.ceil(len(self.labels) / self.samples)
        self.steps = config.epochs * self.per_epoch
        self.optimizer = PiSGD(
            self._groups(), config.lr, config.momentum, config.dampening, config.wd,
            apply_lr_mult_to_wd=not config.no_apply_lr_mult_to_wd,
        )  # fmt: skip
        self.lr_factor, self.gclip_factor = self._schedules()
        self.step = 0
        self._order: tuple[int, Tensor] | None = None
        self.epoch_lines: list[dict[str, Any]] = []
        self.sums = torch.zeros(2, dtype=torch.float64, device=self.device)  # losses, right answers in this epoch
        self._place_atoms()

    def _place_atoms(self) -> None:
        if self.config.cuda_batch_size is not None and isinstance(self.net, InfMLP):
            for layer in self.net.infinite_layers():
                layer.atoms.stay_in_host_memory(self.config.cuda_batch_size)

    def _groups(self) -> list[dict[str, Any]]:
        c = self.config
        mults = (c.first_layer_lr_mult, c.last_layer_lr_mult, c.bias_lr_mult)
        names = ("first_layer_lr_mult", "last_layer_lr_mult", "bias_lr_mult")
        return param_groups(self.net, **dict(zip(names, mults, strict=True)))

    def _schedules(self) -> tuple[Factor, Factor]:
        """Factors of the learning rate and the clipping threshold; those of infinite nets lag by a step, as published."""
        c, late = self.config, lagged if self.config.infinite else (lambda factor: factor)
        lr: Factor = lambda step: 1.0
        if c.scheduler == "multistep":
            lr = late(multistep(milestones(c.lr_drop_milestones, self.per_epoch), c.lr_drop_ratio))
        elif c.scheduler == "cosine":
            lr = late(cosine(self.steps))
        gclip = lr if c.scheduler == "multistep" else (lambda step: 1.0)
        if c.gclip_drop_milestones:
            gclip = late(multistep(milestones(c.gclip_drop_milestones, self.per_epoch), c.gclip_drop_ratio))
        return lr, gclip

    def appended(self, step: int) -> int:
        """Atoms that a layer gets in the steps before this one, without recompression."""
        epoch, i = divmod(step, self.per_epoch)
        return epoch * len(self.labels) + i * self.samples

    def rows(self) -> Tensor:
        """Numbers of the images of this step."""
        epoch, i = divmod(self.step, self.per_epoch)
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, torch.randperm(len(self.labels), generator=_generator(self.config.seed, 1, epoch))
        return self._order[1][i * self.samples : (i + 1) * self.samples]

    def batch(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Inputs (b, d) and labels (b,)."""
        x = self.images[rows.to(self.device)]
        if self.config.data_augment:
            x = augment(x, self.background, generator)
        return x.flatten(1).to(self.dtype), self.labels[rows.to(self.device)]

    def loss(self, output: Tensor, x: Tensor, y: Tensor) -> Tensor:
        """Objective of a batch."""
        c, loss = self.config, plain_loss(output, y, self.config.loss)
        if self.teacher is None:
            return loss
        with torch.no_grad():
            target = F.softmax(self.teacher(x).float() / c.teacher_temp, 1)
        student = F.log_softmax(output.float() / c.teacher_temp, 1)
        return c.teacher_alpha * loss + (1 - c.teacher_alpha) * F.kl_div(student, target, reduction="batchmean")

    def advance(self) -> dict[str, Any] | None:
        """One step, a function of the state and its number; returns what a recompression did, if there was one."""
        c = self.config
        generator = _generator(c.seed, 2, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = c.lr * self.lr_factor(self.step)
        self.optimizer.zero_grad()
        rows = self.rows()
        for part in rows.split(c.batch_size):
            x, y = self.batch(part, generator)
            output = self.net(x)
            loss = self.loss(output, x, y)
            (loss * (len(part) / len(rows))).backward()
            right = (output.argmax(1) == y).sum()
            self.sums += torch.stack([loss.detach().double() * (len(part) / len(rows)), right.double()])
        if c.last_layer_grad_no_alpha and self.net.last_layer_alpha:
            grad = self.net.layers[-1].weight.grad
            if isinstance(grad, Tensor):
                grad.div_(self.net.last_layer_alpha)
        clip_grad_norm_(
            self.net.parameters(), c.gclip * self.gclip_factor(self.step), per_param=c.gclip_per_param,
            eps=None if c.infinite else 1e-6,
        )  # fmt: skip
        self.optimizer.step()
        self.step += 1
        return self._recompress()

    def _recompress(self) -> dict[str, Any] | None:
        if self.config.max_atoms is None or max(self.atoms()) + self.samples <= self.config.max_atoms:
            return None
        assert isinstance(self.net, InfMLP)
        began = time.monotonic()
        done = reduce_atoms(self.net, self.config.kept, optimizer=self.optimizer, held_out=self.test_images[:HELD_OUT])
        return {"step": self.step, "compression": dataclasses.asdict(done), "seconds": time.monotonic() - began}

    def atoms(self) -> list[int]:
        """Their number per layer."""
        return [len(layer.atoms) for layer in self.net.infinite_layers()] if isinstance(self.net, InfMLP) else []

    def loop(self, note: Callable[[str], None]) -> TrainReport:
        """Train to the end, to the time limit or to Ctrl-C; the state is saved in each case."""
        c, began = self.config, time.monotonic()
        log = None if c.save_dir is None else Log(c.save_dir / METRICS, self.step)
        self.epoch_lines = [] if log is None else [line for line in log.lines if "test_acc" in line]
        if self.step == 0:
            self._publish(0)
        bar = tqdm(total=self.steps, initial=self.step, desc="train", unit="step", disable=c.quiet, leave=False)
        stopped = False
        shown = epoch_began = time.monotonic()
        with bar, deferred_interrupt() as interrupted:
            while self.step < self.steps and not stopped:
                line = self.advance()
                if line is not None and log is not None:
                    log.write(line)
                bar.update()
                now = time.monotonic()
                if not c.quiet and now - shown > 0.5:
                    shown = now
                    bar.set_postfix_str(self._postfix())
                if self.step % self.per_epoch == 0:
                    self._end_epoch(log, now - epoch_began, note, bar)
                    epoch_began = time.monotonic()
                elif c.checkpoint_steps and self.step % c.checkpoint_steps == 0:
                    self.save()
                late = c.limit_seconds is not None and time.monotonic() - began > c.limit_seconds
                stopped = self.step < self.steps and (late or interrupted())
            if stopped:
                self.save()
        if c.save_dir is not None and self.epoch_lines and importlib.util.find_spec("matplotlib"):
            from pilimit.figures import draw_curves

            draw_curves(self.epoch_lines, c.save_dir / CURVES)
        return self._report(time.monotonic() - began, stopped and interrupted())

    def _postfix(self) -> str:
        text = f"loss {self._mean_loss():.3f}"
        if self.forecast is None:
            return text
        end = 1e3 * self.forecast.seconds_at_end
        return (
            f"{text}, {max(self.atoms()):,} atoms, {atoms_bytes(self.net) / 1e9:.2f} GB, {end:.1f} ms/step at the end"
        )

    def _mean_loss(self) -> float:
        return float(self.sums[0]) / ((self.step - 1) % self.per_epoch + 1)

    def _end_epoch(self, log: "Log | None", seconds: float, note: Callable[[str], None], bar: Any) -> None:  # noqa: ANN401
        epoch = self.step // self.per_epoch
        self.check()
        loss, right = self.sums.tolist()
        test_loss, test_acc = evaluate(self.net, self.test_images, self.test_labels, self.config)
        line = {
            "step": self.step, "epoch": epoch, "train_loss": loss / self.per_epoch, "test_loss": test_loss,
            "train_acc": right / len(self.labels), "test_acc": test_acc, "atoms": self.atoms(),
            "gb": atoms_bytes(self.net) / 1e9, "seconds": seconds,
        }  # fmt: skip
        self.sums.zero_()
        self.epoch_lines.append(line)
        if log is not None:
            log.write(line)
        if not self.config.quiet:
            bar.clear()
            note(
                f"epoch {epoch}: loss {line['train_loss']:.4f}, accuracy {line['train_acc']:.4f}; test "
                f"{test_loss:.4f}, {test_acc:.4f}; {max([*self.atoms(), 0]):,} atoms, {seconds:.1f} s"
            )
        self._publish(epoch)
        self.save()

    def _publish(self, epoch: int) -> None:
        if self.config.save_model and self.config.save_dir is not None:
            folder = self.config.save_dir / "checkpoints"
            folder.mkdir(exist_ok=True)
            with atomic_write(folder / f"epoch{epoch}.th") as temporary:
                torch.save(self.net.state_dict(), temporary)

    def check(self) -> None:
        """Stop before a loss that is not finite replaces the last good state."""
        if not math.isfinite(self._mean_loss()):
            raise ValueError(
                f"the training loss is {self._mean_loss()} at step {self.step}; lower --lr ({self.config.lr}) or --gclip"
            )

    def save(self) -> None:
        """Write everything that :meth:`load` needs to go on; atoms that are there already are not written again."""
        folder = self.config.save_dir
        if folder is None:
            return
        if self.step % self.per_epoch:
            self.check()
        progress = {"step": self.step, "sums": self.sums.tolist()}
        if isinstance(self.net, InfMLP):
            save_net(folder / NET, self.net, optimizer=self.optimizer, metadata=progress)
        else:
            save_training(
                folder / STATE, modules={"net": self.net}, optimizers={"sgd": self.optimizer}, progress=progress
            )

    def load(self, folder: Path) -> None:
        """Go back to the saved state; stay at the start if there is none."""
        if isinstance(self.net, InfMLP):
            if not (folder / NET / "net.safetensors").is_file():
                return
            self.net = load_net(folder / NET, device=self.device)
            self.optimizer = PiSGD(self._groups(), self.config.lr)
            load_optimizer(folder / NET, self.optimizer)
            self._place_atoms()
            progress = load_metadata(folder / NET)
        else:
            if not (folder / STATE).is_file():
                return
            progress = load_training(folder / STATE, modules={"net": self.net}, optimizers={"sgd": self.optimizer})
        self.step = progress["step"]
        self.sums = torch.tensor(progress["sums"], dtype=torch.float64, device=self.device)

    def _report(self, seconds: float, interrupted: bool) -> TrainReport:
        lines = self.epoch_lines
        best = max(lines, key=lambda line: line["test_acc"], default={})
        least = min(lines, key=lambda line: line["test_loss"], default={})
        test_loss, test_acc = (lines[-1]["test_loss"], lines[-1]["test_acc"]) if lines else (None, None)
        if self.step % self.per_epoch:
            test_loss, test_acc = evaluate(self.net, self.test_images, self.test_labels, self.config)
        return TrainReport(
            self.step, self.steps, self.step / self.per_epoch, test_loss, test_acc, best.get("test_acc"),
            best.get("epoch"), least.get("test_loss"), least.get("epoch"), self.atoms(),
            atoms_bytes(self.net) / 1e9, seconds, interrupted,
        )  # fmt: skip


def _generator(*numbers: int) -> torch.Generator:
    seed = 0
    for number in numbers:
        seed = (seed * 1_000_003 + number + 1) % 2**62
    return torch.Generator().manual_seed(seed)
