"""The ``ghn`` command."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg
from zoo_common.command import run_command

from ghn.config import LEARNING_RATES, TrainConfig

DESCRIPTION = """Graph hypernetworks: predict all parameters of a PyTorch model in one forward pass.

MODEL is a torchvision name, timm:NAME, a genotype (DARTS, PDARTS, ViT), or module.path:callable.

Examples:
  ghn check vit_b_16                      which parameter would be set by what
  ghn check my_package.models:make_net    the same for a model of your own
  ghn graph resnet50 --png resnet50.png   draw the computational graph
  ghn predict resnet50 -o resnet50.safetensors                   predict all weights, with the largest published GHN-3
  ghn predict resnet50 -o small.safetensors --weights ghn2_cifar10.pt --adjust cifar      for small images, 10 classes
  ghn predict my_package.models:make_net -o folder               several files, for large models
  ghn predict DARTS -o darts.safetensors --weights digits --adjust cifar    offline: the small hypernetwork in the package
  ghn train --data digits --out my-ghn    train a small hypernetwork; --weights my-ghn uses it
  ghn eval --data digits --weights digits                        predicted against random weights, on unseen networks
"""


@dataclass(frozen=True)
class CheckCommand:
    """List each parameter of a model and who sets it; nothing is computed or allocated."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A torchvision name, timm:NAME, a genotype (DARTS, PDARTS, ViT), or module.path:callable."""
    dialect: Literal["ghn3", "ppuda"] = "ghn3"
    """Published graph code to judge by: that of GHN-3 (2023) or of GHN-1 and GHN-2 (2021)."""
    input: tuple[int, ...] | None = None
    """Shape of a float input, the batch first; default: two images of the size that the model expects."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class GraphCommand:
    """Make the computational graph of a model: print its size, draw it, or write it down."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A torchvision name, timm:NAME, a genotype (DARTS, PDARTS, ViT), or module.path:callable."""
    png: Path | None = None
    """Picture to write; other suffixes (.pdf, .svg) are understood too."""
    labels: bool = False
    """Write names of parameters beside the nodes of the picture."""
    dialect: Literal["ghn3", "ppuda"] = "ghn3"
    """Published graph code to follow: that of GHN-3 (2023) or of GHN-1 and GHN-2 (2021)."""
    compat: bool = False
    """Keep what the published code got wrong (Swin v2, MaxViT)."""
    extended: bool = False
    """Give nodes to parameters of layers that the published code leaves out."""
    input: tuple[int, ...] | None = None
    """Shape of a float input, the batch first; default: two images of the size that the model expects."""
    json: bool = False
    """Print one JSON object with all nodes and edges."""


@dataclass(frozen=True)
class PredictCommand:
    """Predict the weights of a model and write them to safetensors files."""

    model: Annotated[Positional[str], arg(metavar="MODEL")]
    """A torchvision name, timm:NAME, a genotype (DARTS, PDARTS, ViT), or module.path:callable."""
    out: Annotated[Path, arg(aliases=["-o"])]
    """A file *.safetensors; or a folder, which gets several files and an index."""
    weights: str = "ghn3xlm16.pt"
    """The hypernetwork: a published name, "digits" (in the package), a file, a folder, or owner/name on the hub."""
    revision: str | None = None
    """Branch, tag or commit of the hub."""
    offline: bool = False
    """Use what has been downloaded before."""
    num_classes: int | None = None
    """Outputs of the model; default: the hypernetwork's classes."""
    keep_class_layer: bool = False
    """Do not predict the last layer."""
    extended: bool = False
    """Also predict layers that the published code leaves out."""
    input: tuple[int, ...] | None = None
    """Shape of a float input, the batch first; default: two images of the size that the model expects."""
    adjust: Literal["cifar"] | None = None
    """Fit the first layers to images of 32 x 32 pixels."""
    seed: int = 0
    """Draws what is not predicted."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the hypernetwork computes."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class TrainCommand(TrainConfig):
    """Train a hypernetwork on sampled networks; writes it, its settings, a log and a state to resume from."""

    out: Path = Path("ghn-run")
    """Folder of the run."""
    data_dir: Path | None = None
    """Folder with the files of CIFAR-10."""
    download: bool = False
    """Let torchvision fetch them into this folder if they are missing."""
    resume: bool = False
    """Go on with a run that was stopped or killed."""
    limit_seconds: float | None = None
    """Stop after this time; --resume goes on."""
    dry_run: bool = False
    """Time a few steps and print a forecast of time and disk; writes nothing."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class EvalCommand:
    """Accuracy of predicted networks that no training has seen, against random initialisation."""

    weights: str = "digits"
    """The hypernetwork: "digits" (in the package), a folder of ghn train, a file, or a published name."""
    data: Literal["digits", "cifar10"] = "digits"
    """Images for training and test."""
    data_dir: Path | None = None
    """Folder with the files of CIFAR-10."""
    download: bool = False
    """Let torchvision fetch them into this folder if they are missing."""
    nets: Literal["small", "deepnets"] = "small"
    """Networks: small ones, or new ones by the rules of DeepNets-1M."""
    num_nets: int = 48
    """How many."""
    epochs: int = 1
    """Epochs of SGD from both initialisations."""
    lr: tuple[float, ...] = LEARNING_RATES
    """Learning rates of SGD to choose from: each initialisation has the one that is best on validation images."""
    png: Path | None = None
    """Picture to write."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    seed: int = 0
    """Draws networks, initial weights and the order of images."""
    json: bool = False
    """Print one JSON object and no progress bar."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands: dict[str, tuple[type, Callable[[Any], int | None]]] = {
        "check": (CheckCommand, _later("check")),
        "graph": (GraphCommand, _later("graph")),
        "predict": (PredictCommand, _later("predict")),
        "train": (TrainCommand, _later("train")),
        "eval": (EvalCommand, _later("evaluate")),
    }
    return run_command("ghn", DESCRIPTION, commands, argv)


def _later(name: str) -> Callable[[Any], int | None]:
    """A function of :mod:`ghn.commands`, imported (with torch) when it is called."""

    def run(command: object) -> int | None:
        status: int | None = getattr(importlib.import_module("ghn.commands"), name)(command)
        return status

    return run
