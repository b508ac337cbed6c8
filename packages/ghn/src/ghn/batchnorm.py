"""BatchNorm layers of predicted networks, whose running statistics no hypernetwork predicts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


@dataclass(frozen=True)
class Accuracy:
    """How often a network is right, as fractions."""

    top1: float
    top5: float
    """How often the right class is among the five most likely ones."""
    count: int
    """Images judged."""


def use_batch_statistics(model: nn.Module) -> nn.Module:
    """Make all BatchNorm layers normalise by the statistics of each batch, in evaluation too; returns the model."""
    for module in _layers(model):
        module.track_running_stats, module.training = False, True
    return model


@torch.no_grad()
def condition_bn(model: nn.Module, loader: Iterable[Any], batches: int | None = None) -> nn.Module:
    """Recompute the running statistics of all BatchNorm layers, as the mean over batches.

    Layers that ran on batch statistics use the running ones again.

    Args:
        model: The network, changed in place; its training mode stays.
        loader: Batches of images, alone or first in a tuple with labels.
        batches: How many are used; default: all.

    Raises:
        ValueError: There is not a single batch.
    """
    modes = {module: module.training for module in model.modules()}
    layers = [layer for layer in _layers(model) if layer.running_mean is not None]
    momenta = [layer.momentum for layer in layers]
    model.eval()
    for layer in layers:
        layer.track_running_stats, layer.training, layer.momentum = True, True, None  # None: the mean of all batches
        layer.reset_running_stats()
    count = 0
    try:
        for count, batch in enumerate(loader, start=1):
            model(_images(batch).to(next(model.parameters()).device))
            if count == batches:
                break
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum = momentum
        for module, mode in modes.items():  # layers on batch statistics are in training mode always
            module.training = modes[model] if isinstance(module, _BatchNorm) else mode
    if not count:
        raise ValueError("the loader gives no batch: the statistics of BatchNorm layers need at least one")
    return model


@torch.no_grad()
def evaluate(model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], *, batch_statistics: bool = False) -> Accuracy:
    """Accuracy of a classifier.

    Args:
        model: The network, which gives logits, alone or first in a tuple; its training mode is restored.
        loader: Batches of images and labels; published numbers with batch statistics are for batches of 64.
        batch_statistics: Whether BatchNorm layers use the statistics of each batch.

    Raises:
        ValueError: There is not a single image.
    """
    modes = {module: (module.training, getattr(module, "track_running_stats", None)) for module in model.modules()}
    model.eval()
    if batch_statistics:
        use_batch_statistics(model)
    device = next(model.parameters()).device
    hits, count = torch.zeros(2, dtype=torch.int64, device=device), 0
    try:
        for images, labels in loader:
            logits = model(images.to(device))
            logits = logits[0] if isinstance(logits, tuple) else logits
            best = logits.topk(min(5, logits.shape[1])).indices == labels.to(device)[:, None]
            hits += torch.stack([best[:, 0].sum(), best.sum()])
            count += len(labels)
    finally:
        for module, (training, tracks) in modes.items():
            module.training = training
            if tracks is not None:
                module.track_running_stats = tracks
    if not count:
        raise ValueError("the loader gives no images")
    top1, top5 = (hits / count).tolist()
    return Accuracy(top1, top5, count)


def _layers(model: nn.Module) -> list[_BatchNorm]:
    return [module for module in model.modules() if isinstance(module, _BatchNorm)]


def _images(batch: Any) -> Tensor:  # noqa: ANN401
    return batch[0] if isinstance(batch, list | tuple) else batch
