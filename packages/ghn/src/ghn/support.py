"""Which parameters and operations get a node, and of which type."""

from collections.abc import Callable

import torchvision
from torch import nn
from torchvision.models.convnext import LayerNorm2d

from ghn.draft import Record
from ghn.trace import Owner

#: Operations by the prefix of their autograd function.
OPERATIONS: dict[str, str] = {
    "Mean": "glob_avg",
    "AdaptiveAvgPool2D": "glob_avg",
    "MaxPool2DWithIndices": "max_pool",
    "AvgPool2D": "avg_pool",
    "Softmax": "msa",
    "Mul": "cse",
    "Add": "sum",
    "Cat": "concat",
}

Support = Callable[[Owner | Record], str | None]


def own_name(owner: Owner | Record) -> str:
    """The part of a parameter's name behind the last dot."""
    return owner.name.rpartition(".")[2]


def operation_of(record: Record) -> str:
    """The name of an operation without ``Backward`` and what follows."""
    return record.name.partition("Backward")[0]


def _is_called(module: nn.Module | None, *names: str) -> bool:
    return any(cls.__name__ in names for cls in type(module).__mro__)


def norm_bias(owner: Owner | Record) -> bool:
    """Whether this is the bias of a normalisation, which is predicted together with its weight."""
    return "bias" in own_name(owner) and "norm" in type(owner.module).__name__.lower()


def published(owner: Owner | Record) -> str | None:
    """Type of a parameter's node in the graphs of GHN-3; None: it gets none."""
    module = owner.module
    if norm_bias(owner):
        return None
    if isinstance(module, nn.Conv2d | nn.Linear | nn.MultiheadAttention) or _is_called(module, "Conv1D"):
        return _convolution(owner)
    return _table_or_norm(owner)


def published_ppuda(owner: Owner | Record) -> str | None:
    """The same for the graphs of 2021: exact classes, and no attention, embeddings or torchvision ViT."""
    module = owner.module
    if norm_bias(owner):
        return None
    if type(module) in (nn.Conv2d, nn.Linear):
        return _convolution(owner)
    if type(module) in (nn.BatchNorm2d, nn.LayerNorm, LayerNorm2d) or type(module).__name__ == "PosEnc":
        return _table_or_norm(owner)
    return None


def extended(owner: Owner | Record) -> str | None:
    """Type of a parameter's node if every parameter is to get one; None: a norm's bias, which goes with its weight."""
    if known := published(owner):
        return known
    module, name, shape = owner.module, own_name(owner), owner.shape or ()
    if norm_bias(owner) and getattr(module, "weight", None) is not None:
        return None
    if isinstance(module, nn.modules.conv._ConvNd | nn.RNNBase | nn.RNNCellBase | nn.Bilinear):
        return _convolution(owner)
    if isinstance(module, nn.modules.batchnorm._NormBase):
        return "bn"
    if "norm" in type(module).__name__.lower():
        return "ln"
    if isinstance(module, nn.EmbeddingBag) or any(word in name for word in ("pos", "embed", "token", "table")):
        return "pos_enc"
    if "bias" in name:
        return "bias"
    return "conv" if len([size for size in shape if size > 1]) > 1 else "ln"


def _convolution(owner: Owner | Record) -> str:
    if "bias" in own_name(owner):
        return "bias"
    if getattr(owner.module, "groups", 1) == 1:
        return "conv"
    dilation = owner.module.dilation  # type: ignore[union-attr]
    return "dil_conv" if min(dilation) > 1 else "sep_conv"  # type: ignore[arg-type]


def _table_or_norm(owner: Owner | Record) -> str | None:
    module = owner.module
    if isinstance(module, nn.BatchNorm2d):
        return "bn"
    if isinstance(module, nn.LayerNorm):
        return "ln"
    tables = (nn.Embedding, torchvision.models.vision_transformer.Encoder)
    return "pos_enc" if isinstance(module, tables) or _is_called(module, "PosEnc") else None
