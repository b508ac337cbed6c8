"""Diffusion processes: schedules, respacing, losses, sampling steps and samplers of training steps."""

from gpt_diffusion.diffusion.flow import Flow
from gpt_diffusion.diffusion.process import (
    Bound,
    Diffusion,
    Gaussian,
    Losses,
    LossType,
    ModelMeanType,
    ModelVarType,
    Prediction,
    Step,
    create_diffusion,
    normal_kl,
)
from gpt_diffusion.diffusion.respacing import space_timesteps
from gpt_diffusion.diffusion.samplers import LossSecondMomentSampler, UniformSampler, create_sampler
from gpt_diffusion.diffusion.schedule import Schedule, betas_between, betas_for_alpha_bar, named_betas

__all__ = [
    "Bound",
    "Diffusion",
    "Flow",
    "Gaussian",
    "LossSecondMomentSampler",
    "LossType",
    "Losses",
    "ModelMeanType",
    "ModelVarType",
    "Prediction",
    "Schedule",
    "Step",
    "UniformSampler",
    "betas_between",
    "betas_for_alpha_bar",
    "create_diffusion",
    "create_sampler",
    "named_betas",
    "normal_kl",
    "space_timesteps",
]
