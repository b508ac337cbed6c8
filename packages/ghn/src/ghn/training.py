"""Meta-training of a hypernetwork on sampled networks: a loop to read, copy and change."""

import dataclasses
import json
import math
import sys
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.checkpoint import load_training, save_checkpoint, save_training
from zoo_common.datasets import Part
from zoo_common.files import atomic_write, visible_files
from zoo_common.interrupts import deferred_interrupt

from ghn.config import TrainConfig, read_config
from ghn.deepnets.network import Network
from ghn.deepnets.operations import Keys
from ghn.deepnets.sampling import sample
from ghn.graph import Graph
from ghn.images import augmented, load_images
from ghn.matching import lighten, parameter_slots
from ghn.model import GHN, build
from ghn.pretrained import FILE

STATE, CONFIG, LOG = "state.safetensors", "config.yaml", "metrics.jsonl"
_KEPT = 1000
"""Networks and graphs in memory; small ones take about 300 MB."""


@dataclass(frozen=True)
class TrainReport:
    """What a finished or interrupted training came to."""

    folder: Path
    step: int
    steps: int
    loss: float
    """Mean cross entropy on training images since the last line of the log."""
    accuracy: float
    """Mean accuracy there, a fraction."""
    skipped: int
    """Updates left out because loss or gradient was not finite."""
    seconds: float
    """Of this session."""
    interrupted: bool = False
    """Whether Ctrl-C ended the session."""

    @property
    def finished(self) -> bool:
        """Whether all steps are done; else resume."""
        return self.step == self.steps


@dataclass(frozen=True)
class Forecast:
    """What a training will cost on this machine."""

    steps: int
    parameters: int
    """Of the hypernetwork."""
    seconds: float
    state_bytes: int
    """Disk for the hypernetwork and the training state."""


def train(
    config: TrainConfig,
    folder: Path,
    *,
    resume: bool = False,
    data_dir: Path | None = None,
    download: bool = False,
    limit_seconds: float | None = None,
    quiet: bool = False,
) -> TrainReport:
    """Train a hypernetwork and write it to ``ghn.safetensors`` in a folder.

    The folder also receives ``config.yaml``, ``metrics.jsonl`` and ``state.safetensors``, from which a killed training
    resumes to the same result. Ctrl-C and ``limit_seconds`` save the state and stop.

    Args:
        config: All settings.
        folder: Must be new unless ``resume``.
        resume: Go on from the state in the folder (start, if there is none).
        data_dir: Folder with the files of CIFAR-10.
        download: Let torchvision fetch them into ``data_dir`` if they are missing.
        limit_seconds: Stop after this time.
        quiet: No progress bar.

    Raises:
        FileExistsError: The folder holds a run.
        FileNotFoundError: No data, or nothing to resume.
        ValueError: The configuration differs from that of the run, or the training has diverged.
    """
    if limit_seconds is not None and not limit_seconds >= 0:
        raise ValueError(f"limit_seconds must not be negative, got {limit_seconds}")
    run = Training(config, data_dir, download)
    _open_folder(folder, config, resume)
    if resume and (folder / STATE).exists():
        run.load(folder / STATE)
    report = run.loop(folder, limit_seconds, quiet)
    if report.finished:
        metadata = {"ghn": run.ghn.config, "training": dataclasses.asdict(config)}
        save_checkpoint(folder / FILE, run.ghn.state_dict(), metadata)
    return report


def forecast(
    config: TrainConfig, *, data_dir: Path | None = None, download: bool = False, timed_steps: int = 5
) -> Forecast:
    """Time a few steps without writing anything (but the data, if ``download``)."""
    run = Training(config, data_dir, download)
    run.advance()  # what happens only once
    began = time.monotonic()
    for _ in range(timed_steps):
        run.advance()
    seconds = (time.monotonic() - began) / timed_steps * run.steps
    parameters = sum(p.numel() for p in run.ghn.parameters())
    return Forecast(run.steps, parameters, seconds, 4 * 4 * parameters)  # weights, twice, and two moments of AdamW


class Training:
    """State of one training: hypernetwork, optimizer, step counter. Everything else follows from the step."""

    def __init__(self, config: TrainConfig, data_dir: Path | None = None, download: bool = False) -> None:
        config.check()
        self.config, self.device = config, choose_device(config.device)
        part = load_images(config.data, data_dir, download=download).train
        if len(part.labels) < config.batch_size:
            raise ValueError(f"batch_size is {config.batch_size}, there are {len(part.labels)} training images")
        self.data = Part(part.images.to(self.device), part.labels.to(self.device))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            self.ghn = build(config.ghn_config()).to(self.device).train()
        if config.compile:
            self.ghn.gnn.compile(dynamic=True)
        self.optimizer = torch.optim.AdamW(self.ghn.parameters(), lr=config.lr, weight_decay=config.weight_decay)
        self.per_epoch = len(part.labels) // config.batch_size
        self.steps = config.epochs * self.per_epoch
        self.step = self.skipped = 0
        self.sums = torch.zeros(4, dtype=torch.float64)  # Means and their number, since the last line
        self.means: tuple[float, ...] = (math.nan,) * 3
        self.kept: OrderedDict[int, tuple[Network, Graph]] = OrderedDict()

    def loop(self, folder: Path, limit_seconds: float | None, quiet: bool) -> TrainReport:
        """Train to the end, to the time limit or to Ctrl-C; the state is saved in each case."""
        began, config = time.monotonic(), self.config
        log = _trimmed_log(folder / LOG, self.step)
        bar = tqdm(
            total=self.steps, initial=self.step, desc="train", unit="step", disable=quiet, file=sys.stderr, leave=False
        )
        with bar, deferred_interrupt() as interrupted:
            while self.step < self.steps and not interrupted():
                self.advance()
                bar.update()
                if self.step % config.log_every == 0 or self.step == self.steps:
                    self.write_log(log, time.monotonic() - began)
                    bar.set_postfix(loss=f"{self.means[0]:.3f}", accuracy=f"{self.means[1]:.3f}")
                if self.step % config.save_every == 0:
                    self.save(folder / STATE)
                if limit_seconds is not None and time.monotonic() - began > limit_seconds:
                    break
            self.save(folder / STATE)
        seconds, stopped = time.monotonic() - began, interrupted() and self.step < self.steps
        loss, accuracy, _ = self.means
        return TrainReport(folder, self.step, self.steps, loss, accuracy, self.skipped, seconds, stopped)

    def advance(self) -> None:
        """One update, a function of the state and of the step number."""
        config, seeds = self.config, (self.config.seed, self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = config.learning_rate(self.step // self.per_epoch)
        chosen = np.random.default_rng([*seeds, 0]).choice(config.num_nets, config.meta_batch, replace=False)
        nets, graphs = zip(*[self.sampled(int(i)) for i in chosen], strict=True)
        images, labels = self.batch()
        self.optimizer.zero_grad(set_to_none=True)
        with torch.random.fork_rng(), torch.autocast(self.device.type, torch.bfloat16, config.precision == "bf16"):
            torch.manual_seed(_mixed(*seeds, 1))  # dropout in classifiers
            means = judge(nets, graphs, self.ghn, images, labels)
        (means.loss + config.predparam_wd * means.norm).backward()
        for net in nets:
            lighten(net)
        norm = nn.utils.clip_grad_norm_(self.ghn.parameters(), config.grad_clip or math.inf)
        found = torch.stack(means).detach().double().cpu()
        if found.isfinite().all() and norm.isfinite():
            self.optimizer.step()
            self.sums += torch.cat([found, torch.ones(1)])
        else:
            self.skip()
        self.step += 1

    def batch(self) -> Part:
        """The training images of this step; every epoch has an order of its own."""
        epoch, k = divmod(self.step, self.per_epoch)
        size, seed = self.config.batch_size, self.config.seed
        order = torch.randperm(len(self.data.labels), generator=_generator(seed, epoch, 2))
        rows = order[k * size : (k + 1) * size].to(self.device)
        images = self.data.images[rows]
        if self.config.data == "cifar10":
            images = augmented(images, _generator(seed, self.step, 3))
        return Part(images, self.data.labels[rows])

    def sampled(self, index: int) -> tuple[Network, Graph]:
        """A training network by number, without weights, and its graph; those used last are kept."""
        if index in self.kept:
            self.kept.move_to_end(index)
        else:
            is_small = self.config.nets == "small"
            drawn = sample("train", index, seed=self.config.seed, small=is_small, dialect=self.ghn.dialect)
            self.kept[index] = drawn.architecture.build_light(keys=keys_of(self.ghn)), drawn.graph
            if len(self.kept) > _KEPT:
                self.kept.popitem(last=False)
        return self.kept[index]

    def skip(self) -> None:
        """Count an update that cannot be used.

        Raises:
            ValueError: There have been too many.
        """
        self.skipped += 1
        if self.skipped > max(10, self.steps // 50):
            raise ValueError(
                f"loss or gradient were not finite in {self.skipped} updates up to step {self.step}; "
                f"lower lr ({self.config.lr}), or use fp32 if the precision is bf16 ({self.config.precision})"
            )

    def write_log(self, log: Path, seconds: float) -> None:
        """Append the means since the last line."""
        loss, accuracy, norms, count = self.sums.tolist()
        self.sums.zero_()
        if count:
            self.means = (loss / count, accuracy / count, norms / count)
        line = {"step": self.step, "epoch": self.step / self.per_epoch}
        line |= dict(zip(Means._fields, self.means, strict=True))
        line |= {"lr": self.optimizer.param_groups[0]["lr"], "skipped": self.skipped, "seconds": round(seconds, 3)}
        with log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def save(self, path: Path) -> None:
        """Write everything that :meth:`load` needs to go on."""
        progress = {"step": self.step, "skipped": self.skipped, "sums": self.sums, "means": list(self.means)}
        save_training(path, modules={"ghn": self.ghn}, optimizers={"adamw": self.optimizer}, progress=progress)

    def load(self, path: Path) -> None:
        """Go back to a saved state."""
        progress = load_training(path, modules={"ghn": self.ghn}, optimizers={"adamw": self.optimizer})
        self.step, self.skipped, self.sums = progress["step"], progress["skipped"], progress["sums"]
        self.means = tuple(progress["means"])


class Means(NamedTuple):
    """What a meta-batch came to, means over its networks; scalars through which gradients flow."""

    loss: Tensor
    """Cross entropy."""
    accuracy: Tensor
    """A fraction."""
    norm: Tensor
    """Sum of the norms of a network's predicted tensors."""


def judge(nets: Sequence[Network], graphs: Sequence[Graph], ghn: GHN, images: Tensor, labels: Tensor) -> Means:
    """Predict the networks of a meta-batch and let all of them classify the same images."""
    ghn(nets, graphs, keep_grads=True, bn_track_running_stats=True, reduce_graph=True)
    predicted = [slot.content for net in nets for slot in parameter_slots(net).values()]
    norms = torch.stack([tensor.norm() for tensor in predicted if isinstance(tensor, Tensor)])
    logits = torch.stack([net(images)[0] for net in nets]).float()
    accuracy = (logits.argmax(2) == labels).float().mean()
    return Means(F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(nets))), accuracy, norms.sum() / len(nets))


def keys_of(ghn: GHN) -> Keys:
    """How networks for a hypernetwork name their attention weights."""
    return "ghn2" if ghn.dialect == "ppuda" else "ghn3"


def choose_device(name: str) -> torch.device:
    """Device of a name: ``auto`` (CUDA if there is any), ``cpu`` or ``cuda``.

    Raises:
        ValueError: CUDA is asked for and there is none.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise ValueError("device 'cuda': no CUDA device is available here; use --device cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")


def _mixed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0])


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(_mixed(*numbers))


def _open_folder(folder: Path, config: TrainConfig, resume: bool) -> None:
    """Create the run's folder with its ``config.yaml``, or check that a resumed one has the same."""
    stored = folder / CONFIG
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file: give another folder as --out")
    if not resume and folder.exists() and visible_files(folder, ""):
        raise FileExistsError(f"{folder} already holds a run; use --resume to go on, or another --out")
    if resume and not stored.exists():
        raise FileNotFoundError(f"nothing to resume in {folder}; start the run without --resume")
    if stored.exists():
        before, now = (dataclasses.asdict(one) for one in (read_config(stored), config))
        changed = [f"{key} ({before[key]} there, {now[key]} given)" for key in now if before[key] != now[key]]
        if changed:
            raise ValueError(
                f"{stored} differs from what was given: {', '.join(changed)}; use the same, or another --out"
            )
        return
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(stored) as temporary:
        temporary.write_text(config.to_yaml())


def _trimmed_log(path: Path, step: int) -> Path:
    """Drop the lines that a killed session wrote after its last saved state."""
    if path.exists():
        lines = [line for line in path.read_text().splitlines(keepends=True) if line.endswith("\n")]
        kept = [line for line in lines if json.loads(line)["step"] <= step]
        with atomic_write(path) as temporary:
            temporary.write_text("".join(kept))
    return path
