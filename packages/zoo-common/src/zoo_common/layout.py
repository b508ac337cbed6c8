"""Which number of a flat vector belongs to which tensor of a network.

Shapes: D is the number of parameters, (...) any batch axes. The order of the vector is that of ``state_dict()``, each
tensor in C order.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property, reduce
from itertools import accumulate

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TensorSpec:
    """Name, shape and dtype of one tensor, and where it starts in the vector."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: int | None = None
    """Index of the first element in the vector; None for a buffer that is kept beside it."""

    @property
    def size(self) -> int:
        """Number of elements."""
        return torch.Size(self.shape).numel()


@dataclass(frozen=True)
class ParameterLayout:
    """Order, names, shapes and dtypes of the tensors in a flat vector; equal layouts have equal ids.

    The vector holds every floating-point tensor of the state dict, floating-point buffers included. Beside it, never
    cast, stay the buffers that are not a vector of numbers to learn: integer, boolean and complex tensors, and buffers
    without axes.
    """

    tensors: tuple[TensorSpec, ...]
    """Tensors of the vector, in order."""
    buffers: tuple[TensorSpec, ...] = ()
    """Tensors kept beside the vector."""
    aliases: tuple[tuple[str, str], ...] = ()
    """Pairs (further name, name) of tied tensors, which are in the vector once."""

    @classmethod
    def from_module(cls, module: nn.Module) -> "ParameterLayout":
        """Layout of a module's state dict; works on the meta device too."""
        scalars = [name for name, tensor in module.named_buffers(remove_duplicate=False) if tensor.ndim == 0]
        return cls.from_state_dict(module.state_dict(keep_vars=True), buffers=scalars)

    @classmethod
    def from_state_dict(cls, state: Mapping[str, Tensor], buffers: Iterable[str] = ()) -> "ParameterLayout":
        """Layout of a state dict.

        Args:
            state: Name to tensor; the same memory under two names is a tied tensor.
            buffers: Names of tensors to keep beside the vector although they are floating-point.

        Raises:
            TypeError: An entry is not a tensor.
            ValueError: No tensor is floating-point.
        """
        beside = set(buffers)
        tensors: list[TensorSpec] = []
        kept: list[TensorSpec] = []
        aliases: list[tuple[str, str]] = []
        seen: dict[tuple[object, ...], str] = {}
        for name, tensor in state.items():
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name!r}: a layout holds tensors only, got {type(tensor).__name__}")
            spec = TensorSpec(name, tuple(tensor.shape), tensor.dtype)
            if name in beside or not tensor.is_floating_point():
                kept.append(spec)
                continue
            address = id(tensor) if tensor.is_meta or not spec.size else tensor.data_ptr()
            first = seen.setdefault((address, spec.shape, tensor.stride(), spec.dtype), name)
            if first == name:
                tensors.append(spec)
            else:
                aliases.append((name, first))
        if not tensors:
            raise ValueError(f"no floating-point tensor among {list(state)}: nothing to lay out")
        offsets = accumulate((spec.size for spec in tensors), initial=0)
        placed = [TensorSpec(s.name, s.shape, s.dtype, offset) for s, offset in zip(tensors, offsets, strict=False)]
        return cls(tuple(placed), tuple(kept), tuple(aliases))

    @cached_property
    def size(self) -> int:
        """D, the number of elements of the vector."""
        return sum(self.sizes)

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Names of the tensors in the vector, in order."""
        return tuple(spec.name for spec in self.tensors)

    @cached_property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """Shapes of the tensors in the vector."""
        return tuple(spec.shape for spec in self.tensors)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers of elements of the tensors in the vector."""
        return tuple(spec.size for spec in self.tensors)

    @cached_property
    def slices(self) -> dict[str, slice]:
        """Where each tensor stands in the vector."""
        stops = accumulate(self.sizes)
        return {name: slice(stop - size, stop) for name, size, stop in zip(self.names, self.sizes, stops, strict=True)}

    @cached_property
    def dtype(self) -> torch.dtype:
        """Smallest dtype that holds every tensor of the vector exactly."""
        return reduce(torch.promote_types, (spec.dtype for spec in self.tensors))

    @cached_property
    def id(self) -> str:
        """Sixteen hexadecimal digits that depend on the whole content and on nothing else."""
        return hashlib.sha256(self.to_json().encode()).hexdigest()[:16]

    def to_json(self) -> str:
        """The layout as JSON text; :meth:`from_json` is the inverse."""
        document = {
            "tensors": [_spec_document(spec) for spec in self.tensors],
            "buffers": [_spec_document(spec) for spec in self.buffers],
            "aliases": [list(pair) for pair in self.aliases],
        }
        return json.dumps(document)

    @classmethod
    def from_json(cls, text: str) -> "ParameterLayout":
        """Layout from the text of :meth:`to_json`.

        Raises:
            ValueError: The text is not a layout.
        """
        try:
            document = json.loads(text)
            tensors = tuple(_spec(entry) for entry in document["tensors"])
            buffers = tuple(_spec(entry) for entry in document["buffers"])
            aliases = tuple((str(alias), str(name)) for alias, name in document["aliases"])
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"not a parameter layout: {error!r}") from error
        layout = cls(tensors, buffers, aliases)
        offsets = list(accumulate(layout.sizes, initial=0))[:-1]
        if not tensors or [spec.offset for spec in tensors] != offsets:
            raise ValueError(f"not a parameter layout: offsets must be {offsets}, got {[s.offset for s in tensors]}")
        return layout

    def flatten(self, weights: Mapping[str, Tensor] | nn.Module) -> Tensor:
        """Weights as one vector; differentiable.

        Args:
            weights: A module, or a state dict with this layout's names and shapes. Every tensor may carry the same
                leading batch axes, as in :func:`torch.func.stack_module_state`. Tied names and buffers may be missing.

        Returns:
            (..., D) in the promoted dtype of the tensors given, a copy.

        Raises:
            ValueError: Missing, unexpected and mis-shaped entries, all in one message.
        """
        state = _state(weights)
        batch = self._check(state)
        return torch.cat([state[spec.name].reshape(*batch, spec.size) for spec in self.tensors], dim=-1)

    def unflatten(self, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
        """The tensors of a vector, as views; what :func:`torch.func.functional_call` and ``load_state_dict`` take.

        Args:
            vector: (..., D). In the layout's own dtype each tensor gets its own dtype back (bitwise); in any other
                dtype the tensors keep that of the vector.
            buffers: Tensors to add, usually those of :meth:`buffers_of`.

        Returns:
            Name to tensor (..., *shape), tied names included.

        Raises:
            ValueError: The last axis is not D.
        """
        if vector.ndim == 0 or vector.shape[-1] != self.size:
            raise ValueError(f"expected a vector of shape (..., {self.size}), got {tuple(vector.shape)}")
        own = vector.dtype == self.dtype
        parts = vector.split(self.sizes, dim=-1)
        state = {
            spec.name: part.reshape(vector.shape[:-1] + spec.shape).to(spec.dtype if own else part.dtype)
            for spec, part in zip(self.tensors, parts, strict=True)
        }
        state |= {alias: state[name] for alias, name in self.aliases}
        return state | dict(buffers or {})

    def buffers_of(self, weights: Mapping[str, Tensor] | nn.Module) -> dict[str, Tensor]:
        """The tensors that are kept beside the vector, in their own dtype (not copied)."""
        state = _state(weights)
        if missing := [spec.name for spec in self.buffers if spec.name not in state]:
            raise ValueError(f"missing buffers: {', '.join(missing)}")
        return {spec.name: state[spec.name].detach() for spec in self.buffers}

    @torch.no_grad()
    def load_into(self, module: nn.Module, vector: Tensor, buffers: Mapping[str, Tensor] | None = None) -> None:
        """Copy a vector (D,), and buffers if given, into a module of this layout.

        Raises:
            ValueError: The module or the vector has another layout; the module is not changed.
        """
        state = module.state_dict()
        weights = self.unflatten(vector, buffers)
        if problems := list(self._problems(state, ())) or list(self._problems(weights, ())):
            raise ValueError(f"the weights do not fit the module: {'; '.join(problems)}")
        for name, tensor in weights.items():
            state[name].copy_(tensor)

    def stack(self, weights: Iterable[Mapping[str, Tensor] | nn.Module]) -> Tensor:
        """Vectors (N, D) of N models."""
        return torch.stack([self.flatten(one) for one in weights])

    def _check(self, state: Mapping[str, Tensor]) -> tuple[int, ...]:
        """Batch axes that all tensors share, after a check of names, shapes and ties."""
        first = self.tensors[0]
        batch: tuple[int, ...] = ()
        if first.name in state:
            batch = tuple(state[first.name].shape[: state[first.name].ndim - len(first.shape)])
        if problems := list(self._problems(state, batch)):
            raise ValueError(f"the weights do not fit the layout: {'; '.join(problems)}")
        return batch

    def _problems(self, state: Mapping[str, Tensor], batch: tuple[int, ...]) -> Iterator[str]:
        shapes = {spec.name: spec.shape for spec in self.tensors}
        optional = {alias: shapes[name] for alias, name in self.aliases}
        optional |= {spec.name: spec.shape for spec in self.buffers}
        if missing := [name for name in shapes if name not in state]:
            yield f"missing {', '.join(missing)}"
        yield from _mismatches(state, shapes | optional, batch)
        for alias, name in self.aliases:
            if alias in state and name in state and not _same(state[alias], state[name]):
                yield f"{alias!r} differs from {name!r}, to which the layout ties it"


def _mismatches(
    state: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]], batch: tuple[int, ...]
) -> Iterator[str]:
    if unexpected := [name for name in state if name not in shapes]:
        yield f"unexpected {', '.join(unexpected)}"
    for name, shape in shapes.items():
        if name in state and tuple(state[name].shape) != (*batch, *shape):
            yield f"{name!r}: expected {(*batch, *shape)}, got {tuple(state[name].shape)}"


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.data_ptr() == b.data_ptr() and a.shape == b.shape) or torch.equal(a, b)


def _state(weights: Mapping[str, Tensor] | nn.Module) -> Mapping[str, Tensor]:
    return weights.state_dict() if isinstance(weights, nn.Module) else weights


def _spec_document(spec: TensorSpec) -> dict[str, object]:
    dtype = str(spec.dtype).removeprefix("torch.")
    return {"name": spec.name, "shape": list(spec.shape), "dtype": dtype, "offset": spec.offset}


def _spec(entry: dict[str, object]) -> TensorSpec:
    dtype = torch.empty(0, dtype=getattr(torch, str(entry["dtype"]))).dtype
    shape = tuple(int(n) for n in entry["shape"])  # type: ignore[attr-defined]
    offset = entry["offset"]
    return TensorSpec(str(entry["name"]), shape, dtype, offset if isinstance(offset, int) else None)
