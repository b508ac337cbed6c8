"""Permuting hidden units by a task's ``aug_fn``, the published contract for tasks with their own rule.

An ``aug_fn(net, generator, permute_in_fn, permute_out_fn, permute_in_out_fn, register_fn)`` walks the tensors of the
network in state-dict order and calls exactly one of these on each of them:

========================================  ===========================================================
``permute_in_fn(tensor, p)``              dimension 1 is permuted by p
``permute_out_fn(tensor or tuple, p)``    dimension 0 is permuted by p (of each tensor of a tuple)
``permute_in_out_fn(tensor, p_in, p_out)``  dimension 1 by p_in and dimension 0 by p_out
``register_fn(tensor)``                   nothing is permuted
========================================  ===========================================================

with permutations drawn from ``generator`` (None: the global one). :func:`permute_module` applies such a rule to a module
in place; :func:`permutation_index` turns it into one gather index for flat checkpoints.
"""

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

AugFn = Callable[..., Any]
Tensors = Tensor | Sequence[Tensor]


def permute_in(tensor: Tensor, p: Tensor) -> None:
    """Permute dimension 1 in place."""
    with torch.no_grad():
        tensor.copy_(tensor[:, p])


def permute_out(tensors: Tensors, p: Tensor) -> None:
    """Permute dimension 0 of one or several tensors in place."""
    with torch.no_grad():
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            tensor.copy_(tensor[p])


def permute_in_out(tensor: Tensor, p_in: Tensor, p_out: Tensor) -> None:
    """Permute dimension 1 by p_in and dimension 0 by p_out, in place."""
    permute_in(tensor, p_in)
    permute_out(tensor, p_out)


def permute_module(net: nn.Module, aug_fn: AugFn, generator: torch.Generator | None = None) -> None:
    """Permute the hidden units of a module in place."""
    aug_fn(net, generator, permute_in, permute_out, permute_in_out, lambda tensor: None)


def permutation_index(architecture: nn.Module, aug_fn: AugFn, generator: torch.Generator | None = None) -> Tensor:
    """Draw a permutation as a gather index: ``checkpoint[..., index]`` is the permuted checkpoint.

    Args:
        architecture: Network of the task; only the shapes of its state dict are used.
        aug_fn: Rule of the task, see above.
        generator: Source of the permutations; None = the global one.

    Returns:
        Index (d,) int64.

    Raises:
        ValueError: The rule does not visit the tensors one by one in state-dict order (the message names the first).
    """
    walk = _Walk(architecture)
    aug_fn(architecture, generator, walk.permute_in, walk.permute_out, walk.permute_in_out, walk.take)
    return walk.index()


def random_permute_flat(
    nets: Sequence[Tensor], architecture: nn.Module, seed: int | None, aug_fn: AugFn
) -> list[Tensor]:
    """Permute flat checkpoints (..., d) all by the same random permutation; ``seed`` None = the global generator."""
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    index = permutation_index(architecture, aug_fn, generator)
    return [net[..., index.to(net.device)] for net in nets]


class Permuter(Protocol):
    """What draws and applies function-preserving permutations of many checkpoints; a ``Symmetry`` is one."""

    def random_permutations(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Independent permutations for ``n`` checkpoints, a row of each tensor for each."""
        ...

    def apply(
        self,
        vectors: Tensor,
        permutations: Sequence[Tensor],
        *,
        rows: Tensor | None = None,
        out: Tensor | None = None,
        write: Callable[[Tensor, Tensor], object] = ...,
    ) -> Tensor:
        """Permute checkpoints, each (or each k of them) with its own row; as :meth:`zoo_common.symmetry.Symmetry.apply`."""
        ...


class RulePermuter:
    """A task's own ``aug_fn`` as a :class:`Permuter`: one gather index per checkpoint, drawn one by one.

    For tasks whose symmetry cannot be traced; much slower than :class:`zoo_common.symmetry.Symmetry`.
    """

    def __init__(self, architecture: nn.Module, aug_fn: AugFn) -> None:
        self.architecture, self.aug_fn = architecture, aug_fn

    def random_permutations(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Gather indices, one tensor (n, d)."""
        return [torch.stack([permutation_index(self.architecture, self.aug_fn, generator) for _ in range(n)])]

    def apply(
        self,
        vectors: Tensor,
        permutations: Sequence[Tensor],
        *,
        rows: Tensor | None = None,
        out: Tensor | None = None,
        write: Callable[[Tensor, Tensor], object] = lambda values, out: out.copy_(values),
    ) -> Tensor:
        """Gather each row of ``vectors`` (n, d), or of some ``rows``, (n,) or (k, n), of more."""
        chosen = vectors if rows is None else vectors[rows]
        permuted = chosen.gather(-1, permutations[0].expand(chosen.shape))
        out = torch.empty_like(permuted) if out is None else out
        write(permuted, out)
        return out


class _Walk:
    """Collects the positions in a flat checkpoint that each tensor is filled from."""

    def __init__(self, architecture: nn.Module) -> None:
        self.expected = [*architecture.state_dict().items()]
        self.pieces: list[Tensor] = []
        self.offset = 0

    def take(self, tensor: Tensor) -> Tensor:
        """Positions of the next tensor, in its shape; remembered as they are until changed."""
        visited = len(self.pieces)
        name, shape = "the end", None
        if visited < len(self.expected):
            name, shape = self.expected[visited][0], self.expected[visited][1].shape
        if tensor.shape != shape:
            raise ValueError(
                f"aug_fn: tensor {visited} in state-dict order is {name} {shape and tuple(shape)}, "
                f"but it was given one of shape {tuple(tensor.shape)}"
            )
        positions = torch.arange(self.offset, self.offset + tensor.numel()).view(tensor.shape)
        self.offset += tensor.numel()
        self.pieces.append(positions)
        return positions

    def permute_in(self, tensor: Tensor, p: Tensor) -> None:
        self.pieces[-1] = self.take(tensor)[:, p]

    def permute_out(self, tensors: Tensors, p: Tensor) -> None:
        for tensor in [tensors] if isinstance(tensors, Tensor) else tensors:
            self.pieces[-1] = self.take(tensor)[p]

    def permute_in_out(self, tensor: Tensor, p_in: Tensor, p_out: Tensor) -> None:
        self.pieces[-1] = self.take(tensor)[:, p_in][p_out]

    def index(self) -> Tensor:
        """The whole index."""
        if len(self.pieces) < len(self.expected):
            raise ValueError(f"aug_fn: {self.expected[len(self.pieces)][0]} was not visited")
        return torch.cat([piece.flatten() for piece in self.pieces])
