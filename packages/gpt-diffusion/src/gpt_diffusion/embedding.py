"""Sine and cosine embedding of scalars, in float32 whatever surrounds it.

With ``max_freq_log2 = 14`` and t up to 999 the arguments reach 1.6e7, where neighbouring float32 numbers are one radian
apart: the embedding depends on the last bit of the frequencies. They are therefore part of the weights of a model, never
computed again after loading and never cast, and the product, sine and cosine are float32 kernels that neither autocast
nor a compiler may replace.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


@torch.library.custom_op("gpt_diffusion::sin_cos", mutates_args=())
def _sin_cos(scalars: Tensor, frequencies: Tensor) -> Tensor:
    """[sin(s f), cos(s f), s] of scalars (n,) and frequencies (f,), shape (n, 2f + 1); opaque to ``torch.compile``."""
    s = scalars[:, None]
    angles = s * frequencies
    return torch.cat([angles.sin(), angles.cos(), s], dim=1)


@_sin_cos.register_fake
def _(scalars: Tensor, frequencies: Tensor) -> Tensor:
    return scalars.new_empty(scalars.shape[0], 2 * frequencies.shape[0] + 1)


class ScalarEmbedding(nn.Module):
    r"""[sin(f_0 s) ... sin(f_{F-1} s), cos(f_0 s) ... cos(f_{F-1} s), s] with :math:`f_i = 2^{i M / (F - 1)}`.

    The frequencies of a new module are computed in float64 and rounded once, so that they are the same on every machine.
    ``.to(dtype)``, ``.half()``, ``.double()`` and the like leave them as they are; only the device follows.

    Args:
        num_frequencies: F, at least 2.
        max_freq_log2: M, the exponent of the largest frequency.
    """

    frequencies: Tensor

    def __init__(self, num_frequencies: int = 128, max_freq_log2: float = 14) -> None:
        """Compute the frequencies."""
        super().__init__()
        if num_frequencies < 2:
            raise ValueError(f"num_frequencies must be at least 2, got {num_frequencies}")
        exponents = np.arange(num_frequencies) * (max_freq_log2 / (num_frequencies - 1))
        self.register_buffer("frequencies", torch.tensor((2.0**exponents).astype(np.float32)))

    @property
    def size(self) -> int:
        """Length 2F + 1 of an embedding."""
        return 2 * self.frequencies.numel() + 1

    def forward(self, scalars: Tensor) -> Tensor:
        """Embed scalars (n,) of any dtype, after rounding them to float32; shape (n, 2F + 1), float32."""
        return _sin_cos(scalars.float(), self.frequencies)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "ScalarEmbedding":
        """Follow moves to a device, but no cast."""
        exact = self.frequencies
        super()._apply(fn, recurse)
        if self.frequencies.dtype != torch.float32:
            self.frequencies = exact.to(self.frequencies.device)
        return self

    def _load_from_state_dict(self, state: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        """Refuse frequencies that somebody has cast: they would load, and every embedding would be wrong."""
        table = state.get(prefix + "frequencies")
        if table is not None and table.dtype != torch.float32:
            errors: list[str] = args[-1]
            errors.append(f"{prefix}frequencies must be float32 and never be cast, got {table.dtype}")
        super()._load_from_state_dict(state, prefix, *args)
