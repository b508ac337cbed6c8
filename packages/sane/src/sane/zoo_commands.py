"""``sane zoo``: make a zoo, look into one."""

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro
from tyro.conf import Positional


@dataclass(frozen=True)
class ZooTrain:
    """Train image classifiers with varied hyper-parameters and keep their weights after every epoch: a zoo.

    KEY=VALUE[,VALUE...] sets a hyper-parameter; each run draws one of several values: optim::lr=0.001,0.003
    optim::wd=0,0.01 optim::optimizer=adam,sgd model::init_type=kaiming_uniform,normal training::batchsize=32,128
    model::nlin=tanh model::h_dim=64x32 optim::scheduler=OneCycleLR. The same command goes on where it was stopped or killed, and adds to a
    finished zoo if --runs is larger.
    """

    network: Positional[str]
    """MLP, CNN, CNN2, CNN3, ResCNN, CNN_more_layers, CNN_residual, Resnet18, MiniAlexNet, ...: a published model::type."""
    folder: Positional[Path]
    """Folder of the zoo."""
    settings: Positional[tuple[str, ...]] = ()
    """Hyper-parameters, KEY=VALUE[,VALUE...]."""
    data: Literal["digits", "mnist", "fashion_mnist", "cifar10"] = "digits"
    """Images, resized to what the network takes."""
    data_dir: Path | None = None
    """Folder with the images, unless they come with scikit-learn."""
    download: bool = False
    """Let torchvision fetch missing images into --data-dir."""
    runs: int = 100
    """Networks of this seed that the zoo shall have."""
    epochs: int = 10
    """Passes over the training images."""
    save: str = ""
    """Epochs after which the weights are kept, as 0,1,5,10; default: after every one."""
    train_images: int | None = None
    """Training images that are used; default: all."""
    test_images: int | None = None
    """Test images that are used; default: all."""
    start: Path | None = None
    """Start from the weights in this file (.safetensors, .pt) instead of random ones."""
    split: tuple[float, float, float] = (0.7, 0.15, 0.15)
    """Fractions of training, validation and test runs; a hash of its id decides for each run."""
    seed: int = 0
    """Seed of everything; several processes can fill one zoo, each with its own."""
    chunk: int = 10
    """Runs that are written together."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute."""
    ray: bool = False
    """Train on a Ray cluster (RAY_ADDRESS; default: one on this machine), one run on each CPU or GPU."""
    json: bool = False
    """Print one JSON object and no progress bar."""


@dataclass(frozen=True)
class ZooInspect:
    """What a zoo holds: runs, checkpoints, weights, metrics at the first and the last checkpoint, hyper-parameters."""

    folder: Positional[Path]
    """Folder of the zoo."""
    json: bool = False
    """Print one JSON object."""


@dataclass(frozen=True)
class ZooCommand:
    """Make a zoo of trained networks, or look into one."""

    action: Annotated[
        Annotated[ZooTrain, tyro.conf.subcommand("train")] | Annotated[ZooInspect, tyro.conf.subcommand("inspect")],
        tyro.conf.OmitSubcommandPrefixes,
        tyro.conf.OmitArgPrefixes,
    ]


def zoo(command: ZooCommand) -> None:
    """Run ``sane zoo``."""
    if isinstance(command.action, ZooTrain):
        train(command.action)
    else:
        inspect(command.action)


def train(command: ZooTrain) -> None:
    """Run ``sane zoo train``."""
    from sane.generation import ZooPlan, train_zoo

    plan = ZooPlan(
        command.network,
        command.data,
        command.epochs,
        _epochs(command.save),
        dict(_setting(text) for text in command.settings),
        command.train_images,
        command.test_images,
        None if command.start is None else str(command.start),
    )
    result = train_zoo(
        plan,
        command.folder,
        runs=command.runs,
        seed=command.seed,
        chunk=command.chunk,
        split=command.split,
        data_dir=command.data_dir,
        download=command.download,
        device=command.device,
        ray=command.ray,
        progress=not command.json,
    )
    if command.json:
        sys.stdout.write(json.dumps(result._asdict()) + "\n")
    else:
        sys.stdout.write(
            f"{command.folder}: {result.runs} runs ({result.dropped} left out: not finite), {result.seconds:.0f} s\n"
        )


def inspect(command: ZooInspect) -> None:
    """Run ``sane zoo inspect``."""
    about = summary(command.folder)
    if command.json:
        sys.stdout.write(json.dumps(about) + "\n")
        return
    sys.stdout.write(
        f"{command.folder}: {about['runs']} runs ({', '.join(f'{n} {part}' for part, n in about['split'].items())}), "
        f"{about['checkpoints']} checkpoints of {about['weights']:,} weights\n"
    )
    for name, (first, last) in about["metrics"].items():
        sys.stdout.write(f"  {name:12} {first:.4g} at the first checkpoints, {last:.4g} at the last (mean over runs)\n")
    for key, values in about["varied"].items():
        sys.stdout.write(f"  {key}: {', '.join(map(str, values))}\n")


def summary(folder: Path) -> dict[str, Any]:
    """What ``sane zoo inspect`` tells."""
    import numpy as np
    from zoo_common.zoo import SPLITS, Zoo

    zoo = Zoo.open(folder)
    if not len(zoo):
        raise ValueError(f"{folder}: the zoo is empty; fill it with `sane zoo train`")
    lengths = np.array([run.checkpoints for run in zoo.runs])
    rows = np.arange(len(zoo))
    metrics = {
        name: [float(np.nanmean(zoo.metrics[name].gather(rows, at))) for at in (0 * lengths, lengths - 1)]
        for name in zoo.metrics
    }
    values: dict[str, set[str]] = {}
    for run in zoo.runs:
        for key, value in run.config.items():
            values.setdefault(key, set()).add(str(value))
    return {
        "runs": len(zoo),
        "checkpoints": int(lengths.sum()),
        "weights": zoo.layout.size,
        "task": zoo.task,
        "split": {part: len(zoo.split(part)) for part in SPLITS},
        "metrics": metrics,
        "varied": {key: sorted(found) for key, found in values.items() if 1 < len(found) <= 20},
    }


def _setting(text: str) -> tuple[str, tuple[Any, ...]]:
    """A hyper-parameter and its values, as numbers where they are such."""
    key, equals, values = text.partition("=")
    if not equals or not values:
        raise ValueError(
            f"{text!r}: give hyper-parameters as KEY=VALUE or KEY=VALUE,VALUE, for example optim::lr=0.001,0.003"
        )
    return key, tuple(_value(value) for value in values.split(","))


def _value(text: str) -> Any:  # noqa: ANN401
    """A number, a list of them (64x32), nothing (none), or a name."""
    if re.fullmatch(r"\d+(x\d+)+", text):
        return [int(part) for part in text.split("x")]
    try:
        value: Any = json.loads(text)
    except json.JSONDecodeError:
        return None if text.lower() == "none" else text
    return value


def _epochs(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(",")) if text else ()
    except ValueError:
        raise ValueError(f"--save {text!r}: give epochs as 0,1,5,10") from None
