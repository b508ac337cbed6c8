"""From decoded weights to a parameter of any shape: crop, repeat, normalise."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from ghn.decoders import window
from ghn.shapes import Shape, is_position_table


def fan_scale(shape: Sequence[int]) -> float:
    r"""Factor :math:`\sqrt{\beta / \mathrm{fan\,in}}` of the weights of a parameter with at least two axes.

    :math:`\beta` is 1 for depthwise and 1 x k kernels, else 2. Positional embeddings are not scaled.
    """
    if len(shape) > 2 and shape[2] >= 11 and shape[0] == 1:
        return 1.0
    beta = 1 if len(shape) > 2 and (shape[1] == 1 or shape[2] < (*shape, 0)[3]) else 2
    return math.sqrt(beta / math.prod(shape[1:]))


def normalise_vectors(values: Tensor) -> Tensor:
    """Rows ``(n, 2, width)`` brought into range: weights of norm layers to 0..2, biases to -1..1."""
    return torch.stack([2 * torch.sigmoid(values[:, 0] / 2), torch.tanh(values[:, 1] / 5)], dim=1)


def crop(
    source: Tensor,
    shape: Shape,
    *,
    centred: bool = True,
    generator: torch.Generator | None = None,
    first_pixel: bool = False,
) -> Tensor:
    """Part of decoded weights that is repeated to make a parameter.

    Args:
        source: Decoded weights ``(out, in, height, width)``, or of two axes or one.
        shape: Shape of the parameter.
        centred: Whether a smaller kernel is the centre of the source, or its first corner.
        generator: Draws what is not decoded: the row of the class token in a positional embedding.
        first_pixel: Whether parameters of one or two axes are the first pixel of the source, not its central one.

    Returns:
        A tensor of as many axes as ``shape``, along none larger.
    """
    rank = len(shape)
    if source.shape == shape:
        return source
    if rank == source.ndim and (rank == 1 or source.shape[2:] == shape[2:]):  # by far most
        return source[: shape[0]] if rank == 1 else source[: shape[0], : shape[1]]
    if source.ndim == 1:
        axis = max(range(rank), key=shape.__getitem__)
        source = source.view([-1 if i == axis else 1 for i in range(rank)])
    elif source.ndim == 4 and rank <= 2:
        middle = [0, 0] if first_pixel else [n // 2 for n in source.shape[2:]]
        source = source[:, :, middle[0], middle[1]]
        source = source[:, 0] if rank == 1 else source
    elif rank == 3 and is_position_table(shape):
        source = source.flatten(2).transpose(1, 2)[:, : shape[1], : shape[2]]
        if source.shape[1] < shape[1]:
            row = torch.randn(
                1, 1, source.shape[2], generator=generator, device=generator.device if generator else None
            )
            source = torch.cat([0.02 * row.to(source), source], dim=1)
    elif rank == 3:
        source = source[..., source.shape[3] // 2]
    elif rank > 3:
        source = source[(..., *[None] * (4 - source.ndim))]
        rows, columns = (window(n, m, centred) for n, m in zip(shape[-2:], source.shape[2:], strict=True))
        source = source[..., rows, columns]
        source = source[(slice(None), slice(None), *[None] * (rank - 4))]
    return source[tuple(map(slice, shape))]


def tile_into(out: Tensor, block: Tensor) -> None:
    """Repeat a block along all axes of a tensor that exists, periodically and cut at its end; each value is written once.

    Args:
        out: Tensor with as many axes as ``block``, along none smaller; of any dtype and device.
        block: What is repeated.
    """
    for axis, (total, size) in enumerate(zip(out.shape, block.shape, strict=True)):
        if rest := total % size:
            tile_into(out.narrow(axis, 0, total - rest), block)
            tile_into(out.narrow(axis, total - rest, rest), block.narrow(axis, 0, rest))
            return
    parted = [n for total, size in zip(out.shape, block.shape, strict=True) for n in (total // size, size)]
    out.view(parted).copy_(block.reshape([n for size in block.shape for n in (1, size)]))


def tiled(block: Tensor, shape: Shape) -> Tensor:
    """What :func:`tile_into` writes, as a new tensor through which gradients reach the block."""
    if block.shape == shape:
        return block.clone()
    times = [-(-total // size) for total, size in zip(shape, block.shape, strict=True)]
    parted = block.reshape([n for size in block.shape for n in (1, size)])
    whole = parted.expand([n for pair in zip(times, block.shape, strict=True) for n in pair])
    return whole.reshape([n * size for n, size in zip(times, block.shape, strict=True)])[tuple(map(slice, shape))]
