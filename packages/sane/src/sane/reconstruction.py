"""What the autoencoder keeps of each layer, and which layers it loses.

Shapes: ``n`` checkpoints of ``d`` numbers.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from sane.model import Halo, SaneModel
from sane.progress import track

Finding = Literal["fine", "not finite", "vanished", "shrunk", "blown up", "turned round", "wrong", "lost"]
LOST = 0.9
"""Relative error from which on almost nothing of a layer, or of a checkpoint, has come back."""


@dataclass(frozen=True)
class LayerReport:
    """How one layer comes back."""

    layer: str
    relative_error: float
    """Norm of the difference by the norm, of normalised weights; median over checkpoints."""
    norm_ratio: float
    """Norm after by norm before; median over checkpoints."""
    cosine: float
    """Between before and after; median over checkpoints."""
    finding: Finding
    """What is wrong in comparison with the other layers; ``lost``: almost nothing comes back, here as elsewhere."""
    accuracy: float | None = None
    """Mean accuracy of the original networks when this layer alone is replaced by its reconstruction."""


def layer_reports(
    before: Tensor,
    after: Tensor,
    model: SaneModel,
    accuracy: Callable[[Tensor], Tensor] | None = None,
) -> list[LayerReport]:
    """Compare checkpoints with their reconstructions, layer by layer.

    A layer is faulty if it is much worse than the others: not finite, of another norm, of opposite sign, or with an error
    of more than twice the median of all layers (and above 0.5); or if almost nothing of it comes back.

    Args:
        before: Checkpoints (n, d), raw.
        after: Reconstructions (n, d).
        model: Names the layers and normalises.
        accuracy: Accuracies (n,) of checkpoints (n, d), to replace one layer at a time.
    """
    x, y = (model.tokens(vectors) for vectors in (before, after))
    rows = []
    for layer in model.tokenizer.layers:
        a, b = (part[:, layer.start : layer.stop].flatten(1).double() for part in (x, y))
        size = a.norm(dim=1).clamp_min(1e-12)
        columns = (
            (a - b).norm(dim=1) / size,
            b.norm(dim=1) / size,
            (a * b).sum(1) / (size * b.norm(dim=1).clamp_min(1e-12)),
        )
        rows.append([float(v.median()) if v.isfinite().all() else math.nan for v in columns])
    table = torch.tensor(rows, dtype=torch.float64)
    usual = table[table.isfinite().all(1)].median(0)[0] if table.isfinite().all(1).any() else torch.ones(3)
    reports = []
    for layer, row in track(zip(model.tokenizer.layers, rows, strict=True), "layers"):
        alone = None
        if accuracy is not None:
            mixed = before.clone()
            for name in (layer.weight, layer.bias):
                if name is not None:
                    span = model.tokenizer.layout.slices[name]
                    mixed[:, span] = after[:, span]
            alone = accuracy(mixed).mean().item()
        error, ratio, cosine = row
        reports.append(LayerReport(layer.weight, error, ratio, cosine, _finding(row, usual.tolist()), alone))
    return reports


def _finding(row: list[float], usual: list[float]) -> Finding:
    error, ratio, cosine = row
    if not math.isfinite(error):
        return "not finite"
    if ratio < 0.1 * usual[1]:
        return "vanished"
    if ratio > 2 * max(usual[1], 0.5):
        return "blown up"
    if cosine < -0.3:
        return "turned round"
    if ratio < 0.5 * usual[1]:
        return "shrunk"
    if error > max(2 * usual[0], 0.5):
        return "wrong"
    return "lost" if error >= LOST else "fine"


@dataclass(frozen=True)
class Reconstruction:
    """How well checkpoints survive the autoencoder."""

    layers: list[LayerReport]
    relative_error: float
    """Of all normalised tokens; median over checkpoints."""
    accuracy_before: float | None = None
    accuracy_after: float | None = None
    accuracy_conditioned: float | None = None
    """After the batch norms have seen data; None for networks without them."""

    @property
    def faulty(self) -> list[LayerReport]:
        """Layers with a finding, the worst first."""
        bad = [report for report in self.layers if report.finding != "fine"]
        return sorted(bad, key=lambda r: -r.relative_error if math.isfinite(r.relative_error) else -math.inf)


def reconstruct(
    model: SaneModel,
    vectors: Tensor,
    accuracy: Callable[[Tensor], Tensor] | None = None,
    condition: Callable[[Tensor], Tensor] | None = None,
    halo: Halo | None = None,
) -> Reconstruction:
    """Encode and decode aligned checkpoints (n, d), and report what is lost.

    Args:
        model: The autoencoder.
        vectors: Checkpoints, raw.
        accuracy: Accuracies (n,) of checkpoints (n, d), if they can be measured.
        condition: Lets the batch norms of checkpoints see data, if there are any.
        halo: Windows instead of full attention.
    """
    after = model.decode(model.encode(vectors, halo), halo)
    x, y = (model.tokens(v).flatten(1).double() for v in (vectors, after))
    error = float(((x - y).norm(dim=1) / x.norm(dim=1)).median())
    values: list[float | None] = [None, None, None]
    if accuracy is not None:
        values[:2] = [accuracy(v).mean().item() for v in (vectors, after)]
        values[2] = accuracy(condition(after)).mean().item() if condition is not None else None
    return Reconstruction(layer_reports(vectors, after, model, accuracy), error, *values)
