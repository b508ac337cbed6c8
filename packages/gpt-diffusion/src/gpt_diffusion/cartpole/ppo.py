"""Proximal policy optimization (Schulman et al. 2017) of many actors at once, each as if it were alone.

Shapes: ``t`` time steps, ``a`` actors, ``e`` environments of each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from gpt_diffusion.cartpole.policy import forward, standard_deviation


@dataclass(frozen=True)
class PpoConfig:
    """The published settings."""

    envs: int = 512
    iterations: int = 500
    steps: int = 16
    """Time steps of every environment in an iteration."""
    epochs: int = 8
    minibatches: int = 2
    lr: float = 3e-4
    gamma: float = 0.99
    lam: float = 0.95
    clip: float = 0.2
    value_coefficient: float = 2.0
    entropy_coefficient: float = 0.0
    max_grad_norm: float = 2.0
    clip_values: bool = False
    std_mode: str = "reference"

    def __post_init__(self) -> None:
        """Reject what cannot be trained."""
        for name in ("envs", "iterations", "steps", "epochs", "minibatches"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.envs * self.steps % self.minibatches:
            raise ValueError(f"minibatches ({self.minibatches}) must divide envs x steps ({self.envs * self.steps})")
        if self.std_mode not in ("reference", "exp"):
            raise ValueError(f"std_mode must be reference or exp, got {self.std_mode!r}")


class Rollout(NamedTuple):
    """What all actors saw and did in one iteration."""

    observations: Tensor  # (t, a, e, 4)
    actions: Tensor  # (t, a, e)
    log_probs: Tensor  # (t, a, e)
    values: Tensor  # (t, a, e)
    rewards: Tensor  # (t, a, e)
    dones: Tensor  # (t, a, e), whether the episode ended with this step


class Losses(NamedTuple):
    """Means over all updates of an iteration, (a,)."""

    value: Tensor
    surrogate: Tensor


def log_probability(actions: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """Log density of normal actions, elementwise."""
    return -0.5 * ((actions - mean) / std).square() - std.log() - 0.5 * math.log(2 * math.pi)


def advantages(rollout: Rollout, last_values: Tensor, config: PpoConfig) -> tuple[Tensor, Tensor]:
    """Returns and normalised advantages (t, a, e) by generalised advantage estimation (Schulman et al. 2016).

    Time-outs count as ends, as published. ``last_values`` (a, e) are the critics' after the last step.
    """
    estimate, following = torch.zeros_like(last_values), last_values
    found = []
    for reward, value, done in zip(*(x.flip(0) for x in (rollout.rewards, rollout.values, rollout.dones)), strict=True):
        alive = 1 - done.to(reward.dtype)
        estimate = reward + config.gamma * alive * following - value + config.gamma * config.lam * alive * estimate
        following = value
        found.append(estimate)
    raw = torch.stack(found[::-1])
    mean, std = raw.mean((0, 2), keepdim=True), raw.std((0, 2), keepdim=True)
    return raw + rollout.values, (raw - mean) / (std + 1e-8)


class Trainer:
    """Weights of all actors and critics with their Adam states."""

    def __init__(self, weights: Mapping[str, Tensor], config: PpoConfig) -> None:
        """Take stacked weights (name to (a, *shape)); they are copied."""
        self.config = config
        self.weights = {name: tensor.clone().requires_grad_() for name, tensor in weights.items()}
        self.optimizer = torch.optim.Adam(list(self.weights.values()), lr=config.lr, foreach=True)
        self.lr = config.lr

    def update(self, rollout: Rollout, returns: Tensor, advantage: Tensor, iteration: int) -> Losses:
        """Several epochs over a rollout in sequential parts, time before environments, as published."""
        config, actors = self.config, rollout.actions.shape[1]
        flat = [x.movedim(1, 0).flatten(1, 2) for x in (*rollout[:4], returns, advantage)]  # (a, t e, ...)
        total_value, total_surrogate = torch.zeros(2, actors, device=returns.device, dtype=returns.dtype)
        for epoch in range(config.epochs):
            progress = (iteration + epoch / config.epochs) / config.iterations
            self.lr = config.lr * 0.5 * (1 + math.cos(math.pi * progress))
            self.optimizer.param_groups[0]["lr"] = self.lr
            for parts in zip(*(x.chunk(config.minibatches, 1) for x in flat), strict=True):
                value, surrogate = self._step(*parts)
                total_value += value
                total_surrogate += surrogate
        updates = config.epochs * config.minibatches
        return Losses(total_value / updates, total_surrogate / updates)

    def _step(
        self,
        observations: Tensor,
        actions: Tensor,
        old_log_probs: Tensor,
        old_values: Tensor,
        returns: Tensor,
        advantage: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """One update of every actor on its own part (a, n, ...); value and surrogate losses (a,)."""
        config = self.config
        std = standard_deviation(self.weights, config.std_mode)
        log_probs = log_probability(actions, forward(self.weights, "actor", observations), std)
        values = forward(self.weights, "critic", observations)
        ratio = (log_probs - old_log_probs).exp()
        clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
        surrogate = torch.maximum(-advantage * ratio, -advantage * clipped).mean(1)
        errors = (values - returns).square()
        if config.clip_values:
            near = old_values + (values - old_values).clamp(-config.clip, config.clip)
            errors = torch.maximum(errors, (near - returns).square())
        value = errors.mean(1)
        entropy = (0.5 * math.log(2 * math.pi * math.e) + std.log())[:, 0]
        loss = surrogate + config.value_coefficient * value - config.entropy_coefficient * entropy
        self.optimizer.zero_grad()
        loss.sum().backward()
        self._clip_gradients()
        self.optimizer.step()
        return value.detach(), surrogate.detach()

    @torch.no_grad()
    def _clip_gradients(self) -> None:
        """Limit the gradient norm of each actor with its critic."""
        gradients = [tensor.grad for tensor in self.weights.values() if tensor.grad is not None]
        norm = torch.stack([g.flatten(1).square().sum(1) for g in gradients]).sum(0).sqrt()
        scale = (self.config.max_grad_norm / (norm + 1e-6)).clamp(max=1)
        for gradient in gradients:
            gradient *= scale.view(-1, *[1] * (gradient.ndim - 1))
