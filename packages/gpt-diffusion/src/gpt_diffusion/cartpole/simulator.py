"""The cart-pole of the published experiments, for many actors with many environments each.

A cart on a rail is pushed; a pole stands on it. The equations are those of two rigid bodies (checked against an
independent engine), integrated by semi-implicit Euler in two substeps. The published engine is a different integrator,
so trajectories agree in kind, not in digits.

Shapes: ``a`` actors, ``e`` environments of each. A state or observation has the cart's position (m) and velocity (m/s)
and the pole's angle (rad, 0 is upright) and angular velocity (rad/s).
"""

import math
from typing import Protocol

import torch
from torch import Tensor

MASS_CART = MASS_POLE = 1.0
LENGTH = 0.47
"""From the joint to the pole's centre, in metres."""
INERTIA = (0.06**2 + 1.0**2) / 12
"""Of the pole about its centre."""
GRAVITY = 9.81
TIMESTEP, SUBSTEPS = 0.0166, 2
MAX_FORCE = 400.0
RAIL, MAX_POLE_SPEED = 4.0, 8.0
RESET_DISTANCE, EPISODE_STEPS = 3.0, 500
CLIP_OBSERVATION = 5.0
START_POSITION, START_VELOCITY = 0.1, 0.25
"""Fresh states are uniform between plus and minus these."""


def accelerations(state: Tensor, force: Tensor) -> Tensor:
    """Accelerations (..., 2) of cart (m/s^2) and pole (rad/s^2) in a state (..., 4) under a force (...,) in newtons."""
    angle, speed = state[..., 2], state[..., 3]
    arm = MASS_POLE * LENGTH
    mass, inertia, coupling = MASS_CART + MASS_POLE, INERTIA + arm * LENGTH, arm * angle.cos()
    push = force - arm * angle.sin() * speed.square()
    weight = arm * GRAVITY * angle.sin()
    determinant = mass * inertia - coupling.square()
    cart = (inertia * push + coupling * weight) / determinant
    pole = (mass * weight + coupling * push) / determinant
    return torch.stack([cart, pole], -1)


def move(state: Tensor, action: Tensor) -> Tensor:
    """The state (..., 4) one time step later under an action (...,), which is clipped to -1 .. 1."""
    force, dt = MAX_FORCE * action.clamp(-1, 1), TIMESTEP / SUBSTEPS
    for _ in range(SUBSTEPS):
        cart, pole = (state[..., 1::2] + dt * accelerations(state, force)).unbind(-1)
        pole = pole.clamp(-MAX_POLE_SPEED, MAX_POLE_SPEED)
        place, angle = state[..., 0] + dt * cart, state[..., 2] + dt * pole
        cart = torch.where(place.abs() > RAIL, 0.0, cart)
        state = torch.stack([place.clamp(-RAIL, RAIL), cart, angle, pole], -1)
    return state


def is_lost(state: Tensor) -> Tensor:
    """Whether the cart is too far off or the pole too low in a state (..., 4)."""
    return (state[..., 0].abs() > RESET_DISTANCE) | (state[..., 2].abs() > math.pi / 2)


def reward_and_reset(state: Tensor, reset: Tensor, progress: Tensor) -> tuple[Tensor, Tensor]:
    """Reward of a state (..., 4), and whether its environment starts afresh at the next step.

    Args:
        state: Not clamped.
        reset: (...,) bool, flags that are set already.
        progress: (...,) steps since the start of the episode.
    """
    _, speed, angle, turning = state.unbind(-1)
    lost = is_lost(state)
    reward = torch.where(lost, -2.0, 1 - angle.square() - 0.01 * speed.abs() - 0.005 * turning.abs())
    return reward, reset | lost | (progress >= EPISODE_STEPS - 1)


class Simulator(Protocol):
    """Environments (a, e) that start anew by themselves; what actors can be trained in."""

    def reset(self) -> Tensor:
        """Start all episodes afresh; observations (a, e, 4)."""
        ...

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Observations (a, e, 4) after actions (a, e); rewards (a, e); and which episodes have ended (a, e)."""
        ...


class CartPoles:
    """Environments (a, e) with one clock; the first step after the start initialises them all.

    As published, an environment whose flag is set is simulated once more, and the result thrown away: what
    :meth:`step` returns for it then is its fresh state.
    """

    def __init__(
        self,
        actors: int,
        envs: int,
        generator: torch.Generator,
        dtype: torch.dtype = torch.float32,
        *,
        common: bool = False,
    ) -> None:
        """Environments on the device of the generator, which draws the fresh states.

        With ``common`` all actors see the same fresh states at the same time.
        """
        self._generator, self._drawn = generator, (1 if common else actors, envs, 4)
        device = generator.device
        self.state = torch.zeros(actors, envs, 4, device=device, dtype=dtype)
        self.progress = torch.zeros(actors, envs, device=device, dtype=torch.int64)
        self.flags = torch.ones(actors, envs, device=device, dtype=torch.bool)
        self._range = torch.tensor([START_POSITION, START_VELOCITY] * 2, device=device, dtype=dtype)

    def reset(self) -> Tensor:
        """Start all episodes afresh: one step without force; observations (a, e, 4)."""
        self.flags.fill_(True)
        return self.step(torch.zeros_like(self.state[..., 0]))[0]

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """One time step.

        Args:
            actions: (a, e).

        Returns:
            Observations (a, e, 4), clamped; rewards (a, e); and which episodes have ended (a, e).
        """
        state = move(self.state, actions)
        self.progress += 1
        draws = torch.rand(self._drawn, generator=self._generator, device=state.device, dtype=state.dtype)
        self.state = torch.where(self.flags[..., None], (2 * draws - 1) * self._range, state)
        self.progress.masked_fill_(self.flags, 0)
        reward, self.flags = reward_and_reset(self.state, torch.zeros_like(self.flags), self.progress)
        return self.state.clamp(-CLIP_OBSERVATION, CLIP_OBSERVATION), reward, self.flags
