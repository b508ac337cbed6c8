"""What was published about predicted torchvision models, to check loaded hypernetworks against."""

import json
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any

import torch
from torch import nn

_COLUMN = {"ghn3xlm16": "ghn3", "ghn3tm8": "ghn3-t", "ghn2": "ghn2"}
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class NormCheck:
    """Norm of all parameters of a predicted model against the published one."""

    arch: str
    norm: float
    published: float

    @property
    def passed(self) -> bool:
        """Whether they agree as the published check asks."""
        return abs(self.norm - self.published) < _TOLERANCE


@cache
def published_results() -> dict[str, dict[str, float]]:
    """The published table: for 74 torchvision models accuracies on ImageNet (percent) and norms of all parameters.

    ``ghn2``, ``ghn3-t`` and ``ghn3`` are the accuracies of predicted weights, ``*-paramnorm`` their norms, and
    ``*-sgd1ep``, ``*-sgd10ep`` the accuracies after training for one epoch or ten.
    """
    return json.loads(files("ghn").joinpath("published.json").read_text())


def get_metadata(ghn3_name: str = "ghn3xlm16.pt", arch: str | None = None, attr: str | None = None) -> Any:  # noqa: ANN401
    """Published numbers of one hypernetwork: of all models, of one, or one number.

    Args:
        ghn3_name: ``ghn3xlm16.pt``, ``ghn3tm8.pt`` or ``ghn2.pt``.
        arch: Name of a torchvision model.
        attr: ``accuracy`` (percent) or ``paramnorm``.

    Raises:
        KeyError: Nothing was published of it; the message names what was.
    """
    column = _COLUMN.get(ghn3_name.removesuffix(".pt"))
    if column is None:
        raise KeyError(f"no results of {ghn3_name!r} were published; there are those of {', '.join(_COLUMN)}")
    table = {
        name: {"accuracy": row[column], "paramnorm": row[f"{column}-paramnorm"]}
        for name, row in published_results().items()
    }
    if arch is None:
        return table
    if arch not in table:
        raise KeyError(f"no results for {arch!r} were published; there are {len(table)}: {', '.join(table)}")
    if attr is not None and attr not in table[arch]:
        raise KeyError(f"attr must be one of {', '.join(table[arch])}, got {attr!r}")
    return table[arch] if attr is None else table[arch][attr]


def norm_check(model: nn.Module, arch: str = "resnet50", ghn3_name: str = "ghn3xlm16.pt") -> NormCheck:
    """Compare the norm of all parameters of a torchvision model, predicted just now, with the published one.

    Raises:
        KeyError: Nothing was published of this model and hypernetwork.
    """
    published = get_metadata(ghn3_name, arch, "paramnorm")
    norm = torch.stack([parameter.detach().double().norm() for parameter in model.parameters()]).norm().item()
    return NormCheck(arch, norm, published)
