"""Nets in folders that grow by what is new, and published files.

A folder holds ``net.safetensors`` (what is not atoms, the configuration, the state of the optimizer, and which files
hold which rows) and files of atoms, whose names are never used twice. Rows of atoms never change, so a save writes the
new ones and replaces ``net.safetensors`` atomically; a killed save leaves the state before readable.
"""

import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer
from zoo_common.files import TensorFile, leftover_files, write_tensors
from zoo_common.untrusted import load_untrusted

from pilimit.atoms import Atoms, Segment
from pilimit.infinite import NET_ALPHAS, InfMLP, count_layers

FILE = "net.safetensors"
_NET, _ATOMS = "pilimit-net", "pilimit-atoms"
_VERSION = 1
_SMALL = 1024
"""A last file with fewer atoms is written again with the new ones, so that frequent saves do not make many files."""
_ALWAYS = ("A", "B", "Amult")


def save_net(
    folder: str | Path,
    net: InfMLP,
    *,
    optimizer: Optimizer | None = None,
    metadata: Mapping[str, Any] | None = None,
) -> None:
    """Write a net to a folder; rows of atoms that are there already are not written again.

    Staged rows of a backward pass without a step are not saved.

    Args:
        folder: Made if it does not exist; what another net left in it is removed after the new state is complete.
        net: The net.
        optimizer: Its state is saved too.
        metadata: Anything that JSON can hold.

    Raises:
        OSError: It cannot be written, or the disk is full; the state before is still there.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors: dict[str, Tensor] = {
        name: p.detach() for name, p in net.named_parameters() if not name.endswith(".weight")
    }
    table: dict[str, Any] = {}
    for i, layer in enumerate(net.layers):
        if i:
            atoms: Atoms = layer.atoms  # type: ignore[assignment]
            _write_new_rows(folder, atoms)
            table[str(i)] = {"segments": [vars(segment) for segment in atoms.segments], "scale": atoms.scale}
            if atoms.rewritten:
                tensors[f"layers.{i}.Amult"] = _rows(atoms, 0, len(atoms))[2]
    optimizer_state = None if optimizer is None else _pack(optimizer, tensors)
    entries = {
        "version": _VERSION, "config": net.config, "atoms": table, "optimizer": optimizer_state,
        "metadata": dict(metadata or {}),
    }  # fmt: skip
    write_tensors(folder / FILE, _NET, tensors, entries)
    _remove_others(folder, {segment["name"] for row in table.values() for segment in row["segments"]})


def _write_new_rows(folder: Path, atoms: Atoms) -> None:
    """Bring the list of files up to date with the rows."""
    kept = atoms.segments
    if not all((folder / segment.name).is_file() for segment in kept):
        kept = []
    start = sum(segment.rows for segment in kept)
    if kept and kept[-1].rows < _SMALL and start < len(atoms):
        start -= kept[-1].rows
        kept = kept[:-1]
    if not kept:
        atoms.rewritten = False
    if start == len(atoms):
        atoms.segments = [*kept]
        return
    name = f"atoms-{uuid.uuid4().hex}.safetensors"
    rows = _rows(atoms, start, len(atoms))
    write_tensors(folder / name, _ATOMS, dict(zip(_ALWAYS, rows, strict=True)), {})
    atoms.segments = [*kept, Segment(name, TensorFile(folder / name, _ATOMS).digest, len(atoms) - start)]


def _rows(atoms: Atoms, start: int, stop: int) -> tuple[Tensor, Tensor, Tensor]:
    """Copies of some rows of A, B and Amult, without ``scale``."""
    parts, first = [], 0
    for block in atoms.blocks:
        rows = slice(max(start - first, 0), min(stop - first, block.size))
        parts.append((block.A[rows], block.B[rows], block.Amult[rows]))
        first += block.size
    parts = [part for part in parts if len(part[0])]
    return tuple(torch.cat(tensors).cpu() for tensors in zip(*parts, strict=True))  # type: ignore[return-value]


def _remove_others(folder: Path, names: set[str]) -> None:
    for path in [*folder.glob("atoms-*.safetensors"), *leftover_files(folder)]:
        if path.name not in names:
            path.unlink(missing_ok=True)


def _pack(optimizer: Optimizer, tensors: dict[str, Tensor]) -> dict[str, Any]:
    """JSON of an optimizer's state; its tensors go to ``tensors``."""
    state = optimizer.state_dict()
    scalars: dict[str, dict[str, Any]] = {}
    for number, values in state["state"].items():
        for name, value in values.items():
            if isinstance(value, Tensor):
                tensors[f"optimizer.{number}.{name}"] = value
            else:
                scalars.setdefault(str(number), {})[name] = value
    return {"groups": state["param_groups"], "scalars": scalars}


def _unpack(optimizer: Optimizer, packed: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {int(number): dict(values) for number, values in packed["scalars"].items()}
    for key, value in tensors.items():
        if key.startswith("optimizer."):
            _, number, name = key.split(".")
            state.setdefault(int(number), {})[name] = value
    optimizer.load_state_dict({"state": state, "param_groups": packed["groups"]})


def load_net(path: str | Path, *, mapped: bool = False, device: str | torch.device = "cpu") -> InfMLP:
    """Read a net from a folder of :func:`save_net`, or from a published file, of which nothing is executed.

    Args:
        path: Folder; or a state dict of the published library, a network object of the published original code, or
            what its convert script makes of one. The content decides.
        mapped: Leave the rows of atoms in the files of the folder, whatever their size: they are read when they are
            used, and their sums are not checked (headers and lengths are). Training goes on the same up to rounding,
            without it bit by bit.
        device: Where the net goes, unless it is mapped.

    Raises:
        FileNotFoundError: There is no such folder or file.
        ValueError: It is truncated, damaged, or no net.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"there is no folder or file {path}: give a run, a folder of atoms or a published file")
    if path.is_dir() and not (path / FILE).is_file():
        raise FileNotFoundError(f"{path} is no folder of a run or of atoms: it has no {FILE}")
    if not path.is_dir():
        return _load_published(path).to(device)
    file = TensorFile(path / FILE, _NET)
    config = dict(file.metadata["config"])
    net = InfMLP(**config | {"dtype": getattr(torch, config["dtype"])}, readout_zero_init=True)
    dense = {name: file.tensor(name) for name in file.table} if mapped else file.load()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if not name.endswith(".weight"):
                p.copy_(dense[name])
    for number, row in file.metadata["atoms"].items():
        atoms: Atoms = net.layers[int(number)].atoms  # type: ignore[assignment]
        atoms.clear()
        for stored in row["segments"]:
            segment = Segment(**stored)
            _read_rows(path, segment, atoms, mapped)
        amult = dense.get(f"layers.{number}.Amult")
        atoms.scale, atoms.rewritten = row["scale"], amult is not None
        if amult is not None:
            for block, values in zip(atoms.blocks, amult.split([block.size for block in atoms.blocks]), strict=True):
                block.Amult[: block.size] = values
    return net if mapped else net.to(device)


def _read_rows(folder: Path, segment: Segment, atoms: Atoms, mapped: bool) -> None:
    file = TensorFile(folder / segment.name, _ATOMS)
    if file.digest != segment.digest:
        raise ValueError(f"{file.path} does not belong to {folder / FILE}: restore the folder from another copy")
    a, b, amult = (file.tensor(name) for name in _ALWAYS)
    if mapped:
        atoms.adopt(a, b, amult.clone())
    else:
        file.check()
        atoms.append(a, b, amult)
    atoms.segments.append(segment)


def load_optimizer(folder: str | Path, optimizer: Optimizer) -> None:
    """Give an optimizer (of the net that was loaded from the same folder) its saved state.

    Raises:
        FileNotFoundError: There is no such folder.
        ValueError: It is damaged, was saved without an optimizer, or with other groups of parameters.
    """
    file = TensorFile(Path(folder) / FILE, _NET)
    if (packed := file.metadata["optimizer"]) is None:
        raise ValueError(f"{folder} was saved without an optimizer: give one to save_net")
    _unpack(optimizer, packed, file.load())


def load_metadata(folder: str | Path) -> dict[str, Any]:
    """The ``metadata`` of :func:`save_net`."""
    return TensorFile(Path(folder) / FILE, _NET).metadata["metadata"]


def _load_published(path: Path) -> InfMLP:
    content = load_untrusted(path, stubs=("*.InfPiMLP", "*.DynArr", "*.CycArr"))
    if getattr(content, "state", None) is not None:
        content = content.state
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} holds a {type(content).__name__}, no net of the published library or original code")
    try:
        if "As" in content:
            state, layernorm = from_converted_original(content), bool(content.get("layernorm", False))
        else:
            state, layernorm = dict(content), False
        return _build(state, layernorm)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise ValueError(f"{path} holds no net of the published library or original code ({error!r})") from None


def from_converted_original(content: Mapping[str, Any]) -> dict[str, Tensor]:
    """The state dict of the attributes of the original code's net, with its own growing arrays or cut to their rows.

    Index l of the original is ``layers.(l - 1)`` here; ``last_bias_alpha`` belongs to the last layer alone.
    """
    if not content["As"]:
        raise KeyError("As")
    last = max(content["As"])
    bias_alpha = float(content["bias_alpha"])
    last_bias_alpha = content.get("last_bias_alpha")
    alphas = {
        "first_layer_alpha": content["first_layer_alpha"], "last_layer_alpha": content["last_layer_alpha"],
        "bias_alpha": bias_alpha, "last_bias_alpha": bias_alpha if last_bias_alpha is None else last_bias_alpha,
    }  # fmt: skip
    state = {name: torch.tensor(float(value), dtype=torch.float64) for name, value in alphas.items()}
    for number in sorted(content["As"]):
        prefix = f"layers.{number - 1}."
        state[prefix + "A"] = _valid(content["As"][number])
        if number > 1:
            state[prefix + "Amult"] = _valid(content["Amult"][number])
            state[prefix + "B"] = _valid(content["Bs"][number])
        alpha = state["last_bias_alpha" if number == last else "bias_alpha"]
        bias = (content.get("biases") or {}).get(number)
        if alpha and bias is not None:
            state[prefix + "bias"] = _valid(bias)
        state[prefix + "bias_alpha"] = alpha
    return state


def _valid(array: Any) -> Tensor:  # noqa: ANN401
    """A tensor, or the valid rows of a growing array."""
    if isinstance(array, Tensor):
        return array
    return array.state["arr"][: array.state["size"]]


def _build(state: dict[str, Any], layernorm: bool) -> InfMLP:
    """The net that a state dict belongs to: its sizes are those of the tensors."""
    count = count_layers(state)
    if count < 2:
        raise KeyError("layers.1.A")
    first, last = state["layers.0.A"], state[f"layers.{count - 1}.A"]
    alphas: dict[str, Any] = {name: float(state.get(name, 1.0)) for name in NET_ALPHAS[:3]}
    alphas["last_bias_alpha"] = float(state.get("last_bias_alpha", alphas["bias_alpha"]))
    net = InfMLP(
        first.shape[0], last.shape[1], first.shape[1], count - 2, **alphas, layernorm=layernorm, dtype=last.dtype,
        readout_zero_init=True,
    )  # fmt: skip
    net.load_state_dict(state)
    return net
