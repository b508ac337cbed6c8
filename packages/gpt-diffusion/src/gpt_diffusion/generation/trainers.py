"""Three ways to train many runs of a classifier; in float64 they give the same weights.

``loop`` trains one plain torch model after the other, ``vmap`` all of them with ``torch.func``, ``stacked`` chains of
Linear and activation with batched matrix products and closed-form gradients. All use SGD with Nesterov momentum.

Shapes: ``n`` runs in groups of ``g`` that share the data order, ``k = n / g`` orders, ``d`` parameters, ``c`` save
points, ``b`` images in a batch.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from zoo_common.layout import ParameterLayout
from zoo_common.population import ACTIVATIONS, DenseLayer, dense_chain
from zoo_common.tasks import TrainingRecipe

from gpt_diffusion.generation.batches import Batches


@dataclass(frozen=True)
class Job:
    """What a trainer needs beside the initial weights and the seeds."""

    module: nn.Module  # architecture, in training mode, on the device and in the dtype of the training
    layout: ParameterLayout
    recipe: TrainingRecipe
    images: Tensor  # (n_train, ...)
    labels: Tensor  # (n_train,) int64
    rates: Sequence[float]  # learning rate of every step
    adam: bool = False  # instead of the recipe's SGD

    def batches(self, seeds: Sequence[int]) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches of the orders with these seeds."""
        recipe = self.recipe
        orders = Batches(self.images, self.labels, seeds, batch=recipe.batch, augmentation=recipe.augmentation)
        return iter(orders)

    def optimizer(self, parameters: Sequence[Tensor]) -> torch.optim.Optimizer:
        """The recipe's SGD, or Adam; the learning rate is set before every step."""
        recipe = self.recipe
        if self.adam:
            return torch.optim.Adam(parameters, lr=recipe.lr, fused=True)
        return torch.optim.SGD(
            parameters,
            lr=recipe.lr,
            momentum=recipe.momentum,
            nesterov=recipe.momentum > 0,
            weight_decay=recipe.weight_decay,
            fused=True,
        )


Tick = Callable[[int], object]
Trainer = Callable[[Job, Tensor, Sequence[int], int, Tensor, Tick], Tensor]


def train_loop(job: Job, initial: Tensor, seeds: Sequence[int], group: int, saves: Tensor, tick: Tick) -> Tensor:
    """Train one model after the other; see :func:`train_stacked` for the arguments."""
    saved = torch.empty(len(initial), saves.shape[1], initial.shape[1], dtype=initial.dtype)
    for run, vector in enumerate(initial):
        job.layout.load_into(job.module, vector)
        parameters = list(job.module.parameters())
        optimizer = job.optimizer(parameters)
        points = {int(step): place for place, step in enumerate(saves[run])}
        if 0 in points:
            saved[run, points[0]] = vector
        stream = job.batches([seeds[run // group]])
        for step, (rate, (x, y)) in enumerate(zip(job.rates, stream, strict=False), start=1):
            optimizer.zero_grad()
            F.cross_entropy(job.module(x[0]), y[0]).backward()
            optimizer.param_groups[0]["lr"] = rate
            optimizer.step()
            if step in points:
                saved[run, points[step]] = job.layout.flatten(job.module).detach()
        tick(len(job.rates))
    return saved


class _Stack:
    """Weights and gradients of n runs, tensor by tensor, so that one optimizer step updates everything at once."""

    def __init__(self, job: Job, initial: Tensor) -> None:
        self.weights, self.gradients = torch.empty_like(initial).flatten(), torch.empty_like(initial).flatten()
        self.views, self.gradient_views = self._split(job, self.weights), self._split(job, self.gradients)
        for name, value in job.layout.unflatten(initial).items():
            self.views[name].copy_(value)
        self.weights.grad = self.gradients
        self.optimizer = job.optimizer([self.weights])
        self._names, self._n = job.layout.names, len(initial)

    def _split(self, job: Job, flat: Tensor) -> dict[str, Tensor]:
        n = flat.numel() // job.layout.size
        parts = flat.split([n * size for size in job.layout.sizes])
        return {
            name: part.view(n, *shape)
            for name, shape, part in zip(job.layout.names, job.layout.shapes, parts, strict=True)
        }

    def step(self, rate: float) -> None:
        """One optimizer step of all runs."""
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.step()

    def vectors(self) -> Tensor:
        """The flat vectors, (n, d)."""
        return torch.cat([self.views[name].reshape(self._n, -1) for name in self._names], 1)


def _train_together(
    job: Job,
    initial: Tensor,
    seeds: Sequence[int],
    saves: Tensor,
    tick: Tick,
    gradients: Callable[[_Stack, Tensor, Tensor], None],
) -> Tensor:
    """Step all runs side by side; ``gradients`` fills the stack's gradients from images (k, b, ...) and labels."""
    stack = _Stack(job, initial)
    saved = torch.empty(len(initial), saves.shape[1], initial.shape[1], dtype=initial.dtype)

    def save(step: int) -> None:
        runs, places = (saves == step).nonzero(as_tuple=True)
        if len(runs):
            saved[runs, places] = stack.vectors().cpu()[runs]

    save(0)
    for step, (rate, (x, y)) in enumerate(zip(job.rates, job.batches(seeds), strict=False), start=1):
        gradients(stack, x, y)
        stack.step(rate)
        save(step)
        tick(len(initial))
    return saved


def train_vmap(job: Job, initial: Tensor, seeds: Sequence[int], group: int, saves: Tensor, tick: Tick) -> Tensor:
    """Train all runs together with ``torch.func``; see :func:`train_stacked` for the arguments."""

    def loss(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(functional_call(job.module, weights, (x,)), y)

    runs = vmap(vmap(grad(loss), in_dims=(0, None, None)))

    def gradients(stack: _Stack, x: Tensor, y: Tensor) -> None:
        weights = {name: value.unflatten(0, (-1, group)) for name, value in stack.views.items()}
        for name, value in runs(weights, x, y).items():
            stack.gradient_views[name].copy_(value.flatten(0, 1))

    return _train_together(job, initial, seeds, saves, tick, gradients)


def train_stacked(job: Job, initial: Tensor, seeds: Sequence[int], group: int, saves: Tensor, tick: Tick) -> Tensor:
    """Train all runs of a dense chain together with batched products and closed-form gradients.

    Args:
        job: Network, data and recipe; the network is a chain (:func:`zoo_common.population.dense_chain`).
        initial: (n, d).
        seeds: Of the k data orders.
        group: g, so that run i has order ``i // g``; n = k g (``loop``: the last group may be incomplete).
        saves: (n, c) optimizer steps after which to save each run; 0 is the initialisation.
        tick: Called with the number of model-steps done since the last call.

    Returns:
        Saved vectors (n, c, d), on the CPU.
    """
    chain = dense_chain(job.module, job.layout)
    assert chain is not None, "stacked training needs a dense chain"
    n = len(initial)
    names = _chain_names(chain, job.layout)

    def gradients(stack: _Stack, x: Tensor, y: Tensor) -> None:
        images = x.flatten(2)  # (k, b, inputs)
        weights = [(stack.views[w], None if b is None else stack.views[b]) for w, b in names]
        hidden: list[Tensor] = []
        value = _first_layer(*weights[0], images, group)
        for layer, (weight, bias) in zip(chain, weights, strict=True):
            if hidden:
                value = weight @ hidden[-1] if bias is None else torch.baddbmm(bias[..., None], weight, hidden[-1])
            hidden.append(value if layer.activation is None else ACTIVATIONS[layer.activation][0](value))
        delta = _loss_gradient(hidden[-1], y, group)
        for depth in range(len(chain) - 1, -1, -1):
            layer, (weight, _) = chain[depth], weights[depth]
            if layer.activation is not None:
                delta = ACTIVATIONS[layer.activation][1](delta, hidden[depth])
            weight_name, bias_name = names[depth]
            if bias_name is not None:
                torch.sum(delta, 2, out=stack.gradient_views[bias_name])
            out = stack.gradient_views[weight_name]
            if depth:
                torch.bmm(delta, hidden[depth - 1].transpose(1, 2), out=out)
                delta = weight.transpose(1, 2) @ delta
            else:
                grouped = out.view(n // group, -1, layer.inputs)
                torch.bmm(delta.reshape(n // group, -1, delta.shape[2]), images, out=grouped)

    return _train_together(job, initial, seeds, saves, tick, gradients)


def _chain_names(chain: Sequence[DenseLayer], layout: ParameterLayout) -> list[tuple[str, str | None]]:
    """Names of weight and bias of every layer."""
    names = {spec.offset: spec.name for spec in layout.tensors}
    return [(names[layer.weight.start], None if layer.bias is None else names[layer.bias.start]) for layer in chain]


def _first_layer(weight: Tensor, bias: Tensor | None, images: Tensor, group: int) -> Tensor:
    """First layer of runs that share images within a group: (n, outputs, b)."""
    k = len(images)
    if bias is None:
        value = weight.view(k, -1, weight.shape[2]) @ images.transpose(1, 2)
    else:
        value = torch.baddbmm(bias.view(k, -1, 1), weight.view(k, -1, weight.shape[2]), images.transpose(1, 2))
    return value.view(k * group, weight.shape[1], -1)


def _loss_gradient(logits: Tensor, labels: Tensor, group: int) -> Tensor:
    """Gradient of the mean cross entropy in the logits (n, classes, b): (softmax - one-hot) / b."""
    delta = torch.softmax(logits, 1)
    target = labels[:, None, None].expand(-1, group, 1, -1).reshape(len(logits), 1, -1)
    delta.scatter_add_(1, target, delta.new_full((), -1.0).expand(target.shape))
    return delta.div_(logits.shape[2])


TRAINERS: dict[str, Trainer] = {"loop": train_loop, "vmap": train_vmap, "stacked": train_stacked}


def strategies_for(module: nn.Module, layout: ParameterLayout) -> list[str]:
    """Strategies that can train a network."""
    return [*(["stacked"] if dense_chain(module, layout) is not None else []), "vmap", "loop"]


def initial_vectors(module_of: Callable[[], nn.Module], layout: ParameterLayout, seeds: Sequence[int]) -> Tensor:
    """Fresh initialisations, one per seed: (n, d). The global random state is left alone."""
    vectors = []
    with torch.random.fork_rng(devices=[]):
        for seed in seeds:
            torch.manual_seed(seed)
            vectors.append(layout.flatten(module_of()).detach())
    return torch.stack(vectors)
