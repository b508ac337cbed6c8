"""A diffusion transformer over neural network checkpoints: prompt a loss, get weights."""

import importlib

_MODULE_OF = {
    "BehaviourLoss": "behaviour",
    "Config": "config",
    "ParameterDataset": "dataset",
    "Pretrained": "pretrained",
    "UnitModel": "units",
    "UnitTokens": "units",
    "evaluate": "evaluation",
    "generate": "generation",
    "load_config": "config",
    "load_pretrained": "pretrained",
    "train": "training",
    "Diffusion": "diffusion",
    "GptModel": "model",
    "LossType": "diffusion",
    "ModelMeanType": "diffusion",
    "ModelVarType": "diffusion",
    "PromptCurves": "prompting",
    "ScalarEmbedding": "embedding",
    "create_diffusion": "diffusion",
    "create_sampler": "diffusion",
    "get_normalizer": "normalization",
    "one_by_one": "prompting",
    "one_step_prompting": "prompting",
    "prompt_alignment": "prompting",
    "random_permute_flat": "augmentation",
    "recursive_prompting": "prompting",
    "sample": "sampling",
    "space_timesteps": "diffusion",
    "spread_losses": "prompting",
}

__all__ = list(_MODULE_OF)


def __getattr__(name: str) -> object:
    """Import a public name when it is first used (PEP 562), so that the command line starts without torch."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
