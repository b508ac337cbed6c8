"""Shapes of parameter tensors as a hypernetwork sees them: codes, canonical forms and groups.

A shape has up to four numbers here: output channels, input channels, kernel height, kernel width.
"""

import math
from bisect import bisect_left
from collections.abc import Sequence

import torch
from torch import Tensor, nn

Shape = tuple[int, ...]
Shape4 = tuple[int, int, int, int]

_LARGEST_CHANNEL, _LARGEST_KERNEL = 8192, 16


def channel_vocabulary(num_classes: int) -> list[int]:
    """Channel counts that have an entry of their own."""
    steps = {*range(8, 64, 8), *range(64, 4096, 16), *range(4096, _LARGEST_CHANNEL + 1, 32)}
    return sorted({1, 3, num_classes} | steps)


def kernel_vocabulary(kernel: int) -> list[int]:
    """Kernel sizes that have an entry of their own, for decoders of kernels up to ``kernel``."""
    return sorted({*range(1, max(12, kernel), 2), 14, _LARGEST_KERNEL})


def is_position_table(shape: Sequence[int]) -> bool:
    """Whether a shape is that of a positional embedding, ``(1, tokens, channels)``."""
    return len(shape) == 3 and shape[0] == 1 and shape[1] > 1 and shape[2] > 1


def canonical_shape(shape: Sequence[int]) -> Shape4:
    """Four numbers for any shape: missing ones are 1; a positional embedding becomes an image of its tokens.

    A kernel of three axes is described by its last two, as what is predicted is repeated along the first.
    """
    if is_position_table(shape):
        side = math.isqrt(shape[1])
        return 1, shape[2], side, side
    if len(shape) > 4:
        shape = (*shape[:2], *shape[-2:])
    out, into, height, width = (*shape, 1, 1, 1, 1)[:4]
    return out, into, height, width


def quantise(size: int, largest: int) -> int:
    """Channels that are decoded for a tensor of ``size`` channels, at most ``largest``."""
    size = min(size, largest)
    size = size // 3 * 4 if size % 3 == 0 else size
    return largest if size >= largest / 2 else size


def group_key(
    shape: Sequence[int], max_shape: Shape4, *, last_weight: bool = False, last_bias: bool = False
) -> tuple[int, ...]:
    """Group of tensors that are decoded together: the published keys.

    Args:
        shape: Shape of the parameter, of one to four axes.
        max_shape: Largest tensor of the decoder.
        last_weight: Whether it is the weight of the classification layer.
        last_bias: Whether it is the bias of the classification layer.
    """
    q = [quantise(size, largest) for size, largest in zip(shape, max_shape, strict=False)]
    if len(shape) == 1:
        return q[0], -1 if last_bias else 0
    if last_weight:
        return q[0], q[1]
    if len(shape) == 2:
        return q[0], q[1], 1, 1
    if len(shape) == 3:
        return canonical_shape(shape) if is_position_table(shape) else tuple(q)
    return q[0], q[1], shape[2], shape[3]


class ShapeEncoder(nn.Module):
    """Embedding of a shape: the embeddings of its four numbers, side by side.

    Args:
        hid: Width of the embedding, a multiple of 4.
        num_classes: Classes of the training data: a channel count with an entry of its own.
        kernel: Largest kernel of the decoder.
    """

    def __init__(self, hid: int, num_classes: int, kernel: int) -> None:
        super().__init__()
        self._channels, self._kernels = channel_vocabulary(num_classes), kernel_vocabulary(kernel)
        self.embed_channel = nn.Embedding(len(self._channels) + 1, hid // 4)
        self.embed_spatial = nn.Embedding(len(self._kernels) + 1, hid // 4)
        self._known: dict[Shape, list[int]] = {}

    @property
    def no_shape(self) -> list[int]:
        """Indices of a node without a shape."""
        return [len(self._channels)] * 2 + [len(self._kernels)] * 2

    def indices(self, shapes: Sequence[Sequence[int] | None]) -> Tensor:
        """Rows of the tables for every shape, ``(n, 4)`` int64; ``None`` is a node without a shape."""
        return torch.tensor([self._lookup(tuple(shape)) if shape else self.no_shape for shape in shapes])

    def _lookup(self, shape: Shape) -> list[int]:
        if shape not in self._known:
            out, into, height, width = canonical_shape(shape)
            channels = [
                _nearest(self._channels, 8 if 4 <= n <= 7 and n not in self._channels else n) for n in (out, into)
            ]
            kernels = [_nearest(self._kernels, 3 if n == 2 else n) for n in (height, width)]
            self._known[shape] = channels + kernels
        return self._known[shape]

    def forward(self, shapes: Sequence[Sequence[int] | None]) -> Tensor:
        """Embeddings ``(n, hid)`` of ``n`` shapes."""
        index = self.indices(shapes).to(self.embed_channel.weight.device)
        return torch.cat([self.embed_channel(index[:, :2]).flatten(1), self.embed_spatial(index[:, 2:]).flatten(1)], 1)


def _nearest(entries: list[int], value: int) -> int:
    """Position of the nearest entry, of two the smaller."""
    right = min(bisect_left(entries, value), len(entries) - 1)
    left = max(right - 1, 0)
    return left if value - entries[left] <= entries[right] - value else right
