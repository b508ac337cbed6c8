"""Hypernetworks and targets of the goldens."""

import dataclasses
import json
import math
from pathlib import Path

import torch
import torchvision
from ghn.deepnets import Genotype
from ghn.deepnets.sampling import Architecture
from torch import nn

from support.golden import fill


def filled(module: nn.Module) -> nn.Module:
    """Give every weight of a hypernetwork the value of the goldens' recipe; evaluation mode."""
    for key, value in module.state_dict().items():
        scale = 0.5 if "embed" in key else 0.1 if value.ndim == 1 else 1 / math.sqrt(math.prod(value.shape[1:]))
        is_norm = key.endswith(("ln.weight", "ln1.weight", "ln2.weight"))
        value.copy_(fill(key, tuple(value.shape), scale) + float(is_norm))
    return module.eval()


def torchvision_model(arch: str, num_classes: int = 1000, **options: object) -> nn.Module:
    """A model of a golden, in training mode, with values of its own."""
    if arch in ("googlenet", "inception_v3"):
        options["init_weights"] = False
    return getattr(torchvision.models, arch)(num_classes=num_classes, **options)


def marked_model(arch: str, mark: float, num_classes: int = 1000, **options: object) -> nn.Module:
    """The same with one number in all parameters, made without the time that an initialisation takes."""
    try:
        with torch.device("meta"):
            model = torchvision_model(arch, num_classes, **options)
    except (NotImplementedError, RuntimeError):  # it looks at values
        model = torchvision_model(arch, num_classes, **options)
    model = model.to_empty(device="cpu")
    for value in [*model.parameters(), *model.buffers()]:
        value.data.fill_(mark)
    return model


def stored_architecture(goldens: Path, split: str, index: int, **changes: object) -> Architecture:
    """A network of the sample files of DeepNets-1M."""
    file = split if split in ("train", "search") else "eval"
    record = json.loads((goldens / f"deepnets_sample/deepnets1m_{file}_meta.json").read_text())[split]["nets"][index]
    known = {field.name: record[field.name] for field in dataclasses.fields(Architecture) if field.name in record}
    return Architecture(**{**known, "genotype": Genotype.from_json(record["genotype"]), **changes})
