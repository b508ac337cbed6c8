"""Cutting flat checkpoints into tokens, and back.

Shapes: ``d`` scalars in a vector, ``k`` tokens, (...) any batch axes.
"""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, Self, get_args

import torch
from torch import Tensor, nn

from zoo_common.layout import ParameterLayout

SplitPolicy = Literal["chunk", "layer_by_layer", "chunk_within_layer", "chunk_within_input"]
TokenSize = int | Literal["auto", "legacy-auto"]


@dataclass(frozen=True)
class LayerTokenizer:
    """Split points of a vector made of groups of layers, by one of the four policies of G.pt (Peebles et al. 2022).

    A group is one input of a model (the weights, or a scalar embedding); its numbers are the sizes of its layers.

    ======================  ============================================================================
    ``chunk``               everything is one sequence, cut every ``chunk_size`` scalars
    ``layer_by_layer``      one token for every layer, ``chunk_size`` is not used
    ``chunk_within_layer``  every layer is cut every ``chunk_size`` scalars; no token crosses a layer
    ``chunk_within_input``  every group is cut every ``chunk_size`` scalars; no token crosses a group
    ======================  ============================================================================

    A remainder becomes a last, shorter token; nothing is padded.

    Args:
        groups: Layer sizes of every group, each at least 1.
        policy: One of the four names above.
        chunk_size: Scalars in a full token, at least 1; may be None for ``layer_by_layer``.

    Raises:
        ValueError: Unknown policy, no layer, an empty layer, or a chunk size below 1.

    Example:
        >>> LayerTokenizer(((7, 2), (5,)), "chunk_within_layer", 3).lengths
        (3, 3, 1, 2, 3, 2)
    """

    groups: tuple[tuple[int, ...], ...]
    policy: SplitPolicy
    chunk_size: int | None

    def __post_init__(self) -> None:
        """Reject what would give no tokens or wrong ones."""
        object.__setattr__(self, "groups", tuple(tuple(int(size) for size in group) for group in self.groups))
        if self.policy not in get_args(SplitPolicy):
            raise ValueError(f"split policy {self.policy!r} is unknown; use one of {', '.join(get_args(SplitPolicy))}")
        sizes = [size for group in self.groups for size in group]
        if not sizes or min(sizes) < 1:
            raise ValueError(f"layer sizes must be positive and at least one, got {self.groups}")
        if self.policy != "layer_by_layer" and (self.chunk_size is None or self.chunk_size < 1):
            raise ValueError(f"chunk size must be at least 1 for split policy {self.policy!r}, got {self.chunk_size}")

    @cached_property
    def lengths(self) -> tuple[int, ...]:
        """Scalars in each of the k tokens."""
        layers = [size for group in self.groups for size in group]
        if self.policy == "layer_by_layer" or self.chunk_size is None:
            return tuple(layers)
        pieces = {
            "chunk": [sum(layers)],
            "chunk_within_input": [sum(group) for group in self.groups],
            "chunk_within_layer": layers,
        }[self.policy]
        return tuple(length for piece in pieces for length in _cut(piece, self.chunk_size))

    @property
    def size(self) -> int:
        """Length d of the vector that is cut."""
        return sum(self.lengths)

    def split(self, vectors: Tensor) -> tuple[Tensor, ...]:
        """Views of the k tokens of vectors (..., d), token i of shape (..., lengths[i])."""
        _check_size(vectors, self.size)
        return vectors.split(self.lengths, dim=-1)


@dataclass(frozen=True)
class ChannelLayer:
    """One weight tensor as rows, one per output channel, and the tokens that hold them."""

    weight: str
    """Name of the tensor."""
    bias: str | None
    """Name of the tensor that holds the last value of every row, if there is one."""
    rows: int
    width: int
    """Scalars in a row, the bias included."""
    per_row: int
    """Tokens of one row, adjacent."""
    start: int
    """Index of the first token."""
    stop: int
    """Index after the last token."""


@dataclass(frozen=True)
class ChannelTokenizer:
    """Tokens of a layout by the rule of SANE (Schürholt et al. 2024): one row per output channel, padded and cut.

    Every tensor whose name contains ``weight``, ``running_mean`` or ``running_var`` is a layer, in the layout's order.
    A row is one index of its first axis, flattened, with the bias (the name with every ``weight`` replaced by ``bias``)
    as last value; zeros fill it up to a multiple of the token size. So a batch norm gives three layers: scale with
    shift, running mean, running variance. A tied tensor is a layer once, and a bias that has not one value per row
    (a transposed convolution's) is not appended. What is in no token is listed in :attr:`uncovered`.

    Usually made by :meth:`from_module` or :meth:`from_layout`.

    Args:
        layout: Order and shapes of the vectors.
        token_size: Scalars in a token, at least 1.
        skipped: Names of tensors that are no layers although their names say so.

    Raises:
        ValueError: A token size below 1, a skipped name that the layout does not have, or no layer.

    Example:
        >>> tokenizer = ChannelTokenizer.from_module(nn.Linear(4, 2), token_size=3)
        >>> tokenizer.tokenize(torch.arange(10.0)).tolist()
        [[0.0, 1.0, 2.0], [3.0, 8.0, 0.0], [4.0, 5.0, 6.0], [7.0, 9.0, 0.0]]
    """

    layout: ParameterLayout
    token_size: int
    skipped: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Reject what would give no tokens or wrong ones."""
        if self.token_size < 1:
            raise ValueError(f"token size must be at least 1, got {self.token_size}")
        if unknown := [name for name in self.skipped if name not in self.layout.names]:
            raise ValueError(f"cannot skip {', '.join(unknown)}: not among {', '.join(self.layout.names)}")
        if not self.shape[0]:
            raise ValueError(f"no weight to cut into tokens among {', '.join(self.layout.names)}")

    @classmethod
    def from_module(cls, module: nn.Module, token_size: TokenSize = "auto", ignore_bn: bool = False) -> Self:
        """Tokenizer of a module's layout; ``ignore_bn`` skips its batch norms, found by their type.

        ``token_size`` as in :meth:`from_layout`.
        """
        norms = {name for name, part in module.named_modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)}
        layout = ParameterLayout.from_module(module)
        skipped = [name for name in layout.names if ignore_bn and name.rpartition(".")[0] in norms]
        return cls._sized(layout, token_size, tuple(skipped))

    @classmethod
    def from_layout(cls, layout: ParameterLayout, token_size: TokenSize = "auto", ignore_bn: bool = False) -> Self:
        """Tokenizer of a bare layout.

        Args:
            layout: Order and shapes of the vectors.
            token_size: Scalars in a token; ``auto`` is the longest row, ``legacy-auto`` the original's choice, which
                looks only at layers with a bias and counts running statistics as two.
            ignore_bn: Skip every tensor with ``bn``, ``downsample.1`` or ``batchnorm`` anywhere in its name, the
                original's rule.

        Raises:
            ValueError: No layer is left, or none that ``legacy-auto`` looks at.
        """
        hints = ("bn", "downsample.1", "batchnorm") if ignore_bn else ()
        skipped = [name for name in layout.names if any(hint in name for hint in hints)]
        return cls._sized(layout, token_size, tuple(skipped))

    @classmethod
    def _sized(cls, layout: ParameterLayout, token_size: TokenSize, skipped: tuple[str, ...]) -> Self:
        """A tokenizer with the token size worked out."""
        if isinstance(token_size, int):
            return cls(layout, token_size, skipped)
        if token_size not in ("auto", "legacy-auto"):
            raise ValueError(f"token size {token_size!r} is unknown; use a number, 'auto' or 'legacy-auto'")
        layers = cls(layout, 1, skipped).layers
        widths = [layer.width for layer in layers]
        if token_size == "legacy-auto":  # a running statistic is its own "bias": its name has no "weight" to replace
            pairs = [(layer, layer.weight.replace("weight", "bias")) for layer in layers]
            widths = [layer.width + (layer.bias is None) for layer, bias in pairs if bias in layout.names]
        if not widths:
            raise ValueError("token size 'legacy-auto' needs a layer with a bias; use 'auto' or a number")
        return cls(layout, max(widths), skipped)

    @cached_property
    def layers(self) -> tuple[ChannelLayer, ...]:
        """The layers in order; their index is the second column of :attr:`positions`."""
        shapes = dict(zip(self.layout.names, self.layout.shapes, strict=True))
        layers: list[ChannelLayer] = []
        stop = 0
        for name, shape in shapes.items():
            if name in self.skipped or not any(kind in name for kind in ("weight", "running_mean", "running_var")):
                continue
            rows, width = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
            bias = name.replace("weight", "bias")
            has_bias = bias != name and shapes.get(bias) == (rows,)
            per_row = math.ceil((width + has_bias) / self.token_size)
            start, stop = stop, stop + rows * per_row
            layers.append(ChannelLayer(name, bias if has_bias else None, rows, width + has_bias, per_row, start, stop))
        return tuple(layers)

    @property
    def shape(self) -> tuple[int, int]:
        """(k, token size) of the tokens of one vector."""
        return (max((layer.stop for layer in self.layers), default=0), self.token_size)

    @cached_property
    def uncovered(self) -> tuple[str, ...]:
        """Names of the layout's tensors that are in no token."""
        covered = {name for layer in self.layers for name in (layer.weight, layer.bias)}
        return tuple(name for name in self.layout.names if name not in covered)

    @cached_property
    def mask(self) -> Tensor:
        """(k, token size) bool: true where a token holds a number of the vector, false on padding."""
        return self.tokenize(torch.ones(self.layout.size, dtype=torch.bool))

    @cached_property
    def positions(self) -> Tensor:
        """(k, 3) of int16, or int32 where that is too small: index in the sequence, of the layer, of the channel."""
        channels = [torch.arange(layer.rows).repeat_interleave(layer.per_row) for layer in self.layers]
        layers = [torch.full_like(column, index) for index, column in enumerate(channels)]
        positions = torch.stack([torch.arange(self.shape[0]), torch.cat(layers), torch.cat(channels)], dim=1)
        return positions.to(torch.int16 if positions.max() <= torch.iinfo(torch.int16).max else torch.int32)

    def tokenize(self, vectors: Tensor, out: Tensor | None = None) -> Tensor:
        """Tokens (..., k, token size) of vectors (..., d), in their dtype; differentiable.

        Args:
            vectors: Weights in the layout's order.
            out: Contiguous tensor of the result's shape, dtype and device to write into.

        Raises:
            ValueError: Vectors of another length, or an ``out`` that does not fit.
        """
        _check_size(vectors, self.layout.size)
        shape = (*vectors.shape[:-1], *self.shape)
        if out is None:
            tokens = vectors.new_zeros(shape)
        else:
            got = (tuple(out.shape), out.dtype, out.device, out.is_contiguous())
            if got != (expected := (shape, vectors.dtype, vectors.device, True)):
                raise ValueError(f"out must be (shape, dtype, device, contiguous) = {expected}, got {got}")
            tokens = out
            for layer in self.layers:
                self._rows_of(layer, tokens)[..., layer.width :].zero_()
        for there, here in self._pairs(vectors, tokens):
            here.copy_(there)
        return tokens

    def detokenize(self, tokens: Tensor, base: Tensor | None = None) -> Tensor:
        """Vectors (..., d) of tokens (..., k, token size), in their dtype: the inverse of :meth:`tokenize`.

        Padding is not read. The numbers that no token holds come from ``base``, (d,) or (..., d).

        Raises:
            ValueError: Tokens of another shape, a ``base`` of another length, or none although one is needed.
        """
        if tokens.shape[-2:] != self.shape:
            raise ValueError(f"expected tokens of shape {('...', *self.shape)}, got {tuple(tokens.shape)}")
        if base is None and self.uncovered:
            raise ValueError(f"no token holds {', '.join(self.uncovered)}; give a base vector with their values")
        vectors = tokens.new_empty(*tokens.shape[:-2], self.layout.size)
        if base is not None:
            _check_size(base, self.layout.size)
            for name in self.uncovered:
                vectors[..., self.layout.slices[name]] = base[..., self.layout.slices[name]]
        for here, there in self._pairs(vectors, tokens.contiguous()):
            here.copy_(there)
        return vectors

    def _pairs(self, vectors: Tensor, tokens: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Views (..., rows, n) of the same numbers in the vectors and in the tokens."""
        slices, batch = self.layout.slices, vectors.shape[:-1]
        for layer in self.layers:
            rows, width = self._rows_of(layer, tokens), layer.width - (layer.bias is not None)
            weight = vectors.narrow(-1, slices[layer.weight].start, layer.rows * width)
            yield weight.view(*batch, layer.rows, width), rows.narrow(-1, 0, width)
            if layer.bias is not None:
                yield vectors.narrow(-1, slices[layer.bias].start, layer.rows), rows.select(-1, width)

    def _rows_of(self, layer: ChannelLayer, tokens: Tensor) -> Tensor:
        """View (..., rows, per_row * token_size) of the tokens of one layer."""
        part = tokens.narrow(-2, layer.start, layer.stop - layer.start)
        return part.view(*tokens.shape[:-2], layer.rows, layer.per_row * self.token_size)


def _check_size(vectors: Tensor, size: int) -> None:
    if vectors.ndim == 0 or vectors.shape[-1] != size:
        length = vectors.shape[-1] if vectors.ndim else 0
        raise ValueError(f"vectors have {length} scalars, expected {size}")


def _cut(size: int, chunk: int) -> Sequence[int]:
    """Lengths of the pieces of at most ``chunk`` that ``size`` is cut into."""
    return [min(chunk, size - start) for start in range(0, size, chunk)]
