"""Thousands of cart-pole actors trained at once, saved as the published runs are.

Shapes: ``a`` actors, ``e`` environments of each, ``c`` checkpoints, ``d`` parameters of an actor.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from gpt_diffusion.cartpole.policy import Weights, forward, initial_weights, standard_deviation
from gpt_diffusion.cartpole.ppo import PpoConfig, Rollout, Trainer, advantages, log_probability
from gpt_diffusion.cartpole.simulator import CartPoles, Simulator

MakeSimulator = Callable[[int, int, torch.Generator], Simulator]
"""(actors, environments, source of randomness and device) to environments."""

WINDOW = 200
"""Episodes over which a return is averaged."""


class Returns:
    """Means of the last 200 returns of every actor; empty ones are 0.

    With ``reference`` the published bookkeeping: all returns so far are appended anew after every iteration, so that
    the early ones count repeatedly until 200 episodes have ended.
    """

    def __init__(self, actors: int, device: torch.device, *, reference: bool = True) -> None:
        self._reference = reference
        # newest first
        self._all, self._all_count = (
            torch.zeros(actors, WINDOW, device=device),
            torch.zeros(actors, device=device).long(),
        )
        self._window, self._window_count = self._all.clone(), self._all_count.clone()

    def add(self, returns: Tensor, ended: Tensor) -> None:
        """Append the returns (a, e) of the episodes that have ended (a, e), in the order of the environments."""
        rank = ended.flip(1).cumsum(1).flip(1) - 1  # 0 is the newest
        fresh = torch.zeros(len(ended), ended.shape[1] + 1, device=returns.device)
        fresh.scatter_(1, torch.where(ended, rank, ended.shape[1]), returns.float())
        self._all, self._all_count = _pushed(fresh[:, :-1], ended.sum(1), self._all, self._all_count)

    def mean(self) -> Tensor:
        """Mean returns (a,), at the end of an iteration."""
        if not self._reference:
            self._window, self._window_count = self._all, self._all_count
        else:
            self._window, self._window_count = _pushed(self._all, self._all_count, self._window, self._window_count)
        inside = torch.arange(WINDOW, device=self._all.device) < self._window_count[:, None]
        return (self._window * inside).sum(1) / self._window_count.clamp(min=1)


def _pushed(fresh: Tensor, fresh_count: Tensor, old: Tensor, old_count: Tensor) -> tuple[Tensor, Tensor]:
    """The newest of two lists (a, ...), newest first, the fresh one before the old one."""
    place = torch.arange(WINDOW, device=old.device).expand(len(old), -1)
    is_fresh = place < fresh_count[:, None]
    newer = fresh.gather(1, place.clamp(max=fresh.shape[1] - 1))
    older = old.gather(1, (place - fresh_count[:, None]).clamp(min=0))
    return torch.where(is_fresh, newer, older), (fresh_count + old_count).clamp(max=WINDOW)


class _Episodes:
    """Environments with the returns of their running episodes, and noisy actors in them."""

    def __init__(
        self, actors: int, envs: int, generator: torch.Generator, simulator: Simulator, *, common: bool = False
    ) -> None:
        self.poles = simulator
        self.generator = generator
        self._noise = (1 if common else actors, envs)
        self.observation = self.poles.reset()
        self.running = torch.zeros(actors, envs, device=generator.device)

    def act(self, weights: Weights, std_mode: str) -> tuple[Tensor, Tensor, Tensor]:
        """Actions (a, e), their mean and their standard deviation (a, 1)."""
        mean, std = forward(weights, "actor", self.observation), standard_deviation(weights, std_mode)
        noise = torch.randn(self._noise, generator=self.generator, device=mean.device)
        return mean + std * noise, mean, std

    def step(self, actions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Rewards, ends and, where an episode has ended, its return (a, e)."""
        self.observation, reward, done = self.poles.step(actions)
        self.running += reward
        returns = self.running
        self.running = torch.where(done, 0.0, returns)
        return reward, done, returns


@torch.no_grad()
def mean_returns(
    weights: Weights,
    generator: torch.Generator,
    *,
    envs: int = 512,
    episodes: int = WINDOW,
    std_mode: str = "reference",
    protocol: str = "reference",
    common: bool = False,
    simulator: MakeSimulator | None = None,
) -> Tensor:
    """Mean returns (a,) of noisy actors from fresh starts.

    Args:
        weights: Stacked actors; their critics are not used.
        generator: Of starts and actions; decides on the device.
        envs: Environments of each actor.
        episodes: ``reference`` protocol: an actor stops as soon as more have ended, as published. Short episodes end
            first, so that mixed actors are judged too low.
        std_mode: See :func:`standard_deviation`.
        protocol: ``reference``, or ``one_each``: the first episode of every environment.
        common: All actors meet the same starts and the same noise, so that the result of one does not depend on which
            others are judged beside it.
        simulator: Other environments than :class:`CartPoles`; they have their own randomness.
    """
    actors = len(weights["log_std"])
    poles = (
        CartPoles(actors, envs, generator, common=common) if simulator is None else simulator(actors, envs, generator)
    )
    world = _Episodes(actors, envs, generator, poles, common=common)
    total, count = torch.zeros(2, actors, device=generator.device)
    first = torch.ones(actors, envs, dtype=torch.bool, device=generator.device)
    judging = torch.ones(actors, dtype=torch.bool, device=generator.device)
    while judging.any():
        _, done, returns = world.step(world.act(weights, std_mode)[0])
        counted = done & (first if protocol == "one_each" else judging[:, None])
        total += (returns * counted).sum(1)
        count += counted.sum(1)
        first &= ~done
        judging = first.any(1) if protocol == "one_each" else count <= episodes
    return total / count


def train_actors(
    seeds: Sequence[int],
    saves: Tensor,
    config: PpoConfig,
    generator: torch.Generator,
    *,
    train_ret: str = "reference",
    simulator: MakeSimulator = CartPoles,
    tick: Callable[[int], object] = lambda _: None,
) -> tuple[Tensor, Tensor]:
    """Train one actor per seed.

    Args:
        seeds: Of the initial weights.
        saves: Iterations (a, c) after which the weights are kept, rising, the first one 0.
        config: Settings of PPO.
        generator: Of everything else; decides on the device.
        train_ret: ``reference`` or ``window``; see :class:`Returns`.
        simulator: Makes the environments.
        tick: Called with the iterations done since the last call, all actors together.

    Returns:
        Vectors (a, c, d) on the CPU, and mean returns (a, c) of the last 200 episodes.
    """
    device, actors = generator.device, len(seeds)
    trainer = Trainer({name: tensor.to(device) for name, tensor in initial_weights(seeds).items()}, config)
    names = [name for name in trainer.weights if not name.startswith("critic")]
    size = sum(trainer.weights[name][0].numel() for name in names)
    vectors, kept = torch.zeros(actors, saves.shape[1], size), torch.zeros(actors, saves.shape[1])
    returns = Returns(actors, device, reference=train_ret == "reference")

    def keep(iteration: int, value: Tensor) -> None:
        rows, columns = (saves == iteration).nonzero(as_tuple=True)
        flat = torch.cat([trainer.weights[name].detach().flatten(1) for name in names], 1)
        vectors[rows, columns], kept[rows, columns] = flat.cpu()[rows], value.cpu()[rows]

    start = mean_returns(trainer.weights, generator, envs=config.envs, std_mode=config.std_mode, simulator=simulator)
    keep(0, start)
    world = _Episodes(actors, config.envs, generator, simulator(actors, config.envs, generator))
    for iteration in range(1, config.iterations + 1):
        rollout, last = _collect(world, trainer.weights, config, returns)
        trainer.update(rollout, *advantages(rollout, last, config), iteration - 1)
        keep(iteration, returns.mean())
        tick(actors)
    return vectors, kept


@torch.no_grad()
def _collect(world: _Episodes, weights: Weights, config: PpoConfig, returns: Returns) -> tuple[Rollout, Tensor]:
    """One iteration's steps, and the critics' values (a, e) after them."""
    steps = []
    for _ in range(config.steps):
        observation = world.observation
        actions, mean, std = world.act(weights, config.std_mode)
        values = forward(weights, "critic", observation)
        reward, done, ended = world.step(actions)
        returns.add(ended, done)
        steps.append((observation, actions, log_probability(actions, mean, std), values, reward, done))
    return Rollout(*(torch.stack(rows) for rows in zip(*steps, strict=True))), forward(
        weights, "critic", world.observation
    )
