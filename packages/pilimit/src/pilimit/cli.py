"""The ``pilimit`` command."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro
from zoo_common.command import run_command

DESCRIPTION = """Infinite-width networks that learn features, and their finite twins.

Examples:
  pilimit convert epoch46.th my-net      a published checkpoint to a folder of our own; nothing in it is executed

Planned: train, eval, transfer, maml, kernel, sample, sweep.
"""


@dataclass(frozen=True)
class ConvertConfig:
    """Write a published checkpoint (library, original object, converted original) as a folder of our own format."""

    source: tyro.conf.Positional[Path]
    """The published file."""
    target: tyro.conf.Positional[Path]
    """Folder to write; it must not exist, or be empty."""
    json: bool = False
    """Print one JSON object."""


def _convert(config: ConvertConfig) -> None:
    from pilimit.checkpoint import load_net, save_net

    if config.target.exists() and (not config.target.is_dir() or any(config.target.iterdir())):
        raise ValueError(f"{config.target} exists and is not an empty folder: name another, or remove it")
    net = load_net(config.source)
    save_net(config.target, net)
    result = net.config | {"atoms": [len(layer.atoms) for layer in net.infinite_layers()]}
    if config.json:
        print(json.dumps(result))
    else:
        print(f"{config.target}: depth {net.depth}, r {net.r}, atoms per layer {result['atoms']}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    return run_command("pilimit", DESCRIPTION, {"convert": (ConvertConfig, _convert)}, argv)
