"""The training objective: masked reconstruction of two views, and a contrast between them.

Shapes: ``b`` windows in two views of ``w`` tokens with ``i`` scalars; projections of ``k`` numbers.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


def nt_xent(z_i: Tensor, z_j: Tensor, temperature: float) -> Tensor:
    """Normalised temperature-scaled cross entropy (Chen et al. 2020), mean over the 2b rows.

    Args:
        z_i: Projections (b, k) of the first views.
        z_j: Those of the second views.
        temperature: Divides the cosines.
    """
    z = F.normalize(torch.cat([z_i, z_j]), dim=1, eps=1e-8)
    similarity = z @ z.T / temperature
    similarity.fill_diagonal_(-torch.inf)
    partner = torch.arange(len(z), device=z.device).roll(len(z_i))
    return F.cross_entropy(similarity, partner)


def positive_similarity(z_i: Tensor, z_j: Tensor, temperature: float, *, legacy: bool = False) -> Tensor:
    """One minus the mean cosine of the two views.

    ``legacy``: the published term, the mean square of the 2b similarities divided by 2b, which drives them to 0.
    """
    cosine = F.cosine_similarity(z_i, z_j, dim=1, eps=1e-8)
    if legacy:
        return (cosine / temperature).square().mean() / (2 * len(z_i))
    return 1 - cosine.mean()


def reconstruction(
    y: Tensor,
    target: Tensor,
    mask: Tensor,
    *,
    reduction: Literal["mean", "sum"] = "mean",
    mask_normalize: bool = False,
    normalization: Literal["none", "token"] = "none",
) -> Tensor:
    """Squared error of ``mask * y`` and the target, all (2b, w, i).

    Args:
        y: Reconstructed tokens.
        target: What they should be; 0 on padding.
        mask: True on weights, false on padding.
        reduction: mean over all entries (padding counts in the denominator, as published), or sum.
        mask_normalize: Take the mean over the weights alone.
        normalization: ``token`` scales both sides of every token by the target's own mean and deviation, so that all
            tokens count alike (for zoos of several architectures).
    """
    if normalization == "token":
        count = mask.sum(-1, keepdim=True).clamp_min(1)
        mean = (target * mask).sum(-1, keepdim=True) / count
        scale = (((target - mean) * mask).square().sum(-1, keepdim=True) / count).sqrt().clamp_min(1e-6)
        y, target = (y - mean) / scale, (target - mean) * mask / scale
    squares = (y * mask - target).square()
    if reduction == "sum":
        return squares.sum()
    return squares.sum() / mask.sum() if mask_normalize else squares.mean()


@torch.no_grad()
def explained_variance(y: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """Share of the variance over the 2b samples that is explained, averaged over the w * i entries.

    An entry without variance (padding) counts 1 if it is met exactly and 0 if not.
    """
    error = (target - y * mask).float()
    unexplained, variance = error.var(0, correction=0), target.float().var(0, correction=0)
    value = torch.where(variance > 0, 1 - unexplained / variance, 0.0)
    return torch.where(unexplained == 0, 1.0, value).mean()


class Terms(NamedTuple):
    """The loss and its parts, scalars."""

    loss: Tensor
    contrast: Tensor
    reconstruction: Tensor
    rsq: Tensor
    """Explained variance of the reconstruction; NaN where it is not trained."""
    z_norm: Tensor
    """Mean norm of the projections of the first views."""
    z_var: Tensor
    """Mean variance over the batch of the projections of the first views."""


@dataclass(frozen=True)
class Objective:
    """gamma * contrast + (1 - gamma) * reconstruction + penalties on the projections."""

    gamma: float = 0.05
    temperature: float = 0.1
    contrast: Literal["simclr", "positive", "legacy_positive"] = "simclr"
    reduction: Literal["mean", "sum"] = "mean"
    mask_normalize: bool = False
    normalization: Literal["none", "token"] = "none"
    z_var_penalty: float = 0.0
    z_norm_penalty: float = 0.0

    def __post_init__(self) -> None:
        """Reject what is no mixture."""
        if not 0 <= self.gamma <= 1:
            raise ValueError(f"gamma must be from 0 (reconstruction only) to 1 (contrast only), got {self.gamma}")
        if self.temperature <= 0:
            raise ValueError(f"temperature must be positive, got {self.temperature}")

    def __call__(
        self, z_i: Tensor, z_j: Tensor, y: Tensor, target: Tensor, mask: Tensor, scale: float | Tensor = 1.0
    ) -> Terms:
        """The loss.

        Args:
            z_i: Projections (b, k) of the first views.
            z_j: Those of the second views.
            y: Reconstructed tokens (2b, w, i), first views first.
            target: What they should be.
            mask: Where weights are.
            scale: Factor of the reconstruction, where this is a part of a batch.
        """
        zero = y.new_zeros(())
        contrast = self._contrast(z_i, z_j) if self.gamma > 1e-10 else zero
        recon, rsq = zero, zero + torch.nan
        if 1 - self.gamma > 1e-10:
            recon = reconstruction(
                y,
                target,
                mask,
                reduction=self.reduction,
                mask_normalize=self.mask_normalize,
                normalization=self.normalization,
            )
            recon = recon * scale
            rsq = explained_variance(y, target, mask)
        z_var, z_norm = z_i.var(0).mean(), z_i.norm(dim=1).mean()  # of the first views, as published
        loss = self.gamma * contrast + (1 - self.gamma) * recon
        loss = loss + self.z_var_penalty * z_var + self.z_norm_penalty * z_norm
        return Terms(loss, contrast, recon, rsq, z_norm, z_var)

    def _contrast(self, z_i: Tensor, z_j: Tensor) -> Tensor:
        if self.contrast == "simclr":
            return nt_xent(z_i, z_j, self.temperature)
        return positive_similarity(z_i, z_j, self.temperature, legacy=self.contrast == "legacy_positive")
