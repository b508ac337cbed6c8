r"""Flow matching behind the interface of the diffusion process (Lipman et al. 2023; Liu et al. 2023, rectified flow).

On the straight line from data to noise, :math:`x_s = (1 - s) x_0 + s \epsilon`, the network predicts :math:`x_0` from
:math:`x_s`; samples follow :math:`dx/ds = (x_s - \hat x_0) / s` from s = 1 to 0 by Euler steps.

Shapes: ``n`` samples of ``d`` numbers. Step t = 0 .. T - 1 stands for s = (t + 1) / T.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gpt_diffusion.diffusion.process import Losses

TRAINED_STEPS = 1000
"""Noise levels in training; what the network is told of one is its number among these."""


@dataclass(frozen=True)
class Flow:
    """The straight process, with T steps for sampling."""

    num_timesteps: int = TRAINED_STEPS

    def __post_init__(self) -> None:
        """Reject numbers of steps that the network cannot tell apart."""
        if not 1 <= self.num_timesteps <= TRAINED_STEPS:
            raise ValueError(f"a flow has 1 to {TRAINED_STEPS} steps, got {self.num_timesteps}")

    def level(self, t: Tensor) -> Tensor:
        """S of steps t (n,), (n, 1)."""
        return ((t + 1) / self.num_timesteps)[:, None]

    def original_steps(self, t: Tensor) -> Tensor:
        """What the network is told, (n,) in 0 .. 999."""
        return ((t + 1) * TRAINED_STEPS / self.num_timesteps).round().long() - 1

    def training_losses(
        self,
        model: Callable[..., Tensor],
        x_start: Tensor,
        t: Tensor,
        *,
        loss_target: Tensor,
        loss_prev: Tensor,
        x_prev: Tensor,
        noise: Tensor,
    ) -> Losses:
        """Squared error of the predicted x_0 per sample; arguments as of :meth:`Diffusion.training_losses`."""
        x_s = torch.lerp(x_start, noise, self.level(t).to(x_start.dtype))
        predicted = model(x_s, self.original_steps(t), loss_target, loss_prev=loss_prev, x_prev=x_prev)
        predicted = predicted[0] if isinstance(predicted, tuple) else predicted
        loss = (x_start - predicted).square().mean(dim=1)
        return Losses(loss, loss, None, predicted)

    def euler_sample(
        self,
        denoise: Callable[[Tensor, Tensor], Tensor],
        x: Tensor,
        t: Tensor,
        *,
        denoised_fn: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """One step towards the data, from s = (t + 1) / T to t / T; (n, d)."""
        predicted = denoise(x, self.original_steps(t))
        predicted = predicted if denoised_fn is None else denoised_fn(predicted)
        return torch.lerp(predicted, x, (t / (t + 1))[:, None].to(x.dtype))
