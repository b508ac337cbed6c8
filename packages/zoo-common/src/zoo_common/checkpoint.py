"""Weights in one file, and training states that resume exactly. No pickle: reading a file runs no code."""

import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from zoo_common.files import TensorFile, write_tensors

_WEIGHTS = "weightspace-checkpoint"
_TRAINING = "weightspace-training"


@dataclass(frozen=True)
class Checkpoint:
    """Weights of one network and what was noted with them."""

    state: dict[str, Tensor]
    """Name to tensor, in the order saved."""
    metadata: dict[str, Any]


def save_checkpoint(
    path: str | Path, state: Mapping[str, Tensor], metadata: Mapping[str, object] | None = None
) -> None:
    """Write a state dict and JSON metadata to a safetensors file, atomically, with the SHA-256 of every tensor."""
    write_tensors(path, _WEIGHTS, state, {"metadata": dict(metadata or {})})


def load_checkpoint(path: str | Path, device: str | torch.device = "cpu") -> Checkpoint:
    """Read a file of :func:`save_checkpoint` and check its sums.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged or something else.
    """
    file = TensorFile(path, _WEIGHTS)
    return Checkpoint(file.load(device), file.metadata["metadata"])


def save_training(
    path: str | Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    schedulers: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
    progress: Mapping[str, Any] | None = None,
) -> None:
    """Write everything that a training loop needs to go on exactly where it is, atomically.

    Args:
        path: File to create or replace.
        modules: Models, their moving averages, ...
        optimizers: Optimizers by name.
        schedulers: Anything with ``state_dict`` and ``load_state_dict``: schedulers, gradient scalers, samplers.
        generators: Random generators of the loop; the global ones (torch, CUDA, NumPy, Python) are always stored.
        progress: The loop's own variables (step, data position, best metric ...): scalars, strings, tensors, arrays
            and nested lists, tuples and dicts of these.

    Raises:
        TypeError: Something has a type that cannot be stored; the message says where.
    """
    stateful = {"modules": modules, "optimizers": optimizers or {}, "schedulers": schedulers or {}}
    tree = {kind: {name: item.state_dict() for name, item in items.items()} for kind, items in stateful.items()}
    tree["generators"] = {name: generator.get_state() for name, generator in (generators or {}).items()}
    tree |= {"random": _random_state(), "progress": dict(progress or {})}
    tensors: dict[str, Tensor] = {}
    document = {kind: _encode(branch, kind, tensors) for kind, branch in tree.items()}
    write_tensors(path, _TRAINING, tensors, {"tree": document})


def load_training(
    path: str | Path,
    *,
    modules: Mapping[str, nn.Module],
    optimizers: Mapping[str, Optimizer] | None = None,
    schedulers: Mapping[str, Any] | None = None,
    generators: Mapping[str, torch.Generator] | None = None,
) -> dict[str, Any]:
    """Restore, in place, everything that :func:`save_training` wrote, the global random generators included.

    Returns:
        The ``progress`` that was saved.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or holds other objects, names, shapes or dtypes; one message lists all
            differences, and nothing has been changed.
    """
    file = TensorFile(path, _TRAINING)
    tensors = file.load()
    tree = {kind: _decode(branch, tensors) for kind, branch in file.metadata["tree"].items()}
    wanted: dict[str, Mapping[str, Any]] = {
        "modules": modules,
        "optimizers": optimizers or {},
        "schedulers": schedulers or {},
        "generators": generators or {},
    }
    problems = [
        f"{kind}: the file holds {sorted(tree[kind])}, asked for {sorted(items)}"
        for kind, items in wanted.items()
        if set(tree[kind]) != set(items)
    ]
    for name in modules.keys() & tree["modules"].keys():
        problems += _differences(name, tree["modules"][name], modules[name].state_dict())
    for name in wanted["optimizers"].keys() & tree["optimizers"].keys():
        problems += _group_differences(name, tree["optimizers"][name], wanted["optimizers"][name])
    if problems:
        raise ValueError(f"{path} belongs to another training: {'; '.join(problems)}")
    for kind in ("modules", "optimizers", "schedulers"):
        for name, item in wanted[kind].items():
            item.load_state_dict(tree[kind][name])
    for name, generator in wanted["generators"].items():
        generator.set_state(tree["generators"][name])
    _set_random_state(tree["random"])
    return tree["progress"]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    numpy = np.random.get_state()  # noqa: NPY002 (user code may draw from the global generator)
    return {"torch": torch.get_rng_state(), "cuda": cuda, "numpy": numpy, "python": random.getstate()}


def _set_random_state(state: Mapping[str, Any]) -> None:
    torch.set_rng_state(state["torch"])
    if len(state["cuda"]) == torch.cuda.device_count():
        torch.cuda.set_rng_state_all(state["cuda"])
    np.random.set_state(state["numpy"])  # noqa: NPY002
    random.setstate(state["python"])


def _differences(module: str, saved: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """Missing, unexpected and mis-shaped entries of a state dict, one line each."""
    gaps = {"missing": [n for n in current if n not in saved], "unexpected": [n for n in saved if n not in current]}
    lines = [f"{module}: {kind} {', '.join(names)}" for kind, names in gaps.items() if names]
    for name in current.keys() & saved.keys():
        kinds = [(v.dtype, tuple(v.shape)) if isinstance(v, Tensor) else type(v) for v in (saved[name], current[name])]
        if kinds[0] != kinds[1]:
            lines.append(f"{module}: {name!r}: expected {kinds[1]}, got {kinds[0]}")
    return lines


def _group_differences(name: str, saved: Mapping[str, Any], optimizer: Optimizer) -> list[str]:
    counts = [len(group["params"]) for group in saved["param_groups"]]
    expected = [len(group["params"]) for group in optimizer.param_groups]
    return [f"optimizer {name}: expected groups of {expected} parameters, got {counts}"] if counts != expected else []


def _encode(value: object, where: str, tensors: dict[str, Tensor]) -> object:
    """JSON form of a nested value; its tensors go to ``tensors`` under the path where they stand."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, Tensor | np.ndarray):
        key = f"{where}#{len(tensors)}" if where in tensors else where
        tensors[key] = value if isinstance(value, Tensor) else torch.from_numpy(value.copy())
        return {"tensor" if isinstance(value, Tensor) else "array": key}
    if isinstance(value, np.generic):
        return {"scalar": _encode(np.asarray(value), where, tensors)}
    if isinstance(value, list | tuple):
        items = [_encode(item, f"{where}/{i}", tensors) for i, item in enumerate(value)]
        return {"tuple" if isinstance(value, tuple) else "list": items}
    if isinstance(value, Mapping):
        return {"dict": [[_encode(k, where, tensors), _encode(v, f"{where}/{k}", tensors)] for k, v in value.items()]}
    raise TypeError(f"cannot store {where}: {type(value).__name__} is no tensor, array, scalar, string, list or dict")


def _decode(document: Any, tensors: Mapping[str, Tensor]) -> Any:  # noqa: ANN401
    if not isinstance(document, dict):
        return document
    ((kind, value),) = document.items()
    match kind:
        case "tensor":
            return tensors[value]
        case "array":
            return tensors[value].numpy()
        case "scalar":
            return _decode(value, tensors)[()]
        case "tuple":
            return tuple(_decode(item, tensors) for item in value)
        case "list":
            return [_decode(item, tensors) for item in value]
        case _:
            return {_decode(key, tensors): _decode(item, tensors) for key, item in value}
