"""Sequential autoencoder of neural network weights: embed, analyse and sample models.

The names below are loaded when first used (PEP 562), so that importing the package, and every ``--help``, costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees
    from sane.autoencoder import Autoencoder as Autoencoder
    from sane.autoencoder import AutoencoderConfig as AutoencoderConfig
    from sane.config import Config as Config
    from sane.config import load_config as load_config
    from sane.embedding import embed as embed
    from sane.generation import ZooPlan as ZooPlan
    from sane.generation import train_zoo as train_zoo
    from sane.losses import Objective as Objective
    from sane.model import Halo as Halo
    from sane.model import SaneModel as SaneModel
    from sane.model import load_model as load_model
    from sane.model import load_published as load_published
    from sane.networks import build_network as build_network
    from sane.normalization import Normalization as Normalization
    from sane.population import Networks as Networks
    from sane.prediction import PropertyPredictor as PropertyPredictor
    from sane.preparation import PrepareConfig as PrepareConfig
    from sane.preparation import Prepared as Prepared
    from sane.preparation import open_prepared as open_prepared
    from sane.preparation import prepare as prepare
    from sane.pretraining import pretrain as pretrain
    from sane.reconstruction import reconstruct as reconstruct
    from sane.sampling import KernelDensity as KernelDensity
    from sane.sampling import Sampler as Sampler
    from sane.windows import WindowDataset as WindowDataset

_MODULE_OF = {
    "Autoencoder": "autoencoder",
    "AutoencoderConfig": "autoencoder",
    "Config": "config",
    "Halo": "model",
    "KernelDensity": "sampling",
    "Networks": "population",
    "Normalization": "normalization",
    "Objective": "losses",
    "PrepareConfig": "preparation",
    "Prepared": "preparation",
    "PropertyPredictor": "prediction",
    "SaneModel": "model",
    "Sampler": "sampling",
    "WindowDataset": "windows",
    "ZooPlan": "generation",
    "build_network": "networks",
    "embed": "embedding",
    "load_config": "config",
    "load_model": "model",
    "load_published": "model",
    "open_prepared": "preparation",
    "prepare": "preparation",
    "pretrain": "pretraining",
    "reconstruct": "reconstruction",
    "train_zoo": "generation",
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
