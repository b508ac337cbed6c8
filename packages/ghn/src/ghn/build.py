"""From a model to the nodes and edges of its graph."""

from dataclasses import dataclass
from math import isqrt
from typing import Any, Literal

from torch import nn
from torchvision.models import SqueezeNet, SwinTransformer, VisionTransformer

from ghn import ghn3, ppuda, support
from ghn.draft import Draft, Record, draft_of
from ghn.trace import trace

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
    record = trace(model, example_inputs)
    if dialect == "ppuda":
        supported = support.published_ppuda
        draft = _ppuda(draft_of(record, 1, lambda owner: supported(owner) is not None, whole_slices=True))
    else:
        supported = support.extended if extended else support.published
        draft = draft_of(record)
        _ghn3(draft, model, supported)
    types = [_type_of(entry, supported) for entry in draft.records]
    params = [None if entry.is_op else entry.name for entry in draft.records]
    last_weight = len(draft) - 2
    shapes = [_shape_of(entry, kind, i == last_weight) for i, (entry, kind) in enumerate(zip(draft.records, types))]
    return Nodes(types, params, shapes, draft.edges())


def _ghn3(draft: Draft, model: nn.Module, supported: support.Support) -> None:
    ghn3.filter_nodes(draft, supported)
    ghn3.repair_weights(draft)
    ghn3.repair_softmax(draft)
    if isinstance(model, SwinTransformer):
        ghn3.repair_swin(draft)
    ghn3.filter_joins(draft, ghn3.in_degrees(draft))
    source = draft.add(_INPUT)
    for i, record in enumerate(draft.records):
        if not record.is_op and "weight" in support.own_name(record) and not draft.before[i]:
            draft.connect(source, i)
    draft.sort()
    if isinstance(model, VisionTransformer) or hasattr(model, "_n_cells"):
        add_position_sums(draft, supported)
    if isinstance(model, SqueezeNet):
        draft.records[-3:] = [draft.records[-1], *draft.records[-3:-1]]


def _ppuda(draft: Draft) -> Draft:
    ppuda.repair_linear(draft)
    sources = [i for i, near in enumerate(draft.before) if not near]
    source = draft.add(_INPUT)
    for i in sources:
        draft.connect(source, i)
    draft.sort()
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
    kind = supported(record)
    assert kind is not None, record.name
    return kind


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
