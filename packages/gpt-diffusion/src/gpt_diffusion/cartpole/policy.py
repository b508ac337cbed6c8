"""Actors and critics of the cart-pole: one as a module, many as stacked tensors.

Shapes: ``a`` actors, ``n`` observations of each, ``d`` = 1,250 parameters of an actor.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Weights = Mapping[str, Tensor]
"""Name to (a, *shape): ``log_std``, ``actor.0.weight`` ... and, in training, ``critic.0.weight`` ..."""


def _layers() -> nn.Sequential:
    return nn.Sequential(nn.Linear(4, 32), nn.SELU(), nn.Linear(32, 32), nn.SELU(), nn.Linear(32, 1))


class Actor(nn.Module):
    """The published task network: observation (n, 4) to the mean of the action (n, 1).

    As published, the action's standard deviation is exp(log_std)^2.
    """

    def __init__(self) -> None:
        super().__init__()
        self.log_std = nn.Parameter(torch.zeros(1))
        self.actor = _layers()
        _initialise(self.actor, 0.01)

    def forward(self, observation: Tensor) -> Tensor:
        """Mean actions."""
        mean: Tensor = self.actor(observation)
        return mean


def _initialise(layers: nn.Sequential, last_gain: float) -> None:
    """Orthogonal weights; the biases keep the library's default."""
    dense = [layer for layer in layers if isinstance(layer, nn.Linear)]
    for layer in dense:
        nn.init.orthogonal_(layer.weight, last_gain if layer is dense[-1] else 2**0.5)


def initial_weights(seeds: Sequence[int]) -> dict[str, Tensor]:
    """Stacked actors and critics, each drawn from its own seed."""
    states = []
    for seed in seeds:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            actor, critic = Actor(), _layers()
            _initialise(critic, 1.0)
        states.append(actor.state_dict() | {f"critic.{name}": tensor for name, tensor in critic.state_dict().items()})
    return {name: torch.stack([state[name] for state in states]) for name in states[0]}


def forward(weights: Weights, part: str, observations: Tensor) -> Tensor:
    """Outputs (a, n) of all actors (``part`` "actor": mean actions) or critics ("critic": values) at (a, n, 4)."""
    h = observations
    for layer in (0, 2, 4):
        weight, bias = weights[f"{part}.{layer}.weight"], weights[f"{part}.{layer}.bias"]
        h = torch.baddbmm(bias[:, None], h, weight.transpose(1, 2))
        h = F.selu(h) if layer < 4 else h
    return h[..., 0]


def standard_deviation(weights: Weights, mode: str = "reference") -> Tensor:
    """Standard deviations (a, 1) of the actions: exp(log_std)^2 as published, or exp(log_std) (``mode`` "exp")."""
    return (weights["log_std"] * (2 if mode == "reference" else 1)).exp()
