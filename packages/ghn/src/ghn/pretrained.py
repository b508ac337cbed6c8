"""Hypernetworks in files: the published ones, those of a hub, and our own."""

import math
import tempfile
import urllib.error
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from zoo_common.checkpoint import load_checkpoint, save_checkpoint
from zoo_common.hub import fetch_file, push_file
from zoo_common.untrusted import load_untrusted

from ghn.model import GHN, build

REPOSITORY = "SamsungSAILMontreal/ghn3"
HUB_FILES = ("ghn3xlm16.pt", "ghn3lm8.pt", "ghn3sm8.pt", "ghn3tm8.pt", "ghn2.pt")
ADDRESS = "https://github.com/facebookresearch/ppuda/raw/main/checkpoints"
PPUDA_FILES = ("ghn2_cifar10.pt", "ghn2_imagenet.pt", "ghn1_cifar10.pt", "ghn1_imagenet.pt", "mlp_cifar10.pt")
FILE = "ghn.safetensors"
"""Name of our own files, in folders and on the hub."""

BUNDLED = {"digits": Path(__file__).parent / "weights" / "digits.safetensors"}
"""Files that come with the package."""

_TABLES = ("centrality_embed_in", "centrality_embed_out", "input_dist_embed")


def from_pretrained(
    name: str | Path = "ghn3xlm16.pt",
    *,
    revision: str | None = None,
    offline: bool = False,
    **overrides: Any,  # noqa: ANN401
) -> GHN:
    """Load a hypernetwork; nothing in a file is executed.

    Args:
        name: A file here (ours, or any ``.pt`` or joblib file of the published kinds); a folder of
            :func:`save_pretrained`; a published name (``ghn3tm8.pt``, ``ghn2_cifar10.pt``, ``other/...``); or a
            repository ``owner/name`` or ``owner/name@revision`` with a file of ours. What is here comes first, and
            before it ``digits``: a small hypernetwork in this package, trained on small networks and digits.
        revision: Branch, tag or commit of the hub; default: ``main``.
        offline: Use what has been downloaded before.
        overrides: Constructor arguments that differ from those in the file, or that it does not tell.

    Returns:
        The hypernetwork, on the CPU, in evaluation mode.

    Raises:
        FileNotFoundError: There is no such file, nor published name, or it is not in the cache and cannot be fetched.
        ValueError: The file is damaged, holds something else, does not fit ``overrides``, or has weights that are not
            finite.
        OSError: The hub cannot be reached, or refuses.
    """
    path = _find(str(name), revision, offline)
    if path.suffix == ".safetensors":
        checkpoint = load_checkpoint(path)
        state, config = checkpoint.state, checkpoint.metadata.get("ghn")
        if not isinstance(config, dict):
            raise ValueError(f"{path} holds no hypernetwork: its metadata has no entry 'ghn'")
        return _built(path, state, {**config, **overrides})
    content = load_untrusted(path)
    config = content.get("config") if isinstance(content, Mapping) else None
    found = content.get("state_dict", content) if isinstance(content, Mapping) else None
    if not isinstance(found, Mapping) or not all(isinstance(value, Tensor) for value in found.values()):
        raise ValueError(f"{path} holds no state dict of a hypernetwork: choose another file")
    state = _current_names(found)
    given = vars(config) if hasattr(config, "__dict__") else config or {}
    return _built(path, state, {**infer_config(path, state, bare=config is None), **_known(given), **overrides})


def GHN1(dataset: Literal["imagenet", "cifar10"] = "imagenet", **options: Any) -> GHN:  # noqa: ANN401
    """The published GHN-1 for a data set; options and errors of :func:`from_pretrained`."""
    return from_pretrained(f"ghn1_{_dataset(dataset)}.pt", **options)


def GHN2(dataset: Literal["imagenet", "cifar10"] = "imagenet", **options: Any) -> GHN:  # noqa: ANN401
    """The published GHN-2 for a data set; options and errors of :func:`from_pretrained`."""
    return from_pretrained(f"ghn2_{_dataset(dataset)}.pt", **options)


def save_pretrained(ghn: GHN, folder: str | Path) -> Path:
    """Write a hypernetwork with its configuration into a folder, made if there is none; returns the file."""
    path = Path(folder) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    save_checkpoint(path, ghn.state_dict(), {"ghn": ghn.config})
    return path


def push(ghn: GHN, repo: str, *, revision: str | None = None, private: bool = False) -> str:
    """Upload a hypernetwork to ``owner/name``; arguments, result and errors of :func:`zoo_common.hub.push_file`."""
    with tempfile.TemporaryDirectory() as folder:
        return push_file(save_pretrained(ghn, folder), repo, FILE, revision=revision, private=private)


def infer_config(path: Path, state: Mapping[str, Tensor], bare: bool = True) -> dict[str, Any]:
    """Constructor arguments of :class:`ghn.model.GHN` from the names and shapes of a state dict.

    Args:
        path: Where it comes from, for errors.
        state: Weights, with current names.
        bare: Whether the file tells nothing else; then it is of the GHN-3 code.

    Raises:
        ValueError: A tensor is missing that every hypernetwork has.
    """
    needed = ("embed.weight", "bias_class.1.weight", "decoder_1d.fc.0.weight")
    missing = [name for name in needed if name not in state]
    last = state.get("decoder.conv.2.weight", state.get("decoder.mlp.fc.2.weight"))
    if missing or last is None:
        raise ValueError(f"{path} is no hypernetwork: it lacks {', '.join(missing) or 'decoder.conv.2.weight'}")
    hid = state["embed.weight"].shape[1]
    num_classes, width = state["bias_class.1.weight"].shape
    is_mlp = "decoder.mlp.fc.2.weight" in state
    if is_mlp:
        pixels = len(last) // width**2
    else:
        pixels = len(state["decoder.fc.0.weight"]) // (4 * hid)
    rank = 0 if is_mlp or len(last) == width**2 else len(last) // (2 * width)
    layers = sum(name.endswith("ln1.weight") and "gnn." in name for name in state)
    heads = state.get("gnn.0.attn.proj_e.2.weight")
    kinds = {"gnn.gru.weight_ih": "gatedgnn", "gnn.fc.0.weight": "mlp"}
    return {
        "max_shape": [width, width, math.isqrt(pixels), math.isqrt(pixels)],
        "num_classes": num_classes,
        "hypernet": next((kind for name, kind in kinds.items() if name in state), "graphormer"),
        "decoder": "mlp" if is_mlp else "conv",
        "weight_norm": True,
        "ve": "gnn.gru.weight_ih" not in state or "gnn.mlp_ve.fc.0.weight" in state,
        "layernorm": "ln.weight" in state,
        "hid": hid,
        "heads": 8 if heads is None else len(heads),
        "layers": layers or 3,
        "dialect": "ghn3" if bare or layers or (last.ndim == 2 and not is_mlp) else "ppuda",
        "rank": rank,
    }


def _find(name: str, revision: str | None, offline: bool) -> Path:
    if name in BUNDLED:
        return BUNDLED[name]
    path = Path(name)
    if path.is_dir():
        if not (path / FILE).is_file():
            raise FileNotFoundError(f"{path} is a folder without {FILE}: give a file, or a folder of save_pretrained")
        return path / FILE
    if path.is_file():
        return path
    file = name if name.endswith(".pt") else f"{name}.pt"
    if file in HUB_FILES or file.startswith("other/"):
        return fetch_file(f"{REPOSITORY}@{revision or 'main'}", file, offline=offline)
    if file in PPUDA_FILES:
        return _download(file, offline)
    if "/" in name and path.suffix not in (".pt", ".safetensors"):
        return fetch_file(name, FILE, revision=revision, offline=offline)
    known = ", ".join((*BUNDLED, *HUB_FILES, *PPUDA_FILES))
    raise FileNotFoundError(f"there is no file {name}, and no published hypernetwork of this name; there are {known}")


def _download(file: str, offline: bool) -> Path:
    """A file that was published beside source code, from the cache of ``torch.hub`` or fetched to it."""
    path = Path(torch.hub.get_dir()) / "checkpoints" / file
    if path.exists():
        return path
    address = f"{ADDRESS}/{file}"
    if offline:
        raise FileNotFoundError(f"{path} is not there: repeat this with a connection, or copy {address} to it")
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        torch.hub.download_url_to_file(address, str(path), progress=False)  # to a temporary file, then renamed
    except (urllib.error.URLError, ConnectionError, TimeoutError) as error:
        raise ConnectionError(f"{address} cannot be fetched ({error}): copy it to {path}, or give the file") from error
    return path


def _dataset(name: str) -> str:
    if name not in ("imagenet", "cifar10"):
        raise ValueError(f"there are hypernetworks for imagenet and cifar10, not for {name!r}")
    return name


def _current_names(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names without the prefix of data-parallel training, and with the tables of a graph in the first layer."""
    parallel = all(name.startswith("module.") for name in state)
    names = [name.removeprefix("module.") if parallel else name for name in state]
    names = [f"gnn.0.{name}" if name.startswith(_TABLES) else name for name in names]
    return dict(zip(names, state.values(), strict=True))


def _known(config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a published configuration that decide on the network."""
    allowed = ("max_shape", "num_classes", "hypernet", "decoder", "weight_norm", "ve", "layernorm", "hid")
    return {name: config[name] for name in (*allowed, "heads", "layers") if name in config}


def _built(path: Path, state: Mapping[str, Tensor], config: Mapping[str, Any]) -> GHN:
    """A hypernetwork with given weights."""
    try:
        with torch.device("meta"):
            ghn = build(config)
    except TypeError as error:
        raise ValueError(f"{path}: the configuration does not fit: {error}") from error
    wanted = ghn.state_dict()
    state = {  # the decoder of GHN-2 in the GHN-3 code is linear
        name: value.flatten(1) if name in wanted and value.ndim == 4 and wanted[name].ndim == 2 else value
        for name, value in state.items()
    }
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name}: expected {tuple(wanted[name].shape)}, got {tuple(value.shape)}"
        for name, value in state.items()
        if name in wanted and wanted[name].shape != value.shape
    ]
    if problems:
        raise ValueError(f"{path} does not fit its configuration: {'; '.join(_few(problems))}")
    bad = [name for name, value in state.items() if not value.isfinite().all()]
    if bad:
        raise ValueError(f"{path} has weights that are not finite: {', '.join(_few(bad))}; fetch it again")
    ghn.load_state_dict(state, assign=True)
    return ghn.requires_grad_().eval()


def _few(lines: Sequence[str]) -> list[str]:
    return [*lines[:5], f"and {len(lines) - 5} more"] if len(lines) > 5 else list(lines)
