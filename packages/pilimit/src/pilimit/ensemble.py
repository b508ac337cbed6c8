"""Many finite nets of one shape computed together, and how fast they approach the infinite one."""

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F
from tqdm import tqdm
from zoo_common.files import atomic_write

from pilimit.finite import FinMLP
from pilimit.infinite import InfMLP
from pilimit.optim import PiSGD


class FinEnsemble(nn.Module):
    """Finite nets with a leading axis: parameters (e, ...) under the names of one net, outputs (e, b, d_out).

    :func:`pilimit.param_groups` and :class:`pilimit.PiSGD` work as for one net; train on the sum over the nets of their
    losses. :func:`pilimit.clip_grad_norm_` needs ``ensemble=True``.

    Args:
        nets: e nets of the same shape; they are copied.

    Raises:
        ValueError: There is none, or their shapes differ.
    """

    def __init__(self, nets: Sequence[FinMLP]) -> None:
        super().__init__()
        if not nets or len({str([tuple(p.shape) for p in net.parameters()]) for net in nets}) > 1:
            raise ValueError("an ensemble needs nets of one shape, at least one")
        parameters, buffers = stack_module_state(list(nets))
        self._single = [copy.deepcopy(nets[0]).to("meta")]  # in a list, so that it is no child
        self.layers = copy.deepcopy(nets[0]).layers
        for name, value in parameters.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(value.detach()))
        for name, value in buffers.items():
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, value)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FinEnsemble":
        """Move and convert."""
        super()._apply(fn, recurse)
        self._single = [self._single[0].to(self.layers[0].dtype)]  # type: ignore[arg-type]
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (e, b, d_out) of inputs (b, ...) that all nets share."""

        def one(state: dict[str, Tensor]) -> Tensor:
            return functional_call(self._single[0], state, (x,))

        return vmap(one)(dict(self.named_parameters()) | dict(self.named_buffers()))


@dataclass(frozen=True)
class WidthStudy:
    """Distances of training trajectories of finite nets from that of the infinite net they were sampled from."""

    widths: tuple[int, ...]
    errors: tuple[tuple[float, ...], ...]
    """For each width, that of each net: of the losses of all steps, relative, in the Euclidean norm."""

    @property
    def slope(self) -> float:
        """Of the root mean square error over the width, both logarithmic: about -1/2."""
        x = torch.tensor(self.widths, dtype=torch.float64).log()
        y = torch.tensor([self.mean(i) for i in range(len(self.widths))], dtype=torch.float64).log()
        x = x - x.mean()
        return float((x * y).sum() / x.square().sum())

    def mean(self, i: int) -> float:
        """Root mean square of the errors of a width."""
        return float(torch.tensor(self.errors[i], dtype=torch.float64).square().mean().sqrt())


def width_study(
    net: InfMLP,
    x: Tensor,
    labels: Tensor,
    widths: Sequence[int],
    *,
    nets: int = 4,
    steps: int = 20,
    batch_size: int = 16,
    lr: float = 0.2,
    seed: int = 0,
    quiet: bool = True,
) -> WidthStudy:
    """Train an infinite net and finite twins of it on the same batches.

    Args:
        net: It stays as it is.
        x: Inputs (n, ...).
        labels: Classes (n,).
        widths: At least two.
        nets: Finite nets per width, computed together.
        steps: Of plain SGD.
        batch_size: Per step.
        lr: Learning rate.
        seed: Of batches and samples.
        quiet: No progress bar.

    Raises:
        ValueError: Fewer than two widths, or no step.
    """
    if len(set(widths)) < 2 or nets < 1 or steps < 1:
        raise ValueError(f"a slope needs two widths, a net and a step; got {list(widths)}, {nets} nets, {steps} steps")
    generator = torch.Generator().manual_seed(seed)
    batches = [torch.randint(len(x), (batch_size,), generator=generator) for _ in range(steps)]

    def losses(model: nn.Module) -> Tensor:
        optimizer, trajectory = PiSGD(model.parameters(), lr), []
        for rows in batches:
            optimizer.zero_grad()
            output = model(x[rows])
            output = output if output.ndim == 3 else output[None]
            target = labels[rows].expand(len(output), -1)
            loss = F.cross_entropy(output.movedim(-1, 1), target, reduction="none").mean(1)
            loss.sum().backward()
            optimizer.step()
            trajectory.append(loss.detach())
        return torch.stack(trajectory, 1)  # (e, steps)

    limit = losses(copy.deepcopy(net))
    errors = []
    for width in tqdm(widths, desc="widths", disable=quiet, leave=False):
        twins = FinEnsemble([FinMLP.sample(net, width, generator=generator) for _ in range(nets)])
        errors.append(tuple(((losses(twins) - limit).norm(dim=1) / limit.norm()).tolist()))
    return WidthStudy(tuple(widths), tuple(errors))


def draw_widths(study: WidthStudy, path: Path) -> None:
    """Errors over widths with the measured slope, as PNG."""
    from pilimit.figures import new_figure

    figure, axes = new_figure()
    for width, errors in zip(study.widths, study.errors, strict=True):
        axes.plot([width] * len(errors), errors, "o", color="#7a9cc6", markersize=4)
    means = [study.mean(i) for i in range(len(study.widths))]
    axes.plot(study.widths, means, color="#b04a5a", label=f"root mean square, slope {study.slope:.2f}")
    half = [means[0] * (width / study.widths[0]) ** -0.5 for width in study.widths]
    axes.plot(study.widths, half, color="grey", linestyle="--", label="slope -1/2")
    axes.set(xscale="log", yscale="log", xlabel="width", ylabel="relative error of the loss trajectory")
    axes.legend()
    with atomic_write(path) as temporary:
        figure.savefig(temporary, dpi=120)
