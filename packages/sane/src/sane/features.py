"""Features of checkpoints that embeddings are compared with.

Shapes: ``n`` checkpoints of ``d`` numbers, ``k`` tokens of ``i`` scalars, L layers.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Literal

import torch
from torch import Tensor
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelTokenizer

_PERCENTILES = (0.01, 0.25, 0.5, 0.75, 0.99)
SPECTRAL = ("log_norm", "alpha", "alpha_weighted", "log_alpha_norm", "log_spectral_norm", "stable_rank")
"""What :func:`spectral_features` gives for each layer."""
_LEAST = 8
"""Eigenvalues that make a spectrum, and a tail of few."""


def layer_statistics(tokens: Tensor, tokenizer: ChannelTokenizer, *, include_padding: bool = False) -> Tensor:
    """Mean, population variance and percentiles 1, 25, 50, 75, 99 of every layer: (n, 7L) float64.

    Args:
        tokens: (n, k, i).
        tokenizer: Where layers and padding are.
        include_padding: Count the zeros of the padding, as published.
    """
    found = []
    for layer in tokenizer.layers:
        values = tokens[:, layer.start : layer.stop].flatten(1).double()
        if not include_padding:
            values = values[:, tokenizer.mask[layer.start : layer.stop].flatten().to(values.device)]
        ordered = values.sort(1)[0]
        places = torch.tensor(_PERCENTILES, dtype=torch.float64) * (values.shape[1] - 1)
        low, share = places.long(), (places - places.floor()).to(values.device)
        high = (low + 1).clamp_max(values.shape[1] - 1)
        percentiles = torch.lerp(ordered[:, low], ordered[:, high], share.expand(len(values), -1))
        found.append(torch.cat([values.mean(1)[:, None], values.var(1, correction=0)[:, None], percentiles], dim=1))
    return torch.cat(found, dim=1)


def tensor_statistics(vectors: Tensor, layout: ParameterLayout) -> Tensor:
    """Mean, and logarithms of the standard deviation and of the mean size, of every tensor: (n, 3 tensors) float64.

    Other than layer statistics these keep biases apart from weights: where biases begin as constants, their spread tells
    how far a network is trained.

    Args:
        vectors: Weights (n, d), raw.
        layout: Where the tensors are.
    """
    found = []
    for span in layout.slices.values():
        values = vectors[:, span].double()
        sizes = torch.stack([values.std(1, correction=0), values.abs().mean(1)], 1)
        found.append(torch.cat([values.mean(1, keepdim=True), sizes.clamp_min(1e-6).log()], 1))
    return torch.cat(found, dim=1)


def layer_axes(latents: Iterable[Tensor], tokenizer: ChannelTokenizer) -> list[Tensor]:
    """Principal axes of each layer's latents about their mean in each checkpoint: (l, l), one in each column.

    An autoencoder can turn its latents and turn them back; spreads along these axes do not depend on that.

    Args:
        latents: Blocks (n, k, l) of training checkpoints.
        tokenizer: Where layers are.
    """
    products: list[Tensor] = []
    for block in latents:
        parts = [block[:, layer.start : layer.stop].double() for layer in tokenizer.layers]
        centered = [(part - part.mean(1, keepdim=True)).flatten(0, 1) for part in parts]
        found = [part.T @ part for part in centered]
        products = [a + b for a, b in zip(products, found, strict=True)] if products else found
    return [torch.linalg.eigh(product)[1] for product in products]


def by_layer(latents: Tensor, tokenizer: ChannelTokenizer, axes: Sequence[Tensor] | None = None) -> Tensor:
    """Mean, and logarithm of the standard deviation, of the latents of every layer's tokens: (n, 2L l) float64.

    Args:
        latents: (n, k, l).
        tokenizer: Where layers are.
        axes: For each layer the axes (l, l) to take both along; default: the latents as they are.
    """
    parts = [latents[:, layer.start : layer.stop].double() for layer in tokenizer.layers]
    if axes is not None:
        parts = [part @ axis for part, axis in zip(parts, axes, strict=True)]
    rows = [(part.mean(1), part.std(1, correction=0).clamp_min(1e-6).log()) for part in parts]
    return torch.cat([x for pair in rows for x in pair], dim=1)


def weight_chunk(vectors: Tensor, size: int, where: Literal["first", "last", "random"], seed: int = 0) -> Tensor:
    """``size`` adjacent weights, the same ones of every checkpoint: (n, size)."""
    last = vectors.shape[1] - size
    if last < 0:
        raise ValueError(f"a chunk of {size} weights is longer than a checkpoint ({vectors.shape[1]})")
    drawn = int(torch.randint(last + 1, (), generator=torch.Generator().manual_seed(seed)))
    start = {"first": 0, "last": last, "random": drawn}[where]
    return vectors[:, start : start + size]


def _matrices(tokenizer: ChannelTokenizer) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of the weights that have enough eigenvalues."""
    shapes = dict(zip(tokenizer.layout.names, tokenizer.layout.shapes, strict=True))
    weights = [layer.weight for layer in tokenizer.layers if "weight" in layer.weight]
    large = lambda shape: len(shape) > 1 and min(shape[:2]) * math.prod(shape[2:]) >= _LEAST
    return [(name, shapes[name]) for name in weights if large(shapes[name])]


def available_baselines(names: Sequence[str], tokenizer: ChannelTokenizer) -> tuple[str, ...]:
    """Those of some baselines that networks have: ``spectra`` needs a layer of eight eigenvalues."""
    return tuple(name for name in names if name != "spectra" or _matrices(tokenizer))


def spectral_features(vectors: Tensor, tokenizer: ChannelTokenizer, *, summary: bool = False) -> Tensor:
    """Features of the eigenvalues of W'W of every weight matrix: (n, 6L) float64, in the order of :data:`SPECTRAL`.

    A convolution has a matrix for each place of its kernel, whose eigenvalues are pooled. The features follow
    WeightWatcher (Martin, Peng, Mahoney 2021); alpha is the exponent of a power law fitted to the tail by maximum
    likelihood, which begins where the Kolmogorov-Smirnov distance is least (Clauset et al. 2009).

    Args:
        vectors: Weights (n, d), raw.
        tokenizer: Its layers that have at least eight eigenvalues are used.
        summary: Take the mean over layers, (n, 6).

    Raises:
        ValueError: No layer has as many.
    """
    found = []
    for name, shape in _matrices(tokenizer):
        weights = vectors[:, tokenizer.layout.slices[name]].reshape(-1, *shape[:2], math.prod(shape[2:]))
        values = torch.linalg.svdvals(weights.double().movedim(3, 1)).square().flatten(1)
        if len(shape) > 2:
            values = values / 2  # the package's scale for convolutions
        values = values.sort(1, descending=True)[0].clamp_min(1e-20)
        norm, largest = values.sum(1), values[:, 0]
        alpha = power_law_exponent(values)
        log_alpha_norm = torch.logsumexp(alpha[:, None] * values.log(), 1) / math.log(10)
        rows = [norm.log10(), alpha, alpha * largest.log10(), log_alpha_norm, largest.log10(), norm / largest]
        found.append(torch.stack(rows, 1))
    if not found:
        raise ValueError(
            f"no layer has {_LEAST} eigenvalues: there is no spectrum; choose other baselines than spectra"
        )
    return torch.stack(found).mean(0) if summary else torch.cat(found, dim=1)


def power_law_exponent(values: Tensor) -> Tensor:
    """Exponents (n,) of the tails of positive numbers (n, m), sorted in falling order.

    Of fewer than 20 numbers the tail is at least eight, and the estimate is corrected for its bias.
    """
    count = torch.arange(1, values.shape[1] + 1, dtype=values.dtype, device=values.device)
    few = values.shape[1] < 20
    logs = values.log()
    excess = logs.cumsum(1) - count * logs  # sum over the tail of log(value / least)
    alpha = 1 + (count - 1 if few else count) / excess.clamp_min(1e-12)
    model = 1 - torch.exp((1 - alpha)[:, :, None] * (logs[:, None, :] - logs[:, :, None]))  # (n, begin, value)
    empirical = 1 - count[None, None, :] / count[None, :, None]
    tail = count[None, None, :] <= count[None, :, None]
    distance = torch.where(tail, (model - empirical).abs(), 0.0).amax(2)
    distance[:, : min(_LEAST, values.shape[1]) - 1 if few else 1] = torch.inf  # one value is no tail
    return alpha.gather(1, distance.argmin(1, keepdim=True))[:, 0]


def to_polar(x: Tensor) -> Tensor:
    """Vectors (n, d) as the radius and the d arccosines of the coordinates by the radius: (n, d + 1)."""
    radius = x.norm(dim=1, keepdim=True)
    return torch.cat([radius, torch.acos((x / radius).clamp(-1, 1))], dim=1)


Baseline = Callable[[Tensor, Tensor, ChannelTokenizer], Tensor]
BASELINES: dict[str, Baseline] = {
    "layer statistics": lambda raw, tokens, tokenizer: layer_statistics(tokens, tokenizer),
    "tensor statistics": lambda raw, tokens, tokenizer: tensor_statistics(raw, tokenizer.layout),
    "weights": lambda raw, tokens, tokenizer: raw,
    "first weights": lambda raw, tokens, tokenizer: weight_chunk(raw, min(128, raw.shape[1]), "first"),
    "last weights": lambda raw, tokens, tokenizer: weight_chunk(raw, min(128, raw.shape[1]), "last"),
    "random weights": lambda raw, tokens, tokenizer: weight_chunk(raw, min(128, raw.shape[1]), "random"),
    "spectra": lambda raw, tokens, tokenizer: spectral_features(raw, tokenizer),
}
"""Name -> features from aligned weights (n, d) and their normalised tokens (n, k, i)."""
