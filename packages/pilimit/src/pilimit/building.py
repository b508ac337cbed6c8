"""Nets of a configuration: at their start, or as a training left them."""

from pathlib import Path
from typing import Any

import torch
from zoo_common.checkpoint import load_checkpoint, load_training

from pilimit.checkpoint import load_net
from pilimit.config import TrainConfig
from pilimit.finite import FinMLP, gaussian_init_
from pilimit.infinite import InfMLP, PiMLP
from pilimit.optim import PiSGD, param_groups
from pilimit.run_folder import CONFIG, NET, STATE, read_config


def choose_device(config: TrainConfig) -> torch.device:
    """Where to compute.

    Raises:
        ValueError: A GPU is asked for and there is none.
    """
    if config.cuda and not torch.cuda.is_available():
        raise ValueError("--cuda: no CUDA device is available here; leave it out")
    return torch.device("cuda" if config.cuda else "cpu")


def build_net(config: TrainConfig, d_in: int, d_out: int, device: torch.device) -> PiMLP:
    """The net of a configuration at its start."""
    dtype_name = "float32" if config.single else config.dtype
    if dtype_name == "auto":
        dtype_name = "float16" if device.type == "cuda" else "float32"
    dtype = getattr(torch, dtype_name)
    generator = torch.Generator().manual_seed(config.seed)
    alphas = (config.first_layer_alpha, config.last_layer_alpha, config.bias_alpha, config.last_bias_alpha)
    if config.model_path is not None:
        limit = open_infinite(config.model_path).to(dtype)
        if (limit.d_in, limit.d_out) != (d_in, d_out):
            raise ValueError(
                f"{config.model_path} maps {limit.d_in} to {limit.d_out} values, the data {d_in} to {d_out}"
            )
        if limit.depth != config.depth:
            raise ValueError(
                f"{config.model_path} has depth {limit.depth}, not {config.depth}: give --depth {limit.depth}"
            )
    elif config.infinite:
        limit = InfMLP(
            d_in, d_out, config.r, config.depth - 1, *alphas, config.layernorm, dtype=dtype, generator=generator
        )
    if config.infinite:
        return limit.to(device)
    options: dict[str, Any] = {"project": not config.no_Gproj, "generator": generator}
    rank = config.r if config.model_path is None else limit.r
    if config.tie_omegas:
        omega = torch.randn(int(config.width or 0), rank, generator=generator)
        options["omegas"] = [omega] * (config.depth if config.model_path is None else limit.depth)
    if config.model_path is not None:
        return FinMLP.sample(limit, int(config.width or 0), **options).to(device)
    net = FinMLP(
        d_in, d_out, rank, int(config.width or 0), config.depth - 1, *alphas, config.layernorm, dtype=dtype, **options
    )
    if config.gaussian_init:
        gaussian_init_(net, generator)
    return net.to(device)


def open_net(path: Path, device: torch.device | str = "cpu", *, mapped: bool = False) -> PiMLP:
    """A net of a run's folder (finite or infinite), a folder of atoms, a published file, or a finite net of `sample`.

    Args:
        path: The content decides.
        device: Where the net goes.
        mapped: Leave the atoms of a folder in their files.
    """
    if path.suffix == ".safetensors" and path.is_file():
        return _open_sample(path).to(device)
    if not (path / CONFIG).is_file():
        return load_net(path, mapped=mapped).to(device)
    if (path / NET).is_dir():
        return load_net(path / NET, mapped=mapped).to(device)
    options, (d_in, d_out) = read_config(path)
    config = TrainConfig.from_json(options)
    net = build_net(config, d_in, d_out, torch.device(device))
    optimizer = PiSGD(param_groups(net), 0.0)
    load_training(path / STATE, modules={"net": net}, optimizers={"sgd": optimizer})
    return net


def _open_sample(path: Path) -> FinMLP:
    saved = load_checkpoint(path)
    options = {name: value for name, value in saved.metadata.items() if name != "seed"}
    if "width" not in options:
        raise ValueError(f"{path} holds no net of `pilimit sample`")
    net = FinMLP(**options | {"dtype": getattr(torch, options["dtype"])})
    net.load_state_dict(saved.state)
    return net


def open_infinite(path: Path) -> InfMLP:
    """The same, for what only an infinite net can do.

    Raises:
        ValueError: It is a finite one.
    """
    net = open_net(path)
    if not isinstance(net, InfMLP):
        raise ValueError(f"{path} holds a finite net: an infinite one is needed")
    return net
