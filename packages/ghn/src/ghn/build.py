"""From a model to the nodes and edges of its graph."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from torch import nn
from torchvision.models import SqueezeNet, SwinTransformer, VisionTransformer
from torchvision.models.swin_transformer import PatchMergingV2

from ghn import ghn3, ppuda, support
from ghn.draft import Draft, Record, draft_of
from ghn.trace import Trace, trace

Dialect = Literal["ghn3", "ppuda"]

#: Shape that a pooling node records where its kernel is not known.
POOLING = (1, 1, 3, 3)

_INPUT = Record("input")


@dataclass(frozen=True)
class Nodes:
    """A graph as lists: types, parameters and shapes of the nodes, and edges of length 1."""

    types: list[str]
    params: list[str | None]
    shapes: list[tuple[int, ...] | None]
    edges: list[tuple[int, int]]


def nodes_of(
    model: nn.Module,
    example_inputs: Any = None,  # noqa: ANN401
    *,
    dialect: Dialect = "ghn3",
    compat: bool = False,
    extended: bool = False,
) -> Nodes:
    """Trace a model into a graph; see :class:`ghn.Graph` for the arguments and errors."""
    while isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        model = model.module
    record = trace(model, example_inputs)
    supported = support.extended if extended else support.published
    is_deepnet = hasattr(model, "_n_cells")
    if dialect == "ppuda" and (compat or not is_deepnet):
        if isinstance(model, VisionTransformer):
            raise ValueError("the graphs of 2021 know no VisionTransformer of torchvision: use dialect='ghn3'")
        supported = support.published_ppuda
        draft = _ppuda(draft_of(record, 1, lambda owner: supported(owner) is not None, whole_slices=True))
    elif compat:
        draft, _ = _ghn3(draft_of(record), model, supported, compat=True)
    else:  # also of DeepNets networks for GHN-1 and GHN-2: in stored graphs, attention and gates have their nodes
        draft = _right(record, model, supported)
    types = [_type_of(entry, supported) for entry in draft.records]
    params = [None if entry.is_op else entry.name for entry in draft.records]
    last = class_weight(params, compat=compat)
    shapes = [
        _shape_of(entry, kind, i == last) for i, (entry, kind) in enumerate(zip(draft.records, types, strict=True))
    ]
    return Nodes(types, params, shapes, draft.edges())


def class_weight(params: Sequence[str | None], *, compat: bool) -> int:
    """Position of the classification layer's weight: before the last bias, or last if the layer has none (a fix)."""
    last = params[-1] if params else None
    return len(params) - (1 if last is not None and ".weight" in last and not compat else 2)


def _right(record: Trace, model: nn.Module, supported: support.Support) -> Draft:
    """The published graph, or, where that is wrong, one in which data enters every linear layer at its weight."""
    draft = draft_of(record, shared_once=True)
    ghn3.feed_weights(draft, draft.shared)
    draft, loose = _ghn3(draft, model, supported, compat=False)
    if loose:
        draft = draft_of(record, shared_once=True)
        ghn3.feed_weights(draft, loose | draft.shared)
        draft, _ = _ghn3(draft, model, supported, compat=False)
    if draft.records[0] is not _INPUT or any(a >= b for a, b in draft.edges() if draft.records[a] is not _INPUT):
        raise ValueError(f"the graph of {type(model).__name__} has a cycle; compat=True gives it in no order")
    return draft


def _ghn3(draft: Draft, model: nn.Module, supported: support.Support, *, compat: bool) -> tuple[Draft, set[str]]:
    """Turn an autograd record into a graph of the published kind.

    Returns:
        The graph, and the weights into which data should flow but does not. If it has a cycle, its nodes are not sorted.
    """
    fed = ghn3.fed_weights(draft)
    ghn3.filter_nodes(draft, supported, find_gates=not compat)
    ghn3.repair_weights(draft)
    ghn3.repair_softmax(draft)
    # The published repair for Swin takes the order of version 1 for granted, and makes cycles in version 2.
    if isinstance(model, SwinTransformer) and (
        compat or not any(isinstance(m, PatchMergingV2) for m in model.modules())
    ):
        ghn3.repair_swin(draft)
    ghn3.filter_joins(draft, ghn3.in_degrees(draft))
    if not compat:
        ghn3.filter_gates(draft)
    source = draft.add(_INPUT)
    if not compat:  # ahead of other sources, such as class tokens
        draft.rearrange([source, *range(source)])
        source = 0
    loose = set()
    for i, record in enumerate(draft.records):
        if not record.is_op and "weight" in support.own_name(record) and not draft.before[i]:
            draft.connect(source, i)
            loose |= {record.name} & fed
    draft.sort()
    if isinstance(model, VisionTransformer) or hasattr(model, "_n_cells"):
        add_position_sums(draft, supported)
    if isinstance(model, SqueezeNet):
        draft.records[-3:] = [draft.records[-1], *draft.records[-3:-1]]
    return draft, loose


def _ppuda(draft: Draft) -> Draft:
    ppuda.repair_linear(draft)
    sources = [i for i, near in enumerate(draft.before) if not near]
    source = draft.add(_INPUT)
    for i in sources:
        draft.connect(source, i)
    if not draft.sort():
        raise ValueError("the graph of 2021 has a cycle, as if a layer were used repeatedly: use dialect='ghn3'")
    add_position_sums(draft, support.published_ppuda)
    ppuda.filter_nodes(draft, support.published_ppuda)
    return draft


def add_position_sums(draft: Draft, supported: support.Support) -> None:
    """Part each addition of positions from their table: the table becomes a source, a sum joins it with the data."""
    i = 0
    while i < len(draft):
        record = draft.records[i]
        if not record.is_op and supported(record) == "pos_enc":
            draft.insert(i, record)
            draft.records[i + 1] = Record("AddBackward0")
            draft.connect(i, i + 1)
            i += 1
        i += 1


def _type_of(record: Record, supported: support.Support) -> str:
    if record is _INPUT:
        return "input"
    if record.is_op:
        kind = support.operation_of(record)
        return "msa" if kind == "Clone" else support.OPERATIONS.get(kind, "sum")
    found = supported(record)
    assert found is not None, record.name
    return found


def _shape_of(record: Record, kind: str, is_last_weight: bool) -> tuple[int, ...] | None:
    """Shape that a node records: of its parameter, or of the kernel of a pooling operation."""
    if record.is_op:
        if not kind.endswith("pool"):
            return None
        kernel = getattr(record.function, "_saved_kernel_size", POOLING[2:])
        return (1, 1, *(kernel if len(kernel) == 2 else kernel * 2))
    shape = record.shape
    assert shape is not None, record.name
    if len(shape) == 3 and shape[0] == 1 and min(shape[1:]) > 1:
        return (1, shape[2], isqrt(shape[1]), isqrt(shape[1]))
    if is_last_weight and len(shape) == 4 and shape[2:] == (1, 1):
        return shape[:2]
    return shape
