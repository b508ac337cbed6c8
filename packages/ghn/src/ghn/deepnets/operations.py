"""The operations of DeepNets cells. Submodule names are those of the published weights."""

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ghn.deepnets.genotypes import parse_operation

#: In which code base's spelling attention names its weights.
Keys = Literal["ghn2", "ghn3"]


def make_norm(norm: str | None, channels: int) -> nn.Module:
    """Normalisation by name: none; ``bn...`` with running statistics if the name contains "track".

    Raises:
        ValueError: The name is unknown.
    """
    if norm in (None, "", "none"):
        return nn.Identity()
    if not norm.startswith("bn"):
        raise ValueError(f"unknown norm {norm!r}: none, 'bnorm' (batch statistics) or 'bn-track'")
    return nn.BatchNorm2d(channels, track_running_stats="track" in norm)


def _conv(
    c_in: int, c_out: int, k: int, stride: int = 1, *, padding: int | None = None, groups: int = 1, dilation: int = 1
) -> nn.Conv2d:
    padding = k // 2 if padding is None else padding
    return nn.Conv2d(c_in, c_out, k, stride, padding, dilation, groups, bias=False)


class Layers(nn.Module):
    """Layers in a row, under the name ``op``."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.op = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, h, w) to (b, c_out, h / stride, w / stride)."""
        return self.op(x)


class Stride(nn.Module):
    """Every n-th pixel."""

    def __init__(self, stride: int, scale: float = 1.0) -> None:
        super().__init__()
        self.stride, self.scale = stride, scale

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, h / n, w / n)."""
        x = x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x
        return x if self.scale == 1 else x * self.scale


class FactorizedReduce(nn.Module):
    """Half the resolution by two convolutions, the second on the image shifted by a pixel."""

    def __init__(self, c_in: int, c_out: int, norm: str | None) -> None:
        super().__init__()
        if c_out % 2:
            raise ValueError(f"a reduction needs an even number of channels, got {c_out}")
        self.conv_1 = _conv(c_in, c_out // 2, 1, 2)
        self.conv_2 = _conv(c_in, c_out // 2, 1, 2)
        self.bn = make_norm(norm, c_out)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c_in, h, w), h and w even, to (b, c_out, h / 2, w / 2)."""
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], dim=1))


class ChannelGate(nn.Module):
    """Squeeze and excite, with a hard swish where others have a sigmoid (published)."""

    def __init__(self, channels: int, stride: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(channels, channels // 2)
        self.fc2 = nn.Linear(channels // 2, channels)
        self.stride = stride

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, h / stride, w / stride)."""
        gate = F.hardswish(self.fc2(F.relu(self.fc1(x.mean(dim=(2, 3))))))
        x = gate[:, :, None, None] * x
        return x[:, :, :: self.stride, :: self.stride] if self.stride > 1 else x


def _attend(x: Tensor, to_qkv: nn.Module, to_out: nn.Module, heads: int) -> Tensor:
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in to_qkv(x).chunk(3, dim=-1))
    return to_out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class _Attention(nn.Module):
    """Attention with 8 heads, in the module of its own that GHN-3 has for it."""

    def __init__(self, channels: int, heads: int) -> None:
        super().__init__()
        self.heads, width = heads, channels // heads * heads
        self.to_qkv = nn.Linear(channels, 3 * width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) to (b, n, c)."""
        return _attend(x, self.to_qkv, self.to_out, self.heads)


class _FeedForward(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        gelu, drop = nn.GELU(), nn.Identity()
        self.net = nn.Sequential(nn.Linear(channels, channels), gelu, drop, nn.Linear(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        """(b, n, c) to (b, n, c)."""
        return self.net(x)


class Transformer(nn.Module):
    """A transformer block on the pixels: pre-norm attention with 8 heads, then two layers of the same width."""

    def __init__(self, channels: int, stride: int, keys: Keys) -> None:
        super().__init__()
        self.stride = stride
        attention = _Attention(channels, 8)
        if keys == "ghn3":
            self.ln1 = nn.LayerNorm(channels)
            self.attn = attention
        else:
            self.to_qkv, self.to_out = attention.to_qkv, attention.to_out
            self.ln1 = nn.LayerNorm(channels)
        self.ln2 = nn.LayerNorm(channels)
        self.ff = _FeedForward(channels)

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, h, w) to (b, c, h / stride, w / stride)."""
        source = self.attn if hasattr(self, "attn") else self
        y = x.flatten(2).transpose(1, 2)
        y = y + _attend(self.ln1(y), source.to_qkv, source.to_out, 8)
        y = y + self.ff(self.ln2(y))
        y = y.transpose(1, 2).unflatten(-1, x.shape[2:])
        return y[:, :, :: self.stride, :: self.stride] if self.stride > 1 else y


class PosEnc(nn.Module):
    """A table of positions that is added to the image."""

    def __init__(self, channels: int, side: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(1, channels, side, side).normal_(std=0.02))

    def forward(self, x: Tensor) -> Tensor:
        """(b, c, side, side) to the same."""
        return x + self.weight


def relu_conv(c_in: int, c_out: int, k: int, stride: int, norm: str | None) -> Layers:
    """ReLU, convolution, normalisation."""
    return Layers(nn.ReLU(), _conv(c_in, c_out, k, stride), make_norm(norm, c_out))


def make_operation(name: str, c_in: int, c_out: int, stride: int, norm: str | None, keys: Keys) -> nn.Module:
    """An operation of a genotype; ``none`` is made too, but cells pass it over."""
    family, k = parse_operation(name)
    match family:
        case "none":
            return Stride(stride, scale=0.0)
        case "skip_connect":
            return nn.Identity() if stride == 1 else FactorizedReduce(c_in, c_out, norm)
        case "max_pool":
            return nn.MaxPool2d(k, stride, k // 2)
        case "avg_pool":
            return nn.AvgPool2d(k, stride, k // 2, count_include_pad=False)
        case "conv":
            return relu_conv(c_in, c_out, k, stride, norm)
        case "conv2":
            across = nn.Conv2d(c_in, c_in, (1, k), (1, stride), (0, k // 2), bias=False)
            down = nn.Conv2d(c_in, c_out, (k, 1), (stride, 1), (k // 2, 0), bias=False)
            return Layers(nn.ReLU(), across, down, make_norm(norm, c_out))
        case "sep_conv":
            first = _conv(c_in, c_in, k, stride, groups=c_in), _conv(c_in, c_in, 1), make_norm(norm, c_in)
            second = _conv(c_in, c_in, k, groups=c_in), _conv(c_in, c_out, 1), make_norm(norm, c_out)
            return Layers(nn.ReLU(), *first, nn.ReLU(), *second)
        case "dil_conv":
            deep = _conv(c_in, c_in, k, stride, padding=k - k % 2, groups=c_in, dilation=2)
            return Layers(nn.ReLU(), deep, _conv(c_in, c_out, 1), make_norm(norm, c_out))
        case "msa":
            return Transformer(c_in, stride, keys)
        case "cse":
            return ChannelGate(c_in, stride)
    raise ValueError(f"unknown operation {name!r}")
