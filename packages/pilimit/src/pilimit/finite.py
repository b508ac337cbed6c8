"""Finite-width twins of the infinite layers, with projected gradients, and mu-nets.

As in the infinite net, a layer comes after the activation: it maps pre-activations to pre-activations.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pilimit.expectations import wide
from pilimit.infinite import InfMLP, InfPiInputLinearReLU, InfPiLinearReLU, PiLayer, PiMLP, resolve_depth
from pilimit.propagation import chunk

LAYERNORM_EPS = 1e-5


class ProjectedLinear(torch.autograd.Function):
    r"""``x W^T + alpha b`` whose gradients of W and b are projected on the span of omega's columns.

    The projection :math:`P = \omega (\omega^T \omega)^{-1} \omega^T` acts on the gradient of the output, of which the
    batch has few rows, instead of that of W. The gradient of x is not projected.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None, alpha: float, omega: Tensor, gcovinv: Tensor) -> Tensor:
        """The output (b, n_out)."""
        return F.linear(x, weight, None if bias is None else alpha * bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:  # noqa: ANN401
        """Keep what the backward pass needs."""
        x, weight, bias, ctx.alpha, omega, gcovinv = inputs
        ctx.has_bias = bias is not None
        ctx.save_for_backward(x, weight, omega, gcovinv)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        """Gradients of x, W and b; differentiable."""
        x, weight, omega, gcovinv = ctx.saved_tensors
        projected = d @ omega @ gcovinv @ omega.T
        bias = ctx.alpha * projected.sum(0) if ctx.has_bias else None
        return d @ weight, projected.T @ x, bias, None, None, None


class FinPiLayer(PiLayer):
    """What both finite layers share: weight (n_out, n_in), bias, and omega (n_out, r) unless it is an output layer."""

    omega: Tensor
    gcovinv: Tensor

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int,
        bias_alpha: float,
        output_layer: bool,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
        project: bool,
    ) -> None:
        super().__init__(n_in, n_out, bias_alpha, dtype)
        self.r, self.output_layer = r, output_layer
        options: dict[str, Any] = {"device": device, "dtype": wide(self.dtype)}
        self.weight = nn.Parameter(torch.zeros(n_out, n_in, **options))
        self._make_bias(n_out, device)
        self.project = project and not output_layer and r < n_out
        if not output_layer and project:
            self.register_buffer("omega", torch.zeros(n_out, r, **options))
            self.register_buffer("gcovinv", torch.zeros(r, r, **options))

    @torch.no_grad()
    def _sample(self, layer: InfPiInputLinearReLU | InfPiLinearReLU, previous: Tensor | None, omega: Tensor) -> None:
        """Weights of a finite twin (section 5 of the paper's appendix); ``previous`` is the omega before this layer."""
        n = self.n_in if previous is not None else self.n_out
        source: Any = layer
        moments: Tensor = source.A.T if previous is None else _weights_seen(source, previous)
        if self.output_layer:
            self.weight.copy_(moments * n**-0.5)
        else:
            self.weight.copy_(omega @ moments * (n**-0.5 if previous is None else 1 / n))
        if self.bias is not None and layer.bias is not None:
            self.bias.copy_(layer.bias if self.output_layer else omega @ layer.bias * self.n_out**-0.5)
        if "omega" in self._buffers:
            self.omega.copy_(omega)
            if self.project:
                covariance = self.omega.double().T @ self.omega.double()
                self.gcovinv.copy_(torch.linalg.inv(covariance))

    def _linear(self, h: Tensor) -> Tensor:
        if not self.project:
            return F.linear(h, self.weight, None if self.bias is None else self.bias_alpha * self.bias)
        return ProjectedLinear.apply(h, self.weight, self.bias, self.bias_alpha, self.omega, self.gcovinv)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        state_dict.pop(prefix + "pi_proj", None)  # published, (n_out, n_out); what it does is in omega
        super()._load_from_state_dict(state_dict, prefix, *args)


def _weights_seen(layer: InfPiLinearReLU, omega: Tensor) -> Tensor:
    """The sum over atoms of c A relu(omega B), (r_out, n)."""
    total = omega.new_zeros(layer.n_out, len(omega))
    for a, b, amult in layer.atoms.pieces(chunk(layer.atoms, len(omega))):
        total.addmm_((a.to(total) * amult[:, None].to(total)).T, torch.relu(b.to(total) @ omega.T))
    return total * layer.atoms.scale


class FinPiInputLinearReLU(FinPiLayer):
    """The first layer of a finite net: inputs (b, n_in) to pre-activations (b, n_out).

    Args:
        r: Rank of the probability space.
        n_in: Width of the input.
        n_out: Width; default: ``n_in``.
        bias_alpha: Multiplier of the bias; 0: no bias.
        layernorm: Accepted for symmetry.
        inf_layer: Infinite layer to sample the weights from; default: a new one.
        device: Where the parameters are.
        dtype: Default: torch's.
        generator: Of omega and the new layer.
        omega: Gaussian matrix (n_out, r) of this layer; default: drawn.
        project: Project gradients on the span of omega.
    """

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int | None = None,
        bias_alpha: float = 1.0,
        layernorm: bool = False,
        inf_layer: InfPiInputLinearReLU | None = None,
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        omega: Tensor | None = None,
        project: bool = True,
    ) -> None:
        super().__init__(r, n_in, n_in if n_out is None else n_out, bias_alpha, False, device, dtype, project)
        if inf_layer is None:
            inf_layer = InfPiInputLinearReLU(n_in, r, bias_alpha, device=device, dtype=dtype, generator=generator)
        self._sample(inf_layer, None, _omega(self.n_out, r, omega, inf_layer.A, generator))

    def forward(self, x: Tensor) -> Tensor:
        """Pre-activations (b, n_out)."""
        return self._linear(self._checked(x, self.weight))


class FinPiLinearReLU(FinPiLayer):
    """A finite layer after an activation: pre-activations (b, n_in) to (b, n_out).

    Args:
        r: Rank of the probability space.
        n_in: Width of the layer before.
        n_out: Width; default: ``n_in``.
        bias_alpha: Multiplier of the bias; 0: no bias.
        output_layer: Its weights belong to no omega of its own, and its gradient is not projected.
        layernorm: Divide pre-activations by their norm (plus 1e-5) before the activation.
        inf_layer: Infinite layer to sample the weights from; default: a new one.
        prev_omega: The omega (n_in, r) of the layer before; default: drawn.
        nonlin: Class or function of the activation.
        device: Where the parameters are.
        dtype: Default: torch's.
        generator: Of omegas and the new layer.
        omega: Gaussian matrix (n_out, r) of this layer; default: drawn.
        project: Project gradients on the span of omega.
    """

    def __init__(
        self,
        r: int,
        n_in: int,
        n_out: int | None = None,
        bias_alpha: float = 1.0,
        output_layer: bool = False,
        layernorm: bool = False,
        inf_layer: InfPiLinearReLU | None = None,
        prev_omega: Tensor | None = None,
        nonlin: Any = nn.ReLU,  # noqa: ANN401
        device: torch.device | str | None = None,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        omega: Tensor | None = None,
        project: bool = True,
    ) -> None:
        super().__init__(r, n_in, n_in if n_out is None else n_out, bias_alpha, output_layer, device, dtype, project)
        self.layernorm, self.nonlin = layernorm, nonlin() if isinstance(nonlin, type) else nonlin
        if inf_layer is None:
            width = self.n_out if output_layer else r
            inf_layer = InfPiLinearReLU(
                r, width, bias_alpha, output_layer, device=device, dtype=dtype, generator=generator
            )
        previous = _omega(n_in, r, prev_omega, self.weight, generator)
        own = previous if output_layer else _omega(self.n_out, r, omega, self.weight, generator)
        self._sample(inf_layer, previous, own)

    def forward(self, u: Tensor) -> Tensor:
        """Pre-activations (b, n_out)."""
        return self._linear(self.activations(u))

    def activations(self, u: Tensor) -> Tensor:
        """What the weights act on (b, n_in)."""
        u = self._checked(u, self.weight)
        if self.layernorm:
            u = u / (LAYERNORM_EPS + torch.linalg.vector_norm(u, dim=1, keepdim=True))
        return self.nonlin(u)


def _omega(n: int, r: int, given: Tensor | None, like: Tensor, generator: torch.Generator | None) -> Tensor:
    if given is None:
        return torch.randn(n, r, dtype=like.dtype, device=like.device, generator=generator)
    if tuple(given.shape) != (n, r):
        raise ValueError(f"omega: expected shape {(n, r)}, got {tuple(given.shape)}")
    return given.to(like)


class FinMLP(PiMLP):
    """A finite perceptron sampled from an infinite one, which it approaches as ``width ** -0.5``.

    Args:
        d_in: Width of the inputs, flattened.
        d_out: Width of the outputs.
        r: Rank of the probability space.
        width: Units per hidden layer.
        L: Number of hidden-to-hidden layers; or give ``depth``.
        first_layer_alpha: Multiplier of the first layer, bias included.
        last_layer_alpha: Multiplier of the output.
        bias_alpha: Multiplier of the biases; 0: no biases.
        last_bias_alpha: That of the last one; default: ``bias_alpha``.
        layernorm: Divide pre-activations by their norm before every activation.
        device: Where the parameters are.
        depth: Number of ReLU layers, ``L + 1``; default: 2.
        dtype: Default: torch's.
        generator: Of the sampled values.
        inf_net: Net to sample from; default: a new one.
        omegas: Gaussian matrices (width, r) of all layers but the last; default: drawn.
        project: Project gradients on the span of omega, all but those of the last layer.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        width: int,
        L: int | None = None,
        first_layer_alpha: float = 1.0,
        last_layer_alpha: float = 1.0,
        bias_alpha: float = 1.0,
        last_bias_alpha: float | None = None,
        layernorm: bool = False,
        device: torch.device | str | None = None,
        *,
        depth: int | None = None,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        inf_net: InfMLP | None = None,
        omegas: list[Tensor] | None = None,
        project: bool = True,
    ) -> None:
        depth = resolve_depth(depth, L)
        alphas = (first_layer_alpha, last_layer_alpha, bias_alpha, last_bias_alpha)
        super().__init__(d_in, d_out, depth, *alphas, layernorm)
        if r < 1 or width < 1:
            raise ValueError(f"r and width must be at least 1, got r={r}, width={width}")
        self.r, self.width = r, width
        common: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
        net = inf_net or InfMLP(d_in, d_out, r, depth - 1, *alphas, layernorm, **common)
        if omegas is not None and len(omegas) != depth:
            raise ValueError(f"expected {depth} omegas, one per hidden layer, got {len(omegas)}")
        infinite: list[Any] = list(net.layers)
        like = infinite[0].A
        given: list[Tensor | None] = [*omegas] if omegas else [None] * depth
        drawn = [_omega(width, r, omega, like, generator) for omega in given]
        common["project"] = project
        layers: list[nn.Module] = [
            FinPiInputLinearReLU(r, d_in, width, self.bias_alpha, layernorm, infinite[0], omega=drawn[0], **common)
        ]
        for i in range(1, depth):
            layers.append(
                FinPiLinearReLU(
                    r,
                    width,
                    width,
                    self.bias_alpha,
                    False,
                    layernorm,
                    infinite[i],
                    drawn[i - 1],
                    omega=drawn[i],
                    **common,
                )
            )
        last = infinite[depth]
        layers.append(
            FinPiLinearReLU(r, width, d_out, self.last_bias_alpha, True, layernorm, last, drawn[-1], **common)
        )
        self.layers = nn.ModuleList(layers)

    def features(self, x: Tensor) -> Tensor:
        """Last activations (b, width), whose kernel approaches that of the infinite net's features."""
        u = self.first_layer_alpha * self.layers[0](x.flatten(1))
        for layer in self.layers[1:-1]:
            u = layer(u)
        return self.layers[-1].activations(u)  # type: ignore[operator]

    @classmethod
    def sample(
        cls,
        net: InfMLP,
        width: int,
        *,
        omegas: list[Tensor] | None = None,
        generator: torch.Generator | None = None,
        project: bool = True,
    ) -> "FinMLP":
        """The finite net of this width whose limit is the infinite net, on its device and in its dtype."""
        alphas = (net.first_layer_alpha, net.last_layer_alpha, net.bias_alpha, net.last_bias_alpha)
        return cls(
            net.d_in, net.d_out, net.r, width, net.L, *alphas, net.layernorm, net.layers[0].A.device,  # type: ignore[arg-type]
            dtype=net.dtype, inf_net=net, omegas=omegas, generator=generator, project=project,
        )  # fmt: skip


def mu_net(
    d_in: int,
    d_out: int,
    width: int,
    *,
    generator: torch.Generator | None = None,
    **options: Any,  # noqa: ANN401
) -> FinMLP:
    """A mu-net: the same finite net with Gaussian weights of variance 2 / fan-in, zero biases and plain gradients.

    Args:
        d_in: Width of the inputs.
        d_out: Width of the outputs.
        width: Units per hidden layer.
        generator: Of the weights.
        options: Further arguments of :class:`FinMLP`.
    """
    net = FinMLP(d_in, d_out, 1, width, project=False, **options)
    gaussian_init_(net, generator)
    return net


@torch.no_grad()
def gaussian_init_(net: FinMLP, generator: torch.Generator | None = None) -> None:
    """Replace all weights by Gaussian ones of variance 2 / fan-in; biases become zero."""
    for layer in net.layers:
        assert isinstance(layer, FinPiLayer)
        layer.weight.normal_(0, (2 / layer.n_in) ** 0.5, generator=generator)
        if layer.bias is not None:
            layer.bias.zero_()
