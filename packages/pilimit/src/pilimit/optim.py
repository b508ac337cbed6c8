"""Stochastic gradient descent for atoms and ordinary parameters, learning-rate groups, clipping."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from pilimit.atoms import AtomsParameter, align
from pilimit.expectations import wide


class PiSGD(Optimizer):
    """SGD that appends the staged rows of each infinite layer, and updates other parameters as usual.

    The learning rate of a group is ``lr * lr_mult``, so torch's schedulers, which change ``lr``, keep the ratios.

    Args:
        params: Parameters, or groups as from :func:`param_groups`.
        lr: Learning rate.
        momentum: Of atoms too.
        dampening: As in torch, but from the first step on.
        weight_decay: Applied before the gradient, not seen by clipping.
        lr_mult: Multiplier of ``lr``. With 0, atoms decay but none are appended.
        apply_lr_mult_to_wd: Decay by ``lr * lr_mult * weight_decay``; otherwise by ``lr * weight_decay``, as in the
            published CIFAR-10 runs.
        legacy_momentum_init: Start the velocity of existing atoms at ``weight_decay`` as the published code does; the
            right value is 0.
    """

    def __init__(
        self,
        params: Any,  # noqa: ANN401 (torch's own type is not public)
        lr: float,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        *,
        lr_mult: float = 1.0,
        apply_lr_mult_to_wd: bool = True,
        legacy_momentum_init: bool = False,
    ) -> None:
        for name, value in (("lr", lr), ("momentum", momentum), ("weight_decay", weight_decay)):
            if not value >= 0:
                raise ValueError(f"{name} must not be negative, got {value}")
        defaults = {
            "lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay, "lr_mult": lr_mult,
            "apply_lr_mult_to_wd": apply_lr_mult_to_wd, "legacy_momentum_init": legacy_momentum_init,
        }  # fmt: skip
        super().__init__(params, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # noqa: ANN401
        """Update all parameters that have a gradient."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, AtomsParameter):
                    self._step_atoms(parameter, group)
                elif parameter.grad is not None:
                    self._step_dense(parameter, group)
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """As in torch; staged rows of atoms are dropped in either case, for zeroed ones would be appended."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if isinstance(parameter, AtomsParameter):
                    parameter.grad = None
        super().zero_grad(set_to_none)

    def _step_atoms(self, parameter: AtomsParameter, group: dict[str, Any]) -> None:
        rows, atoms = parameter.pending(), parameter.atoms
        if rows is None:
            return
        rate = group["lr"] * group["lr_mult"] * parameter.lr_mult
        if group["momentum"]:
            self._step_velocity(parameter, group, rate, rows)
            return
        if group["weight_decay"]:
            atoms.decay(1 - _decay_rate(group, rate) * group["weight_decay"])
        if rate:
            atoms.append(*rows, -rate)

    def _step_velocity(
        self, parameter: AtomsParameter, group: dict[str, Any], rate: float, rows: tuple[Tensor, Tensor]
    ) -> None:
        atoms, new = parameter.atoms, 1 - group["dampening"]
        state, decay = self.state[parameter], _momentum_decay(group)
        atoms.fold()
        if "velocity" not in state:
            start = decay if group["legacy_momentum_init"] else 0.0
            state["velocity"] = [torch.full_like(block.Amult, start) for block in atoms.blocks]
        velocity = align(state["velocity"], atoms)
        for v, block in zip(velocity, atoms.blocks, strict=True):
            v.mul_(group["momentum"])
            if decay:
                v[: block.size].add_(block.Amult[: block.size], alpha=new * decay)
            if rate:
                block.Amult[: block.size].sub_(v[: block.size], alpha=rate)
        old = len(atoms)
        if rate:
            atoms.append(*rows, -rate * new)
        state["velocity"] = velocity = align(velocity, atoms)
        start = 0
        for v, block in zip(velocity, atoms.blocks, strict=True):
            v[max(old - start, 0) : block.size] = new
            start += block.size

    def _step_dense(self, parameter: Tensor, group: dict[str, Any]) -> None:
        rate, gradient = group["lr"] * group["lr_mult"], parameter.grad
        assert gradient is not None
        if not group["momentum"]:
            parameter.mul_(1 - _decay_rate(group, rate) * group["weight_decay"]).sub_(gradient, alpha=rate)
            return
        state = self.state[parameter]
        if "velocity" not in state:
            state["velocity"] = torch.zeros_like(parameter)
        direction = gradient + _momentum_decay(group) * parameter
        velocity = state["velocity"].mul_(group["momentum"]).add_(direction, alpha=1 - group["dampening"])
        parameter.sub_(velocity, alpha=rate)

    def state_dict(self) -> dict[str, Any]:
        """As in torch; velocities of atoms as one vector each, of the valid rows."""
        for group in self.param_groups:
            for p in group["params"]:
                velocity = self.state.get(p, {}).get("velocity")
                if isinstance(velocity, list):
                    parts = [v[: block.size] for v, block in zip(velocity, p.atoms.blocks, strict=False)]
                    self.state[p]["velocity"] = torch.cat([*parts, p.new_empty(0)])
        return super().state_dict()


def _decay_rate(group: dict[str, Any], rate: float) -> float:
    return rate if group["apply_lr_mult_to_wd"] else group["lr"]


def _momentum_decay(group: dict[str, Any]) -> float:
    """Weight decay as part of the gradient, which the learning rate with its multiplier will scale."""
    if group["apply_lr_mult_to_wd"] or not group["lr_mult"]:
        return group["weight_decay"]
    return group["weight_decay"] / group["lr_mult"]


def param_groups(
    net: nn.Module,
    *,
    first_layer_lr_mult: float = 1.0,
    last_layer_lr_mult: float = 1.0,
    bias_lr_mult: float = 1.0,
) -> list[dict[str, Any]]:
    """Groups of an :class:`InfMLP` or :class:`FinMLP` for :class:`PiSGD`: first weights, last weights, biases, others."""
    last = len(net.layers) - 1  # type: ignore[arg-type]
    mults = {"first": first_layer_lr_mult, "last": last_layer_lr_mult, "bias": bias_lr_mult, "other": 1.0}
    members: dict[str, list[Tensor]] = {kind: [] for kind in mults}
    for name, parameter in net.named_parameters():
        number = int(name.split(".")[1])
        kind = "bias" if name.endswith(".bias") else {0: "first", last: "last"}.get(number, "other")
        members[kind].append(parameter)
    return [{"params": members[kind], "lr_mult": mults[kind]} for kind in mults if members[kind]]


@torch.no_grad()
def grad_norms(parameters: Iterable[Tensor], *, ensemble: bool = False) -> list[tuple[Tensor, Tensor]]:
    """Pairs (parameter, norm of its gradient) of all that have one: operator norms of atoms, else Euclidean norms.

    Args:
        parameters: Those of a net.
        ensemble: They have a leading axis (e, ...), and so have the norms (e,).
    """
    norms: list[tuple[Tensor, Tensor]] = []
    for p in parameters:
        if isinstance(p, AtomsParameter):
            if p.pending() is not None:
                norms.append((p, p.gradient_norm()))
        elif p.grad is not None:
            axes = tuple(range(1, p.ndim)) if ensemble else None
            norms.append((p, torch.linalg.vector_norm(p.grad, dim=axes, dtype=wide(p.grad.dtype))))
    return norms


@torch.no_grad()
def clip_grad_norm_(
    parameters: Iterable[Tensor] | Tensor,
    max_norm: float,
    *,
    per_param: bool = False,
    exclude_last_layer: bool = False,
    eps: float | None = None,
    ensemble: bool = False,
) -> Tensor:
    """Scale gradients, staged rows of A included, so that their norm is at most ``max_norm``; 0 or less: do not.

    The device is never waited for. Use it instead of torch's function, which knows nothing of operators.

    Args:
        parameters: Those of a net.
        max_norm: The threshold.
        per_param: Every parameter by its own norm, instead of all by the total.
        exclude_last_layer: Leave the atoms of the output layer out of the total; they are scaled all the same.
        eps: Added to norms before the division; default: as published, 1e-10 per parameter, 0 for the total. Finite
            nets were published with 1e-6.
        ensemble: Parameters have a leading axis (e, ...): each net is clipped by itself.

    Returns:
        The total norm before, without what is excluded; (e,) for an ensemble.
    """
    norms = grad_norms([parameters] if isinstance(parameters, Tensor) else parameters, ensemble=ensemble)
    if not norms:
        return torch.tensor(0.0)
    counted = [norm for p, norm in norms if not (exclude_last_layer and getattr(p, "output_layer", False))]
    total = torch.linalg.vector_norm(torch.stack(counted), dim=0) if counted else torch.zeros_like(norms[0][1])
    if max_norm <= 0:
        return total
    for p, norm in norms:
        added = (1e-10 if per_param else 0.0) if eps is None else eps
        coefficient = (max_norm / ((norm if per_param else total) + added)).clamp(max=1.0)
        assert p.grad is not None
        if ensemble:
            coefficient = coefficient.view(-1, *[1] * (p.ndim - 1))
        p.grad.mul_(coefficient.to(p.grad.dtype) if p.grad.dtype == wide(p.grad.dtype) else coefficient)
    return total
