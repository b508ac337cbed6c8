"""Decoders: from the embedding of a node to a block of weights, the source of all tiles of a parameter."""

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby
from operator import itemgetter
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn.partial import View, partial_linears
from ghn.shapes import Shape4

_BLOCK_BYTES = 2**25
"""Memory for the weights that are decoded at once."""


_READ_PIXELS = 20
"""Pixels for which the last layer can be computed in the time that reading it takes."""

Kind = tuple[Shape4, tuple[int, int], bool]
"""Sizes that are computed for a node, the kernel that it gets, and whether it is a classification layer."""

Decoded = Iterator[tuple[list[int], Tensor]]
"""Positions of some nodes, and the weights ``(nodes, out, in, height, width)`` decoded for them."""


def window(kernel: int, largest: int, centred: bool) -> slice:
    """Which of ``largest`` rows make a kernel of ``kernel`` rows: those around the centre, or the first."""
    if not centred:
        return slice(0, min(kernel, largest))
    centre = largest // 2
    return slice(max(0, centre - kernel // 2), min(centre + math.ceil(kernel / 2), largest))


def _linear(layer: Any, x: Tensor) -> Tensor:  # noqa: ANN401 (linear, or a convolution of one pixel)
    return F.linear(x, layer.weight.flatten(1), layer.bias)


class _Decoder(nn.Module):
    """What both decoders share: which sizes are decoded, and the classification layer."""

    def __init__(self, max_shape: Shape4, num_classes: int) -> None:
        super().__init__()
        self.max_shape, self.num_classes = max_shape, num_classes

    def clipped(self, shape: Shape4) -> Shape4:
        """The same shape, where it is larger than what the decoder gives cut to that."""
        out, into, height, width = (min(size, largest) for size, largest in zip(shape, self.max_shape, strict=True))
        return out, into, height, width

    def forward(self, x: Tensor, shape: Shape4, is_class: bool = False) -> Tensor:
        """Decode all nodes alike.

        Args:
            x: Embeddings ``(n, hid)``.
            shape: Sizes that are needed; more channels than the decoder has are not.
            is_class: Whether it is the weight of a classification layer.

        Returns:
            Weights ``(n, out, in, height, width)``, with ``num_classes`` as ``out`` of a classification layer.
        """
        raise NotImplementedError

    def decode(self, x: Tensor, shapes: Sequence[Shape4], is_class: Sequence[bool]) -> Decoded:
        """Decode nodes ``(n, hid)``, each to a shape of its own or to a classification layer, in any order."""
        for (shape, of_class), members in _grouped(list(zip(shapes, is_class, strict=True))).items():
            for some in _pieces(members, [4 * math.prod(self.clipped(shape))] * len(members)):
                yield some, self(x[some], shape, of_class)


class ConvDecoder(_Decoder):
    r"""Maps an embedding to an image of ``S x S`` hidden vectors, and each of these to ``out * in`` weights.

    Only those pixels and those rows of the last layer are computed that a tensor needs, and the last layer, which has
    nearly all the weights of a large hypernetwork, is read once for all kernel sizes.

    Args:
        hid: Width of node embeddings.
        max_shape: ``(O, I, S, S)``.
        num_classes: Classes of the training data.
        linear: Whether the last layers are linear ones (GHN-3), or convolutions of one pixel (GHN-1 and GHN-2).
        centred: Whether a kernel is the centre of the image (GHN-3), or its first corner.
        periodic: Whether a kernel larger than the image repeats it (GHN-1 and GHN-2), or is interpolated.
        rank: Make the matrix ``(O, I)`` of a pixel as a product of two of this rank, from a last layer of
            ``(O + I) * rank`` instead of ``O * I`` rows; 0: make it at once, as published.
    """

    def __init__(
        self,
        hid: int,
        max_shape: Shape4,
        num_classes: int,
        *,
        linear: bool = True,
        centred: bool = True,
        periodic: bool = False,
        rank: int = 0,
    ) -> None:
        super().__init__(max_shape, num_classes)
        self.centred, self.periodic, self.rank = centred, periodic, rank
        out, into, size, _ = max_shape
        layer = nn.Linear if linear else partial(nn.Conv2d, kernel_size=1)
        rows = (out + into) * rank if rank else out * into
        self.fc = nn.Sequential(nn.Linear(hid, 4 * hid * size**2), nn.ReLU())
        self.conv = nn.Sequential(layer(4 * hid, 8 * hid), nn.ReLU(), layer(8 * hid, rows))
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), layer(out, num_classes))

    def hidden(self, inputs: Sequence[Tensor], kernels: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Hidden vectors ``(n_i, pixels, 8 hid)`` of the pixels of kernels, for nodes ``(n_i, hid)`` each."""
        images = partial_linears(self.fc[0], [self._pixels(*kernel) for kernel in kernels], inputs)
        width = cast(Tensor, self.conv[0].weight).shape[1]
        pixels = F.relu(torch.cat([image.view(-1, width) for image in images]))
        hidden = F.relu(_linear(self.conv[0], pixels))
        parts = hidden.split([image.numel() // width for image in images])
        return [part.view(len(x), -1, part.shape[1]) for part, x in zip(parts, inputs, strict=True)]

    def _pixels(self, height: int, width: int) -> View:
        """The outputs of the first layer that make the pixels of a kernel, pixel by pixel."""
        size = self.max_shape[2]
        rows, columns = window(height, size, self.centred), window(width, size, self.centred)
        return lambda parameter: parameter.unflatten(0, (-1, size, size))[:, rows, columns].movedim(0, 2)

    def matrices(self, hidden: Sequence[Tensor], sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """The first channels of the weights of pixels, ``(pixels_i, out_i * in_i)`` each."""
        if self.rank:
            return [self._product(h, out, into) for h, (out, into) in zip(hidden, sizes, strict=True)]
        views = [self._channels(out, into) for out, into in sizes]
        return partial_linears(self.conv[2], views, hidden)

    def _channels(self, out: int, into: int) -> View:
        most = self.max_shape[:2]
        return lambda parameter: parameter.unflatten(0, most)[:out, :into]

    def _product(self, hidden: Tensor, out: int, into: int) -> Tensor:
        split, rank = self.max_shape[0] * self.rank, self.rank
        views: list[View] = [lambda p: p[: out * rank], lambda p: p[split : split + into * rank]]
        left, right = partial_linears(self.conv[2], views, [hidden, hidden])
        product = left.view(-1, out, rank) @ right.view(-1, into, rank).mT
        return product.flatten(1) / math.sqrt(rank)

    def finish(self, image: Tensor, kernel: tuple[int, int], is_class: bool) -> Tensor:
        """Weights from what was computed, ``(n, out, in, height, width)``: classes, and kernels beyond the image."""
        if is_class:
            columns = F.relu(image[..., 0, 0]).mT
            return _linear(self.class_layer_predictor[1], columns).mT[..., None, None]
        if image.shape[-2:] == kernel:
            return image
        if self.periodic:
            return _repeated(image, kernel)
        return F.interpolate(image.flatten(0, 1), kernel, mode="bilinear").view(*image.shape[:3], *kernel)

    def forward(self, x: Tensor, shape: Shape4, is_class: bool = False) -> Tensor:  # noqa: D102 (of the base)
        out, into, height, width = self._computed(shape, is_class)
        (hidden,) = self.hidden([x], [(height, width)])
        (matrix,) = self.matrices([hidden.flatten(0, 1)], [(out, into)])
        image = matrix.view(len(x), height, width, out, into).permute(0, 3, 4, 1, 2)
        return self.finish(image, shape[2:], is_class)

    def decode(self, x: Tensor, shapes: Sequence[Shape4], is_class: Sequence[bool]) -> Decoded:  # noqa: D102
        requests = list(zip(shapes, is_class, strict=True))
        computed = [self._computed(*request) for request in requests]
        kinds = [(size, shape[2:], of_class) for size, (shape, of_class) in zip(computed, requests, strict=True)]
        kernels = _grouped([size[2:] for size in computed])
        hidden: dict[int, Tensor] = {}
        made = self.hidden([x[members] for members in kernels.values()], list(kernels))
        for members, vectors in zip(kernels.values(), made, strict=True):
            hidden |= dict(zip(members, vectors.unbind(), strict=True))
        pieces = []
        for size, members in self._groups(computed, hidden).items():
            members.sort(key=kinds.__getitem__)
            pieces += [
                (size, some) for some in _pieces(members, [4 * math.prod(size) * len(hidden[i]) for i in members])
            ]
        at_once = len(pieces) if torch.is_grad_enabled() else 1
        for start in range(0, len(pieces), max(1, at_once)):
            batch = pieces[start : start + at_once]
            inputs = [torch.cat([hidden[i] for i in some]) for _, some in batch]
            matrices = self.matrices(inputs, [size for size, _ in batch])
            for (size, some), matrix in zip(batch, matrices, strict=True):
                yield from self._images(matrix, size, [(kinds[i], i) for i in some])

    def _images(self, matrix: Tensor, size: tuple[int, int], members: Sequence[tuple[Kind, int]]) -> Decoded:
        """Weights of nodes from what was computed for their pixels, ``(pixels, out * in)``; those of a kind at once."""
        for ((out, into, height, width), kernel, is_class), same in groupby(members, itemgetter(0)):
            nodes = [i for _, i in same]
            pixels, matrix = matrix.tensor_split((len(nodes) * height * width,))
            images = pixels.view(-1, height, width, *size).permute(0, 3, 4, 1, 2)[:, :out, :into]
            yield nodes, self.finish(images, kernel, is_class)

    def _computed(self, shape: Shape4, is_class: bool) -> Shape4:
        """What is computed for a tensor; for a classification layer one pixel of all output channels."""
        out, into, height, width = self.clipped(shape)
        return (self.max_shape[0], into, 1, 1) if is_class else (out, into, height, width)

    def _groups(self, shapes: Sequence[Shape4], hidden: Mapping[int, Tensor]) -> dict[tuple[int, int], list[int]]:
        """Nodes for which the same channels are computed.

        Few different numbers of channels make large matrix products, and a group that is small compared to the part of
        the last layer that would be read for it goes with those that need all of it.
        """
        groups = _grouped([(self._rounded(out, 0), self._rounded(into, 1)) for out, into, *_ in shapes])
        whole = self.max_shape[:2]
        for size in [size for size in groups if size != whole and whole in groups]:
            pixels, part = sum(len(hidden[i]) for i in groups[size]), math.prod(size)
            if pixels * (math.prod(whole) - part) < _READ_PIXELS * part:
                groups[whole] += groups.pop(size)
        return groups

    def _rounded(self, channels: int, axis: int) -> int:
        largest = self.max_shape[axis]
        step = max(1, largest // 8) if channels > 4 else 1
        return min(-(-channels // step) * step, largest)


class MlpDecoder(_Decoder):
    """Two layers from an embedding to all weights of the largest tensor, of which a corner is kept."""

    def __init__(self, hid: int, max_shape: Shape4, num_classes: int) -> None:
        super().__init__(max_shape, num_classes)
        layers = [nn.Linear(hid, 2 * hid), nn.ReLU(), nn.Linear(2 * hid, math.prod(max_shape))]
        self.mlp = nn.ModuleDict({"fc": nn.Sequential(*layers)})
        self.class_layer_predictor = nn.Sequential(nn.ReLU(), nn.Linear(2 * hid, num_classes * max_shape[0]))

    def forward(self, x: Tensor, shape: Shape4, is_class: bool = False) -> Tensor:  # noqa: D102 (of the base)
        first, _, last = cast(nn.Sequential, self.mlp["fc"])
        hidden = F.relu(first(x))
        out, into, height, width = self.clipped(shape)
        if is_class:
            values = self.class_layer_predictor(hidden).view(len(x), self.num_classes, -1)
            return values[..., :into, None, None]

        def needed(parameter: Tensor) -> Tensor:
            return parameter.unflatten(0, self.max_shape)[:out, :into, :height, :width]

        (values,) = partial_linears(last, [needed], [hidden])
        values = values.view(len(x), out, into, height, width)
        return values if (height, width) == shape[2:] else _repeated(values, shape[2:])


class Decoder1d(nn.Module):
    """Weight and bias of normalisation layers, and all other biases: rows 0 and 1 of ``(n, 2, width)``."""

    def __init__(self, hid: int, width: int) -> None:
        super().__init__()
        self.width = width
        self.fc = nn.Sequential(nn.Linear(hid, 2 * hid), nn.ReLU(), nn.Linear(2 * hid, 2 * width))

    def forward(self, x: Tensor) -> Tensor:
        """Decode embeddings ``(n, hid)``."""
        return self.fc(x).view(len(x), 2, self.width)


def _repeated(image: Tensor, kernel: tuple[int, int]) -> Tensor:
    """An image repeated to a larger kernel."""
    rows, columns = (torch.arange(n, device=image.device) % m for n, m in zip(kernel, image.shape[-2:], strict=True))
    return image[..., rows[:, None], columns]


def _grouped(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """Positions of each key."""
    groups = defaultdict(list)
    for i, key in enumerate(keys):
        groups[key].append(i)
    return groups


def _pieces(members: list[int], sizes: list[int]) -> Iterator[list[int]]:
    """Consecutive members whose sizes in bytes add up to little."""
    start = total = 0
    for end, size in enumerate(sizes):
        if total and total + size > _BLOCK_BYTES:
            yield members[start:end]
            start, total = end, 0
        total += size
    yield members[start:]
