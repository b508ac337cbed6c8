"""Normalisation of the weights layer by layer, with the statistics of a zoo.

A layer is a weight with its bias, or one running statistic. Every mode but ``l2_ind`` is one affine map of the flat
vector, ``(w - center) / scale`` with a center and a scale for each layer.

Shapes: ``n`` checkpoints of ``d`` numbers.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from zoo_common.layout import ParameterLayout
from zoo_common.tokens import ChannelLayer, ChannelTokenizer

Mode = Literal["standardize", "minmax", "l2_ind", "none"]
_BLOCK = 2**19
"""Numbers that are measured at once, so that they stay in the cache."""


@dataclass(frozen=True)
class Normalization:
    """A normalisation with its statistics.

    ==============  ==================================================================================================
    ``standardize``  mean of the checkpoints' means and root of the mean of their (unbiased) variances, for each layer
    ``minmax``       least and greatest value of each layer to [-1, 1]; running statistics stay as they are
    ``l2_ind``       each layer of each checkpoint divided by its own norm; cannot be undone
    ``none``         nothing
    ==============  ==================================================================================================
    """

    mode: Mode
    layers: Mapping[str, tuple[float, float]]
    """Weight of a layer -> (mean, standard deviation), or (least, greatest value)."""
    layout: ParameterLayout
    skipped: tuple[str, ...] = ()
    """Tensors that are in no layer (batch norms)."""
    legacy_double_bn: bool = False
    """Normalise running statistics twice, as published files with batch norms need it."""

    @cached_property
    def _affine(self) -> tuple[Tensor, Tensor]:
        """Center and scale of every number (d,)."""
        center, scale = torch.zeros(self.layout.size), torch.ones(self.layout.size)
        known = {layer.weight: layer for layer in _layers(self.layout, self.skipped, "standardize")}
        for name, (a, b) in self.layers.items():
            if self.mode == "minmax":
                a, b = (a + b) / 2, (b - a) / 2
            b = b if b > 0 and math.isfinite(b) else 1.0  # a layer that is the same in all checkpoints
            if self.legacy_double_bn and "weight" not in name:
                a, b = a + a * b, b * b
            for span in _spans(self.layout, known[name]):
                center[span], scale[span] = a, b
        return center, scale

    def of(self, name: str) -> tuple[float, float]:
        """Center and scale of a tensor; not for ``l2_ind``, whose scales depend on the checkpoint."""
        place = self.layout.slices[name].start
        return self._affine[0][place].item(), self._affine[1][place].item()

    def normalize(self, vectors: Tensor) -> Tensor:
        """Normalised copies of vectors (..., d)."""
        if self.mode == "l2_ind":
            vectors = vectors.clone()
            for layer in _layers(self.layout, self.skipped, self.mode):
                spans = _spans(self.layout, layer)
                squares = sum(vectors[..., span].square().sum(-1, keepdim=True) for span in spans)
                norm = torch.as_tensor(squares).sqrt()
                for span in spans:
                    vectors[..., span] /= torch.where(norm > 0, norm, 1.0)
            return vectors
        center, scale = (part.to(vectors) for part in self._affine)
        return (vectors - center) / scale

    def denormalize(self, vectors: Tensor) -> Tensor:
        """The inverse of :meth:`normalize`.

        Raises:
            ValueError: The mode ``l2_ind`` has none.
        """
        if self.mode == "l2_ind":
            raise ValueError("normalisation l2_ind cannot be undone: sampling needs standardize, minmax or none")
        center, scale = (part.to(vectors) for part in self._affine)
        return torch.addcmul(center, vectors, scale)

    def to_document(self) -> dict[str, Any]:
        """The published file's content: layer -> statistics, and ``mode``."""
        names = ("min", "max") if self.mode == "minmax" else ("mean", "std")
        table: dict[str, Any] = {name: dict(zip(names, pair, strict=True)) for name, pair in self.layers.items()}
        return table | {"mode": None if self.mode == "none" else self.mode}

    @classmethod
    def from_document(
        cls, document: Mapping[str, Any], tokenizer: ChannelTokenizer, *, legacy_double_bn: bool = False
    ) -> "Normalization":
        """Read the content of a published (or our) normalisation file; skipped tensors that it names are left out.

        Raises:
            ValueError: It names layers that the network does not have, or is something else.
        """
        mode = check_mode(document.get("mode") or "none")
        names = ("min", "max") if mode == "minmax" else ("mean", "std")
        try:
            pairs = {k: (float(v[names[0]]), float(v[names[1]])) for k, v in document.items() if k != "mode"}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"not a normalisation file: each layer needs {names[0]} and {names[1]}") from error
        skipped = tokenizer.skipped  # published files have `batchnorm` layers that are in no token
        known = {layer.weight for layer in _layers(tokenizer.layout, skipped, "standardize")}
        if unknown := [name for name in pairs if name not in known.union(skipped)]:
            raise ValueError(f"the normalisation is of another network: it has {', '.join(unknown)}")
        pairs = {name: pair for name, pair in pairs.items() if name in known}
        return cls(mode, pairs, tokenizer.layout, tokenizer.skipped, legacy_double_bn)


def measure(
    blocks: Iterable[Tensor], tokenizer: ChannelTokenizer, mode: Mode, *, legacy_double_bn: bool = False
) -> Normalization:
    """Statistics of checkpoints in one pass and bounded memory.

    Args:
        blocks: Vectors (n, d), any number of blocks; the statistics do not depend on the order of hidden units.
        tokenizer: Its layout and skipped tensors decide on the layers.
        mode: What to measure.
        legacy_double_bn: Take the published statistics of running means and variances (over the vector joined to
            itself), which are applied twice.

    Raises:
        ValueError: Unknown mode, or no checkpoint.
    """
    check_mode(mode)
    layout, skipped = tokenizer.layout, tokenizer.skipped
    layers = _layers(layout, skipped, mode) if mode in ("standardize", "minmax") else []
    count = 0
    sums = torch.zeros(len(layers), 2, dtype=torch.float64)
    low, high = torch.full((len(layers),), math.inf), torch.full((len(layers),), -math.inf)
    for block in blocks:
        for part in block.split(max(1, _BLOCK // layout.size)):
            count += len(part)
            for i, layer in enumerate(layers):
                values = [part[:, span] for span in _spans(layout, layer)]
                if mode == "minmax":
                    low[i], high[i] = (
                        torch.minimum(low[i], torch.stack([v.min() for v in values]).min()),
                        torch.maximum(high[i], torch.stack([v.max() for v in values]).max()),
                    )
                    continue
                doubled = legacy_double_bn and "weight" not in layer.weight
                size = sum(v.shape[1] for v in values)
                freedom = (2 * size - 1) / 2 if doubled else max(size - 1, 1)
                mean = torch.stack([v.sum(1, dtype=torch.float64) for v in values]).sum(0) / size
                near = mean.to(part.dtype)  # what is subtracted; the rest of the mean is accounted for
                norms = [torch.linalg.vector_norm(v - near[:, None], dim=1, dtype=torch.float64) for v in values]
                squares = torch.stack(norms).square().sum(0) - size * (mean - near).square()
                sums[i] += torch.stack([mean.sum(), squares.sum() / freedom])
    if not count:
        raise ValueError("no checkpoint to take statistics of: the training split is empty")
    pairs = torch.stack([low, high], 1) if mode == "minmax" else sums / count
    if mode == "standardize":
        pairs[:, 1].sqrt_()
    table = {layer.weight: (float(a), float(b)) for layer, (a, b) in zip(layers, pairs.tolist(), strict=True)}
    return Normalization(mode, table, layout, skipped, legacy_double_bn)


def check_mode(mode: str) -> Mode:
    """The mode of a name; ``ValueError`` if there is none."""
    for known in get_args(Mode):
        if mode == known:
            found: Mode = known
            return found
    raise ValueError(f"normalisation {mode!r} is unknown; use one of {', '.join(get_args(Mode))}")


def _layers(layout: ParameterLayout, skipped: tuple[str, ...], mode: str) -> list[ChannelLayer]:
    layers = ChannelTokenizer(layout, 1, skipped).layers
    return [layer for layer in layers if mode == "standardize" or "weight" in layer.weight]


def _spans(layout: ParameterLayout, layer: ChannelLayer) -> list[slice]:
    return [layout.slices[name] for name in (layer.weight, layer.bias) if name is not None]
