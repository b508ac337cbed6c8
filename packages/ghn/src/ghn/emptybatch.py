"""Operations whose autograd record on an empty batch differs from the record on images, and what records the same.

On the meta device the same stand-ins are a hundred times faster than the operations.
"""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence
from torch.overrides import TorchFunctionMode


class Layer(torch.autograd.Function):
    """A layer that reads the input, a weight and a bias, in this order."""

    @staticmethod
    def forward(ctx: Any, width: int, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:  # noqa: ANN401
        """The shape of the input; ``width``, unless 0, becomes its last size."""
        return x.new_empty(*x.shape[:-1], width) if width else torch.empty_like(x)

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
    return Layer.apply(0, x, weight, bias)


def _scale_negative(x: Tensor, weight: Tensor) -> Tensor:
    return Layer.apply(0, x, weight, None)


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
    F.prelu: _scale_negative,
    torch.prelu: _scale_negative,
    F.dropout: _drop,
    F.dropout1d: _drop,
    F.dropout2d: _drop,
    F.dropout3d: _drop,
    F.scaled_dot_product_attention: _attend,
    F.multi_head_attention_forward: _attend_with_heads,
}


def run_recurrent(module: nn.RNNBase, x: Tensor | PackedSequence, hx: Any = None) -> Any:  # noqa: ANN401
    """The output of a recurrent layer, as a chain of its weights and biases instead of one copy per time step."""
    y = x.data if isinstance(x, PackedSequence) else x
    width = module.proj_size or module.hidden_size
    directions = 2 if module.bidirectional else 1
    for i in range(0, len(module._all_weights), directions):
        ends = []
        for names in module._all_weights[i : i + directions]:
            tensors = {name: getattr(module, name) for name in names}
            end = y
            for kind in ("weight_ih", "weight_hh", "weight_hr"):
                weight = next((t for name, t in tensors.items() if name.startswith(kind)), None)
                bias = next((t for name, t in tensors.items() if name.startswith(kind.replace("weight", "bias"))), None)
                end = end if weight is None else Layer.apply(module.hidden_size, end, weight, bias)
            ends.append(end[..., :width])
        y = torch.cat(ends, dim=-1) if directions == 2 else ends[0]
    count = len(module._all_weights)
    output: Tensor | PackedSequence = y
    if isinstance(x, PackedSequence):
        last, output = y[:1].expand(int(x.batch_sizes[0]), -1), x._replace(data=y)
    else:
        last = y.select(1 if module.batch_first and y.ndim == 3 else 0, -1)
    h = last[..., :width].expand(count, *last.shape[:-1], width)
    if not isinstance(module, nn.LSTM):
        return output, h
    return output, (h, last[..., :1].expand(count, *last.shape[:-1], module.hidden_size))


class EmptyBatch(TorchFunctionMode):
    """Runs code on an empty batch with the autograd record, and the sizes, that it has on images."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # noqa: ANN401
        """Replace the operations of the table; give the -1 in ``x.view(x.size(0), -1)`` its size."""
        if func in _LOOKS:
            raise ValueError("the code looks at values, which an empty batch does not have")
        if instead := _INSTEAD.get(func):
            return instead(*args, **(kwargs or {}))
        if func in _VIEWS and args[0].numel() == 0:
            sizes = tuple(args[1]) if len(args) == 2 and isinstance(args[1], tuple | list) else args[1:]
            if -1 in sizes and 0 in sizes:
                rest = prod(size for size in args[0].shape if size) // prod(size for size in sizes if size > 0)
                args = (args[0], tuple(rest if size == -1 else size for size in sizes))
        return func(*args, **(kwargs or {}))


_LOOKS = (Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__float__, Tensor.__int__, Tensor.__index__)
_VIEWS = (Tensor.view, Tensor.reshape, torch.reshape)
