"""Operations whose autograd record on an empty batch differs from the record on images, and what records the same."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Normalised(torch.autograd.Function):
    """Batch and instance normalisation: reads the input, the weight and the bias, in this order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        """The shape of the input."""
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Never called."""


class ScaledDotProductAttention(torch.autograd.Function):
    """Attention in one kernel."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:  # noqa: ANN401
        """The shape of the queries with the width of the values."""
        return query.new_empty(*query.shape[:-1], value.shape[-1])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        """Never called."""


def _normalise(
    x: Tensor,
    mean: Tensor | None = None,
    var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    *args: Any,  # noqa: ANN401
    **kwargs: Any,  # noqa: ANN401
) -> Tensor:
    return Normalised.apply(x, weight, bias)


def _drop(x: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    return x * x.detach() if training and p > 0 else x


def _attend(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:  # noqa: ANN401
    return ScaledDotProductAttention.apply(query, key, value)


def _attend_with_heads(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:  # noqa: ANN401
    """``nn.MultiheadAttention`` with a softmax of its own, which is done if weights are asked for."""
    output, weights = F.multi_head_attention_forward(*args, **{**kwargs, "need_weights": True})
    return output, weights if kwargs.get("need_weights", True) else None


_INSTEAD: dict[Any, Callable[..., Any]] = {
    F.batch_norm: _normalise,
    F.instance_norm: _normalise,
    F.dropout: _drop,
    F.dropout1d: _drop,
    F.dropout2d: _drop,
    F.dropout3d: _drop,
    F.scaled_dot_product_attention: _attend,
    F.multi_head_attention_forward: _attend_with_heads,
}


class EmptyBatch(TorchFunctionMode):
    """Runs code on an empty batch with the autograd record, and the sizes, that it has on images."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Replace the operations of the table; give the -1 in ``x.view(x.size(0), -1)`` its size."""
        if instead := _INSTEAD.get(func):
            return instead(*args, **(kwargs or {}))
        if func in _VIEWS and args[0].numel() == 0:
            sizes = tuple(args[1]) if len(args) == 2 and not isinstance(args[1], int) else args[1:]
            if -1 in sizes and 0 in sizes:
                rest = prod(size for size in args[0].shape if size) // prod(size for size in sizes if size > 0)
                args = (args[0], tuple(rest if size == -1 else size for size in sizes))
        return func(*args, **(kwargs or {}))


_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
