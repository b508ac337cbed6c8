"""Infinite-width networks that learn features, and their finite twins.

The names below are loaded when first used (PEP 562), so that importing the package, and every ``--help``, costs no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # what a type checker sees
    from pilimit.checkpoint import from_converted_original as from_converted_original
    from pilimit.checkpoint import load_metadata as load_metadata
    from pilimit.checkpoint import load_net as load_net
    from pilimit.checkpoint import load_optimizer as load_optimizer
    from pilimit.checkpoint import save_net as save_net
    from pilimit.ensemble import FinEnsemble as FinEnsemble
    from pilimit.ensemble import width_study as width_study
    from pilimit.expansion import KernelModel as KernelModel
    from pilimit.finite import FinMLP as FinMLP
    from pilimit.finite import FinPiInputLinearReLU as FinPiInputLinearReLU
    from pilimit.finite import FinPiLinearReLU as FinPiLinearReLU
    from pilimit.finite import mu_net as mu_net
    from pilimit.infinite import InfMLP as InfMLP
    from pilimit.infinite import InfPiInputLinearReLU as InfPiInputLinearReLU
    from pilimit.infinite import InfPiLinearReLU as InfPiLinearReLU
    from pilimit.kernels import nngp as nngp
    from pilimit.kernels import ntk as ntk
    from pilimit.optim import PiSGD as PiSGD
    from pilimit.optim import clip_grad_norm_ as clip_grad_norm_
    from pilimit.optim import grad_norms as grad_norms
    from pilimit.optim import param_groups as param_groups
    from pilimit.recompression import reduce_atoms as reduce_atoms
    from pilimit.regression import fit_kernel as fit_kernel

_MODULE_OF = {
    "FinEnsemble": "ensemble",
    "FinMLP": "finite",
    "FinPiInputLinearReLU": "finite",
    "FinPiLinearReLU": "finite",
    "InfMLP": "infinite",
    "InfPiInputLinearReLU": "infinite",
    "InfPiLinearReLU": "infinite",
    "KernelModel": "expansion",
    "PiSGD": "optim",
    "clip_grad_norm_": "optim",
    "fit_kernel": "regression",
    "from_converted_original": "checkpoint",
    "grad_norms": "optim",
    "load_metadata": "checkpoint",
    "load_net": "checkpoint",
    "load_optimizer": "checkpoint",
    "mu_net": "finite",
    "nngp": "kernels",
    "ntk": "kernels",
    "param_groups": "optim",
    "reduce_atoms": "recompression",
    "save_net": "checkpoint",
    "width_study": "ensemble",
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
