"""Models by name, as the command line takes them."""

import difflib
import importlib
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

import torch
import torchvision
from torch import nn

from ghn.deepnets import GENOTYPES, Network

HELP = "a torchvision name, timm:NAME, a genotype (DARTS, PDARTS, ViT), or module.path:callable"

#: Arguments of the published networks of each genotype, for large and for small images.
_LARGE: dict[str, dict[str, Any]] = {
    "DARTS": {"C": 48, "n_cells": 14, "stem_type": 1},
    "PDARTS": {"C": 48, "n_cells": 14, "stem_type": 1},
    "ViT": {"C": 128, "n_cells": 12, "preproc": False, "C_mult": 1},
}
_SMALL = {**_LARGE, "DARTS": {"C": 36, "n_cells": 20}, "PDARTS": {"C": 36, "n_cells": 20}}


def resolve_model(
    name: str, *, num_classes: int | None = None, small_images: bool = False, meta: bool = False
) -> nn.Module:
    """Build the model of a name, with random weights.

    Args:
        name: What the command line takes as MODEL: a torchvision classifier, ``timm:NAME``, a predefined genotype, or
            ``module.path:callable``, which is called without arguments.
        num_classes: Outputs of the classifier; default: that of the model.
        small_images: Build genotypes for 32 x 32 pixels.
        meta: Build on the meta device where the model's code can do that: no memory, no initialisation.

    Raises:
        ValueError: The name is unknown, or what it names fails or gives no module.
        ImportError: timm, or the module of a callable, is not installed.
    """
    classes = {} if num_classes is None else {"num_classes": num_classes}
    make: Callable[[], Any]
    if name in GENOTYPES:
        arguments = (_SMALL if small_images else _LARGE)[name]
        outputs = num_classes or (10 if small_images else 1000)
        make = partial(Network, num_classes=outputs, genotype=GENOTYPES[name], is_imagenet_input=not small_images)
        make = partial(make, **arguments)
    elif name.startswith("deepnets:"):
        raise ValueError(f"{name!r}: networks of DeepNets-1M files cannot be read in this version")
    elif name.startswith("timm:"):
        make = _from_timm(name.removeprefix("timm:"), classes)
    elif ":" in name:
        make = _imported(name)
    else:
        make = _from_torchvision(name, classes)
    model = _build(make, name, meta)
    if not isinstance(model, nn.Module):
        raise ValueError(f"{name!r} gives a {type(model).__name__}, not a module")
    return model


def _build(make: Callable[[], Any], name: str, meta: bool) -> Any:  # noqa: ANN401
    if meta:
        with suppress(Exception), torch.device("meta"):  # its initialisation may look at values
            return make()
    try:
        return make()
    except Exception as error:  # whatever the user's code does
        raise ValueError(f"{name!r} cannot be built: {type(error).__name__}: {error}") from error


def _from_torchvision(name: str, options: dict[str, Any]) -> Callable[[], Any]:
    known = torchvision.models.list_models(module=torchvision.models)
    if name not in known:
        close = difflib.get_close_matches(name, [*known, *GENOTYPES], n=3)
        hint = f"did you mean {' or '.join(close)}? " if close else ""
        raise ValueError(f"unknown model {name!r}; {hint}MODEL is {HELP}")
    if name in ("googlenet", "inception_v3"):
        options = {**options, "init_weights": False}  # it takes a minute, and warns
    return lambda: torchvision.models.get_model(name, **options)


def _from_timm(name: str, options: dict[str, Any]) -> Callable[[], Any]:
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise ImportError("models of timm need the extra: pip install 'ghn[timm]'") from error
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        raise ValueError(f"timm has no model {name!r}" + (f"; close: {', '.join(close)}" if close else ""))
    return lambda: timm.create_model(name, pretrained=False, **options)


def _imported(name: str) -> Callable[[], Any]:
    path, _, attribute = name.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(path)
    except ModuleNotFoundError as error:
        raise ImportError(f"{name!r}: {error}; the current folder is searched too") from error
    except Exception as error:  # whatever the user's module does
        raise ValueError(f"{name!r}: module {path!r} fails on import: {type(error).__name__}: {error}") from error
    made = getattr(found, attribute, None)
    if not callable(made):
        raise ValueError(f"{name!r}: module {path} has no callable {attribute!r}")
    found_callable: Callable[[], Any] = made
    return found_callable
