"""The cart-pole as a vector environment of Gymnasium, and such environments as simulators for our trainer.

Both begin an episode anew in the step after its end (``AutoresetMode.NEXT_STEP``), the published order; that step's
reward is the one of the fresh state.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gpt_diffusion.cartpole.simulator import CLIP_OBSERVATION, EPISODE_STEPS, CartPoles, is_lost
from gpt_diffusion.cartpole.training import MakeSimulator

try:
    from gymnasium.spaces import Box
    from gymnasium.vector import AutoresetMode, VectorEnv
    from gymnasium.vector.utils import batch_space
except ImportError:  # the extra is not installed: the names are there, using them says so
    VectorEnv = object  # type: ignore[assignment, misc]


def _require() -> None:
    if VectorEnv is object:
        raise ImportError('cart-poles as Gymnasium environments need the extra: pip install "gpt-diffusion[rl]"')


class CartPoleVectorEnv(VectorEnv):
    """Cart-poles with NumPy arrays in and out.

    Observations are (n, 4) float32, clamped to -5 .. 5: position, velocity, angle, angular velocity; actions (n, 1) from
    -1 to 1, the force as a fraction of 400 N. ``truncated`` marks episodes of 500 steps.
    """

    def __init__(self, num_envs: int = 512, seed: int = 0, device: str = "cpu") -> None:
        """Make the environments on a device; ``seed`` counts until :meth:`reset` gives another.

        Raises:
            ImportError: Gymnasium is not installed.
            ValueError: ``num_envs`` is less than 1.
        """
        _require()
        if num_envs < 1:
            raise ValueError(f"num_envs must be at least 1, got {num_envs}")
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        self.num_envs = num_envs
        self.single_observation_space = Box(-CLIP_OBSERVATION, CLIP_OBSERVATION, (4,), np.float32)
        self.single_action_space = Box(-1, 1, (1,), np.float32)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._generator = torch.Generator(device).manual_seed(seed)
        self._poles = CartPoles(1, num_envs, self._generator)

    def reset(
        self, *, seed: int | list[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start all episodes afresh.

        Raises:
            ValueError: A seed for each environment is given: they have one source of randomness.
        """
        if isinstance(seed, list):
            raise ValueError("CartPoleVectorEnv takes one seed for all environments, not a list")
        if seed is not None:
            self._generator.manual_seed(seed)
        return self._poles.reset()[0].cpu().numpy(), {}

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]:
        """Observations, rewards, terminated, truncated (n, ...) after actions (n, 1).

        Raises:
            ValueError: The actions have another shape.
        """
        if np.shape(actions) != (self.num_envs, 1):
            raise ValueError(f"actions must have shape ({self.num_envs}, 1), got {np.shape(actions)}")
        forces = torch.as_tensor(actions, dtype=torch.float32, device=self._generator.device)
        observation, reward, _ = self._poles.step(forces[None, :, 0])
        lost = is_lost(self._poles.state)
        late = (self._poles.progress >= EPISODE_STEPS - 1) & ~lost
        found = (observation, reward, lost, late)
        return *(part[0].cpu().numpy() for part in found), {}  # type: ignore[return-value]


class GymSimulator:
    """A vector environment of actors x environments as a :class:`~gpt_diffusion.cartpole.simulator.Simulator`."""

    def __init__(self, env: "VectorEnv[Any, Any, Any]", actors: int, generator: torch.Generator) -> None:
        """Take an environment and seed it from the generator, on whose device the tensors are wanted."""
        if env.metadata.get("autoreset_mode") not in (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP):
            raise ValueError(f"{env}: episodes must begin anew by themselves (autoreset_mode NEXT_STEP or SAME_STEP)")
        for what, space, shape in (
            ("observations", env.single_observation_space, (4,)),
            ("actions", env.single_action_space, (1,)),
        ):
            if space.shape != shape:
                raise ValueError(f"{env}: {what} must have shape {shape}, got {space.shape}")
        if env.num_envs % actors:
            raise ValueError(f"{env}: {env.num_envs} environments cannot be shared by {actors} actors")
        self._env, self._shape, self._device = env, (actors, env.num_envs // actors), generator.device
        self._seed: int | None = int(torch.randint(2**31, (), generator=generator, device=generator.device))

    def reset(self) -> Tensor:
        """Start all episodes afresh; observations (a, e, 4)."""
        seed, self._seed = self._seed, None
        return self._tensor(self._env.reset(seed=seed)[0], 4)

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observations (a, e, 4) after actions (a, e); rewards (a, e); and which episodes have ended (a, e)."""
        clipped = actions.clamp(-1, 1).reshape(-1, 1).cpu().numpy()
        observation, reward, terminated, truncated, _ = self._env.step(clipped)
        ended = torch.as_tensor(np.asarray(terminated) | np.asarray(truncated), device=self._device)
        return self._tensor(observation, 4), self._tensor(reward), ended.view(self._shape)

    def _tensor(self, values: object, *last: int) -> Tensor:
        return torch.as_tensor(np.asarray(values), dtype=torch.float32, device=self._device).view(*self._shape, *last)


def from_gym(make: "Callable[[int], VectorEnv[Any, Any, Any]]") -> MakeSimulator:
    """Environments of Gymnasium for :func:`~gpt_diffusion.cartpole.training.train_actors`.

    Args:
        make: Number of environments to a vector environment with four observations and one action each.

    Raises:
        ImportError: Gymnasium is not installed.
    """
    _require()
    return lambda actors, envs, generator: GymSimulator(make(actors * envs), actors, generator)
