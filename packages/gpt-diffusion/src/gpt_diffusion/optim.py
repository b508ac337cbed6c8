"""Optimizer, learning rate and averaged weights, as G.pt was trained."""

import copy
import math
from collections.abc import Iterable, Mapping
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights of Linear layers with weight decay; biases, layer norms, positions and all else without.

    Inside a group the parameters are sorted by name (as strings: ``blocks.10`` before ``blocks.2``), which is the order
    of the optimizer state in released files.
    """
    modules = model.named_modules()
    linear = {f"{name}.weight".removeprefix(".") for name, module in modules if isinstance(module, nn.Linear)}
    named = sorted((name, p) for name, p in model.named_parameters() if p.requires_grad)
    return [
        {"params": [p for name, p in named if name in linear], "weight_decay": weight_decay},
        {"params": [p for name, p in named if name not in linear], "weight_decay": 0.0},
    ]


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float = 0.1, beta2: float = 0.999
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019) over :func:`param_groups`, eps 1e-8, betas (0.9, beta2), fused."""
    groups = param_groups(model, weight_decay)
    return torch.optim.AdamW(groups, lr=lr, betas=(0.9, beta2), eps=1e-8, fused=True)


def load_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over the moments of a released file; the parameters are in the order of :func:`param_groups`.

    The options of ``optimizer`` stay. Old files count steps in Python integers, which torch no longer accepts.
    """
    own = optimizer.state_dict()["param_groups"]
    order = [index for group in saved["param_groups"] for index in group["params"]]
    state = {}
    for position, index in enumerate(order):
        entry = saved["state"][index]
        moments = {key: entry[key] for key in ("exp_avg", "exp_avg_sq")}
        state[position] = {"step": torch.as_tensor(float(entry["step"])), **moments}
    optimizer.load_state_dict({"state": state, "param_groups": own})


def learning_rate(
    epoch: float,
    *,
    base_lr: float,
    num_epochs: float,
    warmup_epochs: float = 0.0,
    warmup_factor: float = 0.0,
    schedule: Literal["cos", "fixed"] = "cos",
) -> float:
    """Learning rate at a fractional epoch, or at a step if all three lengths are counted in steps.

    Args:
        epoch: epoch + iteration / iterations per epoch.
        base_lr: Highest rate.
        num_epochs: Where the cosine reaches 0.
        warmup_epochs: Length of the linear warm-up that is multiplied onto the schedule.
        warmup_factor: Where the warm-up begins, relative to the full rate.
        schedule: ``cos``: base_lr (1 + cos(pi epoch / num_epochs)) / 2; ``fixed``: base_lr.

    Returns:
        The rate.

    Raises:
        ValueError: Unknown schedule.
    """
    if schedule not in ("cos", "fixed"):
        raise ValueError(f"learning rate schedule {schedule!r} is unknown; use cos or fixed")
    lr = base_lr * 0.5 * (1 + math.cos(math.pi * epoch / num_epochs)) if schedule == "cos" else base_lr
    if epoch < warmup_epochs:
        done = epoch / warmup_epochs
        lr *= warmup_factor * (1 - done) + done
    return lr


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Use ``lr`` in all groups from the next step on."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def clip_gradients(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """Scale gradients to a global L2 norm of at most ``max_norm`` (0: leave them); returns the norm before, a scalar."""
    return nn.utils.clip_grad_norm_(parameters, max_norm if max_norm > 0 else math.inf)


def averaged_copy(model: Module) -> Module:
    """A copy in evaluation mode that takes no gradients: the start of an exponential moving average."""
    return copy.deepcopy(model).requires_grad_(False).eval()


@torch.no_grad()
def update_average(average: nn.Module, model: nn.Module, decay: float) -> None:
    """Set average to decay * average + (1 - decay) * model, all parameters in one fused pass; buffers stay."""
    torch._foreach_lerp_(list(average.parameters()), list(model.parameters()), 1 - decay)


def apply_gradients(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    *,
    lr: float,
    grad_clip: float = 0.0,
    average: nn.Module | None = None,
    decay: float = 0.9999,
) -> Tensor:
    """One optimizer step with the gradients that are there: clipping, AdamW, moving average.

    Args:
        model: Its parameters are updated.
        optimizer: Over the parameters of ``model``.
        lr: Learning rate of this step.
        grad_clip: Largest global L2 norm of the gradient; 0 = no limit.
        average: Moving average of ``model``, updated last, if any.
        decay: Its decay.

    Returns:
        Global L2 norm of the gradient before clipping, a scalar on the model's device.
    """
    set_learning_rate(optimizer, lr)
    norm = clip_gradients(model.parameters(), grad_clip)
    optimizer.step()
    if average is not None:
        update_average(average, model, decay)
    return norm
