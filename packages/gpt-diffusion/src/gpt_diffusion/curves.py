"""Curves of an evaluation in the layout of the published figure files: lists ``x``, ``y`` and ``key`` (names) of lines.

A file is called ``dvo_<group>_<group>.pt`` (prompts against what was reached) or ``recursive_<group>_zero.pt`` (updates
against what was reached), with the groups ``training_set`` and ``test_set``, in a folder ``figure_files/<exp_name>``.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypedDict

import numpy as np
import torch
from zoo_common.files import atomic_write
from zoo_common.untrusted import load_untrusted

from gpt_diffusion.prompting import PromptCurves

Line = tuple[str, Sequence[float], Sequence[float]]
#: Name of the line that shows updates of an optimizer beside those of a prompt.
GRADIENT = "gradient-based"
#: Groups of starting networks, and the split of the zoo that each comes from.
GROUPS = {"training_set": "train", "test_set": "test"}
KINDS = ("dvo", "recursive")


class Curves(TypedDict):
    """Lines of one figure; all three lists are of one length."""

    x: list[list[float]]
    y: list[list[float]]
    key: list[str]


def curve_name(kind: str, group: str) -> str:
    """Name of a published figure file, without ``.pt``; ``kind`` is one of :data:`KINDS`."""
    return f"dvo_{group}_{group}" if kind == "dvo" else f"recursive_{group}_zero"


def dvo_curves(prompted: PromptCurves, group: str, optimum: float) -> Curves:
    """One-step prompting: a line for each network, the best metric of the runs, and the diagonal."""
    largest = prompted.desired.max().item()
    lines = _networks(group, prompted.desired.tolist(), prompted.observed[:, 1:].tolist())
    return _curves([("optimal", [0.0, largest], [optimum] * 2), *lines, ("identity", [0.0, largest], [0.0, largest])])


def recursive_curves(prompted: PromptCurves, group: str, optimum: float, gradient: Line | None = None) -> Curves:
    """Recursive prompting: a line for each network, the best metric of the runs, and an optimizer if there is one."""
    points = prompted.observed.shape[1]
    steps = [[float(step) for step in range(points)]] * len(prompted.observed)
    lines = _networks(group, steps, prompted.observed.tolist())
    return _curves([*lines, ("optimal", [0.0, float(points)], [optimum] * 2), *([gradient] if gradient else [])])


def write_curves(folder: Path, figures: Mapping[str, Curves]) -> list[Path]:
    """Write figure files by their names (without ``.pt``); the folder is created."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.pt" for name in figures]
    for path, curves in zip(paths, figures.values(), strict=True):
        with atomic_write(path) as temporary:
            torch.save(dict(curves), temporary)
    return paths


def read_curves(path: str | Path) -> Curves:
    """Read a figure file without running code in it.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is damaged, or holds something else.
    """
    content = load_untrusted(path)
    refused = f"{path} is no published figure file: expected lists x, y and key, with equally many numbers in x and y"
    try:
        x, y = ([_numbers(line) for line in content[name]] for name in ("x", "y"))
        keys = [str(key) for key in content["key"]]
    except (KeyError, TypeError, ValueError, IndexError):
        raise ValueError(refused) from None
    if not len(x) == len(y) == len(keys) or list(map(len, x)) != list(map(len, y)):
        raise ValueError(refused)
    if len({len(line) for line, key in zip(x, keys, strict=True) if key.startswith("dnn_")}) > 1:
        raise ValueError(f"{path}: the lines of the networks have different numbers of points")
    return Curves(x=x, y=y, key=keys)


def _numbers(line: Any) -> list[float]:  # noqa: ANN401 (a list, tensor or array from a file)
    values: list[float] = np.asarray(line, dtype=np.float64).tolist()
    if not isinstance(values, list):
        raise TypeError(f"expected a list of numbers, got {line!r}")
    return values


def _networks(group: str, x: list[list[float]], y: list[list[float]]) -> list[Line]:
    return [(f"dnn_{group}_{i}", *line) for i, line in enumerate(zip(x, y, strict=True))]


def _curves(lines: Sequence[Line]) -> Curves:
    return Curves(x=[[*x] for _, x, _ in lines], y=[[*y] for _, _, y in lines], key=[key for key, _, _ in lines])
