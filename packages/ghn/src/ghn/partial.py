"""Linear layers of which only some outputs are needed, as slices of one weight."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

View = Callable[[Tensor], Tensor]
"""Takes a parameter whose first axis counts outputs; gives a view of the outputs that are needed, in their order."""

_LARGE = 2**15 + 1
"""Weights per row of a view from which they are used row by row: to copy them together takes longer than their use."""


def partial_linears(layer: Any, views: Sequence[View], inputs: Sequence[Tensor]) -> list[Tensor]:  # noqa: ANN401
    """Apply parts of one layer, each to an input of its own.

    Args:
        layer: With a bias; a linear layer, or a convolution of one pixel.
        views: Which outputs each input gets.
        inputs: ``(n_i, in)`` each.

    Returns:
        ``(n_i, outputs of view i)`` each.
    """
    weight, bias = layer.weight.flatten(1), layer.bias
    if torch.is_grad_enabled() and weight.requires_grad:
        return list(_PartialLinears.apply(weight, bias, views, *inputs))
    return [_partial_linear(x, view(weight), view(bias)) for view, x in zip(views, inputs, strict=True)]


def _partial_linear(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    if weight.is_contiguous() or weight.is_cuda or weight[0].numel() < _LARGE:
        return F.linear(x, weight.flatten(0, -2), bias.flatten())
    rows = zip(weight.flatten(1, -2), bias.flatten(1), strict=True)
    return torch.cat([F.linear(x, *row) for row in rows], dim=1)


class _PartialLinears(torch.autograd.Function):
    """The same with gradients: autograd would make one of the size of the whole weight for every slice."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor, bias: Tensor, views: Sequence[View], *inputs: Tensor) -> tuple[Tensor, ...]:  # noqa: ANN401
        ctx.views = views
        ctx.save_for_backward(weight, bias, *inputs)
        return tuple(_partial_linear(x, view(weight), view(bias)) for view, x in zip(views, inputs, strict=True))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> Any:  # noqa: ANN401
        weight, bias, *inputs = ctx.saved_tensors
        into_weight, into_bias = torch.zeros_like(weight), torch.zeros_like(bias)
        into_inputs = []
        for view, x, grad in zip(ctx.views, inputs, grads, strict=True):
            part = view(into_weight)
            part.add_((grad.T @ x).view(part.shape))
            part = view(into_bias)
            part.add_(grad.sum(0).view(part.shape))
            into_inputs.append(grad @ view(weight).flatten(0, -2))
        return into_weight, into_bias, None, *into_inputs
