"""Files, layouts, tokens, symmetries and tasks for learning in weight space.

The names below are loaded when first used, so that importing the package costs no torch.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "Checkpoint": "checkpoint",
    "load_checkpoint": "checkpoint",
    "load_training": "checkpoint",
    "save_checkpoint": "checkpoint",
    "save_training": "checkpoint",
    "atomic_write": "files",
    "ParameterLayout": "layout",
    "TensorSpec": "layout",
    "ZooRecorder": "recorder",
    "Pairs": "zoo",
    "Run": "zoo",
    "RunInfo": "zoo",
    "Zoo": "zoo",
}

__all__ = sorted(_HOME)  # noqa: PLE0605 (computed from the table above)


def __getattr__(name: str) -> Any:  # noqa: ANN401
    """Load a public name from its module."""
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
