"""Which time steps to train on."""

import torch
from torch import Tensor, nn


class UniformSampler(nn.Module):
    """Every step with equal probability.

    Args:
        num_timesteps: T.
    """

    def __init__(self, num_timesteps: int) -> None:
        """Store the number of steps."""
        super().__init__()
        self.num_timesteps = num_timesteps

    def weights(self) -> Tensor:
        """Unnormalised probability of every step, (T,) float64."""
        return torch.ones(self.num_timesteps, dtype=torch.float64)

    def sample(
        self, count: int, *, generator: torch.Generator | None = None, uniforms: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Draw steps by inverting the cumulative distribution.

        Args:
            count: Number n of draws.
            generator: Source of the uniform numbers, on the CPU.
            uniforms: The numbers themselves, (n,) float64 in [0, 1), instead of a generator.

        Returns:
            Steps (n,) int64 and importance weights 1 / (T p_t) (n,) float32, which keep the mean loss unbiased.
        """
        p = self.weights() / self.weights().sum()
        if uniforms is None:
            uniforms = torch.rand(count, generator=generator, dtype=torch.float64)
        cumulative = p.cumsum(0)
        t = torch.searchsorted(cumulative / cumulative[-1], uniforms, right=True)
        return t, (1 / (self.num_timesteps * p[t])).float()


class LossSecondMomentSampler(UniformSampler):
    """Steps with probability proportional to sqrt(E[L_t^2]) (Nichol & Dhariwal 2021, eq. 18).

    Uniform until every step has a full history of losses. The history is part of the state dict; under
    ``torch.distributed`` all ranks share one.

    Args:
        num_timesteps: T.
        history_per_term: Losses remembered per step.
        uniform_prob: Share of uniform draws mixed in.
    """

    history: Tensor  # (T, history_per_term) float64, oldest first
    counts: Tensor  # (T,) int64

    def __init__(self, num_timesteps: int, history_per_term: int = 10, uniform_prob: float = 0.001) -> None:
        """Start with an empty history."""
        super().__init__(num_timesteps)
        self.uniform_prob = uniform_prob
        self.register_buffer("history", torch.zeros(num_timesteps, history_per_term, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(num_timesteps, dtype=torch.int64))

    def weights(self) -> Tensor:
        """Unnormalised probability of every step, (T,) float64."""
        if (self.counts < self.history.shape[1]).any():
            return super().weights()
        weights = self.history.square().mean(dim=1).sqrt()
        return weights / weights.sum() * (1 - self.uniform_prob) + self.uniform_prob / self.num_timesteps

    def update(self, t: Tensor, losses: Tensor) -> None:
        """Remember the losses (n,) met at steps t (n,), of all ranks, in order of rank."""
        pairs = [(t.cpu(), losses.detach().double().cpu())]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            gathered = [pairs[0]] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(gathered, pairs[0])
            pairs = gathered
        for steps, values in pairs:
            for step, value in zip(steps.tolist(), values.tolist(), strict=True):
                self._remember(step, value)

    def _remember(self, step: int, loss: float) -> None:
        row, count = self.history[step], int(self.counts[step])
        if count == len(row):
            row.copy_(row.roll(-1))
            row[-1] = loss
        else:
            row[count] = loss
            self.counts[step] += 1


def create_sampler(name: str, num_timesteps: int) -> UniformSampler:
    """The sampler called ``uniform`` or ``loss-second-moment``; any other name is a ValueError."""
    samplers = {"uniform": UniformSampler, "loss-second-moment": LossSecondMomentSampler}
    if name not in samplers:
        raise ValueError(f"time step sampler {name!r} is unknown; use one of {', '.join(samplers)}")
    return samplers[name](num_timesteps)
