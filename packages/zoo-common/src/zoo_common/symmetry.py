"""Permutation symmetries of a network: hidden units may change places, and the function stays the same.

:meth:`Symmetry.from_module` traces a network with ``torch.fx`` and follows the channel axis of every intermediate value
from the layer that makes it (a *group* of interchangeable units) to the layers that read it. Each group's claim is
proven in float64 when the symmetry is built.

Shapes: ``n`` networks, ``d`` parameters each, ``s`` units in a group.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from zoo_common.layout import ParameterLayout

#: Largest difference (relative to the largest output, at least 1) that the float64 proof of a group accepts.
PROOF_TOLERANCE = 1e-10


class Entry(NamedTuple):
    """One place where the units of a group stand: an axis of a parameter, ``block`` consecutive positions per unit."""

    tensor: str
    axis: int
    block: int = 1


@dataclass(frozen=True)
class Group:
    """Units that may be permuted among each other."""

    name: str
    """Module that makes the units."""
    size: int
    entries: tuple[Entry, ...]
    homogeneous: bool
    """Whether only positively homogeneous functions (ReLU, pooling ...) lie between its writers and readers."""


@dataclass(frozen=True)
class Symmetry:
    """The permutation groups of one network, as index maps on its flat vector."""

    layout: ParameterLayout
    groups: tuple[Group, ...]

    @classmethod
    def from_module(cls, module: nn.Module, example_input: Tensor) -> "Symmetry":
        """Find and prove the groups of a network of Linear, Conv2d, element-wise functions, pooling and flattening.

        Args:
            module: The network, with one input and one output; it is not changed.
            example_input: A batch of inputs of the right shape, at least two images.

        Raises:
            ValueError: The network cannot be traced, holds something whose symmetry is not known (named), or a group
                does not pass its proof.
        """
        symmetry = cls(ParameterLayout.from_module(module), _trace_groups(module, example_input))
        _prove(symmetry, module, example_input)
        return symmetry

    def index(self, permutations: Sequence[Tensor]) -> Tensor:
        """Gather index of one permutation per group: ``vector[index]`` is the permuted network.

        Args:
            permutations: For each group (s,), or (n, s) for n networks at once.

        Returns:
            (d,) or (n, d) int64. To permute many networks use :meth:`apply`, which needs no such index.
        """
        many = permutations[0].ndim == 2 if permutations else False
        rows = [p if many else p[None] for p in permutations]
        start = torch.arange(self.layout.size, device=rows[0].device if rows else None)
        index = self.apply(start.expand(len(rows[0]) if rows else 1, -1), rows)
        return index if many else index[0]

    def random_permutations(self, n: int, generator: torch.Generator | None = None) -> list[Tensor]:
        """Independent uniform permutations for ``n`` networks: (n, s) per group, on the generator's device."""
        device = generator.device if generator is not None else torch.device("cpu")
        return [torch.rand(n, g.size, generator=generator, device=device).argsort(1) for g in self.groups]

    def apply(self, vectors: Tensor, permutations: Sequence[Tensor]) -> Tensor:
        """Permute each network of ``vectors`` (n, d) with its own row of ``permutations`` ((n, s) per group)."""
        self._check(vectors)
        for group, permutation in zip(self.groups, permutations, strict=True):
            if permutation.shape != (len(vectors), group.size):
                raise ValueError(
                    f"group {group.name!r}: permutations must be {(len(vectors), group.size)}, got {tuple(permutation.shape)}"
                )
        out = torch.empty(vectors.shape, dtype=vectors.dtype, device=vectors.device)
        moves = self._moves()
        for name, (span, shape) in self._places.items():
            values = vectors[:, span]
            for g, axis, block in moves.get(name, ()):
                values = _permute_axis(values, shape, axis, block, permutations[g])
            out[:, span] = values
        return out

    def permute(self, vectors: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Permute the hidden units of each network of ``vectors`` (n, d) independently; functions stay the same."""
        permutations = [p.to(vectors.device) for p in self.random_permutations(len(vectors), generator)]
        return self.apply(vectors, permutations)

    def align(self, vectors: Tensor, reference: Tensor, *, max_sweeps: int = 100) -> Tensor:
        """Permute each network towards ``reference`` (d,) by weight matching (Ainsworth et al. 2023, algorithm 1).

        Coordinate descent over the groups: each step solves the assignment that maximises the inner product with the
        reference, the other groups held fixed, until no network gains. The inner product never decreases.
        """
        self._check(vectors)
        vectors = vectors.clone()
        active = torch.arange(len(vectors), device=vectors.device)
        for _ in range(max_sweeps):
            improved = torch.zeros(len(active), dtype=torch.bool, device=vectors.device)
            for g in range(len(self.groups)):
                current = vectors[active]
                permutation, gained = _assign(self._similarity(g, current, reference))
                vectors[active] = self._apply_one(g, current, permutation)
                improved |= gained
            active = active[improved]
            if not len(active):
                break
        return vectors

    def balance(self, vectors: Tensor, *, max_sweeps: int = 1000) -> Tensor:
        """Scale every ReLU unit positively so that the norms of its incoming and outgoing weights are equal.

        A unit's incoming weights and bias times a, outgoing weights divided by a > 0, compute the same function; the
        balanced network is the one of least norm among these and therefore canonical. Units without incoming or
        without outgoing weights, and groups whose functions are not positively homogeneous, stay as they are.
        """
        self._check(vectors)
        vectors = vectors.clone()
        groups = []
        for group in self.groups:
            entering = [self._coordinates(entry).flatten(1) for entry in group.entries if entry.axis == 0]
            leaving = [self._coordinates(entry).flatten(1) for entry in group.entries if entry.axis > 0]
            if group.homogeneous and leaving:
                groups.append((torch.cat(entering, 1).to(vectors.device), torch.cat(leaving, 1).to(vectors.device)))
        for _ in range(max_sweeps):
            change = 0.0
            for into, out in groups:
                norm_in, norm_out = vectors[:, into].norm(dim=-1), vectors[:, out].norm(dim=-1)
                alive = (norm_in > 0) & (norm_out > 0)
                scale = torch.where(alive, (norm_out / norm_in).sqrt(), 1.0)[..., None]
                vectors[:, into] *= scale
                vectors[:, out] /= scale
                change = max(change, (scale - 1).abs().max().item()) if scale.numel() else change
            if len(groups) < 2 or change < 4 * torch.finfo(vectors.dtype).eps:
                break
        return vectors

    def _check(self, vectors: Tensor) -> None:
        if vectors.ndim != 2 or vectors.shape[1] != self.layout.size:
            raise ValueError(f"expected vectors (n, {self.layout.size}), got {tuple(vectors.shape)}")

    @cached_property
    def _places(self) -> dict[str, tuple[slice, tuple[int, ...]]]:
        """Slice of the flat vector and shape of every tensor."""
        return {spec.name: (self.layout.slices[spec.name], spec.shape) for spec in self.layout.tensors}

    def _moves(self) -> dict[str, list[tuple[int, int, int]]]:
        """For each tensor the (group, axis, block) of its permuted axes."""
        moves: dict[str, list[tuple[int, int, int]]] = {}
        for g, group in enumerate(self.groups):
            for entry in group.entries:
                moves.setdefault(entry.tensor, []).append((g, entry.axis, entry.block))
        return moves

    def _coordinates(self, entry: Entry) -> Tensor:
        """Positions of an entry's values in the flat vector, unit axis first: (s, block, ...)."""
        span, shape = self._places[entry.tensor]
        index = torch.arange(span.start, span.stop).reshape(shape)
        size = shape[entry.axis] // entry.block
        return index.unflatten(entry.axis, (size, entry.block)).movedim(entry.axis, 0)

    def _apply_one(self, g: int, vectors: Tensor, permutation: Tensor) -> Tensor:
        """Permute one group of every network."""
        out = vectors.clone()
        for entry in self.groups[g].entries:
            span, shape = self._places[entry.tensor]
            out[:, span] = _permute_axis(vectors[:, span], shape, entry.axis, entry.block, permutation)
        return out

    def _similarity(self, g: int, vectors: Tensor, reference: Tensor) -> Tensor:
        """Inner products (n, s, s) of unit i of each network with unit j of the reference."""
        group = self.groups[g]
        total = vectors.new_zeros(len(vectors), group.size, group.size)
        for entry in group.entries:
            span, shape = self._places[entry.tensor]
            split = (entry.axis + 1, (group.size, entry.block))
            mine = vectors[:, span].reshape(len(vectors), *shape).unflatten(*split).movedim(split[0], 1)
            theirs = reference[span].reshape(1, *shape).unflatten(*split).movedim(split[0], 1)
            total += mine.reshape(len(vectors), group.size, -1) @ theirs.reshape(group.size, -1).T
        return total


def _permute_axis(values: Tensor, shape: Sequence[int], axis: int, block: int, permutation: Tensor) -> Tensor:
    """Permute one axis of n stacked tensors, (n, prod(shape)) -> the same, with a permutation (n, s) for each."""
    n, size = permutation.shape
    before, after = math.prod(shape[:axis]), block * math.prod(shape[axis + 1 :])
    if after > 1:  # copies of contiguous rows
        first = torch.arange(0, n * before * size, size, device=values.device).view(n, before, 1)
        rows = (first + permutation[:, None]).flatten()
        return values.reshape(n * before * size, after).index_select(0, rows).view(n, -1)
    where = permutation[:, None, :, None].expand(n, before, size, after)  # a view, no index in memory
    return values.reshape(n, before, size, after).gather(2, where).view(n, -1)


def _assign(similarity: Tensor) -> tuple[Tensor, Tensor]:
    """Best assignment of each (s, s) matrix: permutations (n, s), and which ones gain (n,) on staying as they are."""
    from scipy.optimize import linear_sum_assignment

    n, size, _ = similarity.shape
    scores = similarity.double()
    matrices = scores.transpose(1, 2).cpu().numpy()  # rows: places of the reference
    chosen = [linear_sum_assignment(matrix, maximize=True)[1] for matrix in matrices]
    permutation = torch.from_numpy(np.reshape(chosen, (n, size))).to(similarity.device, torch.int64)
    gain = scores.gather(1, permutation[:, None])[:, 0].sum(1) - scores.diagonal(dim1=1, dim2=2).sum(1)
    rounding = 4 * size * torch.finfo(similarity.dtype).eps * scores.abs().amax((1, 2))
    gained = gain > rounding
    return torch.where(gained[:, None], permutation, torch.arange(size, device=similarity.device)), gained


# Tracing


@dataclass
class _Channels:
    """What stands on the channel axis (1) of an intermediate value."""

    group: int | None  # None: nothing that may be permuted (inputs and what follows from them)
    block: int = 1  # positions per unit


@dataclass
class _Draft:
    name: str
    size: int
    entries: list[Entry]
    homogeneous: bool = True
    fixed: bool = False  # reaches the output


_HOMOGENEOUS = (nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, F.relu, F.leaky_relu, F.dropout, torch.relu)
_HOMOGENEOUS_METHODS = ("relu", "relu_", "contiguous", "clone")
_ELEMENTWISE = (
    *(nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.ReLU6),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink),
    *(F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.relu6, F.hardtanh, F.hardswish),
    *(F.logsigmoid, F.tanh, F.sigmoid, torch.tanh, torch.sigmoid, torch.selu, torch.sin, torch.cos),
)
_ELEMENTWISE_METHODS = ("tanh", "sigmoid", "sin", "cos")
_POOLING = (
    *(nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d),
    *(F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d),
)
_RESHAPING = (nn.Flatten, torch.flatten, torch.reshape)
_RESHAPING_METHODS = ("flatten", "view", "reshape")
_MEAN = (torch.mean,)
_SIZES = ("size", "dim", getattr)


def _trace_groups(module: nn.Module, example: Tensor) -> tuple[Group, ...]:
    """Walk the traced network once; see :class:`_Walk`."""
    replica = copy.deepcopy(module).cpu().double().eval()
    try:
        traced = fx.symbolic_trace(replica)
        ShapeProp(traced).propagate(torch.zeros(example.shape, dtype=torch.float64))
    except Exception as error:  # whatever the network's own code raises
        raise ValueError(f"cannot trace {type(module).__name__}: {error}") from error
    walk = _Walk(traced, ParameterLayout.from_module(module))
    for node in traced.graph.nodes:
        walk.visit(node)
    drafts = [draft for draft in walk.drafts if not draft.fixed]
    return tuple(Group(d.name, d.size, tuple(d.entries), d.homogeneous) for d in drafts)


class _Walk:
    """Follows channel axes through a traced graph and collects the groups in the order of their layers."""

    def __init__(self, traced: fx.GraphModule, layout: ParameterLayout) -> None:
        self.modules = dict(traced.named_modules())
        self.parameters = set(layout.names)
        self.drafts: list[_Draft] = []
        self.channels: dict[fx.Node, _Channels] = {}
        self.used: set[str] = set()

    def visit(self, node: fx.Node) -> None:
        """Note what stands on the channel axis of one node's value."""
        layer = self.modules.get(str(node.target)) if node.op == "call_module" else None
        inputs = [self.channels[n] for n in node.all_input_nodes if n in self.channels]
        if node.op == "output":
            for value in inputs:
                if value.group is not None:
                    self.drafts[value.group].fixed = True
        elif isinstance(layer, nn.Linear | nn.Conv2d):
            self.channels[node] = self._layer(node, layer, inputs[0])
        elif node.op == "get_attr" or (layer is not None and any(True for _ in layer.parameters())):
            raise self._unknown(node)
        elif not _shape(node) and (not inputs or node.target in _SIZES):
            return  # a plain number or a size
        elif all(value.group is None for value in inputs):
            self.channels[node] = _Channels(None)
        elif len(inputs) == 1:
            self.channels[node] = self._function(node, layer, inputs[0])
        else:
            raise self._unknown(node)

    def _layer(self, node: fx.Node, layer: nn.Linear | nn.Conv2d, value: _Channels) -> _Channels:
        """A dense or convolutional layer reads one group and makes the next."""
        name, weight = str(node.target), layer.weight
        if name in self.used or f"{name}.weight" not in self.parameters:
            raise ValueError(f"module {name!r}: shared layers are not supported by Symmetry")
        self.used.add(name)
        shape = _shape(node.all_input_nodes[0])
        rank = 2 if isinstance(layer, nn.Linear) else 4
        if len(shape) != rank or (isinstance(layer, nn.Conv2d) and layer.groups != 1):
            raise ValueError(f"module {name!r} ({type(layer).__name__}, input {shape}) is not supported by Symmetry")
        if value.group is not None:
            self.drafts[value.group].entries.append(Entry(f"{name}.weight", 1, value.block))
        entries = [Entry(f"{name}.weight", 0)]
        if layer.bias is not None:
            entries.append(Entry(f"{name}.bias", 0))
        self.drafts.append(_Draft(name, weight.shape[0], entries))
        return _Channels(len(self.drafts) - 1)

    def _function(self, node: fx.Node, layer: nn.Module | None, value: _Channels) -> _Channels:
        """A function without parameters: element-wise, pooling or reshaping."""
        assert value.group is not None
        before, after = _shape(node.all_input_nodes[0]), _shape(node)
        if _is(node, layer, _HOMOGENEOUS, _HOMOGENEOUS_METHODS):
            return value
        if _is(node, layer, _ELEMENTWISE, _ELEMENTWISE_METHODS):
            self.drafts[value.group].homogeneous = False
            return value
        if _is(node, layer, _POOLING, ()) and len(before) == 4:
            return value
        if _is(node, layer, _MEAN, ("mean",)) and len(before) == 4 and after[:2] == before[:2]:
            return value
        if _is(node, layer, _RESHAPING, _RESHAPING_METHODS) and len(after) == 2 and after[0] == before[0]:
            return _Channels(value.group, value.block * math.prod(before[2:]))
        raise self._unknown(node)

    def _unknown(self, node: fx.Node) -> ValueError:
        layer = self.modules.get(str(node.target)) if node.op == "call_module" else None
        kind = type(layer).__name__ if layer is not None else getattr(node.target, "__name__", str(node.target))
        what = "module" if layer is not None else "operation"
        name = node.target if layer is not None else node.name
        return ValueError(f"{what} {str(name)!r} ({kind}): its permutation symmetry is not known to Symmetry")


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(getattr(node.meta.get("tensor_meta"), "shape", ()))


def _is(node: fx.Node, layer: nn.Module | None, known: tuple[Any, ...], methods: tuple[str, ...]) -> bool:
    if layer is not None:
        return type(layer) in known
    return node.target in methods if node.op == "call_method" else node.target in known


def _prove(symmetry: Symmetry, module: nn.Module, example: Tensor) -> None:
    """Permute each group of a float64 copy with random weights and compare the outputs."""
    replica = copy.deepcopy(module).cpu().double().eval()
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(example.shape, dtype=torch.float64, generator=generator)
    own = symmetry.layout.flatten(replica).detach()
    vector = own + 0.1 * torch.randn(own.shape, dtype=torch.float64, generator=generator)
    before = _outputs(symmetry, replica, vector, images)
    for g, group in enumerate(symmetry.groups):
        still = [torch.arange(other.size)[None] for other in symmetry.groups]
        still[g] = torch.randperm(group.size, generator=generator)[None]
        after = _outputs(symmetry, replica, symmetry.apply(vector[None], still)[0], images)
        difference = ((after - before).abs().max() / before.abs().max().clamp(min=1)).item()
        if not difference < PROOF_TOLERANCE:
            raise ValueError(f"module {group.name!r}: permuting its units changes the output by {difference:.1e}")


@torch.no_grad()
def _outputs(symmetry: Symmetry, replica: nn.Module, vector: Tensor, images: Tensor) -> Tensor:
    output: Tensor = torch.func.functional_call(replica, symmetry.layout.unflatten(vector), (images,))
    return output
