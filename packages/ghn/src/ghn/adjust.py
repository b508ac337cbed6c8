"""Fitting image classifiers to small images, and counting their parameters."""

import warnings
from typing import TypeVar

import torch
from torch import Tensor, nn
from torchvision import models

from ghn.trace import expected_input_size, output_tensors

Net = TypeVar("Net", bound=nn.Module)


def adjust_net(net: Net, large_input: bool = False) -> Net:
    """Fit the first layers of a torchvision classifier to images of 32 x 32 pixels, as published.

    Args:
        net: Changed in place: its first convolution gets stride 1 (in ResNets and DenseNets also the central 3 x 3 of its
            kernel), the first pooling is left out. Models of other families stay as they are, with a warning.
        large_input: The images have 224 x 224 pixels: only ``expected_input_sz`` is set.

    Returns:
        The same model, with ``expected_input_sz`` set to 32 or 224.
    """
    fits = getattr(net, "expected_input_sz", None) == 32
    net.expected_input_sz = 224 if large_input else 32  # type: ignore[assignment]
    if large_input:
        return net
    match net:
        case models.ResNet():
            _shrink(net.conv1)
            net.maxpool = nn.Identity()
        case models.DenseNet():
            _shrink(net.features[0])
            net.features[3] = nn.Identity()
        case models.MobileNetV2() | models.MobileNetV3():
            for conv in (m for m in net.features[:5].modules() if isinstance(m, nn.Conv2d)):
                conv.stride = (1, 1)
        case models.VGG():
            for i in range(10):
                if isinstance(net.features[i], nn.MaxPool2d):
                    net.features[i] = nn.Identity()
        case models.AlexNet():
            net.features[0].stride = (1, 1)
            net.features[2] = nn.Identity()
        case models.MNASNet():
            net.layers[0].stride = (1, 1)
        case models.ShuffleNetV2():
            net.conv1.stride = 1  # on the block, where it does nothing: published
            net.maxpool = nn.Identity()
        case models.GoogLeNet():
            net.conv1.stride = 1  # likewise
            net.maxpool1 = nn.Identity()
        case models.ConvNeXt():
            net.features[0][0].stride = (1, 1)
        case _ if fits:
            pass  # made for them, as DeepNets networks may be
        case _:
            warnings.warn(f"{type(net).__name__} has no adjustment to 32 x 32 images and stays as it is", stacklevel=2)
    return net


def _shrink(conv: nn.Conv2d) -> None:
    """Keep the central 3 x 3 of a kernel, at stride 1."""
    rows, columns = ((size - 3) // 2 for size in conv.kernel_size)
    kept = conv.weight.detach()[:, :, rows : rows + 3, columns : columns + 3]
    conv.weight = nn.Parameter(kept.clone(), requires_grad=conv.weight.requires_grad)
    conv.kernel_size, conv.stride, conv.padding = (3, 3), (1, 1), (1, 1)


def capacity(model: nn.Module, is_grad: bool = True) -> tuple[int, int]:
    """Count tensors and scalars among a model's parameters, shared ones once.

    Args:
        model: May store shapes where others have parameters (light networks).
        is_grad: Leave out parameters that are not trained; shapes count as trained.
    """
    sizes = [p.numel() for p in model.parameters() if p.requires_grad or not is_grad]
    for module in model.modules():
        shapes = (getattr(module, name, None) for name in ("weight", "bias"))
        sizes += [torch.Size(shape).numel() for shape in shapes if isinstance(shape, tuple | list)]
    return len(sizes), sum(sizes)


def num_valid_nodes(model: nn.Module, x: Tensor | None = None) -> int:
    """Count the parameter tensors that a mean output of the model depends on, in a real forward and backward.

    Args:
        model: Called in its current mode; gradients are taken, not stored.
        x: Input; default: two images of uniform noise in [-0.25, 0.25] of the expected size.

    Returns:
        Tensors whose gradient has a sum of absolute values above 1e-20; -1 if the output is not a number.
    """
    first = next(model.parameters())
    if x is None:
        size = expected_input_size(model)
        shape = (3, size, size) if isinstance(size, int) else tuple(size)
        x = torch.rand(2, *shape, device=first.device, dtype=first.dtype) / 2 - 0.25
    with torch.enable_grad():
        loss = sum((output.mean() for output in output_tensors(model(x))), torch.zeros((), device=first.device))
        if torch.isnan(loss):
            return -1
        trained = [p for p in model.parameters() if p.requires_grad]
        grads = torch.autograd.grad(loss, trained, allow_unused=True)
    return sum(grad is not None and bool(grad.abs().sum() > 1e-20) for grad in grads)
