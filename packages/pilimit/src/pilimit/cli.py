"""The ``pilimit`` command."""

import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro
from zoo_common.command import Commands, run_command

from pilimit.config import EvalConfig, KernelConfig, TrainConfig, WidthsConfig, expand_presets

DESCRIPTION = """Infinite-width networks that learn features, and their finite twins.

Examples:
  pilimit train digits --save-dir run --epochs 10 --r 50 --lr 0.5 --batch-size 8
  pilimit train mnist --data-root data --max-atoms 4000 --save-dir run
  pilimit train cifar10 --data-root data --preset infinite --save-dir run     the published run
  pilimit eval run digits                                                     loss and accuracy
  pilimit kernel mnist --data-root data --kernel ntk --train-subset-size 5000
  pilimit widths digits --plot widths.png                                     finite nets approach the infinite one
  pilimit convert epoch46.th my-net      a published checkpoint to a folder of our own; nothing in it is executed
  pilimit sample my-net finite.safetensors --width 2048

Planned: transfer, maml, sweep.
"""


_NO_MEMORY = ("allocate memory", "out of memory")
"""How torch tells it."""


@dataclass(frozen=True)
class ConvertConfig:
    """Write a published checkpoint (library, original object, converted original) as a folder of our own format."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """The published file, or the folder of a run."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """Folder to write; it must not exist, or be empty."""
    json: bool = False
    """Print one JSON object."""


def _convert(config: ConvertConfig) -> None:
    from pilimit.building import open_infinite
    from pilimit.checkpoint import save_net

    if config.target.exists() and (not config.target.is_dir() or any(config.target.iterdir())):
        raise ValueError(f"{config.target} exists and is not an empty folder: name another, or remove it")
    net = open_infinite(config.source)
    save_net(config.target, net)
    result = net.config | {"atoms": [len(layer.atoms) for layer in net.infinite_layers()]}
    if config.json:
        print(json.dumps(result))
    else:
        print(f"{config.target}: depth {net.depth}, r {net.r}, atoms per layer {result['atoms']}")


@dataclass(frozen=True)
class SampleConfig:
    """Write a finite net that is sampled from an infinite one, as safetensors; `pilimit eval` reads it."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE")]
    """Folder of a run or of atoms, or a published file."""
    target: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="TARGET")]
    """File to write."""
    width: int = 1024
    """Units per hidden layer."""
    seed: int = 0
    """Of the sample."""
    json: bool = False
    """Print one JSON object."""


def _sample(config: SampleConfig) -> None:
    import torch
    from zoo_common.checkpoint import save_checkpoint

    from pilimit.building import open_infinite
    from pilimit.finite import FinMLP

    net = open_infinite(config.source)
    finite = FinMLP.sample(net, config.width, generator=torch.Generator().manual_seed(config.seed))
    result = net.config | {"width": config.width, "seed": config.seed}
    save_checkpoint(config.target, finite.state_dict(), result)
    print(json.dumps(result) if config.json else f"{config.target}: width {config.width}, depth {net.depth}")


def _train(config: TrainConfig) -> int:
    if config.width:
        # read by torch when it is loaded: gradients of wide layers in large pages, a fifth of a step at width 4096
        os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    from pilimit.commands import run_train

    return run_train(config)


def _eval(config: EvalConfig) -> int:
    from pilimit.commands import run_eval

    return run_eval(config)


def _kernel(config: KernelConfig) -> int:
    from pilimit.commands import run_kernel

    return run_kernel(config)


def _widths(config: WidthsConfig) -> int:
    from pilimit.commands import run_widths

    return run_widths(config)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands: Commands = {
        "train": (TrainConfig, _train), "eval": (EvalConfig, _eval), "kernel": (KernelConfig, _kernel),
        "widths": (WidthsConfig, _widths), "convert": (ConvertConfig, _convert), "sample": (SampleConfig, _sample),
    }  # fmt: skip
    try:
        arguments = expand_presets(sys.argv[1:] if argv is None else argv)
    except ValueError as error:
        sys.stderr.write(f"pilimit: {error}\n")
        return 1
    try:
        return run_command("pilimit", DESCRIPTION, commands, arguments)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(word in str(error) for word in _NO_MEMORY):
            raise
        sys.stderr.write(
            "pilimit: memory ran out: take a smaller r, width or batch, or bound the atoms (--max-atoms)\n"
        )
        return 1
