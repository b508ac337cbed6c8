"""Zoos of task networks: thousands of runs trained at once, each from its own seed."""

from gpt_diffusion.generation.procedure import Forecast, Generated, generate, train_from, trajectories_from

__all__ = ["Forecast", "Generated", "generate", "train_from", "trajectories_from"]
