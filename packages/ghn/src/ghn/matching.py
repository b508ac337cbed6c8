"""Which node of a graph predicts which parameter of a model."""

from collections.abc import Sequence
from typing import Literal, NamedTuple

from torch import Tensor, nn

from ghn.graph import Graph, NodeInfo, stored_name
from ghn.shapes import Shape

Kind = Literal["weight", "vector", "class weight", "class bias"]
_LIGHT = ("weight", "bias", "in_proj_weight", "in_proj_bias", "pos_embedding", "layer_scale")
"""Attributes of modules that hold a shape instead of a tensor in light-weight networks."""
_WITHOUT_PARAMETER = ("input", "sum", "concat", "max_pool", "avg_pool", "glob_avg", "msa", "cse")


class Slot(NamedTuple):
    """Where a parameter stands. In a light-weight network it is a shape, and there is no tensor yet."""

    module: nn.Module
    attribute: str
    content: Tensor | Sequence[int]

    @property
    def shape(self) -> Shape:
        """Shape of the parameter."""
        return tuple(getattr(self.content, "shape", self.content))


class Target(NamedTuple):
    """A parameter that is predicted."""

    name: str
    slot: Slot
    shape: Shape
    kind: Kind
    node: int
    """Row of the embeddings from which it is predicted."""
    row: int = 0
    """Of the decoder of vectors: 0 for weights of norm layers, 1 for biases."""
    is_last: bool = False
    """Whether it belongs to the last layer of the model: the published graphs can take another for the last one."""


def parameter_slots(model: nn.Module) -> dict[str, Slot]:
    """All parameters by name; those of the model itself have a name that starts with a dot.

    Names that light-weight networks and stored graphs use are included.
    """
    slots: dict[str, Slot] = {}
    wrapped = model.module if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel) else model
    waiting = [("", wrapped)]
    while waiting:
        prefix, module = waiting.pop()
        own = vars(module)
        for name, value in module._parameters.items():
            if value is not None:
                slots[f"{prefix}.{name}"] = Slot(module, name, value)
        for name in () if own.keys().isdisjoint(_LIGHT) else _LIGHT:
            if isinstance(own.get(name), list | tuple):
                slots[f"{prefix}.{name}"] = Slot(module, name, own[name])
        before = f"{prefix}." if prefix else ""
        children = [(before + name, child) for name, child in module._modules.items() if child is not None]
        waiting += reversed(children)
    return slots


def lighten(model: nn.Module) -> None:
    """Put the shapes of all parameters, or of what was predicted in their place, where these are."""
    for slot in parameter_slots(model).values():
        slot.module._parameters.pop(slot.attribute, None)
        vars(slot.module)[slot.attribute] = slot.shape


def match(graph: Graph, model: nn.Module, first_row: int = 0) -> tuple[list[Target], list[Shape | None]]:
    """Find the parameters of a model in its graph.

    Args:
        graph: Graph of the model, traced or stored.
        model: The model.
        first_row: Row of the embeddings that belongs to the graph's first node.

    Returns:
        The parameters that the graph predicts, in the order of its nodes; and for every node the shape that describes
        it to the hypernetwork.

    Raises:
        ValueError: The graph has a node for a parameter that the model lacks, or two models are confused.
    """
    slots = parameter_slots(model)
    shapes: list[Shape | None] = list(graph.node_shapes)
    targets: list[Target] = []
    for info in (info for cell in graph.node_info for info in cell):
        if info.primitive in _WITHOUT_PARAMETER:
            continue
        name = _find(graph.node_params[info.node] or info.name, slots)
        slot = slots[name]
        shapes[info.node] = slot.shape
        targets += _targets(name, slot, info, first_row + info.node, slots)
    return targets, shapes


def _find(name: str, slots: dict[str, Slot]) -> str:
    """Key of the parameter that a graph calls ``name``."""
    # The networks of GHN-3 keep attention in a module of its own, which graphs stored before do not know.
    moved = name.replace("to_qkv", "attn.to_qkv").replace("to_out", "attn.to_out")
    spellings = (name, f"{name}.weight", moved)
    for spelling in spellings:
        if spelling in slots:
            return spelling
    for key in slots:
        if stored_name(key) in spellings:
            return key
    raise ValueError(f"the graph has a node for {name!r}, which the model has not: give the graph of this model")


def _targets(name: str, slot: Slot, info: NodeInfo, row: int, slots: dict[str, Slot]) -> list[Target]:
    shape = slot.shape
    if info.is_last_bias if len(shape) == 1 else info.is_last_weight:
        is_last = next(reversed(slots.values())).module is slot.module
        kind: Kind = "class bias" if len(shape) == 1 else "class weight"
        return [Target(name, slot, shape, kind, row, int(len(shape) == 1), is_last)]
    # An extended graph also has class tokens and scales of layers, which are vectors whatever their rank.
    is_vector = len(shape) == 1 or (info.primitive in ("bn", "ln", "pos_enc", "bias") and sum(n > 1 for n in shape) < 2)
    if not is_vector:
        return [Target(name, slot, shape, "weight", row)]
    targets = [Target(name, slot, shape, "vector", row, int(info.primitive not in ("bn", "ln")))]
    partner = name.removesuffix("weight") + "bias"
    if info.primitive in ("bn", "ln") and slot.attribute == "weight" and partner in slots:
        targets.append(Target(partner, slots[partner], slots[partner].shape, "vector", row, 1))
    return targets
