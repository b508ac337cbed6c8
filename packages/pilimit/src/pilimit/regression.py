"""Ridge regression with a kernel that is never held whole: a triangle, in float64 or in float32 with refinement.

Shapes: ``n`` training points, ``m`` test points, ``c`` columns of targets.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm import tqdm

from pilimit.kernels import Kernel

TILE = 1024
"""Rows of a panel."""
_TEMPORARIES = 12
"""Tiles in float64 that a kernel may hold beside its result."""
_TOLERANCE = 1e-10
"""Of the residual, relative to the targets."""
_ITERATIONS = 200


class Triangle:
    """Cholesky factor of a kernel matrix plus a ridge, as panels of rows up to the diagonal.

    Args:
        kernel: The kernel.
        x: Points (n, d).
        ridge: Added to the diagonal.
        dtype: Of the panels.
        quiet: No progress bar.

    Raises:
        ValueError: The matrix is not positive definite in this dtype.
    """

    def __init__(self, kernel: Kernel, x: Tensor, ridge: float, dtype: torch.dtype, quiet: bool = True) -> None:
        self.panels: list[Tensor] = []
        for i, start in enumerate(tqdm(range(0, len(x), TILE), desc="factor", disable=quiet, leave=False)):
            rows = x[start : start + TILE].double()
            panel = torch.empty(len(rows), start + len(rows), dtype=dtype, device=x.device)
            for k in range(i):
                columns = slice(k * TILE, (k + 1) * TILE)
                panel[:, columns] = kernel(rows, x[columns].double())
            last = kernel(rows, None)
            last.diagonal().add_(ridge)
            panel[:, start:] = last
            self.panels.append(panel)
            self._factor(i)

    def _factor(self, i: int) -> None:
        panel = self.panels[i]
        for k, above in enumerate(self.panels):
            begin, end = k * TILE, k * TILE + len(above)
            part = panel[:, begin:end]
            part.addmm_(panel[:, :begin], above[:, :begin].T, alpha=-1)
            if k < i:
                part.copy_(torch.linalg.solve_triangular(above[:, begin:], part.T, upper=False).T)
            else:
                factor, info = torch.linalg.cholesky_ex(part)
                if info:
                    raise ValueError("the kernel matrix is not positive definite: raise the ridge")
                part.copy_(factor)

    def solve(self, b: Tensor) -> Tensor:
        """The inverse times b (n, c)."""
        z = b.to(self.panels[0], copy=True)
        for i, panel in enumerate(self.panels):
            begin, end = i * TILE, i * TILE + len(panel)
            right = z[begin:end] - panel[:, :begin] @ z[:begin]
            z[begin:end] = torch.linalg.solve_triangular(panel[:, begin:], right, upper=False)
        for i, panel in reversed(list(enumerate(self.panels))):
            begin, end = i * TILE, i * TILE + len(panel)
            z[begin:end] = torch.linalg.solve_triangular(panel[:, begin:].T, z[begin:end].clone(), upper=True)
            z[:begin] -= panel[:, :begin].T @ z[begin:end]
        return z.to(b)


@dataclass(frozen=True)
class KernelRegression:
    """A fitted regression."""

    kernel: Kernel
    x: Tensor  # (n, d), the training points
    alpha: Tensor  # (n, c) float64, their coefficients
    dtype: torch.dtype
    """Of the factor."""
    residual: float
    """Of the linear system, relative to the targets; in float64."""
    iterations: int
    """Passes over the kernel to reach it."""

    def predict(self, x: Tensor, quiet: bool = True) -> Tensor:
        """Values (m, c) at points (m, d), in float64."""
        starts = tqdm(range(0, len(x), TILE), desc="predict", disable=quiet, leave=False)
        parts = [_product(self.kernel, x[start : start + TILE], self.x, self.alpha) for start in starts]
        return torch.cat(parts)


def _product(kernel: Kernel, rows: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """Kernel of some rows and all points, times v (n, c)."""
    rows = rows.double()
    total = torch.zeros(len(rows), v.shape[1], dtype=v.dtype, device=v.device)
    for start in range(0, len(x), TILE):
        columns = slice(start, start + TILE)
        total += kernel(rows, x[columns].double()) @ v[columns]
    return total


def _apply(kernel: Kernel, x: Tensor, ridge: float, v: Tensor) -> Tensor:
    """The matrix that was factored, times v (n, c); only one triangle is computed."""
    total = ridge * v
    for start in range(0, len(x), TILE):
        own = slice(start, start + TILE)
        rows = x[own].double()
        total[own] += kernel(rows, None) @ v[own]
        for begin in range(0, start, TILE):
            columns = slice(begin, begin + TILE)
            values = kernel(rows, x[columns].double())
            total[own] += values @ v[columns]
            total[columns] += values.T @ v[own]
    return total


def fit_kernel(
    kernel: Kernel,
    x: Tensor,
    targets: Tensor,
    ridge: float,
    *,
    memory_budget: float | None = None,
    quiet: bool = True,
) -> KernelRegression:
    """Solve ``(K + ridge) alpha = targets``.

    The factor is a triangle in float64 if that fits in the budget; if not, one in float32 that preconditions conjugate
    gradients, whose products with the kernel are computed in float64, tile by tile.

    Args:
        kernel: The kernel.
        x: Training points (n, d).
        targets: (n, c).
        ridge: Added to the diagonal.
        memory_budget: Bytes that may be used beside the points; default: no limit.
        quiet: No progress bar.

    Raises:
        ValueError: Not even float32 fits, the matrix is not positive definite, or the refinement does not converge.
    """
    if not ridge > 0:
        raise ValueError(f"the ridge must be positive, got {ridge}")
    if len(x) != len(targets) or not len(x):
        raise ValueError(f"{len(x)} points and {len(targets)} targets: expected the same number, at least one")
    dtype = _dtype_that_fits(len(x), targets.shape[1], memory_budget)
    b = targets.double()
    jitter = ridge if dtype == torch.float64 else max(ridge, 4 * torch.finfo(dtype).eps * _trace(kernel, x))
    factor = Triangle(kernel, x, jitter, dtype, quiet)
    alpha = factor.solve(b)
    size, norm = _conjugate_gradients(kernel, x, ridge, b, alpha, factor)
    return KernelRegression(kernel, x, alpha, dtype, norm, size)


def _dtype_that_fits(n: int, c: int, budget: float | None) -> torch.dtype:
    tile = min(n, TILE)
    extra = 8 * (_TEMPORARIES * tile * tile + 6 * n * c)
    needed = {dtype: _triangle_bytes(n, dtype) + extra for dtype in (torch.float64, torch.float32)}
    for dtype, count in needed.items():
        if budget is None or count <= budget:
            return dtype
    least = needed[torch.float32] / 1e9
    raise ValueError(
        f"{n} points need {least:.2f} GB in float32, the memory budget is {(budget or 0) / 1e9:.2f} GB: "
        "raise it, or take fewer points"
    )


def _triangle_bytes(n: int, dtype: torch.dtype) -> int:
    sizes = [min(TILE, n - start) for start in range(0, n, TILE)]
    return dtype.itemsize * sum(size * (i * TILE + size) for i, size in enumerate(sizes))


def _trace(kernel: Kernel, x: Tensor) -> float:
    """Of the matrix; from at most 64 points, which is near enough for a jitter."""
    some = x[:: math.ceil(len(x) / 64)].double()
    return kernel(some, None).diagonal().mean().item() * len(x)


def _conjugate_gradients(
    kernel: Kernel, x: Tensor, ridge: float, b: Tensor, alpha: Tensor, factor: Triangle
) -> tuple[int, float]:
    """Improve ``alpha`` in place, each column by itself; returns the number of products and the relative residual."""
    scale = torch.linalg.vector_norm(b)
    residual = b - _apply(kernel, x, ridge, alpha)
    direction, before = torch.zeros_like(b), torch.ones_like(b[0])
    for count in range(1, _ITERATIONS + 1):
        norm = float(torch.linalg.vector_norm(residual) / scale) if scale > 0 else 0.0
        if norm <= _TOLERANCE:
            return count, norm
        z = factor.solve(residual)
        now = (residual * z).sum(0)
        direction = z + direction * (now / before if count > 1 else 0.0)
        product = _apply(kernel, x, ridge, direction)
        length = (direction * product).sum(0)
        step = torch.where(length > 0, now / length, 0.0)
        alpha += direction * step
        residual -= product * step
        before = torch.where(now > 0, now, 1.0)
    raise ValueError(
        f"the regression has a residual of {norm:.1e} after {_ITERATIONS} passes: raise the ridge ({ridge}) or the "
        "memory budget"
    )
