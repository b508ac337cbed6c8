"""Graph hypernetworks: predict all parameters of a PyTorch model in one forward pass.

The names below are loaded when first used (PEP 562), so that importing the package, and every ``--help``, costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees
    from ghn.adjust import adjust_net as adjust_net
    from ghn.adjust import capacity as capacity
    from ghn.adjust import num_valid_nodes as num_valid_nodes
    from ghn.batchnorm import Accuracy as Accuracy
    from ghn.batchnorm import condition_bn as condition_bn
    from ghn.batchnorm import evaluate as evaluate
    from ghn.batchnorm import use_batch_statistics as use_batch_statistics
    from ghn.checking import CheckReport as CheckReport
    from ghn.checking import check as check
    from ghn.config import TrainConfig as TrainConfig
    from ghn.deepnets.genotypes import Genotype as Genotype
    from ghn.deepnets.network import Network as Network
    from ghn.deepnets.sampling import Architecture as Architecture
    from ghn.deepnets.sampling import sample as sample
    from ghn.evaluation import compare as compare
    from ghn.graph import Graph as Graph
    from ghn.graph import GraphBatch as GraphBatch
    from ghn.images import load_images as load_images
    from ghn.model import GHN as GHN
    from ghn.model import GHN3 as GHN3
    from ghn.models import resolve_model as resolve_model
    from ghn.pretrained import GHN1 as GHN1
    from ghn.pretrained import GHN2 as GHN2
    from ghn.pretrained import from_pretrained as from_pretrained
    from ghn.pretrained import push as push
    from ghn.pretrained import save_pretrained as save_pretrained
    from ghn.published import get_metadata as get_metadata
    from ghn.published import norm_check as norm_check
    from ghn.training import train as train
    from ghn.writing import predict_to as predict_to

_MODULE_OF = {
    "Accuracy": "batchnorm",
    "Architecture": "deepnets.sampling",
    "CheckReport": "checking",
    "GHN": "model",
    "GHN1": "pretrained",
    "GHN2": "pretrained",
    "GHN3": "model",
    "Genotype": "deepnets.genotypes",
    "Graph": "graph",
    "GraphBatch": "graph",
    "Network": "deepnets.network",
    "TrainConfig": "config",
    "adjust_net": "adjust",
    "capacity": "adjust",
    "check": "checking",
    "compare": "evaluation",
    "condition_bn": "batchnorm",
    "evaluate": "batchnorm",
    "from_pretrained": "pretrained",
    "get_metadata": "published",
    "load_images": "images",
    "norm_check": "published",
    "num_valid_nodes": "adjust",
    "predict_to": "writing",
    "push": "pretrained",
    "resolve_model": "models",
    "sample": "deepnets.sampling",
    "save_pretrained": "pretrained",
    "train": "training",
    "use_batch_statistics": "batchnorm",
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
