"""The ``sane`` command."""

import importlib
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from zoo_common.command import run_command

DESCRIPTION = """Sequential autoencoder of neural network weights: embed, analyse and sample models of any size.

Examples:
  sane zoo train digits zoo --runs 100                    make a zoo: small networks with varied settings
  sane zoo inspect zoo                                    which properties it has, and how they spread
  sane preprocess zoo -o prepared.safetensors             align, split and measure; writes no weights
  sane pretrain small training.epochs=20                  train the autoencoder; writes results/small
  sane diagnose results/small prepared.safetensors        what it loses, layer by layer
  sane embed results/small zoo -o embeddings.safetensors  embeddings of a zoo, a folder of files or one file
  sane predict results/small prepared.safetensors         accuracy, epoch, generalisation gap; against baselines
  sane sample results/small prepared.safetensors -o new.safetensors   new networks, beside what costs nothing
  sane finetune new.safetensors --epochs 2                train them on
  sane align zoo aligned-zoo                              a copy of a zoo in canonical form
"""
ZOO_DESCRIPTION = """Make and look at zoos of the published networks.

Examples:
  sane zoo train digits zoo --runs 100
  sane zoo train mnist zoo optim::lr=0.0003,0.001,0.003 --data-dir data/mnist --runs 300 --epochs 10
  sane zoo inspect zoo
"""
_Halo = tuple[int, int] | None


@dataclass(frozen=True)
class PreprocessCommand:
    """Split, check, align and measure a zoo. Permutations and statistics are stored, weights are not."""

    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of a zoo (`zoo convert` makes one of trial folders)."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("prepared.safetensors")
    """File to write."""
    steps: tuple[int, ...] = ()
    """Steps (epochs, in imported trials) of the checkpoints to take; default: all."""
    token_size: str = "auto"
    """Scalars in a token: a number, auto (the longest row) or legacy-auto (the original's choice)."""
    ignore_bn: bool = False
    """Leave batch norms out of the tokens."""
    normalization: Literal["standardize", "minmax", "l2_ind", "none"] = "standardize"
    """Normalisation of the weights, layer by layer."""
    align: Literal["last", "each", "none"] = "last"
    """Align by each run's last checkpoint (as published), or every checkpoint by itself."""
    split: Literal["zoo", "published"] = "zoo"
    """The zoo's own split, or the published shuffle with seed 42."""
    fractions: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Training, validation and test runs, for --split published."""
    max_runs: int = 0
    """Take at most this many runs; 0: all."""
    max_abs: float = float("inf")
    """Leave out checkpoints with a larger value."""
    min_accuracy_quantile: float = 0.0
    """Keep the runs whose last test accuracy is at least this quantile."""
    legacy_double_bn: bool = False
    """Normalise running statistics twice, for published files with batch norms."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class AlignCommand:
    """Write a copy of a zoo whose networks are aligned with one training network."""

    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of a zoo."""
    out: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder of the copy."""
    each: bool = False
    """Align every checkpoint by itself, not all of a run by its last one."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class PretrainCommand:
    """Train the autoencoder; writes the model, its settings, a log and a state to resume from.

    CONFIG is a built-in name (small, cnn, resnet18) or a YAML file; KEY=VALUE changes single settings, for example
    prepared=my.safetensors training.epochs=20. --show prints all keys.
    """

    config: Annotated[Positional[str], arg(metavar="CONFIG")]
    """Built-in name or YAML file."""
    overrides: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")] = ()
    """Settings to change, KEY=VALUE."""
    tune: tuple[str, ...] = ()
    """KEY=VALUE,VALUE,...: train every combination with Ray Tune (extra `tune`)."""
    resume: bool = False
    """Go on with a run that was stopped or killed."""
    device: str | None = None
    """Where to compute: auto, cpu or cuda."""
    seed: int | None = None
    """Seed of everything."""
    limit_seconds: float | None = None
    """Stop after this time; --resume goes on."""
    dry_run: bool = False
    """Time a few steps and print a forecast; writes nothing."""
    show: bool = False
    """Print the resolved configuration as YAML and do nothing else."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class DiagnoseCommand:
    """What the autoencoder loses of each layer, and which layers are faulty."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training, or a model file."""
    prepared: Annotated[Positional[Path], arg(metavar="PREPARED")]
    """File of `sane preprocess`."""
    split: Literal["train", "validation", "test"] = "test"
    """Whose checkpoints to reconstruct."""
    num: int = 16
    """How many checkpoints."""
    halo: _Halo = None
    """Window and halo in tokens, instead of full attention, for large networks."""
    condition: int = 20
    """Batches of images that batch norms see after the reconstruction."""
    judge_images: int = 1000
    """Validation images, at most, that accuracies are measured on."""
    data_dir: Path | None = None
    """Folder with the data files of the task; without data there are no accuracies."""
    download: bool = False
    """Let torchvision fetch missing files into --data-dir."""
    data: str | None = None
    """Data set, for zoos that name no task: digits, mnist, fashion_mnist or cifar10."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class EmbedCommand:
    """Embed all networks of a zoo, a folder of .pt or .safetensors files, or one file."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training, or a model file."""
    source: Annotated[Positional[Path], arg(metavar="SOURCE")]
    """What to embed."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("embeddings.safetensors")
    """File to write: `embeddings` (n, l), with runs and steps in its metadata."""
    halo: _Halo = None
    """Window and halo in tokens, e.g. 128 64: an approximation of full attention for long sequences."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class PredictCommand:
    """Predict properties from embeddings: ridges fitted on training runs, chosen on validation runs, judged on test runs."""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training, or a model file."""
    prepared: Annotated[Positional[Path], arg(metavar="PREPARED")]
    """File of `sane preprocess`."""
    properties: tuple[str, ...] = ("test_acc", "epoch", "ggap")
    """Metrics of the zoo, epoch, ggap, or config:KEY (a text, as config:model::init_type, is classified)."""
    baselines: tuple[str, ...] = ("layer statistics", "tensor statistics", "weights", "spectra")
    """Features to compare with: also `first weights`, `last weights`, `random weights`."""
    elsewhere: tuple[Path, ...] = ()
    """Prepared files of other zoos, on which the same predictors are judged (out of distribution)."""
    halo: _Halo = None
    """Window and halo in tokens, instead of full attention."""
    resamples: int = 1000
    """Draws of the test runs for the 95 % intervals."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Also write the report to this JSON file."""
    seed: int = 0
    """Draws the resamples."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class SampleCommand:
    """Sample networks around anchors, and compare them with what costs nothing: is it worth it, and are they new?"""

    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """Folder of a training, or a model file."""
    prepared: Annotated[Positional[Path], arg(metavar="PREPARED")]
    """File of `sane preprocess`; its training checkpoints are the anchors."""
    out: Annotated[Path, arg(aliases=["-o"])] = Path("samples.safetensors")
    """File to write: stacked tensors."""
    num: int = 10
    """Networks to sample."""
    strategy: Literal["plain", "subsampled", "bootstrapped"] = "plain"
    """Take what is drawn; keep the best of --draws; or do that again around the best ones."""
    mode: Literal["individual", "token", "joint"] = "token"
    """What one anchor is drawn for: each number, each token, or the whole network."""
    bandwidth: float = 0.2
    """Noise on the latents."""
    relative: bool = False
    """The bandwidth is in standard deviations of each latent number over the anchors."""
    shared_noise: bool = False
    """The published draw: one anchor per network in every mode, the same noise for all tokens."""
    anchors: int = 10
    """How many anchors."""
    choose: Literal["best", "random", "first"] = "best"
    """Which training runs: best by validation accuracy, at random, or the first ones as published; their last checkpoints."""
    draws: int = 50
    """Networks drawn to choose from, for subsampled and bootstrapped."""
    keep: int = 10
    """Networks that become the next anchors, for bootstrapped."""
    iterations: int = 5
    """Rounds of bootstrapped."""
    halo: _Halo = None
    """Window and halo in tokens to decode in."""
    condition: int = 20
    """Batches of training images that batch norms see."""
    epochs: int = 1
    """Epochs of the same fine-tuning for all groups that are compared."""
    lr: float = 1e-3
    """Its learning rate (Adam)."""
    train_images: int | None = None
    """Use at most this many training images."""
    judge_images: int | None = None
    """Judge on at most this many validation and test images."""
    no_compare: bool = False
    """Only sample: no rivals, no fine-tuning, no novelty."""
    report: Path | None = None
    """Also write the report to this JSON file."""
    seed: int = 42
    """Draws everything."""
    data_dir: Path | None = None
    """Folder with the data files of the task."""
    download: bool = False
    """Let torchvision fetch missing files into --data-dir."""
    data: str | None = None
    """Data set, for zoos that name no task: digits, mnist, fashion_mnist or cifar10."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to decode."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class FinetuneCommand:
    """Train stacked networks on, all at once, and judge them after every epoch, single and as an ensemble."""

    networks: Annotated[Positional[Path], arg(metavar="NETWORKS")]
    """File of `sane sample`."""
    out: Annotated[Path | None, arg(aliases=["-o"])] = None
    """Write the trained networks to this file."""
    epochs: int = 1
    """Passes over the training images."""
    lr: float = 1e-3
    """Learning rate."""
    batch: int = 64
    """Images in a batch."""
    optimizer: Literal["adam", "sgd"] = "adam"
    """sgd: with a momentum of 0.9."""
    schedule: Literal["constant", "onecycle"] = "constant"
    """Of the learning rate."""
    reset_classifier: int | None = None
    """Give the last layer this many classes, freshly initialised: transfer to another task."""
    data: str | None = None
    """Data set: digits, mnist, fashion_mnist or cifar10; default: that of the task."""
    data_dir: Path | None = None
    """Folder with the data files."""
    download: bool = False
    """Let torchvision fetch missing files into --data-dir."""
    train_images: int | None = None
    """Use at most this many training images."""
    seed: int = 0
    """Draws the order of the images, and new classifiers."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class ZooTrainCommand:
    """Train image classifiers with varied hyper-parameters and keep their weights after every epoch: a zoo.

    KEY=VALUE[,VALUE...] sets a hyper-parameter; each run draws one of several values: optim::lr=0.001,0.003
    optim::wd=0,0.01 optim::optimizer=adam,sgd model::init_type=kaiming_uniform,normal training::batchsize=32,128
    model::nlin=tanh model::h_dim=64x32 optim::scheduler=OneCycleLR. The same command goes on where it was stopped or
    killed, and adds to a finished zoo if --runs is larger.
    """

    data: Positional[Literal["digits", "mnist", "fashion_mnist", "cifar10"]]
    """Data set; images are resized to what the network takes."""
    directory: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of the zoo."""
    settings: Annotated[Positional[tuple[str, ...]], arg(metavar="[KEY=VALUE ...]")] = ()
    """Hyper-parameters, KEY=VALUE[,VALUE...]."""
    network: str = "CNN"
    """A published type: MLP, CNN, CNN2, CNN3, ResCNN, CNN_more_layers, CNN_residual, Resnet18, MiniAlexNet, ..."""
    runs: int = 300
    """Networks of this seed that the zoo shall have; a larger number adds to it."""
    epochs: int = 10
    """Passes over the training images."""
    save: str = ""
    """Epochs after which the weights are kept, as 0,1,5,10; default: after every one."""
    train_images: int | None = None
    """Use at most this many training images."""
    test_images: int | None = None
    """Judge on at most this many images of each part."""
    start: Path | None = None
    """Start from the weights in this file (.safetensors, .pt) instead of random ones."""
    chunk: int = 10
    """Runs that are written as one file."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Fractions of training, validation and test runs; a hash of its id decides for each run."""
    seed: int = 0
    """Seed of everything; several processes can fill one zoo, each with its own."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:1."""
    ray: bool = False
    """Train on a Ray cluster (RAY_ADDRESS; default: one on this machine), one run on each CPU or GPU."""
    data_dir: Path | None = None
    """Folder with the data files."""
    download: bool = False
    """Let torchvision fetch missing files into --data-dir."""
    limit_seconds: float | None = None
    """Stop after this time; the same command goes on."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class ZooInspectCommand:
    """Which properties a zoo has and how they spread over its splits."""

    zoo: Annotated[Positional[Path], arg(metavar="ZOO")]
    """Folder of a zoo."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ZooCommand:
    """Make and look at zoos of the published networks: `sane zoo train`, `sane zoo inspect`."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["zoo"]:
        zoos: dict[str, tuple[type, Callable[[Any], int | None]]] = {
            "train": (ZooTrainCommand, _later("zoo_train", "zoo_commands")),
            "inspect": (ZooInspectCommand, _later("zoo_inspect", "zoo_commands")),
        }
        return run_command("sane zoo", ZOO_DESCRIPTION, zoos, arguments[1:] or ["--help"], package="sane")
    commands: dict[str, tuple[type, Callable[[Any], int | None]]] = {
        "zoo": (ZooCommand, lambda _: main(["zoo"])),  # for the list of commands: those of zoo are parsed above
        "preprocess": (PreprocessCommand, _later("preprocess")),
        "align": (AlignCommand, _later("align")),
        "pretrain": (PretrainCommand, _later("pretrain")),
        "diagnose": (DiagnoseCommand, _later("diagnose")),
        "embed": (EmbedCommand, _later("embed")),
        "predict": (PredictCommand, _later("predict")),
        "sample": (SampleCommand, _later("sample", "sampling_commands")),
        "finetune": (FinetuneCommand, _later("finetune", "sampling_commands")),
    }
    return run_command("sane", DESCRIPTION, commands, arguments)


def _later(name: str, module: str = "commands") -> Callable[[Any], int | None]:
    """A function of :mod:`sane.commands` or another module, imported (with torch) when it is called."""

    def run(command: object) -> int | None:
        function, bars = (importlib.import_module(f"sane.{part}") for part in (module, "progress"))
        try:
            with bars.progress_bars(not getattr(command, "json", False)):
                status: int | None = getattr(function, name)(command)
        except (RuntimeError, MemoryError) as error:  # torch tells a lack of memory as a RuntimeError
            if isinstance(error, RuntimeError) and not re.search("out of memory|allocate memory", str(error)):
                raise
            raise OSError(f"not enough memory, use smaller sizes: {error}") from error
        return status

    return run
