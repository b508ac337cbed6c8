"""Views of windows for the contrastive loss: noise and erased rectangles.

Shapes: ``b`` windows of ``w`` tokens with ``i`` scalars.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Erase:
    """Random erasing of a rectangle of the (w, i) plane (Zhong et al. 2020), with torchvision's rules."""

    p: float = 0.5
    """Probability that a window is touched."""
    scale: tuple[float, float] = (0.02, 0.33)
    """Range of the erased share of the plane."""
    ratio: tuple[float, float] = (0.3, 3.3)
    """Range of height by width."""
    attempts: int = 10
    """Draws of a rectangle until one fits."""

    def __call__(self, tokens: Tensor, generator: torch.Generator, *, shared: bool = False) -> Tensor:
        """Windows (b, w, i) with zeros in one rectangle each; ``shared``: the same rectangle in all, as published."""
        b, height, width = (1 if shared else len(tokens)), *tokens.shape[1:]
        device = tokens.device

        def uniform(low: float, high: float, *shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=device) * (high - low) + low

        area = uniform(*self.scale, b, self.attempts) * height * width
        low, high = (torch.tensor(bound).log().item() for bound in self.ratio)
        ratio = uniform(low, high, b, self.attempts).exp()
        h, w = (area * ratio).sqrt().round(), (area / ratio).sqrt().round()
        fits = (h < height) & (w < width)
        first = fits.int().argmax(1, keepdim=True)
        h, w = (x.gather(1, first)[:, 0] for x in (h, w))
        used = fits.any(1) & (uniform(0, 1, b) < self.p)
        top = (uniform(0, 1, b) * (height - h + 1)).floor()
        left = (uniform(0, 1, b) * (width - w + 1)).floor()
        rows, columns = torch.arange(height, device=device), torch.arange(width, device=device)
        inside_rows = (rows >= top[:, None]) & (rows < (top + h)[:, None])
        inside_columns = (columns >= left[:, None]) & (columns < (left + w)[:, None])
        erased = inside_rows[:, :, None] & inside_columns[:, None, :] & used[:, None, None]
        return tokens.masked_fill(erased, 0)


def add_noise(tokens: Tensor, sigma: float, generator: torch.Generator, *, additive: bool = False) -> Tensor:
    """Windows times ``1 + sigma * N(0, 1)``, so that padding stays 0; ``additive``: plus ``sigma * N(0, 1)``."""
    if sigma == 0:
        return tokens
    noise = torch.randn(tokens.shape, generator=generator, device=tokens.device, dtype=tokens.dtype)
    return tokens + sigma * noise if additive else tokens * (1 + sigma * noise)
