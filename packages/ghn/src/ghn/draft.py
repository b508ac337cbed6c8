"""A graph under construction: named nodes that are inserted, bridged over and reordered."""

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

from torch import nn

from ghn.trace import Owner, Trace


@dataclass(frozen=True, slots=True, eq=False)
class Record:
    """What a node stands for: a parameter (with its module) or an operation (with its autograd function)."""

    name: str
    module: nn.Module | None = None
    shape: tuple[int, ...] | None = None
    function: Any = None

    @property
    def is_op(self) -> bool:
        """Whether the node stands for an operation."""
        return self.module is None


class Draft:
    """Nodes in a list, each with the sets of nodes before and after it."""

    def __init__(self) -> None:
        self.records: list[Record] = []
        self.before: list[set[int]] = []
        self.after: list[set[int]] = []
        self.shared: set[str] = set()  #: parameters that are used repeatedly, where data enters at the first use alone

    def __len__(self) -> int:
        """Number of nodes."""
        return len(self.records)

    def add(self, record: Record) -> int:
        """Append a node."""
        self.records.append(record)
        self.before.append(set())
        self.after.append(set())
        return len(self.records) - 1

    def connect(self, a: int, b: int) -> None:
        """Add the edge a -> b."""
        self.after[a].add(b)
        self.before[b].add(a)

    def disconnect(self, a: int, b: int) -> None:
        """Remove the edge a -> b if it is there."""
        self.after[a].discard(b)
        self.before[b].discard(a)

    def bridge(self, i: int) -> None:
        """Connect each node before i with each after it, never a node with itself."""
        for a in self.before[i]:
            for b in self.after[i]:
                if a != b:
                    self.connect(a, b)

    def remove(self, doomed: Collection[int], *, bridged: bool = False) -> None:
        """Take nodes out, bridging over them (``bridged``: that has been done)."""
        for i in () if bridged else doomed:
            self.bridge(i)
            for a in tuple(self.before[i]):
                self.disconnect(a, i)
            for b in tuple(self.after[i]):
                self.disconnect(i, b)
        if doomed:
            gone = set(doomed)
            self.rearrange([i for i in range(len(self)) if i not in gone])

    def rearrange(self, order: list[int]) -> None:
        """Keep these nodes, in this order."""
        place = {old: new for new, old in enumerate(order)}
        self.records = [self.records[i] for i in order]
        self.before, self.after = (
            [{place[j] for j in sets[i] if j in place} for i in order] for sets in (self.before, self.after)
        )

    def insert(self, i: int, record: Record) -> None:
        """Make room for a node at position i; those from i on move up by one."""
        self.before, self.after = (
            [{j + (j >= i) for j in near} for near in sets] for sets in (self.before, self.after)
        )
        self.records.insert(i, record)
        self.before.insert(i, set())
        self.after.insert(i, set())

    def sort(self) -> bool:
        """Order topologically, generation by generation; False, and nothing changes, if there is a cycle.

        Generation 0 has the nodes without predecessors in list order. As a node is placed, its successors are looked at
        in list order; those that have no other predecessor left join the next generation.
        """
        missing = [len(near) for near in self.before]
        generation = [i for i, count in enumerate(missing) if not count]
        order: list[int] = []
        while generation:
            order += generation
            following = []
            for i in generation:
                for j in sorted(self.after[i]):
                    missing[j] -= 1
                    if not missing[j]:
                        following.append(j)
            generation = following
        if len(order) < len(self):
            return False
        self.rearrange(order)
        return True

    def edges(self) -> list[tuple[int, int]]:
        """All edges, row by row."""
        return [(a, b) for a, near in enumerate(self.after) for b in sorted(near)]


def draft_of(
    trace: Trace,
    roots: int | None = None,
    keep: Callable[[Owner], bool] = lambda owner: True,
    *,
    whole_slices: bool = False,
    shared_once: bool = False,
) -> Draft:
    """The autograd record as a graph, from the outputs back to the inputs, in the published order.

    A function that reads parameters directly is represented by them: data enters at the first of them and leaves at
    the last. Any other function is a node of its own.

    Args:
        trace: The record.
        roots: How many of the outputs to follow; default: all.
        keep: Whether a parameter gets a node.
        whole_slices: Count slices of a whole axis, which PyTorch 2.0 recorded: ``x[:, :, 1:]`` as three slices.
        shared_once: Let data enter a parameter that is used repeatedly at its first use alone, so that no cycle arises.
    """
    draft, place = Draft(), {}
    first = _first_uses(trace) if shared_once else {}
    draft.shared = {trace.leaves[leaf].name for leaf in first}
    ends: dict[Any, tuple[int, int]] = {}  # of each function: where data enters and leaves
    waiting = list(reversed(trace.roots[:roots]))
    while waiting:
        function = waiting.pop()
        if function in ends:
            continue
        below = trace.children[function]
        leaves = [child for child in below if child in trace.leaves]
        shown = [leaf for leaf in leaves if keep(trace.leaves[leaf]) and first.get(leaf, function) is function]
        if function in trace.leaves:  # an output that is a parameter
            shown = [function]
        for leaf in shown:
            if leaf not in place:
                owner = trace.leaves[leaf]
                place[leaf] = draft.add(Record(owner.name, owner.module, owner.shape))
                ends[leaf] = place[leaf], place[leaf]
        if shown:
            ends[function] = place[shown[0]], place[shown[-1]]
        else:
            entry = node = draft.add(Record(operation_name(function), function=function))
            for _ in range(_unrecorded(function, below) if whole_slices else 0):
                entry, inner = draft.add(Record("SliceBackward0")), entry
                draft.connect(entry, inner)
            ends[function] = entry, node
        waiting.extend(child for child in reversed(below) if child not in trace.leaves)
    for function, (entry, _) in tuple(ends.items()):
        for child in trace.children[function]:
            if child not in ends:
                continue  # a parameter that gets no node
            leaving = ends[child][1]
            if leaving == entry:
                continue
            owned = first.get(child, function) is function
            if owned and child in trace.leaves and "bias" in trace.leaves[child].name.rpartition(".")[2]:
                draft.connect(entry, leaving)
            else:
                draft.connect(leaving, entry)
    return draft


def _first_uses(trace: Trace) -> dict[Any, Any]:
    """For each parameter that several functions read, the one that was called first."""
    users: dict[Any, list[Any]] = {}
    for function, below in trace.children.items():
        for leaf in set(below) & trace.leaves.keys():
            users.setdefault(leaf, []).append(function)
    return {leaf: min(found, key=lambda f: f._sequence_nr()) for leaf, found in users.items() if len(found) > 1}


def _unrecorded(function: Any, below: list[Any]) -> int:  # noqa: ANN401
    """How many slices of whole axes stand before one slice of an index."""
    if not function.name().startswith("Slice"):
        return 0
    inner = below[0] if below and below[0].name().startswith("Slice") else None
    done = inner._saved_dim + 1 if inner is not None and inner._saved_dim < function._saved_dim else 0
    return int(function._saved_dim - done)


def operation_name(function: Any) -> str:  # noqa: ANN401
    """Name of an autograd function; attention computed by one fused kernel counts as the softmax in it."""
    name: str = function.name()
    fused = name.startswith("ScaledDotProduct") and "Attention" in name
    return "SoftmaxBackward0" if fused or name.startswith("SafeSoftmax") else name
