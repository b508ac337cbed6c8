"""Graph hypernetworks: predict all parameters of a PyTorch model in one forward pass.

The names below are loaded when first used (PEP 562), so that importing the package, and every ``--help``, costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees
    from ghn.adjust import adjust_net as adjust_net
    from ghn.adjust import capacity as capacity
    from ghn.adjust import num_valid_nodes as num_valid_nodes
    from ghn.checking import CheckReport as CheckReport
    from ghn.checking import check as check
    from ghn.deepnets.genotypes import Genotype as Genotype
    from ghn.deepnets.network import Network as Network
    from ghn.graph import Graph as Graph
    from ghn.graph import GraphBatch as GraphBatch
    from ghn.models import resolve_model as resolve_model

_MODULE_OF = {
    "CheckReport": "checking",
    "Genotype": "deepnets.genotypes",
    "Graph": "graph",
    "GraphBatch": "graph",
    "Network": "deepnets.network",
    "adjust_net": "adjust",
    "capacity": "adjust",
    "check": "checking",
    "num_valid_nodes": "adjust",
    "resolve_model": "models",
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
