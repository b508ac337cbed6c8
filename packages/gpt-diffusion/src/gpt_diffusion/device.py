"""Choosing where to compute."""

import torch


def choose_device(name: str) -> torch.device:
    """``auto`` takes the first GPU if there is one, else the CPU.

    Raises:
        ValueError: A GPU is asked for and there is none.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if name.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: no CUDA device is available here; use --device cpu")
    return torch.device(name)
