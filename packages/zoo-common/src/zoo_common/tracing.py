"""Following hidden units through a traced network: which positions of which tensors belong to the same unit.

Every element of an intermediate value carries a label. A layer gives new labels to the units it makes; operations that
move numbers move labels alike; operations that combine numbers unite their labels. Label 0 stands for what must keep its
place. In the end each class of united labels is one unit, and units that stand in the same tensors in the same way may
change places.

The same walk finds two symmetries. *Permutations*: labels pass through anything that treats all units alike.
*Scales*: a unit times a > 0 where it is made and 1/a where it is read; labels pass through positively homogeneous
functions only, and normalisations make new ones.

Shapes: label tensors (int64) have the shape of the value they describe; None stands for all zeros.
"""

import copy
import inspect
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from torch import Tensor, fx, nn

from zoo_common.layout import ParameterLayout
from zoo_common.rules import RULES, Labels, UnknownOperation, label_tensors, layer_rule, varying

_TORCH = str(Path(torch.__file__).parent)


@dataclass(frozen=True, eq=False)
class Entry:
    """Where the units of a group stand in one tensor."""

    tensor: str
    axis: int
    positions: Tensor
    """(s, k) int64: the k positions of each unit on the axis."""
    block: int | None
    """k, if the units fill the whole axis in order, with k positions each; else None."""
    reads: bool = False
    """Whether the tensor reads the units (columns of a dense layer) and does not make them; decides how it is scaled."""


@dataclass(frozen=True, eq=False)
class Group:
    """Units of one kind: they may be permuted among each other (or scaled, each by its own factor)."""

    name: str
    """Module that makes the units."""
    size: int
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Traced:
    """What a walk found."""

    groups: tuple[Group, ...]
    fixed: dict[str, str]
    """Modules whose units must keep their places, and why."""


def trace(module: nn.Module, examples: Sequence[Tensor], *, scaling: bool = False) -> Traced:
    """Find the groups of a network in evaluation mode.

    Args:
        module: The network; neither changed nor copied.
        examples: Its inputs (only shapes and kinds count).
        scaling: Look for units that may be scaled and not for units that may be permuted.

    Raises:
        ValueError: The network cannot be traced by ``torch.fx``; the message has the line of its code.
    """
    twin, walk = _on_meta(module), None
    try:
        parameters = list(inspect.signature(module.forward).parameters.values())[len(examples) :]
        constants = {p.name: p.default for p in parameters if p.default is not p.empty}
        graph = _Tracer().trace(twin, constants)
        walk = Walk(fx.GraphModule(twin, graph), ParameterLayout.from_module(module), scaling)
        walk.run(*(example.to("meta", torch.float64 if example.is_floating_point() else None) for example in examples))
    except Exception as error:  # whatever the network's own code raises
        frames = "".join(traceback.format_tb(error.__traceback__)) if walk is None else walk.frames
        text = str(error).split("\n", 1)[0]
        raise ValueError(f"cannot trace {type(module).__name__}: {text}{_user_line(frames)}") from error
    return walk.result()


class _Tracer(fx.Tracer):
    """Notes where each operation stands; ``record_stack_traces`` would import torch's compiler, which takes seconds."""

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:  # noqa: ANN401
        """A node with the stack that led to it."""
        node = super().create_node(*args, **kwargs)
        node.stack_trace = "".join(traceback.format_stack())
        return node


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without data, in float64 and evaluation mode."""
    memo: dict[int, Any] = {}
    for tensor in (*module.parameters(), *module.buffers()):
        empty = torch.empty_like(tensor, device="meta")
        memo[id(tensor)] = nn.Parameter(empty) if isinstance(tensor, nn.Parameter) else empty
    return copy.deepcopy(module, memo).double().eval()


def _user_line(frames: str) -> str:
    """The innermost line of a formatted stack that belongs neither to torch nor to this module."""
    lines = re.findall(r'File "(.*)", line (\d+), in .*\n\s*(.*)', frames)
    own = [f" (line {line} of {file}: {code})" for file, line, code in lines if not file.startswith((_TORCH, __file__))]
    return own[-1] if own else ""


class Walk(fx.Interpreter):
    """Runs a graph on tensors without data and labels every value on the way."""

    def __init__(self, traced: fx.GraphModule, layout: ParameterLayout, scaling: bool) -> None:
        super().__init__(traced)
        self.layout = layout
        self.scaling = scaling
        self.shapes = dict(zip(layout.names, layout.shapes, strict=True))
        self.names = dict(layout.aliases) | {name: name for name in layout.names}
        self.count = 1
        self.edges: list[tuple[Tensor, Tensor]] = []
        self.axes: dict[tuple[str, int, bool], Tensor] = {}
        """(tensor, axis, reads) to the labels of the positions on it."""
        self.elements: dict[str, Tensor] = {}
        """Labels of the elements of tensors that are used as values."""
        self.frozen: list[tuple[Tensor, str]] = []
        self.parts: list[Tensor] = []
        """Labels that an operation has picked from others."""
        self.labels: dict[fx.Node, Any] = {}
        self.reason = self.frames = ""
        self.roles: dict[str, dict[str, set[tuple[int, bool]]]] = {}
        """For each tensor, by operation, the axes on which it makes and reads units."""

    # Labels

    def new(self, count: int) -> Tensor:
        """Labels that nothing has so far, (count,)."""
        self.count += count
        return torch.arange(self.count - count, self.count)

    def unite(self, a: Labels, b: Labels) -> None:
        """Make elements of two label tensors (broadcastable) belong together."""
        if a is None and b is None:
            return
        zero = torch.zeros((), dtype=torch.int64)
        a, b = torch.broadcast_tensors(zero if a is None else a, zero if b is None else b)
        for axis in range(a.ndim):
            if a.stride(axis) == b.stride(axis) == 0:
                a, b = a.narrow(axis, 0, 1), b.narrow(axis, 0, 1)
        pairs = torch.unique(a.flatten() * self.count + b.flatten())
        first, second = pairs // self.count, pairs % self.count
        self.edges.append((first[first != second], second[first != second]))

    def freeze(self, labels: Labels, reason: str | None = None) -> None:
        """Fix units to their places."""
        if labels is not None:
            self.frozen.append((torch.unique(labels), reason or self.reason))
            self.unite(labels, None)

    def axis(self, name: str, axis: int, *, reads: bool = False) -> Tensor:
        """Labels of the positions on one axis of a tensor, new ones at the first use."""
        if name not in self.names:
            raise UnknownOperation
        key = (self.names[name], axis, reads and self.scaling)
        self.roles.setdefault(key[0], {}).setdefault(self.operation, set()).add(key[1:])
        if key not in self.axes:
            self.axes[key] = self.new(self.shapes[key[0]][axis])
        return self.axes[key]

    def value_of(self, name: str) -> Labels:
        """Labels of the elements of a tensor that is used as a value."""
        if name not in self.names:
            return None
        own = self.names[name]
        if own not in self.elements:
            shape = self.shapes[own]
            self.elements[own] = self.new(int(np.prod(shape))).reshape(shape)
        return self.elements[own]

    def along(self, labels: Labels, axis: int, size: int) -> Tensor:
        """Labels (size,) along one axis, those on all other axes united."""
        if labels is None:
            return torch.zeros(size, dtype=torch.int64)
        rows = labels.movedim(axis, 0)
        first = rows[(slice(None),) + (0,) * (rows.ndim - 1)]
        if varying(labels) - {axis % labels.ndim}:
            self.unite(rows, first.reshape(-1, *[1] * (rows.ndim - 1)))
        return first

    def bundle(self, labels: Tensor, axes: Iterable[int]) -> Tensor:
        """If units differ along ``axes`` and along others too, those along ``axes`` move together; (…, 1, …)."""
        chosen = {axis % labels.ndim for axis in axes}
        first = labels
        for axis in chosen:
            first = first.narrow(axis, 0, 1)
        found = varying(labels)
        if found & chosen and found - chosen:
            found = varying(torch.from_numpy(self._classes(self.edges)[labels.numpy()]))
        if found & chosen and found - chosen:
            self.unite(labels, first)
        return first

    # The walk

    def run_node(self, n: fx.Node) -> Any:  # noqa: ANN401
        """Compute a value without data, and its labels."""
        self.frames, self.operation = n.stack_trace or "", n.name
        value = super().run_node(n)
        self.reason = self._where(n)
        args, kwargs = fx.node.map_arg((n.args, n.kwargs), self._labels_of)
        try:
            self.labels[n] = self._label(n, value, args, kwargs)
        except UnknownOperation:
            for labels in label_tensors((args, kwargs)):
                self.freeze(labels)
            self.labels[n] = None
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:  # noqa: ANN401
        """Attention without its fast path, which needs data."""
        layer = self.fetch_attr(target)
        if isinstance(layer, nn.MultiheadAttention):
            return torch.empty_like(args[0] if args else kwargs["query"]), None
        return super().call_module(target, args, kwargs)

    def _labels_of(self, node: fx.Node) -> Any:  # noqa: ANN401
        if node.op == "get_attr":
            return self.value_of(str(node.target))
        return self.labels.get(node)

    def _label(self, node: fx.Node, value: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
        """Labels of a node's value; ``UnknownOperation`` if there is no rule for it."""
        if node.op in ("placeholder", "get_attr"):
            return None
        if node.op == "output":
            for labels in label_tensors(args):
                self.freeze(labels, "its units are outputs of the network")
            return None
        layer = self.fetch_attr(str(node.target)) if node.op == "call_module" else None
        if layer is not None and (rule := layer_rule(layer)):
            return rule(self, str(node.target), layer, value, *args, **kwargs)
        if not label_tensors((args, kwargs)):
            return None
        kind: Any = type(layer) if layer is not None else node.target
        name = f"{getattr(kind, '__module__', '')}.{getattr(kind, '__name__', '')}"
        if rule := RULES.get(kind) or RULES.get(name):
            return rule(self, node, layer, value, args, kwargs)
        if isinstance(value, Tensor | tuple | list) and _holds_tensor(value):
            raise UnknownOperation
        return None  # a number or a shape

    def _where(self, node: fx.Node) -> str:
        """The operation in words, with the line of the user's code."""
        if node.op == "call_module":
            return f"module {str(node.target)!r} ({type(self.fetch_attr(str(node.target))).__name__}) has no known symmetry"
        kind = getattr(node.target, "__name__", str(node.target))
        return f"operation {kind!r}{_user_line(self.frames)} has no known symmetry"

    # The result

    def result(self) -> Traced:
        """Sort units into groups."""
        self._pin_contradictions()
        while True:
            classes = self._classes(self.edges)
            places = {key: classes[labels.numpy()] for key, labels in self.axes.items()}
            crooked = [name for name in self.elements if not self._place(name, classes, places)]
            if not crooked:
                break
            for name in crooked:
                self.freeze(self.elements.pop(name), "it is used in a way that has no known symmetry")
        order = {name: i for i, name in enumerate(self.layout.names)}
        slots = sorted(places, key=lambda key: (order[key[0]], key[1], key[2]))
        return Traced(tuple(self._groups(classes, places, slots)), self._fixed(places, slots))

    def _pin_contradictions(self) -> None:
        """Fix units whose tensors are used in two ways that would need different moves."""
        for name, uses in self.roles.items():
            roles = list(uses.values())
            if name in self.elements:
                self.freeze(self.elements.pop(name), "its weights are used by a layer and as a value")
            elif not self.scaling or all(role == roles[0] for role in roles):
                continue
            for key in (key for key in self.axes if key[0] == name):
                self.freeze(self.axes[key], "its weights make units in one place and read them in another")

    def _classes(self, edges: Sequence[tuple[Tensor, Tensor]]) -> np.ndarray:
        """Class of every label; 0 is that of label 0."""
        rows = [torch.cat([edge[i] for edge in edges] or [torch.zeros(0, dtype=torch.int64)]).numpy() for i in (0, 1)]
        ones = np.ones(len(rows[0]), dtype=np.int8)
        _, classes = connected_components(coo_array((ones, rows), shape=(self.count, self.count)), directed=False)
        return np.where(classes == classes[0], 0, classes + 1)

    def _place(self, name: str, classes: np.ndarray, places: dict[tuple[str, int, bool], np.ndarray]) -> bool:
        """Put a tensor that is used as a value on one of its axes; False if it does not depend on one alone."""
        found = classes[self.elements[name].numpy()]
        if not found.any():
            return True
        for axis in range(found.ndim):
            rows = np.moveaxis(found, axis, 0).reshape(found.shape[axis], -1)
            if (rows == rows[:, :1]).all():
                places[name, axis, False] = rows[:, 0]
                return True
        return False

    def _groups(
        self, classes: np.ndarray, places: dict[tuple[str, int, bool], np.ndarray], slots: Sequence[Any]
    ) -> Iterable[Group]:
        """Units of one kind: in the same slots equally often, and picked by the same operations."""
        marks: dict[int, tuple[int, ...]] = {}
        for i, labels in enumerate(self.parts):
            for unit in np.unique(classes[labels.numpy()]).tolist():
                marks[unit] = (*marks.get(unit, ()), i)
        kinds: dict[Any, list[np.ndarray]] = {}
        for unit, slot_of, position in _by_unit([places[slot] for slot in slots]):
            kinds.setdefault((slot_of.tobytes(), marks.get(unit, ())), []).append(position)
        tables: dict[tuple[int, bytes], Tensor] = {}
        found = []
        for (slot_bytes, _), members in kinds.items():
            own = np.frombuffer(slot_bytes, dtype=np.int64)
            members.sort(key=lambda row: int(row[0]))
            if len(members) > 1 or self.scaling:
                found.append((int(own[0]), int(members[0][0]), own, np.stack(members)))
        for _, _, own, table in sorted(found, key=lambda entry: entry[:2]):
            entries = []
            for slot in dict.fromkeys(own.tolist()):
                name, axis, reads = slots[slot]
                rows = table[:, own == slot]
                same = tables.setdefault((len(rows), rows.tobytes()), torch.from_numpy(rows.copy()))
                whole = np.array_equal(rows.ravel(), np.arange(self.shapes[name][axis]))
                entries.append(Entry(name, axis, same, rows.shape[1] if whole else None, reads))
            yield Group(_module_of(slots[own[0]][0]), len(table), tuple(entries))

    def _fixed(self, places: dict[tuple[str, int, bool], np.ndarray], slots: Sequence[Any]) -> dict[str, str]:
        """Modules that make units of which none is in a group, and the reason."""
        free = self._classes([(a[(a != 0) & (b != 0)], b[(a != 0) & (b != 0)]) for a, b in self.edges])
        reasons: dict[int, str] = {}
        for labels, reason in self.frozen:
            reasons |= {c: reason for c in np.unique(free[labels.numpy()]).tolist() if c and c not in reasons}
        fixed: dict[str, str] = {}
        for slot in slots:
            name, axis, reads = slot
            if axis == 0 and not reads and slot in self.axes and not places[slot].any():
                known = [reasons[c] for c in free[self.axes[slot].numpy()].tolist() if c in reasons]
                fixed.setdefault(_module_of(name), known[0] if known else "its units stand beside fixed ones")
        return fixed


def _by_unit(places: Sequence[np.ndarray]) -> Iterator[tuple[int, np.ndarray, np.ndarray]]:
    """Each unit but 0, with the slots and the positions in them where it stands, in order."""
    counts = [len(units) for units in places]
    units = np.concatenate([np.zeros(0, np.int64), *places])
    slot_of = np.repeat(np.arange(len(places)), counts)
    position = np.concatenate([np.zeros(0, np.int64), *map(np.arange, counts)])
    order = np.argsort(units, kind="stable")[np.count_nonzero(units == 0) :]
    starts = np.flatnonzero(np.diff(units[order], prepend=0))
    for rows in np.split(order, starts[1:]) if len(starts) else ():
        yield int(units[rows[0]]), slot_of[rows], position[rows]


def _module_of(tensor: str) -> str:
    return tensor.rpartition(".")[0] or tensor


def _holds_tensor(value: Any) -> bool:  # noqa: ANN401
    return isinstance(value, Tensor) or any(isinstance(item, Tensor) for item in value)
