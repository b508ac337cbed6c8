"""What each layer and operation does to the labels of units (see :mod:`zoo_common.tracing`).

A rule takes the walk, the layer or node, the value without data and the labels of the inputs, and returns the labels of
the value. Where it does not apply it raises :class:`UnknownOperation`, and the units that it meets keep their places.
"""

import operator
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

if TYPE_CHECKING:
    from zoo_common.tracing import Walk

Labels = Tensor | None


class UnknownOperation(Exception):
    """The operation is in no table; its inputs keep their places."""


_HOMOGENEOUS = {
    *(nn.ReLU, nn.LeakyReLU, nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
    *(F.relu, F.leaky_relu, F.dropout, torch.relu, torch.abs, torch.neg, operator.neg, torch.clone, abs),
    *("relu", "relu_", "contiguous", "clone", "abs", "neg", "detach", "to", "float", "double", "type_as"),
    "torchvision.ops.stochastic_depth.stochastic_depth",
}
_ELEMENTWISE = {
    *(nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish, nn.Tanh, nn.Sigmoid, nn.Softplus, nn.Softsign, nn.ReLU6),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LogSigmoid, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink),
    *(F.elu, F.selu, F.celu, F.gelu, F.silu, F.mish, F.softplus, F.softsign, F.relu6, F.hardtanh, F.hardswish),
    *(F.hardsigmoid, F.logsigmoid, F.tanh, F.sigmoid, torch.tanh, torch.sigmoid, torch.selu, torch.sin, torch.cos),
    *(torch.exp, torch.log, torch.sqrt, torch.rsqrt, torch.square, torch.clamp, torch.pow, operator.pow, torch.erf),
    *("tanh", "sigmoid", "sin", "cos", "exp", "log", "sqrt", "rsqrt", "square", "clamp", "pow", "tanh_", "sigmoid_"),
}
_RESIZING = {  # acts on each channel alone and in the same way
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d, nn.Upsample),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d, F.interpolate),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d, F.lp_pool2d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
}
_MOVING = {  # only moves numbers: is applied to the labels as it is
    *(nn.Flatten, nn.Unflatten, nn.PixelShuffle, nn.PixelUnshuffle, nn.ChannelShuffle),
    *(torch.flatten, torch.reshape, torch.permute, torch.transpose, torch.squeeze, torch.unsqueeze, torch.cat),
    *(torch.concat, torch.stack, torch.chunk, torch.split, torch.unbind, torch.movedim, torch.flip, torch.roll),
    *(torch.narrow, torch.select, torch.swapaxes, torch.t, torch.tile, torch.unflatten, operator.getitem),
    *(F.pixel_shuffle, F.pixel_unshuffle, F.channel_shuffle, torch.repeat_interleave),
    *("flatten", "view", "reshape", "permute", "transpose", "squeeze", "unsqueeze", "chunk", "split", "unbind"),
    *("movedim", "flip", "roll", "narrow", "select", "swapaxes", "t", "expand", "expand_as", "repeat", "unflatten"),
    *("repeat_interleave",),
}
_REDUCING = {torch.mean, torch.sum, torch.amax, torch.amin, "mean", "sum", "amax", "amin"}
_SPREADING = {torch.var, torch.std, torch.norm, torch.logsumexp, "var", "std", "norm", "logsumexp"}
_NORMALIZING = {nn.Softmax, nn.LogSoftmax, F.softmax, F.log_softmax, F.normalize, "softmax", "log_softmax"}
_ADDING = {
    *(operator.add, operator.iadd, operator.sub, operator.isub, torch.add, torch.sub, torch.maximum, torch.minimum),
    *("add", "add_", "sub", "sub_"),
}
_MULTIPLYING = {
    *(operator.mul, operator.imul, operator.truediv, operator.itruediv, torch.mul, torch.div, torch.multiply),
    *("mul", "mul_", "div", "div_"),
}
_MATMUL = {torch.matmul, torch.bmm, operator.matmul, "matmul", "bmm"}
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_BATCH_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


def varying(labels: Tensor) -> set[int]:
    """Axes along which labels differ."""
    return {
        axis
        for axis in range(labels.ndim)
        if labels.shape[axis] > 1 and labels.stride(axis) and (labels != labels.narrow(axis, 0, 1)).any()
    }


def label_tensors(value: Any) -> list[Tensor]:  # noqa: ANN401
    """All label tensors in nested arguments."""
    found: list[Tensor] = []
    fx.node.map_aggregate(value, lambda item: found.append(item) if isinstance(item, Tensor) else None)
    return found


def _spread(labels: Tensor, axis: int, shape: Sequence[int]) -> Tensor:
    """Labels (size,) of one axis as labels of a value, constant along all others."""
    view = [1] * len(shape)
    view[axis] = -1
    return labels.reshape(view).expand(*shape)


# Rules for layers: (walk, name, layer, value, labels of the inputs ...) -> labels of the value


def _linear(walk: "Walk", name: str, layer: nn.Linear, value: Tensor, x: Labels) -> Labels:
    """Units along the last axis are read, others pass."""
    if x is not None and (found := varying(x)) and x.ndim - 1 not in found:
        if walk.scaling:
            raise UnknownOperation
        return x.narrow(-1, 0, 1).expand(value.shape)
    walk.unite(walk.axis(f"{name}.weight", 1, reads=True), walk.along(x, -1, layer.in_features))
    return _spread(_made(walk, name, layer), -1, value.shape)


def _made(walk: "Walk", name: str, layer: Any, axis: int = 0) -> Tensor:  # noqa: ANN401
    """The units that a layer makes, on an axis of its weight and in its bias."""
    units = walk.axis(f"{name}.weight", axis)
    if layer.bias is not None:
        walk.unite(walk.axis(f"{name}.bias", 0), units)
    return units


def _convolution(walk: "Walk", name: str, layer: nn.Conv2d, value: Tensor, x: Labels) -> Labels:
    """Channel groups stay together; each channel of a depthwise convolution is the unit it reads."""
    if value.ndim != layer.weight.ndim:
        raise UnknownOperation
    read, made = walk.along(x, 1, layer.in_channels), _made(walk, name, layer)
    if layer.groups == 1:
        walk.unite(walk.axis(f"{name}.weight", 1, reads=True), read)
    elif not walk.scaling:
        read, rows = read.reshape(layer.groups, -1), made.reshape(layer.groups, -1)
        if x is None:
            walk.freeze(rows, f"module {name!r} ({type(layer).__name__}) reads each input with units of its own")
        walk.unite(read, read[:, :1])
        walk.unite(rows, read[:, :1])
    elif layer.groups == layer.in_channels:
        walk.unite(
            walk.axis(f"{name}.weight", 0, reads=True), read.repeat_interleave(layer.out_channels // layer.groups)
        )
    else:
        walk.freeze(x)
    return _spread(made, 1, value.shape)


def _transposed(walk: "Walk", name: str, layer: nn.ConvTranspose2d, value: Tensor, x: Labels) -> Labels:
    if layer.groups != 1 or value.ndim != layer.weight.ndim:
        raise UnknownOperation
    walk.unite(walk.axis(f"{name}.weight", 0, reads=True), walk.along(x, 1, layer.in_channels))
    return _spread(_made(walk, name, layer, axis=1), 1, value.shape)


def _batch_norm(walk: "Walk", name: str, layer: nn.BatchNorm2d, value: Tensor, x: Labels) -> Labels:
    if walk.scaling:
        walk.freeze(x)
        return _spread(_made(walk, name, layer), 1, value.shape) if layer.affine else None
    if x is None:
        return None
    units = walk.along(x, 1, layer.num_features)
    for part in ("weight", "bias", "running_mean", "running_var"):
        if getattr(layer, part) is not None:
            walk.unite(walk.axis(f"{name}.{part}", 0), units)
    return x


def _group_norm(walk: "Walk", name: str, layer: nn.GroupNorm, value: Tensor, x: Labels) -> Labels:
    if walk.scaling:
        walk.freeze(x)
        return _spread(_made(walk, name, layer), 1, value.shape) if layer.affine else None
    if x is None:
        return None
    units = walk.along(x, 1, layer.num_channels)
    if layer.num_groups > 1:
        groups = units.reshape(layer.num_groups, -1)
        walk.unite(groups, groups[:, :1])
    if layer.affine:
        walk.unite(_made(walk, name, layer), units)
    return x


def _layer_norm(walk: "Walk", name: str, layer: nn.LayerNorm, value: Tensor, x: Labels) -> Labels:
    parts = [f"{name}.{part}" for part in ("weight", "bias") if getattr(layer, part, None) is not None]
    return _normalized(walk, value, x, len(layer.normalized_shape), [walk.value_of(part) for part in parts])


def _normalized(walk: "Walk", value: Tensor, x: Labels, axes: int, parts: Sequence[Labels]) -> Labels:
    """Normalisation over the last axes, then a weight and a bias."""
    known = [part for part in parts if part is not None]
    if walk.scaling:
        walk.freeze(x)
        for part in known[1:]:
            walk.unite(part, known[0])
        return known[0].expand(value.shape) if known else None
    if x is None:
        for part in known:
            walk.freeze(part)
        return None
    units = x
    for part in known:
        units = _combine(walk, part, units, value)
    walk.bundle(units, range(-axes, 0))
    return units


def _prelu(walk: "Walk", name: str, layer: nn.PReLU, value: Tensor, x: Labels) -> Labels:
    if layer.num_parameters > 1 and x is not None and not walk.scaling:
        walk.unite(walk.axis(f"{name}.weight", 0), walk.along(x, 1, layer.num_parameters))
    return x


def _embedding(walk: "Walk", name: str, layer: nn.Embedding, value: Tensor, x: Labels) -> Labels:
    return _spread(walk.axis(f"{name}.weight", 1), -1, value.shape)


def _attention(
    walk: "Walk",
    name: str,
    layer: nn.MultiheadAttention,
    value: tuple[Tensor, None],
    query: Labels,
    key: Labels,
    values: Labels,
    *rest: object,
    **options: object,
) -> tuple[Labels, Labels]:
    """Heads may change places; what belongs to one head stays together."""
    if layer.bias_k is not None or label_tensors((rest, options)):
        raise UnknownOperation
    inputs = (query, key, values)
    sizes = (layer.embed_dim, layer.kdim, layer.vdim)
    read = [walk.along(x, -1, size) for x, size in zip(inputs, sizes, strict=True)]
    if layer.in_proj_weight is not None:
        for labels in read:
            walk.unite(walk.axis(f"{name}.in_proj_weight", 1, reads=True), labels)
        rows = list(walk.axis(f"{name}.in_proj_weight", 0).chunk(3)) if not walk.scaling else []
    else:
        parts = [f"{name}.{part}_proj_weight" for part in "qkv"]
        for part, labels in zip(parts, read, strict=True):
            walk.unite(walk.axis(part, 1, reads=True), labels)
        rows = [walk.axis(part, 0) for part in parts] if not walk.scaling else []
    if rows:
        if layer.in_proj_bias is not None:
            walk.unite(walk.axis(f"{name}.in_proj_bias", 0), torch.cat(rows))
        q, k, v = (row.reshape(layer.num_heads, -1) for row in rows)
        walk.unite(q, k)
        if layer.num_heads > 1:
            walk.unite(torch.cat([q, v], 1), q[:, :1])
        walk.unite(walk.axis(f"{name}.out_proj.weight", 1, reads=True), rows[2])
    out = _made(walk, f"{name}.out_proj", layer.out_proj)
    return _spread(out, -1, value[0].shape), None


_LAYER_RULES: tuple[tuple[tuple[type, ...], Callable[..., Any]], ...] = (
    ((nn.Linear,), _linear),
    (_CONVOLUTIONS, _convolution),
    (_TRANSPOSED, _transposed),
    (_BATCH_NORMS, _batch_norm),
    ((nn.GroupNorm,), _group_norm),
    ((nn.LayerNorm, nn.RMSNorm), _layer_norm),
    ((nn.PReLU,), _prelu),
    ((nn.Embedding,), _embedding),
    ((nn.MultiheadAttention,), _attention),
)


def layer_rule(layer: nn.Module) -> Callable[..., Any] | None:
    """The rule for a layer with parameters, if there is one."""
    return next((rule for kinds, rule in _LAYER_RULES if isinstance(layer, kinds)), None)


# Rules for operations: (walk, node, layer or None, value, labels of the arguments) -> labels of the value


def _pass(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """Element-wise and positively homogeneous."""
    (labels,) = _one(args, kwargs)
    return labels


def _element_wise(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    (labels,) = _one(args, kwargs)
    if walk.scaling:
        raise UnknownOperation
    return labels


def _resize(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    (labels,) = _one(args, kwargs)
    if not isinstance(value, Tensor) or value.ndim != labels.ndim or value.ndim < 3:
        raise UnknownOperation
    return _spread(walk.along(labels, 1, labels.shape[1]), 1, value.shape)


def _move(walk: "Walk", node: fx.Node, layer: Any, value: Any, args: Any, kwargs: Any) -> Any:  # noqa: ANN401
    """The same operation on labels; those it picks from others are told apart from the rest."""

    def numbered(item: Any) -> Any:  # noqa: ANN401
        if not isinstance(item, fx.Node):
            return item
        labels, data = walk._labels_of(item), walk.env[item]
        if labels is None and isinstance(data, Tensor):
            return torch.zeros((), dtype=torch.int64).expand(data.shape)
        return data if labels is None else labels

    args, kwargs = fx.node.map_arg(node.args, numbered), fx.node.map_arg(node.kwargs, numbered)
    try:
        if layer is not None:
            moved = layer(*args, **kwargs)
        elif node.op == "call_method":
            method = "reshape" if node.target == "view" else str(node.target)
            moved = getattr(args[0], method)(*args[1:], **kwargs)
        else:
            moved = node.target(*args, **kwargs)  # type: ignore[operator]
    except (RuntimeError, TypeError, IndexError, NotImplementedError) as error:
        raise UnknownOperation from error
    before = torch.unique(torch.cat([labels.flatten() for labels in label_tensors((args, kwargs))]))
    for labels in label_tensors(moved):
        if len(picked := torch.unique(labels)) < len(before):
            walk.parts.append(picked[picked > 0])
    return moved


def _pad(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """Padding repeats units along an axis on which all elements are one unit; elsewhere it is fixed."""
    (labels,) = _one(args, kwargs)
    pad: Any = node.args[1] if len(node.args) > 1 else node.kwargs["pad"]
    found, padded = varying(labels), []
    for i in range(labels.ndim):
        low, high = (pad[2 * i], pad[2 * i + 1]) if 2 * i + 1 < len(pad) else (0, 0)
        axis = labels.ndim - 1 - i
        if axis not in found:
            labels = labels.narrow(axis, 0, 1).expand(
                *labels.shape[:axis], value.shape[axis], *labels.shape[axis + 1 :]
            )
            low = high = 0
        elif walk.scaling or min(low, high) < 0:
            raise UnknownOperation
        padded += [low, high]
    return F.pad(labels, padded)


def _reduce(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """Sums, means and the like over some axes."""
    (labels,) = _one(args, kwargs)
    options = dict(zip(("dim", "keepdim"), node.args[1:], strict=False)) | node.kwargs
    dim: Any = options.get("dim", options.get("axis"))
    axes = range(labels.ndim) if dim is None else [dim] if isinstance(dim, int) else dim
    chosen = {axis % labels.ndim for axis in axes}
    if walk.scaling and (node.target in _SPREADING or varying(labels) & chosen):
        raise UnknownOperation
    first = walk.bundle(labels, chosen)
    if not varying(labels) - chosen:
        return None if varying(labels) else labels.flatten()[0].expand(value.shape)
    return first.reshape(value.shape)


def _normalize(walk: "Walk", node: fx.Node, layer: Any, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """Softmax and the like along one axis."""
    (labels,) = _one(args, kwargs)
    position = 2 if node.target is F.normalize else 1
    given = node.args[position] if len(node.args) > position else None
    dim = layer.dim if layer is not None else node.kwargs.get("dim", given)
    if walk.scaling or not isinstance(dim, int):
        raise UnknownOperation
    walk.bundle(labels, [dim])
    return labels


def _binary(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """Sums and products of two values, or of a value and a number."""
    if len(args) != 2 or set(kwargs) - {"alpha"}:
        raise UnknownOperation
    first, second = args
    data = [walk.env[arg] if isinstance(arg, fx.Node) else arg for arg in node.args]
    if not walk.scaling:
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            return _combine(walk, first, second, value)
        labels, other = (first, data[1]) if isinstance(first, Tensor) else (second, data[0])
        labels = labels.expand(value.shape)
        if isinstance(other, Tensor) and varying(labels) & _axes_of(other, value.ndim):
            walk.freeze(labels)
        return labels
    if node.target in _MULTIPLYING:
        if isinstance(first, Tensor) and isinstance(second, Tensor):
            raise UnknownOperation
        if first is None and node.target in (operator.truediv, torch.div, "div", "div_"):
            raise UnknownOperation
        return (first if isinstance(first, Tensor) else second).expand(value.shape)
    if not (isinstance(first, Tensor) and isinstance(second, Tensor)):
        raise UnknownOperation
    return _combine(walk, first, second, value)


def _axes_of(operand: Tensor, ndim: int) -> set[int]:
    """Axes of a value of ``ndim`` axes along which an operand is not broadcast."""
    return {ndim - operand.ndim + i for i, n in enumerate(operand.shape) if n > 1}


def _combine(walk: "Walk", a: Tensor, b: Tensor, value: Tensor) -> Tensor:
    """Labels of two operands that are combined element by element."""
    first, second = a.expand(value.shape), b.expand(value.shape)
    if first is second or torch.equal(a, b):
        return second
    one, other = varying(first), varying(second)
    if one and other and not one & other and not torch.equal(first, second):
        walk.freeze(a, "it is combined with units on another axis")
        return second
    walk.unite(first, second)
    return first if len(one) < len(other) else second


def _matmul(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """(…, i, k) times (…, k, j)."""
    if walk.scaling or kwargs or len(args) != 2:
        raise UnknownOperation
    shapes = [walk.env[arg].shape for arg in node.args]  # type: ignore[index]
    if min(len(shape) for shape in shapes) < 2:
        raise UnknownOperation
    zero = torch.zeros((), dtype=torch.int64)
    a, b = ((zero if x is None else x).expand(shape) for x, shape in zip(args, shapes, strict=True))
    return _product(walk, a, b, value)


def _product(walk: "Walk", a: Tensor, b: Tensor, value: Tensor) -> Labels:
    over_k = (a.ndim - 1 in varying(a), b.ndim - 2 in varying(b))
    over_rows, over_columns = a.ndim - 2 in varying(a), b.ndim - 1 in varying(b)
    if over_rows and over_columns:
        raise UnknownOperation
    if any(over_k):
        if over_rows or over_columns:
            raise UnknownOperation
        left, right = a[..., :1, :], b[..., :1].transpose(-1, -2)
        walk.unite(left, right)
        both = torch.broadcast_tensors(left, right)[0]
        first = walk.bundle(both, [-1])
        return first.expand(value.shape) if varying(first) else None
    left, right = a[..., :1].expand(value.shape), b[..., :1, :].expand(value.shape)
    if not left.any() or not right.any():
        return left if left.any() else right if right.any() else None
    return _combine(walk, left, right, value)


def _scaled_attention(walk: "Walk", node: fx.Node, layer: object, value: Tensor, args: Any, kwargs: Any) -> Labels:  # noqa: ANN401
    """Attention of queries, keys and values (…, l, d)."""
    if walk.scaling or len(args) < 3 or len(label_tensors((args, kwargs))) > 3:
        raise UnknownOperation
    zero = torch.zeros((), dtype=torch.int64)
    q, k, v = (
        (zero if x is None else x).expand(walk.env[arg].shape)  # type: ignore[index]
        for x, arg in zip(args[:3], node.args[:3], strict=True)
    )
    weights = torch.empty(*q.shape[:-1], k.shape[-2], device="meta")
    scores = _product(walk, q, k.transpose(-1, -2), weights)
    return _product(walk, zero.expand(weights.shape) if scores is None else scores, v, value)


def _layer_norm_function(
    walk: "Walk",
    node: fx.Node,
    layer: object,
    value: Tensor,
    args: Any,  # noqa: ANN401
    kwargs: Any,  # noqa: ANN401
) -> Labels:
    options = dict(zip(("input", "shape", "weight", "bias"), args, strict=False)) | kwargs
    shape = node.args[1] if len(node.args) > 1 else node.kwargs["normalized_shape"]
    parts = [options.get("weight"), options.get("bias")]
    return _normalized(walk, value, options["input"], len(shape), parts)  # type: ignore[arg-type]


def _one(args: Any, kwargs: Any) -> list[Tensor]:  # noqa: ANN401
    """The only label tensor among the arguments, which must be the first argument or named ``input``."""
    labels = label_tensors((args, kwargs))
    if len(labels) != 1:
        raise UnknownOperation
    return labels


RULES: dict[Any, Callable[..., Any]] = {
    **dict.fromkeys(_HOMOGENEOUS, _pass),
    **dict.fromkeys(_ELEMENTWISE, _element_wise),
    **dict.fromkeys(_RESIZING, _resize),
    **dict.fromkeys(_MOVING, _move),
    **dict.fromkeys(_REDUCING | _SPREADING, _reduce),
    **dict.fromkeys(_NORMALIZING, _normalize),
    **dict.fromkeys(_ADDING | _MULTIPLYING, _binary),
    **dict.fromkeys(_MATMUL, _matmul),
    F.pad: _pad,
    F.scaled_dot_product_attention: _scaled_attention,
    F.layer_norm: _layer_norm_function,
}
