"""Windows of a long sequence with context on both sides ("halo"), and the sequence back from them (SANE).

Shapes: ``t`` tokens of any trailing shape, ``n`` windows of ``s`` tokens, (...) batch axes before them.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class HaloWindows:
    """Where the windows of a sequence lie; all have the same length, those at the ends are moved inside.

    Args:
        length: t, at least 1.
        window: Tokens that a window is for, at least 1.
        halo: Further tokens on each side, at least 0.

    Raises:
        ValueError: One of them is smaller.

    Example:
        >>> HaloWindows(93, window=32, halo=16).starts.tolist()
        [0, 16, 29]
    """

    length: int
    window: int
    halo: int

    def __post_init__(self) -> None:
        """Reject what makes no windows."""
        for name, least in (("length", 1), ("window", 1), ("halo", 0)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}, got {getattr(self, name)}")

    @property
    def size(self) -> int:
        """s: window and halo, or the whole sequence if that is shorter."""
        return min(self.length, self.window + 2 * self.halo)

    @cached_property
    def starts(self) -> Tensor:
        """(n,) first token of every window."""
        return (torch.arange(0, self.length, self.window) - self.halo).clamp(0, self.length - self.size)

    def split(self, tokens: Tensor, axis: int = -2) -> Tensor:
        """Sequences (..., t, ...) as windows (..., n, s, ...), a copy."""
        axis = self._axis(tokens, axis, self.length)
        index = self.starts[:, None] + torch.arange(self.size)
        return tokens.index_select(axis, index.flatten().to(tokens.device)).unflatten(axis, index.shape)

    def merge(self, windows: Tensor, axis: int = -3) -> Tensor:
        """Windows (..., n, s, ...) as sequences (..., t, ...): of each window the tokens that it is for."""
        axis = self._axis(windows, axis, len(self.starts))
        token = torch.arange(self.length)
        own = token // self.window
        index = own * self.size + token - self.starts[own]
        return windows.flatten(axis, axis + 1).index_select(axis, index.to(windows.device))

    def _axis(self, values: Tensor, axis: int, size: int) -> int:
        if not -values.ndim <= axis < values.ndim or values.shape[axis] != size:
            raise ValueError(f"axis {axis} of {tuple(values.shape)} must have {size} entries")
        return axis % values.ndim
