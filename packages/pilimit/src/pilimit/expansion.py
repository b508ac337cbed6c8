r"""The growing kernel expansion :math:`f(x) = \sum_m K(x, X_m) c_m`: what training does to a net that learns no features."""

from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from pilimit.atoms import Atoms, AtomsModule, AtomsParameter
from pilimit.expectations import wide
from pilimit.kernels import Kernel
from pilimit.propagation import chunk


def expansion_norm(kernel: Kernel, a: Tensor, x: Tensor) -> Tensor:
    """Norm of ``sum_i a_i K(x_i, .)`` in the space of the kernel: a (n, c), x (n, d)."""
    a = a.to(wide(a.dtype))
    return (kernel(x, None) * (a @ a.T)).sum().clamp(min=0).sqrt()


class Coefficients(AtomsParameter):
    """Atoms whose norm is that of a sum of kernels."""

    kernels: tuple[Kernel, ...]

    def __new__(
        cls,
        atoms: Atoms,
        requires_grad: bool = True,
        output_layer: bool = False,
        lr_mult: float = 1.0,
        kernels: tuple[Kernel, ...] = (),
    ) -> Self:
        """Arguments of :class:`AtomsParameter`, and the kernels."""
        parameter = super().__new__(cls, atoms, requires_grad, output_layer, lr_mult)
        parameter.kernels = kernels
        return parameter

    def gradient_norm(self) -> Tensor:
        """In the space of the kernel."""
        rows = self.pending()
        if rows is None:
            return self.new_zeros(())
        return torch.linalg.vector_norm(torch.stack([expansion_norm(kernel, *rows) for kernel in self.kernels]))

    def _flags(self) -> tuple[Any, ...]:
        return *super()._flags(), self.kernels


class KernelModel(AtomsModule):
    """A net in its kernel limit, trained like the infinite layers: a backward pass stages rows, the optimizer appends them.

    Rows A of its atoms are coefficients (M, d_out), rows B are inputs (M, d_in).

    Args:
        kernels: Their sum is the kernel. Each belongs to one group of weights of the net, with a gradient norm of its
            own: see :func:`pilimit.kernels.one_hidden_layer`; for a kernel with arguments, ``functools.partial``.
        d_in: Width of the inputs.
        d_out: Width of the outputs.
        device: Where the atoms are.
        dtype: Default: torch's.
    """

    def __init__(
        self,
        kernels: Sequence[Kernel],
        d_in: int,
        d_out: int,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.kernels, self.d_in, self.d_out = tuple(kernels), d_in, d_out
        atoms = Atoms(d_in, d_out, dtype or torch.get_default_dtype(), device)
        self.weight = Coefficients(atoms, output_layer=True, kernels=self.kernels)

    def forward(self, x: Tensor) -> Tensor:
        """Outputs (b, d_out) of inputs (b, ...), which are flattened; gradients of the inputs are not computed.

        Raises:
            ValueError: Another width, or a value that is not finite.
        """
        x = x.flatten(1).detach()
        if x.shape[1] != self.d_in:
            raise ValueError(f"expected a batch of shape (b, {self.d_in}), got {tuple(x.shape)}")
        if not torch.isfinite(x).all():
            raise ValueError("the batch has a value that is not finite: clean the data")
        return _Expand.apply(x, self.weight, self.atoms, self.kernels)


class _Expand(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, parameter: Tensor, atoms: Atoms, kernels: tuple[Kernel, ...]) -> Tensor:  # noqa: ANN401
        ctx.atoms, ctx.x = atoms, x
        y = x.new_zeros(len(x), atoms.r_out, dtype=wide(x.dtype))
        for a, b, amult in atoms.pieces(chunk(atoms, len(x))):
            coefficients = (a * amult[:, None]).to(y)
            for kernel in kernels:
                y += kernel(x, b) @ coefficients
        return y * atoms.scale

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[None, ...]:  # noqa: ANN401
        ctx.atoms.pending.append((d.to(ctx.atoms.dtype), ctx.x.to(ctx.atoms.dtype)))
        return None, None, None, None
