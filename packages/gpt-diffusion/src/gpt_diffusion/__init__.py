"""A diffusion transformer over neural network checkpoints: prompt a loss, get weights.

The names below are loaded when first used (PEP 562), so that importing the package, and every ``--help``, costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees
    from gpt_diffusion.behaviour import BehaviourLoss as BehaviourLoss
    from gpt_diffusion.config import Config as Config
    from gpt_diffusion.config import load_config as load_config
    from gpt_diffusion.dataset import ParameterDataset as ParameterDataset
    from gpt_diffusion.diffusion import Diffusion as Diffusion
    from gpt_diffusion.diffusion import create_diffusion as create_diffusion
    from gpt_diffusion.diffusion import space_timesteps as space_timesteps
    from gpt_diffusion.downloads import download as download
    from gpt_diffusion.downloads import find_checkpoints as find_checkpoints
    from gpt_diffusion.downloads import find_model as find_model
    from gpt_diffusion.embedding import ScalarEmbedding as ScalarEmbedding
    from gpt_diffusion.evaluation import evaluate as evaluate
    from gpt_diffusion.generation import generate as generate
    from gpt_diffusion.generation import train_from as train_from
    from gpt_diffusion.model import GptModel as GptModel
    from gpt_diffusion.normalization import get_normalizer as get_normalizer
    from gpt_diffusion.novelty import nearest_checkpoints as nearest_checkpoints
    from gpt_diffusion.preparation import prepare as prepare
    from gpt_diffusion.pretrained import Pretrained as Pretrained
    from gpt_diffusion.pretrained import load_pretrained as load_pretrained
    from gpt_diffusion.prompting import prompt_alignment as prompt_alignment
    from gpt_diffusion.published import PublishedDataset as PublishedDataset
    from gpt_diffusion.published import PublishedZoo as PublishedZoo
    from gpt_diffusion.published import open_runs as open_runs
    from gpt_diffusion.sampling import sample as sample
    from gpt_diffusion.training import train as train
    from gpt_diffusion.trust import NoveltyReport as NoveltyReport
    from gpt_diffusion.trust import novelty_report as novelty_report
    from gpt_diffusion.units import UnitModel as UnitModel
    from gpt_diffusion.units import UnitTokens as UnitTokens

_MODULE_OF = {
    "BehaviourLoss": "behaviour",
    "Config": "config",
    "Diffusion": "diffusion",
    "GptModel": "model",
    "NoveltyReport": "trust",
    "ParameterDataset": "dataset",
    "Pretrained": "pretrained",
    "PublishedDataset": "published",
    "PublishedZoo": "published",
    "ScalarEmbedding": "embedding",
    "UnitModel": "units",
    "UnitTokens": "units",
    "create_diffusion": "diffusion",
    "download": "downloads",
    "evaluate": "evaluation",
    "find_checkpoints": "downloads",
    "find_model": "downloads",
    "generate": "generation",
    "get_normalizer": "normalization",
    "load_config": "config",
    "load_pretrained": "pretrained",
    "nearest_checkpoints": "novelty",
    "novelty_report": "trust",
    "open_runs": "published",
    "prepare": "preparation",
    "prompt_alignment": "prompting",
    "sample": "sampling",
    "space_timesteps": "diffusion",
    "train": "training",
    "train_from": "generation",
}

__all__ = sorted(_MODULE_OF)  # noqa: PLE0605 (computed from the table above)


def __getattr__(name: str) -> object:
    """Load a public name from its module."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)


def __dir__() -> list[str]:
    """The public names."""
    return __all__
