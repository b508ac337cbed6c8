"""Zoos of task networks: thousands of runs trained at once, each from its own seed."""

from gpt_diffusion.generation.chunks import Generated
from gpt_diffusion.generation.procedure import generate
from gpt_diffusion.generation.supervised import train_from, trajectories_from
from gpt_diffusion.generation.work import Forecast

__all__ = ["Forecast", "Generated", "generate", "train_from", "trajectories_from"]
