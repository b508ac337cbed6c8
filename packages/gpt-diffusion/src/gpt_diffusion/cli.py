"""The ``gpt-diffusion`` command."""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from zoo_common.command import run_command

_SETTING = re.compile(r"[A-Za-z_][\w.]*=")

DESCRIPTION = """Train networks by sampling their weights: a diffusion transformer over checkpoints.

Examples:
  gpt-diffusion generate digits_loss zoo --runs 2240      train thousands of small networks, keep their checkpoints
  gpt-diffusion generate cartpole actors --forever        actors, until Ctrl-C
  gpt-diffusion prepare zoo                               find bad runs and the scale of the weights
  gpt-diffusion train digits_loss                         learn from the folder `zoo`; writes results/digits_loss
  gpt-diffusion train digits_loss train.max_steps=3000    any key of the configuration can be overridden
  gpt-diffusion sample results/digits_loss --prompt 0.1 -o better.safetensors
  gpt-diffusion sample results/digits_loss --start my.safetensors --prompt 0.1 -o better.safetensors
  gpt-diffusion eval results/digits_loss --against sgd,adam  do the samples reach what was asked for? curves, figures
  gpt-diffusion novelty results/digits_loss               are the samples new, or copies of training checkpoints?
  gpt-diffusion novelty better.safetensors --zoo zoo      the same for networks in a file
  gpt-diffusion walk results/digits_loss -o walk.gif      film the hidden units along a walk through the noise
  gpt-diffusion tasks                                     what can be learnt, and what is asked of it
  gpt-diffusion download cifar10_error.pt                 a released model; `download mnist`: a data set
  gpt-diffusion train mnist_loss_test                     judge the released model, with the published settings
  gpt-diffusion import checkpoint_datasets/mnist zoo      a data set in the published format becomes a zoo
"""


@dataclass(frozen=True)
class GenerateCommand:
    """Train thousands of task networks at once and keep their checkpoints: a zoo.

    Every run has its own initialisation and data order. The same command on the same folder goes on where it was
    stopped or killed, and adds to a finished zoo if --runs is larger.
    """

    task: Annotated[Positional[str], arg(metavar="TASK")]
    """What to train: digits, mnist, fashion-mnist, cifar10, cartpole (by reinforcement), or a task of your own."""
    directory: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    runs: int = 2240
    """Networks of this seed that the zoo shall have; a larger number adds to a finished zoo."""
    forever: bool = False
    """Go on until Ctrl-C or --limit-seconds, whatever --runs says."""
    seed: int = 0
    """Seed of all initialisations and data orders; several processes can fill one zoo, each with its own."""
    share_batches: int = 1
    """Let groups of this many runs share one data order: faster, recorded with each run."""
    save_points: Literal["geometric", "even", "random"] | None = None
    """When checkpoints are kept; default: the task's. random: other steps for each run, as published."""
    save_count: int | None = None
    """Checkpoints per run; default: the task's."""
    steps: int | None = None
    """Optimizer steps per run (cartpole: iterations of PPO); default: the task's."""
    envs: int | None = None
    """Environments of each actor, for cartpole; default: 512."""
    strategy: Literal["auto", "loop", "vmap", "stacked"] = "auto"
    """How runs are computed together; auto measures each for a moment. Does not change the result beyond rounding."""
    dtype: Literal["float32", "float64"] = "float32"
    """Precision of the training; the zoo stores float32."""
    split: tuple[float, float, float] = (0.9, 0.05, 0.05)
    """Fractions of training, validation and test runs; a hash of its id decides for each run."""
    chunk: int | None = None
    """Runs per file; default: that of the zoo, or as many as make 128 MiB (cartpole: 4,096 environments)."""
    ray: bool = False
    """Spread the files over a Ray cluster (RAY_ADDRESS; default: one on this machine), a thread each."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder with the data files of the task."""
    download: bool = False
    """Let torchvision fetch missing data into --data-dir."""
    limit_seconds: float | None = None
    """Stop after this time; what is not in a finished file is given up."""
    dry_run: bool = False
    """Measure for a moment and print a forecast of time and disk; writes nothing."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class PrepareCommand:
    """Check a zoo before training: bad runs, the normalisation coefficient, and the prior term of the diffusion.

    Writes prepared.json to the zoo; training leaves out the runs listed there.
    """

    directory: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    max_abs: float = 10.0
    """A run with a larger weight is bad, like one that cannot be read or is not finite."""
    pairs: int = 25_000
    """Checkpoints drawn from the good training runs for the statistics; 0: leave these out."""
    seed: int = 10
    """Draws them."""
    delete: bool = False
    """Move bad runs to the folder `removed` of the zoo, instead of listing them."""
    dry_run: bool = False
    """Report only; writes nothing."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class TrainCommand:
    """Train a model on a zoo; writes the model, its settings, a log and a state to resume from.

    CONFIG is a built-in name (digits_loss) or a YAML file; KEY=VALUE changes single settings, for example
    dataset.path=my-zoo train.max_steps=3000 transformer.tokens=layers. --show prints all keys.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """Built-in name or YAML file."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")] = ()
    """Settings to change, KEY=VALUE."""
    resume: bool = False
    """Go on with a run that was stopped or killed."""
    device: Literal["auto", "cpu", "cuda"] | None = None
    """Where to compute; default: as configured (auto)."""
    seed: int | None = None
    """Seed of everything; default: as configured (0)."""
    objective: Literal["diffusion", "flow"] | None = None
    """What is learned; default: as configured (diffusion, as published)."""
    data_dir: Path | None = None
    """Folder with the data files of the task (for prompting and the behaviour term), unless they come with scikit-learn."""
    limit_seconds: float | None = None
    """Stop after this time; --resume goes on."""
    dry_run: bool = False
    """Time a few steps and print a forecast of time, memory and disk; writes nothing."""
    show: bool = False
    """Print the resolved configuration as YAML and do nothing else."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class SampleCommand:
    """Sample networks with a wanted metric, from given weights or from random initialisations."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training run, a model file, a released model (mnist_loss.pt), or owner/name@revision on a hub."""
    prompt: float
    """Metric wanted, in its own units."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """File to write: a state dict (one network), or stacked tensors (several)."""
    start: Path | None = None
    """Safetensors file with the weights to start from, of one network or several; default: random initialisations."""
    num: int = 1
    """Networks to sample."""
    start_metric: float | None = None
    """Metric of the start; default: measured on the task's data."""
    recursive: int = 1
    """Prompted steps: more than one feeds samples back as starts."""
    no_novelty: bool = False
    """Do not compare the samples with the training checkpoints."""
    seed: int = 0
    """Seed of initialisations and noise."""
    config: str | None = None
    """Configuration of a .pt file that is not named after one."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of a .pt file; default: as configured (ema)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder with the data files of the task."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class EvalCommand:
    """Prompt starting networks for a range of metrics: desired against observed, one step and recursive.

    Prints scores; all curves (eval.json) and figures (eval-dvo.png, eval-recursive.png, eval-against.png) go to the folder
    of the run. Bands are 95 % intervals of the mean over networks (Student's t).
    """

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training run, a model file, a released model (mnist_loss.pt), or owner/name@revision on a hub."""
    zoo: Path | None = None
    """Take initialisations of its training runs and of its unseen test runs; default: the zoo of the training."""
    networks: int | None = None
    """Networks per group; default: as configured."""
    prompts: Literal["line", "trajectory"] = "line"
    """line: evenly spaced from the best prompt to the metric of the start; trajectory: metrics of the run's own training,
    as evenly spread as its checkpoints allow."""
    against: str | None = None
    """Also train the unseen starts with these optimizers (sgd,adam): how many steps do what one prompt does?"""
    against_steps: int | None = None
    """Optimizer steps of these trainings; default: the task's."""
    out: Path | None = None
    """JSON file for all curves; figures stand beside it; default: eval.json in the folder of the run."""
    figures: Literal["auto", "yes", "no"] = "auto"
    """auto: if matplotlib (extra `plot`) is there."""
    curve_files: Path | None = None
    """Also write the curves to this folder as the published figure files (dvo_test_set_test_set.pt ...)."""
    beside: Path | None = None
    """Folder with such files of another evaluation, drawn in our figures too."""
    no_novelty: bool = False
    """Do not compare the samples with the training checkpoints."""
    seed: int = 0
    """Seed of the noise."""
    config: str | None = None
    """Configuration of a .pt file that is not named after one."""
    weights: Literal["ema", "raw"] | None = None
    """Weights of a .pt file; default: as configured (ema)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder with the data files of the task."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class NoveltyCommand:
    """Are networks new, or copies of training checkpoints: exact, permuted, rescaled, or with noise?

    Each network is compared with its nearest training checkpoint, up to the order and scale of hidden units, and this
    with what runs look like that the training has not seen.
    """

    source: Annotated[Positional[Path], arg(metavar="MODEL|FILE")]
    """Model to sample from (folder of a training run, file, or owner/name@revision on a hub), or a safetensors file with
    one network or several, stacked."""
    zoo: Path | None = None
    """Its training runs are what may have been copied; default: the zoo of the model's training."""
    samples: Path | None = None
    """Safetensors file with networks to judge, instead of new samples of the model."""
    num: int = 16
    """Networks to sample, from random initialisations."""
    prompt: float | None = None
    """Metric wanted of them; default: the task's best prompt."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Write the whole report to this JSON file."""
    seed: int = 0
    """Seed of initialisations and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample."""
    data_dir: Path | None = None
    """Folder with the data files of the task."""
    json: bool = False
    """Print the whole report as one JSON object and no progress bar."""


@dataclass(frozen=True)
class WalkCommand:
    """Walk through the noise that networks are sampled from, and film their first layers; a PNG strip lies beside."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training run, or a model file."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("walk.gif")
    """File to write: .gif, or .mp4 with the extra `video`."""
    prompt: float | None = None
    """Metric wanted, in its own units; default: the task's best."""
    start: Path | None = None
    """Safetensors file with the weights to start from; default: a random initialisation."""
    latents: int = 16
    """Normal vectors to walk between, from the last one back to the first."""
    points: int = 24
    """Networks from one to the next, both included; published: 120."""
    scale: int = 8
    """Pixels for each weight."""
    seed: int = 0
    """Seed of initialisation and noise."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    data_dir: Path | None = None
    """Folder with the data files of the task."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class TasksCommand:
    """List the tasks: built-in ones, and those of installed packages (entry points of the group zoo_common.tasks)."""

    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class DownloadCommand:
    """Fetch a released model or data set; what is here already is checked instead. Goes on with broken transfers."""

    name: Annotated[Positional[str], arg(metavar="NAME")]
    """mnist_loss.pt, mnist_error.pt, cifar10_loss.pt, cifar10_error.pt, cartpole.pt; mnist (68 GB), cifar10 (275 GB),
    cartpole (82 GB); or all."""
    dir: Path | None = None
    """Where to put it; default: pretrained_models or checkpoint_datasets."""
    server: str | None = None
    """Address of a mirror; default: the environment variable GPT_DIFFUSION_SERVER, or where they were published."""
    offline: bool = False
    """Check what is here and fetch nothing."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class ImportCommand:
    """Convert a data set in the published format (or any that `zoo convert` reads) to a zoo. Goes on where it stopped."""

    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """Folder of the runs."""
    directory: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    task: str | None = None
    """Task of the runs, where the sizes of their tensors do not tell it."""
    steps_per_epoch: int | None = None
    """Iterations in an epoch; default: those of the published MNIST and CIFAR-10 runs, where they are such."""
    verify_done: bool = False
    """Pass over runs without DONE.txt."""
    json: bool = False
    """Print one JSON object and no progress bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands: dict[str, tuple[type, Callable[[Any], int | None]]] = {
        "generate": (GenerateCommand, _later("generate")),
        "prepare": (PrepareCommand, _later("prepare")),
        "train": (TrainCommand, _later("train")),
        "sample": (SampleCommand, _later("sample")),
        "eval": (EvalCommand, _later("evaluate")),
        "novelty": (NoveltyCommand, _later("novelty")),
        "walk": (WalkCommand, _later("walk")),
        "tasks": (TasksCommand, _later("tasks")),
        "download": (DownloadCommand, _later("download")),
        "import": (ImportCommand, _later("import_runs")),
    }
    return run_command("gpt-diffusion", DESCRIPTION, commands, overrides_first(sys.argv[1:] if argv is None else argv))


def overrides_first(argv: Sequence[str]) -> list[str]:
    """Move the KEY=VALUE settings of ``train`` before its options: the parser takes them together only.

    What follows an option that takes a value stays where it is.
    """
    if list(argv[:1]) != ["train"] or argv[1:2] == [] or argv[1].startswith("-"):
        return list(argv)
    alone = {f"--{field.name.replace('_', '-')}" for field in fields(TrainCommand) if field.type is bool}
    moved = [
        i
        for i, (before, word) in enumerate(pairwise(argv), start=1)
        if _SETTING.match(word) and (not before.startswith("-") or "=" in before or before in alone)
    ]
    first = next((i for i, word in enumerate(argv) if word.startswith("-")), len(argv))
    late = [i for i in moved if i > first]
    rest = [word for i, word in enumerate(argv) if i not in late]
    return [*rest[:first], *(argv[i] for i in late), *rest[first:]]


def _later(name: str) -> Callable[[Any], int | None]:
    """A function of :mod:`gpt_diffusion.commands`, imported (with torch) when it is called."""

    def run(command: object) -> int | None:
        status: int | None = getattr(importlib.import_module("gpt_diffusion.commands"), name)(command)
        return status

    return run
