"""Files, layouts, tokens, symmetries and tasks for learning in weight space.

The names below are loaded when first used (PEP 562), so that importing the package, and every ``--help``, costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees
    from zoo_common.checkpoint import Checkpoint as Checkpoint
    from zoo_common.checkpoint import load_checkpoint as load_checkpoint
    from zoo_common.checkpoint import load_training as load_training
    from zoo_common.checkpoint import save_checkpoint as save_checkpoint
    from zoo_common.checkpoint import save_training as save_training
    from zoo_common.datasets import load_dataset as load_dataset
    from zoo_common.files import atomic_write as atomic_write
    from zoo_common.formats import open_source as open_source
    from zoo_common.formats.convert import convert as convert
    from zoo_common.hub import fetch_file as fetch_file
    from zoo_common.hub import pull_zoo as pull_zoo
    from zoo_common.hub import push_file as push_file
    from zoo_common.hub import push_zoo as push_zoo
    from zoo_common.layout import ParameterLayout as ParameterLayout
    from zoo_common.layout import TensorSpec as TensorSpec
    from zoo_common.population import Population as Population
    from zoo_common.recorder import ZooRecorder as ZooRecorder
    from zoo_common.symmetry import Symmetry as Symmetry
    from zoo_common.tasks import Task as Task
    from zoo_common.tasks import get_task as get_task
    from zoo_common.tasks import register_task as register_task
    from zoo_common.tasks import task_names as task_names
    from zoo_common.tokens import ChannelTokenizer as ChannelTokenizer
    from zoo_common.tokens import LayerTokenizer as LayerTokenizer
    from zoo_common.untrusted import load_untrusted as load_untrusted
    from zoo_common.windows import HaloWindows as HaloWindows
    from zoo_common.zoo import Pairs as Pairs
    from zoo_common.zoo import Run as Run
    from zoo_common.zoo import RunInfo as RunInfo
    from zoo_common.zoo import Zoo as Zoo

_MODULE_OF = {
    "ChannelTokenizer": "tokens",
    "Checkpoint": "checkpoint",
    "HaloWindows": "windows",
    "LayerTokenizer": "tokens",
    "Pairs": "zoo",
    "ParameterLayout": "layout",
    "Population": "population",
    "Run": "zoo",
    "RunInfo": "zoo",
    "Symmetry": "symmetry",
    "Task": "tasks",
    "TensorSpec": "layout",
    "Zoo": "zoo",
    "ZooRecorder": "recorder",
    "atomic_write": "files",
    "convert": "formats.convert",
    "fetch_file": "hub",
    "get_task": "tasks",
    "load_checkpoint": "checkpoint",
    "load_dataset": "datasets",
    "load_training": "checkpoint",
    "load_untrusted": "untrusted",
    "open_source": "formats",
    "pull_zoo": "hub",
    "push_file": "hub",
    "push_zoo": "hub",
    "save_checkpoint": "checkpoint",
    "save_training": "checkpoint",
    "register_task": "tasks",
    "task_names": "tasks",
}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 (computed from the table above)


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
