"""Cutting flat checkpoints into tokens.

Shapes: ``d`` scalars in a vector, ``k`` tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal, get_args

from torch import Tensor

SplitPolicy = Literal["chunk", "layer_by_layer", "chunk_within_layer", "chunk_within_input"]


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
        if vectors.shape[-1] != self.size:
            raise ValueError(f"vectors have {vectors.shape[-1]} scalars, the tokens cover {self.size}")
        return vectors.split(self.lengths, dim=-1)


def _cut(size: int, chunk: int) -> Sequence[int]:
    """Lengths of the pieces of at most ``chunk`` that ``size`` is cut into."""
    return [min(chunk, size - start) for start in range(0, size, chunk)]
