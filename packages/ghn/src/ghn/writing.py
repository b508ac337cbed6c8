"""Predicted weights written to disk as they are decoded, for targets that do not fit in memory."""

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
from torch import Tensor, nn
from tqdm import tqdm
from zoo_common.files import atomic_write, write_json

from ghn.graph import Graph
from ghn.matching import Target
from ghn.model import GHN
from ghn.tiling import tile_into

INDEX = "model.safetensors.index.json"
_CODES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16", torch.float64: "F64", torch.int64: "I64"}
_CODES |= {torch.bool: "BOOL", torch.uint8: "U8", torch.int32: "I32"}


@dataclass(frozen=True)
class Written:
    """What :func:`predict_to` wrote."""

    path: Path
    files: int
    parameters: int
    """Numbers that were predicted."""
    bytes: int
    kept: tuple[str, ...]
    """Parameters that are not predicted; they have their initial values."""


def predict_to(
    ghn: GHN,
    model: nn.Module,
    path: str | Path,
    *,
    graph: Graph | None = None,
    initial: Mapping[str, Tensor] | None = None,
    predict_class_layers: bool = True,
    shard_bytes: int = 2**31,
    generator: torch.Generator | None = None,
    progress: bool = False,
) -> Written:
    """Predict the weights of a model straight to safetensors files, part by part.

    The model is not changed and may be on the meta device, so that its weights exist on disk only. What is needed at a
    time is the hypernetwork, its embeddings, and a block of weights.

    Args:
        ghn: The hypernetwork.
        model: The target.
        path: A file ``*.safetensors`` to create or replace; or a folder, which gets one file per ``shard_bytes`` and
            an index, as the libraries of the model hub write and read them. The index comes last.
        graph: The model's graph, if there is one already.
        initial: Values of parameters and buffers that are not predicted, where the model is on the meta device and
            their layers do not tell (layers with ``reset_parameters`` do).
        predict_class_layers: Whether the last layer is predicted too.
        shard_bytes: Size of a file from which on the next tensor begins another; a larger tensor has one of its own.
        generator: Draws what is not decoded.
        progress: Show a bar on stderr.

    Raises:
        ValueError: The model does not fit the hypernetwork, or lacks values; nothing has been written.
        OSError: It cannot be written, or the disk is full; what is there before stays.
    """
    path = Path(path)
    check_output(path)
    is_file = path.suffix == ".safetensors"
    graphs = ghn.graphs_of([model], graph)
    targets, shapes = ghn.plan([model], graphs, predict_class_layers)
    tensors = dict(model.state_dict(keep_vars=True))
    planned = {id(target.slot.content): target for target in targets}
    rest = {name: tensor for name, tensor in tensors.items() if id(tensor) not in planned}
    values = _values(rest, model, initial or {})
    shards = [list(tensors)] if is_file else _shards(tensors, shard_bytes)
    weight_map: dict[str, str] = {}
    if not is_file:
        path.mkdir(parents=True, exist_ok=True)
    bar = tqdm(total=len(targets), unit="tensor", disable=not progress, leave=False)
    with torch.no_grad(), bar:
        x = ghn.embeddings(graphs, shapes)
        for i, names in enumerate(shards, start=1):
            file = path if is_file else path / f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            wanted = {id(tensors[name]): planned[id(tensors[name])] for name in names if name not in rest}
            blocks = (block for block in ghn.blocks(wanted.values(), x, generator) if bar.update() or True)
            _write(file, {name: tensors[name] for name in names}, values, blocks)
            weight_map |= dict.fromkeys(names, file.name)
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    if not is_file:
        write_json(path / INDEX, {"metadata": {"total_size": size}, "weight_map": weight_map})
    kept = [name for name, _ in model.named_parameters() if name in rest]
    return Written(path, len(shards), sum(math.prod(target.shape) for target in targets), size, tuple(kept))


def check_output(path: Path) -> None:
    """Refuse a path to which no weights can be written.

    Raises:
        ValueError: It has the suffix of another format.
        OSError: Its folder does not exist, or there is a file where a folder should be, or the reverse.
    """
    if not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"cannot write {path}: there is no folder {path.absolute().parent}; create it first")
    remedy = "give a file *.safetensors, which is replaced if it exists, or a folder"
    if path.suffix == ".safetensors" and path.is_dir():
        raise IsADirectoryError(f"cannot write {path}, which is a folder: {remedy} without this suffix")
    if path.suffix != ".safetensors" and path.exists() and not path.is_dir():
        raise FileExistsError(f"cannot write to {path}, which exists and is no folder: {remedy}")
    if path.suffix[1:].isalpha() and path.suffix != ".safetensors" and not path.is_dir():
        raise ValueError(f"cannot write {path}: {remedy}")


def _write(
    file: Path, tensors: Mapping[str, Tensor], values: Mapping[str, Tensor], blocks: Iterable[tuple[Target, Tensor]]
) -> None:
    """Write one file: some tensors as they are, the others by repeating blocks; tied ones once for each name."""
    with atomic_write(file) as temporary, open(temporary, "wb") as out:
        starts = _write_header(out, tensors)
        names = defaultdict(list)
        for name, tensor in tensors.items():
            names[id(tensor)].append(name)
            if name in values:
                out.seek(starts[name])
                out.write(_bytes(values[name]))
        for target, block in blocks:
            for name in names[id(target.slot.content)]:
                out.seek(starts[name])
                _write_tiled(out, block.to(tensors[name].dtype), target)


def _shards(tensors: Mapping[str, Tensor], most: int) -> list[list[str]]:
    shards: list[list[str]] = []
    size = most
    for name, tensor in tensors.items():
        if size >= most:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += tensor.numel() * tensor.element_size()
    return shards


def _values(tensors: Mapping[str, Tensor], model: nn.Module, initial: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Values of what is not predicted: given, those of the model, or those that its layers begin with."""
    found, missing = {}, defaultdict(list)
    for name, tensor in tensors.items():
        if name in initial:
            if initial[name].shape != tensor.shape:
                raise ValueError(f"initial[{name!r}]: expected {tuple(tensor.shape)}, got {tuple(initial[name].shape)}")
            found[name] = initial[name].detach().to(tensor.dtype)
        elif tensor.is_meta:
            missing[name.rpartition(".")[0]].append(name)
        else:
            found[name] = tensor.detach()
    unknown = []
    for prefix, names in missing.items():
        module = model.get_submodule(prefix)
        if not hasattr(module, "reset_parameters"):
            unknown += names
            continue
        whole = deepcopy(module).to_empty(device="cpu", recurse=False)
        cast(Any, whole).reset_parameters()
        state = whole.state_dict()
        found |= {name: state[name.removeprefix(f"{prefix}.")] for name in names}
    if unknown:
        raise ValueError(
            f"{', '.join(unknown[:5])}{', ...' if len(unknown) > 5 else ''} are not predicted and have no values on the "
            "meta device: pass initial={name: tensor} for them, or build the model on the CPU"
        )
    return found


def _write_header(out: IO[bytes], tensors: Mapping[str, Tensor]) -> dict[str, int]:
    """Write the header of a safetensors file, make room for its tensors, and tell where each begins."""
    header, starts, end = {}, {}, 0
    for name, tensor in tensors.items():
        starts[name], size = end, tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **header}).encode()
    text += b" " * (-len(text) % 8)
    out.write(len(text).to_bytes(8, "little") + text)
    begin = out.tell()
    out.truncate(begin + end)
    return {name: begin + start for name, start in starts.items()}


def _write_tiled(out: IO[bytes], block: Tensor, target: Target) -> None:
    """Write a tensor that repeats a block: a few rows of it at a time."""
    rows, total = block.shape[0], target.shape[0]
    whole = torch.empty(min(rows, total), *target.shape[1:], dtype=block.dtype)
    tile_into(whole, block.cpu())
    content = _bytes(whole)
    for _ in range(total // rows):
        out.write(content)
    out.write(content[: len(content) // rows * (total % rows)])


def _bytes(tensor: Tensor) -> memoryview:
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data
