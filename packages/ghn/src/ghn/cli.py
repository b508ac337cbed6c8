"""The ``ghn`` command."""

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from tyro.conf import Positional
from zoo_common.command import run_command

DESCRIPTION = """Graph hypernetworks: predict all parameters of a PyTorch model in one forward pass.

MODEL is a torchvision name, timm:NAME, a genotype (DARTS, PDARTS, ViT), or module.path:callable.

Examples:
  ghn check vit_b_16                      which parameter would be set by what
  ghn check my_package.models:make_net    the same for a model of your own
  ghn graph resnet50 --png resnet50.png   draw the computational graph
"""


@dataclass(frozen=True)
class CheckCommand:
    """List each parameter of a model and who sets it; nothing is computed or allocated."""

    model: Positional[str]
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

    model: Positional[str]
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


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    commands: dict[str, tuple[type, Callable[[Any], int | None]]] = {
        "check": (CheckCommand, _later("check")),
        "graph": (GraphCommand, _later("graph")),
    }
    return run_command("ghn", DESCRIPTION, commands, argv)


def _later(name: str) -> Callable[[Any], int | None]:
    """A function of :mod:`ghn.commands`, imported (with torch) when it is called."""

    def run(command: object) -> int | None:
        status: int | None = getattr(importlib.import_module("ghn.commands"), name)(command)
        return status

    return run
