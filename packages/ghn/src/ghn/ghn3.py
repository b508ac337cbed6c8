"""The graphs of GHN-3 (2023): which nodes of an autograd record stay, and how they are joined.

The published rules look at names and at neighbours in the list; they are kept because published weights depend on the
result. A record stands for a parameter or an operation; lists run from the output back to the input.
"""

from ghn.draft import Draft, Record
from ghn.support import OPERATIONS, Support, operation_of, own_name

_HEAD = ("classifier", "fc", "head")


def filter_nodes(draft: Draft, support: Support, *, find_gates: bool) -> None:
    """Take out parameters and operations that have no type, and those operations that do not count."""
    has_cse = any("sigmoid" in (name := record.name.lower()) or "swish" in name for record in draft.records)
    degrees = in_degrees(draft)
    names = [record.name.lower() for record in draft.records]
    gates = {i for i in _with(draft, "Mul") if (has_cse and _gates(names, i)) or (find_gates and is_gate(draft, i))}
    draft.remove([i for i in _with(draft, "Mul") if i not in gates])
    # Names that begin with Add, such as Addmm, are judged as sums (published).
    joins = {i for i in _with(draft, "Add") if degrees[draft.records[i]] > 1}
    draft.remove([i for i, record in enumerate(draft.records) if i not in joins and not _is_known(record, support)])
    names = [record.name.lower() for record in draft.records]
    draft.remove([i for i in _with(draft, "Mean") if has_cse and not _near_head(names, i)])
    filter_joins(draft, degrees)


def filter_joins(draft: Draft, degrees: dict[Record, int]) -> None:
    """Take out sums and concatenations of fewer than two inputs."""
    for prefix in ("Add", "Cat"):
        draft.remove([i for i in _with(draft, prefix) if degrees[draft.records[i]] < 2])


def filter_gates(draft: Draft) -> None:
    """Take out multiplications of one value with constants, which are no gates."""
    draft.remove([i for i in _with(draft, "Mul") if len(draft.before[i]) < 2])


def in_degrees(draft: Draft) -> dict[Record, int]:
    """Number of edges that enter each node."""
    return {record: len(near) for record, near in zip(draft.records, draft.before, strict=True)}


def _with(draft: Draft, prefix: str) -> list[int]:
    """Operations whose name begins so."""
    return [i for i, record in enumerate(draft.records) if record.is_op and record.name.startswith(prefix)]


def _is_known(record: Record, support: Support) -> bool:
    return operation_of(record) in OPERATIONS if record.is_op else support(record) is not None


def _near_head(names: list[str], i: int) -> bool:
    """Whether one of the two nodes behind it is part of the classifier."""
    return i + 1 >= len(names) or names[i - 1].startswith(_HEAD) or names[i - 2].startswith(_HEAD)


def _gates(names: list[str], i: int) -> bool:
    """Whether a multiplication is that of a squeeze-excite block."""
    if _near_head(names, i):
        return False
    return (
        names[i - 2].startswith(("hard", "sigmoid"))
        or names[i - 3].startswith(("relu", "mean"))
        or names[i + 1].startswith(("hard", "sigmoid", "relu"))
    )


def is_gate(draft: Draft, i: int) -> bool:
    """Whether a multiplication scales something by a bounded function of its own means, whatever the list's order."""
    for gate in draft.before[i]:
        waiting, seen, averaged = {gate}, set[int](), set[int]()
        while waiting and len(seen) < _GATE_NODES:
            node = waiting.pop()
            seen.add(node)
            is_mean = draft.records[node].is_op and draft.records[node].name.startswith(("Mean", "AdaptiveAvgPool"))
            averaged |= draft.before[node] if is_mean else set()
            waiting |= set() if is_mean else draft.before[node] - seen
        bounded = any(draft.records[node].name.startswith(("Sigmoid", "Hard")) for node in seen)
        if not waiting and bounded and averaged & (draft.before[i] - {gate}):
            return True
    return False


_GATE_NODES = 24
"""Most nodes between the mean and the multiplication of a squeeze-excite block."""

_PRODUCTS = ("Mm", "Addmm", "Bmm", "Baddbmm", "Linear", "Mv", "Addmv")


def fed_weights(draft: Draft) -> set[str]:
    """Weights that are multiplied with something that has a node."""
    return {record.name for i, record in enumerate(draft.records) if _product(draft, i) is not None}


def _product(draft: Draft, i: int) -> int | None:
    """The operation that multiplies a linear layer's weight with data, the first one if it is shared."""
    record = draft.records[i]
    if record.is_op or "weight" not in own_name(record) or draft.before[i]:
        return None
    found = [o for o in draft.after[i] if draft.records[o].name.startswith(_PRODUCTS) and len(draft.before[o]) > 1]
    return min(found, key=lambda o: draft.records[o].function._sequence_nr(), default=None)


def feed_weights(draft: Draft, names: set[str]) -> None:
    """Let data enter these linear layers at their weights: predecessors -> weight -> (bias ->) product."""
    for i, record in enumerate(draft.records):
        product = _product(draft, i) if record.name in names else None
        if product is None:
            continue
        for a in tuple(draft.before[product] - {i}):
            bias = _bias_behind(draft, a, record)
            if bias is not None:
                draft.connect(i, bias)
                draft.disconnect(i, product)
            else:
                draft.disconnect(a, product)
                draft.connect(a, i)


def _bias_behind(draft: Draft, i: int, weight: Record) -> int | None:
    """The bias of the weight's layer from which a value is computed, if it is computed from nothing else."""
    while draft.records[i].is_op and len(draft.before[i]) == 1:
        (i,) = draft.before[i]
    record = draft.records[i]
    return i if record.module is weight.module and "bias" in own_name(record) else None


def repair_weights(draft: Draft) -> None:
    """Let data enter a linear layer at its weight: predecessors -> weight -> bias (or softmax) -> consumers."""
    for i, record in enumerate(draft.records):
        if record.is_op or "weight" not in own_name(record) or draft.before[i] or record.name in draft.shared:
            continue
        following = sorted(draft.after[i])
        for o in following:
            other = draft.records[o]
            same_layer = other.module is record.module
            into_softmax = not draft.before[i] and "softmax" in other.name.lower()
            if (same_layer or into_softmax) and draft.before[o] - {i}:
                draft.records[i], draft.records[o] = other, record
                draft.disconnect(i, o)
                consumers = draft.after[o] if len(following) == 1 else set()
                for consumer in tuple(consumers):
                    draft.disconnect(o, consumer)
                    draft.connect(i, consumer)
                draft.connect(o, i)


def repair_softmax(draft: Draft) -> None:
    """Let values enter attention at its softmax, like queries and keys."""
    frozen = [set(near) for near in draft.after]
    before = [set(near) for near in draft.before]
    for i, record in enumerate(draft.records):
        if "softmax" not in record.name.lower():
            continue
        for o in frozen[i]:
            for j in before[o] - {i}:
                only_path = not _leads(frozen, frozen[j] - {o}, o)
                if not only_path or j not in frozen[i]:
                    draft.disconnect(j, o)
                if only_path and j not in frozen[i]:
                    draft.connect(j, i)


def _leads(after: list[set[int]], starts: set[int], end: int) -> bool:
    """Whether a path leads from one of some nodes to another node."""
    seen, waiting = set(starts), list(starts)
    while waiting:
        node = waiting.pop()
        if node == end:
            return True
        fresh = after[node] - seen
        seen |= fresh
        waiting.extend(fresh)
    return False


def repair_swin(draft: Draft) -> None:
    """Lead both inputs of a stage of Swin v1 through its patch merging."""
    names = [record.name for record in draft.records]
    for i, name in enumerate(names):
        if name.endswith("norm.weight"):
            for o in tuple(draft.after[i]):
                if names[o].endswith("norm1.weight") or "Add" in names[o]:
                    draft.disconnect(i, o)
                    reduction = name.replace("norm", "reduction")
                    draft.connect(i, next(j for j, other in enumerate(names) if reduction in other))
    for i, name in enumerate(names):
        if name.endswith("attn.proj.bias"):
            for o in [o for o in draft.after[i] if names[o].endswith("reduction.weight")]:
                draft.disconnect(i, o)
                for join in [j for j in draft.after[o] if names[j].startswith("AddBackward")]:
                    draft.connect(i, join)
