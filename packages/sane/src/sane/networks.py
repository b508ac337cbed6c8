"""Networks of the model zoos that SANE was published with, by their ``model::type``.

Configurations are the published ones: ``model::type``, ``model::channels_in``, ``model::o_dim``, ``model::nlin``,
``model::dropout`` and ``model::init_type``, the MLP's also ``model::i_dim``, ``model::h_dim`` and ``model::use_bias``.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leakyrelu": nn.LeakyReLU,
    "relu": nn.ReLU,
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "elu": nn.ELU,
    "celu": nn.CELU,
}
INITIALISATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "xavier_uniform": nn.init.xavier_uniform_,
    "xavier_normal": nn.init.xavier_normal_,
    "uniform": nn.init.uniform_,
    "normal": nn.init.normal_,
    "kaiming_normal": nn.init.kaiming_normal_,
    "kaiming_uniform": nn.init.kaiming_uniform_,
}
INPUT_SIZES = {"CNN3": 32, "MiniAlexNet": 32}
"""Height and width of the images of the types that do not take 28 x 28."""


COLOURED = ("efficientnet_v2_s", "efficientnet_v2_m", "densenet121", "densenet161", "vit_b_16")
"""Types that take images of three channels only."""


class _Chain(nn.Module):
    """A chain of modules under the published name ``module_list``."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__()
        self.module_list = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return self.module_list(x)


class Mlp(_Chain):
    """Dense layers with an activation (and dropout) between them, on flattened inputs."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        hidden = config["model::h_dim"]
        hidden = [hidden] if isinstance(hidden, int) else hidden
        if not isinstance(hidden, list | tuple) or not all(isinstance(size, int) and size > 0 for size in hidden):
            raise ValueError(
                f"model::h_dim must be a number of units, or a list of them for several layers, got {hidden!r}"
            )
        sizes = [config["model::i_dim"], *hidden]
        bias, dropout = config.get("model::use_bias", True), config.get("model::dropout", 0.0)
        layers: list[nn.Module] = []
        for inputs, outputs in pairwise(sizes):
            layers += [nn.Linear(inputs, outputs, bias=bias), _activation(config)]
            layers += [nn.Dropout(dropout)] if dropout else []
        super().__init__([*layers, nn.Linear(sizes[-1], config["model::o_dim"], bias=bias)])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes)."""
        return self.module_list(x.flatten(1))


def _cnn_layers(config: Mapping[str, Any], convolutions: Sequence[tuple[int, int]], features: int) -> list[nn.Module]:
    """Of CNN and CNN2: three convolutions, two of them pooled, and two dense layers."""
    dropout = config.get("model::dropout", 0.0)
    drop = [nn.Dropout(dropout)] if dropout else []
    channels = [config["model::channels_in"], *(width for width, _ in convolutions)]
    layers: list[nn.Module] = []
    for i, (width, kernel) in enumerate(convolutions):
        layers.append(nn.Conv2d(channels[i], width, kernel))
        layers += [nn.MaxPool2d(2), _activation(config)] if i < 2 else [_activation(config)]
        layers += drop if i < 2 else []
    layers += [nn.Flatten(), nn.Linear(features, 20), _activation(config), *drop, nn.Linear(20, config["model::o_dim"])]
    return layers


def _cnn3(config: Mapping[str, Any]) -> nn.Module:
    dropout, classes = config.get("model::dropout", 0.0), config["model::o_dim"]
    layers: list[nn.Module] = []
    for inputs, outputs in pairwise((config["model::channels_in"], 16, 32, 15)):
        layers += [nn.Conv2d(inputs, outputs, 3), nn.MaxPool2d(2), _activation(config), nn.Dropout(dropout)]
    layers += [nn.Flatten(), nn.Linear(60, 20), _activation(config), nn.Dropout(dropout), nn.Linear(20, classes)]
    return _Chain(layers)


class ResCnn(nn.Module):
    """The CNN with a pooled 1x1 convolution beside each convolution, added to its output; loads a CNN's weights."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.module_list = nn.Sequential(*_cnn_layers({**config, "model::dropout": 0.0}, ((8, 5), (6, 5), (4, 2)), 36))
        self.res1_conv = nn.Conv2d(config["model::channels_in"], 8, 1)
        self.res2_conv = nn.Conv2d(8, 6, 1)
        self.res3_conv = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, c, 28, 28)."""
        layers, branches = list(self.module_list), (self.res1_conv, self.res2_conv, self.res3_conv)
        for stage, (kernel, stride), branch in zip(
            (layers[0:3], layers[3:6], layers[6:8]), ((5, 2), (5, 2), (2, 1)), branches, strict=True
        ):
            beside = branch(F.max_pool2d(x, kernel, stride))
            for layer in stage:
                x = layer(x)
            x = x + beside
        for layer in layers[8:]:
            x = layer(x)
        return x


class CnnMoreLayers(nn.Module):
    """A deeper CNN: four convolutions, three of them without bias, tanh throughout."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        widths, kernels = (config["model::channels_in"], 8, 4, 6, 4), (5, 5, 4, 3)
        layers: list[nn.Module] = []
        for i, (inputs, outputs) in enumerate(pairwise(widths)):
            layers += [nn.Conv2d(inputs, outputs, kernels[i], bias=i == 0), *([nn.MaxPool2d(2)] if i == 0 else [])]
            layers.append(nn.Tanh())
        layers += [nn.Flatten(), nn.Linear(36, 18), nn.Tanh(), nn.Linear(18, config["model::o_dim"])]
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, c, 28, 28)."""
        return self.layers(x)


class CnnResidual(nn.Module):
    """Three convolutions, and a strided 1x1 convolution from the first one's output to the third one's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config["model::channels_in"], 8, 5, bias=False)
        self.conv2 = nn.Conv2d(8, 6, 5)
        self.conv3 = nn.Conv2d(6, 4, 2, bias=False)
        self.identity = nn.Conv2d(8, 4, 1, bias=False)
        self.fc4 = nn.Linear(36, 20, bias=False)
        self.fc5 = nn.Linear(20, config["model::o_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, c, 28, 28)."""
        first = torch.tanh(F.max_pool2d(self.conv1(x), 2))
        x = torch.tanh(F.max_pool2d(self.conv2(first), 2))
        x = torch.tanh(self.conv3(x)) + self.identity(first)[..., ::4, ::4]
        return self.fc5(torch.tanh(self.fc4(x.flatten(1))))


class CnnMoreLayersResidual(nn.Module):
    """The deeper CNN with the second convolution's output, cropped and strided, added to the fourth one's."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config["model::channels_in"], 8, 5)
        self.conv2 = nn.Conv2d(8, 4, 5, bias=False)
        self.conv3 = nn.Conv2d(4, 6, 4, bias=False)
        self.conv4 = nn.Conv2d(6, 4, 3, bias=False)
        self.fc5 = nn.Linear(36, 18)
        self.fc6 = nn.Linear(18, config["model::o_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, c, 28, 28)."""
        second = torch.tanh(self.conv2(torch.tanh(F.max_pool2d(self.conv1(x), 2))))
        x = torch.tanh(self.conv4(torch.tanh(self.conv3(second)))) + second[..., 1:-1, 1:-1][..., ::2, ::2]
        return self.fc6(torch.tanh(self.fc5(x.flatten(1))))


class MiniAlexNet(nn.Module):
    """Two convolutions with batch norms after the ReLUs, three dense layers."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(config.get("model::channels_in", 3), 96, 3)
        self.batchnorm1 = nn.BatchNorm2d(96)
        self.conv2 = nn.Conv2d(96, 256, 3)
        self.batchnorm2 = nn.BatchNorm2d(256)
        self.fc1 = nn.Linear(4096, 384)
        self.fc2 = nn.Linear(384, 192)
        self.fc3 = nn.Linear(192, config["model::o_dim"])

    def forward(self, x: Tensor) -> Tensor:
        """Logits (n, classes) of images (n, c, 32, 32)."""
        x = F.max_pool2d(self.batchnorm1(F.relu(self.conv1(x))), 3, 3)
        x = F.max_pool2d(self.batchnorm2(F.relu(self.conv2(x))), 2)
        return self.fc3(F.relu(self.fc2(F.relu(self.fc1(x.flatten(1))))))


def _torchvision(name: str) -> Callable[[Mapping[str, Any]], nn.Module]:
    """A network of torchvision; ResNets for small images, as in the zoos: 3x3 stem, no pooling after it."""

    def build(config: Mapping[str, Any]) -> nn.Module:
        import torchvision

        net: nn.Module = getattr(torchvision.models, name)(num_classes=config["model::o_dim"])
        if name.startswith("resnet"):
            net.conv1 = nn.Conv2d(config.get("model::channels_in", 3), 64, 3, padding=1, bias=False)
            net.maxpool = nn.Identity()
        return net

    return build


NETWORKS: dict[str, Callable[[Mapping[str, Any]], nn.Module]] = {
    "MLP": Mlp,
    "CNN": lambda config: _Chain(_cnn_layers(config, ((8, 5), (6, 5), (4, 2)), 36)),
    "CNN2": lambda config: _Chain(_cnn_layers(config, ((6, 5), (9, 5), (6, 2)), 54)),
    "CNN3": _cnn3,
    "ResCNN": ResCnn,
    "CNN_more_layers": CnnMoreLayers,
    "CNN_residual": CnnResidual,
    "CNN_more_layers_residual": CnnMoreLayersResidual,
    "MiniAlexNet": MiniAlexNet,
    **{f"Resnet{depth}": _torchvision(f"resnet{depth}") for depth in (18, 34, 50, 101, 152)},
    **{name: _torchvision(name) for name in COLOURED},
}


def build_network(config: Mapping[str, Any]) -> nn.Module:
    """A freshly initialised network.

    Args:
        config: The published keys; ``model::init_type`` initialises the weights of Linear and Conv (biases: 0.01) and is
            torch's default if absent. The configuration is not changed.

    Raises:
        ValueError: An unknown type, activation or initialisation, or a missing key.
    """
    kind = config.get("model::type")
    if kind not in NETWORKS:
        raise ValueError(f"model::type {kind!r} is unknown; use one of {', '.join(NETWORKS)}")
    try:
        network = NETWORKS[kind](config)
    except KeyError as error:
        raise ValueError(f"the configuration of a {kind} lacks {error.args[0]!r}") from None
    initialise(network, config.get("model::init_type"))
    return network


def initialise(network: nn.Module, kind: str | None) -> None:
    """Initialise weights of Linear and Conv by name, biases with 0.01; None leaves everything as it is."""
    if kind is None:
        return
    if kind not in INITIALISATIONS:
        raise ValueError(f"model::init_type {kind!r} is unknown; use one of {', '.join(INITIALISATIONS)}")
    for module in network.modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            INITIALISATIONS[kind](module.weight)
            if module.bias is not None:
                nn.init.constant_(module.bias, 0.01)


def input_shape(config: Mapping[str, Any]) -> tuple[int, ...]:
    """Shape of one input of a network, without the batch axis."""
    kind = config.get("model::type", "")
    if kind == "MLP":
        return (config["model::i_dim"],)
    grey = kind.startswith(("CNN", "ResCNN")) and kind != "CNN3"
    size = 224 if kind == "vit_b_16" else 28 if grey else INPUT_SIZES.get(kind, 32)
    return (config.get("model::channels_in", 1 if grey else 3), size, size)


def _activation(config: Mapping[str, Any]) -> nn.Module:
    name = config.get("model::nlin", "tanh")
    if name not in ACTIVATIONS:
        raise ValueError(f"model::nlin {name!r} is unknown; use one of {', '.join(ACTIVATIONS)}")
    return ACTIVATIONS[name]()
