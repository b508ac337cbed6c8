"""Many networks of one architecture computed together, from a matrix of their flat vectors.

Shapes: ``n`` networks with ``d`` parameters, ``b`` inputs of shape ``(...)``, ``c`` outputs.
"""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.func import functional_call, vmap

from zoo_common.layout import ParameterLayout

#: Memory that the largest intermediate values of a chunk of :meth:`Population.metrics` may take, in bytes.
CHUNK_BYTES = 32 * 2**20


@dataclass(frozen=True)
class DenseLayer:
    """One Linear layer of a chain, as slices of the flat vector, with the function that follows it."""

    inputs: int
    outputs: int
    weight: slice
    bias: slice | None
    activation: str | None
    """Key of :data:`ACTIVATIONS`; None: identity."""


#: Functions of a dense chain, and their gradients from the gradient in the output and the output itself.
ACTIVATIONS: dict[str, tuple[Callable[[Tensor], Tensor], Callable[[Tensor, Tensor], Tensor]]] = {
    "relu": (torch.relu, lambda gradient, y: torch.ops.aten.threshold_backward(gradient, y, 0)),
    "tanh": (torch.tanh, torch.ops.aten.tanh_backward),
    "sigmoid": (torch.sigmoid, torch.ops.aten.sigmoid_backward),
}
_NAMES: dict[object, str] = {
    function: name
    for name, functions in {
        "relu": (nn.ReLU, F.relu, torch.relu),
        "tanh": (nn.Tanh, F.tanh, torch.tanh),
        "sigmoid": (nn.Sigmoid, F.sigmoid, torch.sigmoid),
    }.items()
    for function in functions
}


def dense_chain(module: nn.Module, layout: ParameterLayout) -> tuple[DenseLayer, ...] | None:
    """The layers of a network that flattens its input and then is a chain of Linear and activation; else None."""
    try:
        traced = fx.symbolic_trace(module)
    except Exception:  # noqa: BLE001 (whatever the network's own code raises: it is computed the general way)
        return None
    where = layout.slices
    modules = dict(traced.named_modules())
    layers: list[DenseLayer] = []
    previous: fx.Node | None = None
    for node in traced.graph.nodes:
        if previous is not None and node.all_input_nodes != [previous]:
            return None
        layer = modules.get(str(node.target)) if node.op == "call_module" else None
        kind = type(layer) if layer is not None else node.target
        name = f"{node.target}."
        if isinstance(layer, nn.Linear):
            if name + "weight" not in where or any(done.weight == where[name + "weight"] for done in layers):
                return None
            bias = where[name + "bias"] if layer.bias is not None else None
            layers.append(DenseLayer(layer.in_features, layer.out_features, where[name + "weight"], bias, None))
        elif layers and layers[-1].activation is None and node.op != "output" and kind in _NAMES:
            layers[-1] = replace(layers[-1], activation=_NAMES[kind])
        elif not (node.op in ("placeholder", "output") or (not layers and _is_flatten(node, layer))):
            return None
        previous = node
    return tuple(layers) or None


def _is_flatten(node: fx.Node, layer: nn.Module | None) -> bool:
    """Whether a node flattens everything but the batch axis."""
    if isinstance(layer, nn.Flatten):
        return (layer.start_dim, layer.end_dim) == (1, -1)
    known = (node.op == "call_method" and node.target == "flatten") or node.target is torch.flatten
    return known and node.args[1:] == (1,) and not node.kwargs


class Population:
    """Computes n networks of one architecture at once.

    Chains of Linear layers and activations become batched matrix products (one single product in the first layer when
    all networks see the same input); every other network goes through ``torch.func``.
    """

    def __init__(self, module: nn.Module) -> None:
        """Take the architecture (not the weights) of ``module``, in evaluation mode."""
        self.layout = ParameterLayout.from_module(module)
        self.chain = dense_chain(module, self.layout)
        self._module = copy.deepcopy(module).to("meta").eval()
        self._buffers = self.layout.buffers_of(module)
        self._statistics = {name for name, _ in module.named_buffers()}  # running means and the like: no gradients

    def __call__(self, vectors: Tensor, x: Tensor, *, own: bool = False) -> Tensor:
        """Outputs of every network; differentiable.

        Args:
            vectors: (n, d).
            x: (b, ...) shared by all networks, or with ``own`` (n, b, ...), each network's own inputs.
            own: Whether ``x`` holds a batch for each network.

        Returns:
            (n, b, c).

        Raises:
            ValueError: ``vectors`` are of another layout, or there are not n own batches.
        """
        if vectors.ndim != 2 or vectors.shape[1] != self.layout.size:
            raise ValueError(f"expected vectors (n, {self.layout.size}), got {tuple(vectors.shape)}")
        if own and len(x) != len(vectors):
            raise ValueError(f"{len(vectors)} networks need as many batches of their own, got {len(x)}")
        if self.chain is not None:
            return chain_forward(self.chain, vectors, x.flatten(2 if own else 1), own=own)[-1].transpose(1, 2)

        def forward(vector: Tensor, inputs: Tensor) -> Tensor:
            state = self.layout.unflatten(vector, self._buffers)
            for name in self._statistics & state.keys():
                state[name] = state[name].detach()
            output: Tensor = functional_call(self._module, state, (inputs,))
            return output

        outputs: Tensor = vmap(forward, in_dims=(0, 0 if own else None))(vectors, x)
        return outputs

    @torch.no_grad()
    def metrics(self, vectors: Tensor, images: Tensor, labels: Tensor) -> "Metrics":
        """Judge classifiers on the same images, a bounded chunk of networks and images at a time.

        Args:
            vectors: (n, d).
            images: (b, ...).
            labels: (b,) int64.
        """
        loss = torch.zeros(len(vectors), dtype=torch.float64, device=vectors.device)
        wrong = torch.zeros_like(loss)
        width = self._width(vectors, images)
        several = max(1, min(len(images), CHUNK_BYTES // width))
        many = max(1, CHUNK_BYTES // (width * several))
        for nets in torch.arange(len(vectors), device=vectors.device).split(many):
            for x, y in zip(images.split(several), labels.split(several), strict=True):
                logits = self(vectors[nets], x.to(vectors.dtype)).transpose(1, 2)  # (n, c, b)
                chosen = logits.gather(1, y.expand(len(nets), 1, len(y)))[:, 0]
                best = logits.amax(1)
                right = chosen == best
                if (logits == best[:, None]).sum() != right.numel():  # ties: the first class counts (argmax is slow)
                    right = logits.argmax(1) == y
                normaliser = logits.sub(best[:, None]).exp_().sum(1).log_().add_(best)
                loss[nets] += normaliser.sub_(chosen).sum(1, dtype=torch.float64)
                wrong[nets] += (~right).sum(1)
        error = 100 * wrong / len(images)
        return Metrics(loss / len(images), error, 1 - error / 100)

    def _width(self, vectors: Tensor, images: Tensor) -> int:
        """Bytes of the largest layer output of one network on one image."""
        if self.chain is not None:
            return max(layer.outputs for layer in self.chain) * vectors.element_size()
        sizes: list[int] = []
        hooks = [m.register_forward_hook(lambda _m, _x, y: sizes.append(y.numel())) for m in self._module.modules()]
        try:
            self._module(torch.empty_like(images[:1], device="meta"))
        finally:
            for hook in hooks:
                hook.remove()
        return max(sizes) * vectors.element_size()


class Metrics(NamedTuple):
    """Mean cross entropy (nats), top-1 error (percent) and accuracy (fraction) of n networks, (n,) float64 each."""

    loss: Tensor
    error: Tensor
    accuracy: Tensor


def chain_forward(chain: Sequence[DenseLayer], vectors: Tensor, x: Tensor, *, own: bool) -> list[Tensor]:
    """Outputs of every layer of a dense chain, activations applied: (n, outputs, b) each.

    Args:
        chain: Layers of :func:`dense_chain`.
        vectors: (n, d).
        x: (b, inputs), or (n, b, inputs) if ``own``.
        own: Whether every network has its own inputs.
    """
    n, outputs = len(vectors), []
    hidden: Tensor | None = x.transpose(1, 2) if own else None
    for layer in chain:
        weight = vectors[:, layer.weight].reshape(n, layer.outputs, layer.inputs)
        if hidden is None:  # all networks' first layers as one matrix
            hidden = (weight.reshape(-1, layer.inputs) @ x.T).view(n, layer.outputs, -1)
            hidden = hidden if layer.bias is None else hidden + vectors[:, layer.bias, None]
        elif layer.bias is None:
            hidden = weight @ hidden
        else:
            hidden = torch.baddbmm(vectors[:, layer.bias, None], weight, hidden)
        if layer.activation is not None:
            hidden = ACTIVATIONS[layer.activation][0](hidden)
        outputs.append(hidden)
    return outputs
