"""Infinite-width layers and the multilayer perceptron made of them.

A layer maps pre-activations to pre-activations: the activation comes first, then the weights. All that a layer computes
and returns has at least float32; float16 and bfloat16 are for the storage of atoms, and for what :class:`InfMLP` takes
and returns.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from pilimit.atoms import Atoms, AtomsModule, AtomsParameter
from pilimit.expectations import wide
from pilimit.propagation import directions, propagate


class Hidden(NamedTuple):
    """What an infinite layer computes."""

    g: Tensor  # (b, r_out), pre-activations that it returns
    gbar: Tensor  # (b, r), unit rows of those that it was given
    q: Tensor  # (b, M), correlations with its atoms
    s: Tensor  # (b, 1), norms of the rows that it was given


class PiLayer(nn.Module):
    """What infinite and finite layers share: a bias with its multiplier, a dtype, checks of batches."""

    def __init__(self, n_in: int, n_out: int, bias_alpha: float, dtype: torch.dtype | None) -> None:
        super().__init__()
        for name, value in (("input", n_in), ("output", n_out)):
            if value < 1:
                raise ValueError(f"the {name} width (r) of a layer must be at least 1, got {value}")
        self.n_in, self.n_out, self.bias_alpha = n_in, n_out, float(bias_alpha)
        self.dtype = dtype or torch.get_default_dtype()

    def _make_bias(self, width: int, device: torch.device | str | None) -> None:
        zero = torch.zeros(width, device=device, dtype=wide(self.dtype))
        self.bias = nn.Parameter(zero) if self.bias_alpha else None

    def _add_bias(self, g: Tensor) -> Tensor:
        return g if self.bias is None else g + self.bias_alpha * self.bias

    def _checked(self, x: Tensor, weight: Tensor) -> Tensor:
        """The batch in the dtype of the computation."""
        if x.ndim != 2 or x.shape[1] != self.n_in:
            raise ValueError(f"expected a batch of shape (b, {self.n_in}), got {tuple(x.shape)}")
        if x.device != weight.device:
            raise ValueError(f"the batch is on {x.device}, the layer on {weight.device}: move one with .to(...)")
        if x.dtype not in (self.dtype, wide(self.dtype)):
            raise ValueError(f"expected a batch of {self.dtype}, got {x.dtype}: convert one with .to(...)")
        return x.to(wide(self.dtype))

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PiLayer":
        """Move and convert; parameters keep at least float32."""
        device = next(self.parameters()).device
        target = fn(torch.empty(0, dtype=self.dtype, device=device))

        def apply_wide(t: Tensor) -> Tensor:
            narrow = t.is_floating_point() and target.dtype != wide(target.dtype)
            return t.to(target.device, wide(target.dtype)) if narrow else fn(t)

        super()._apply(apply_wide, recurse)
        self.dtype = target.dtype
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "bias_alpha"] = torch.tensor(self.bias_alpha, dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        take_numbers(self, state_dict, prefix, ("bias_alpha", "layer_alpha"))
        if self.bias is None and self.bias_alpha == 0:
            state_dict.pop(prefix + "bias", None)  # published files keep one that has no effect
        super()._load_from_state_dict(state_dict, prefix, *args)


def take_numbers(module: nn.Module, state: dict[str, Any], prefix: str, names: tuple[str, ...]) -> None:
    """Move scalars of a state dict to attributes."""
    for name in names:
        if (value := state.pop(prefix + name, None)) is not None:
            setattr(module, name, float(value))


class InfPiInputLinearReLU(PiLayer):
    """The first layer: inputs (b, r) to pre-activations (b, r_out), ``X A + bias_alpha * bias``.

    Args:
        r: Width of the input.
        r_out: Rank of the probability space; default: ``r``.
        bias_alpha: Multiplier of the bias; 0: no bias at all.
        layernorm: Accepted for symmetry; the layer that follows divides by the norm.
        device: Where the parameters are.
        return_hidden: Give ``(g, None, None, None)``.
        dtype: Default: torch's. Parameters have at least float32.
        generator: Of the initial values.
    """

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        bias_alpha: float = 1.0,
        layernorm: bool = False,
        device: torch.device | str | None = None,
        return_hidden: bool = False,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        super().__init__(r, r if r_out is None else r_out, bias_alpha, dtype)
        self.layernorm, self.return_hidden = layernorm, return_hidden
        a = torch.randn(r, self.n_out, device=device, dtype=wide(self.dtype), generator=generator)
        self.A = nn.Parameter(a / a.norm(dim=0))
        self._make_bias(self.n_out, device)

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        """Pre-activations (b, r_out).

        Raises:
            ValueError: Another width, device or dtype, or an input that is not finite.
        """
        x = self._checked(x, self.A)
        if not torch.isfinite(x).all():
            row = int((~torch.isfinite(x)).any(1).nonzero()[0])
            raise ValueError(f"row {row} of the batch has a value that is not finite: clean the data")
        g = self._add_bias(x @ self.A)
        return (g, None, None, None) if self.return_hidden else g


class InfPiLinearReLU(AtomsModule, PiLayer):
    """A layer after a ReLU: pre-activations (b, r) to (b, r_out), with atoms that every step appends to.

    Backward passes stage the rows that the next step appends, each its own; a forward pass without one stages none.

    Args:
        r: Rank of the probability space, the width of the input.
        r_out: Width of the output; default: ``r``.
        bias_alpha: Multiplier of the bias; 0: no bias at all.
        output_layer: It gives outputs: ``exclude_last_layer`` of clipping and the multiplier of the last layer mean it.
        layer_alpha: Multiplier of the learning rate of its atoms.
        layernorm: Divide each row of the input by its norm before the activation.
        optim_mode: Only ``project``.
        device: Where the atoms are.
        cuda_batch_size: Accepted as published; chunks are chosen by the memory of the device.
        return_hidden: Give a :class:`Hidden` instead of ``g``.
        dtype: Of the atoms. Default: torch's.
        generator: Of the initial values.
        initial_atoms: Their number, 0 for a layer that starts as zero; default: ``r``.
    """

    def __init__(
        self,
        r: int,
        r_out: int | None = None,
        bias_alpha: float = 1.0,
        output_layer: bool = False,
        layer_alpha: float = 1.0,
        layernorm: bool = False,
        optim_mode: str = "project",
        device: torch.device | str | None = None,
        cuda_batch_size: int | None = None,
        return_hidden: bool = False,
        *,
        dtype: torch.dtype | None = None,
        generator: torch.Generator | None = None,
        initial_atoms: int | None = None,
    ) -> None:
        super().__init__(r, r if r_out is None else r_out, bias_alpha, dtype)
        if optim_mode != "project":
            raise ValueError(f"optim_mode {optim_mode!r} does not exist: the published and only one is 'project'")
        self.layernorm, self.return_hidden = layernorm, return_hidden
        atoms = Atoms(r, self.n_out, self.dtype, device)
        count = r if initial_atoms is None else initial_atoms
        if count:
            options: dict[str, Any] = {"device": device, "dtype": wide(self.dtype), "generator": generator}
            a, b = torch.randn(count, self.n_out, **options), torch.randn(count, r, **options)
            atoms.append(a / (count if output_layer else count**0.5), directions(b)[1], 1.0)
        self.weight = AtomsParameter(atoms, output_layer=output_layer, lr_mult=layer_alpha)
        self._make_bias(self.n_out, device)

    @property
    def layer_alpha(self) -> float:
        """Multiplier of the learning rate of the atoms."""
        return self.weight.lr_mult

    @layer_alpha.setter
    def layer_alpha(self, value: float) -> None:
        self.weight.lr_mult = value

    def forward(self, g: Tensor) -> Any:  # noqa: ANN401
        """Pre-activations (b, r_out), or :class:`Hidden`.

        Raises:
            ValueError: Another width, device or dtype.
        """
        g = self._checked(g, self.weight)
        y = self._add_bias(propagate(g, self.weight, self.layernorm))
        if not self.return_hidden:
            return y
        s, gbar = directions(g)
        return Hidden(y, gbar, gbar @ self.atoms.tensors()[1].to(gbar).T, s)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination[prefix + "layer_alpha"] = torch.tensor(self.layer_alpha, dtype=torch.float64)

    def extra_repr(self) -> str:
        """Sizes."""
        return f"r={self.n_in}, r_out={self.n_out}, atoms={len(self.atoms)}, {self.dtype}"


NET_ALPHAS = ("first_layer_alpha", "last_layer_alpha", "bias_alpha", "last_bias_alpha")


class PiMLP(nn.Module):
    """What :class:`InfMLP` and :class:`pilimit.finite.FinMLP` share: layers, multipliers, the forward pass."""

    layers: nn.ModuleList

    def __init__(
        self,
        d_in: int,
        d_out: int,
        depth: int,
        first_layer_alpha: float,
        last_layer_alpha: float,
        bias_alpha: float,
        last_bias_alpha: float | None,
        layernorm: bool,
    ) -> None:
        super().__init__()
        for name, value in (("d_in", d_in), ("d_out", d_out), ("depth", depth)):
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        self.d_in, self.d_out, self.depth, self.layernorm = d_in, d_out, depth, layernorm
        self.first_layer_alpha, self.last_layer_alpha = float(first_layer_alpha), float(last_layer_alpha)
        self.bias_alpha = float(bias_alpha)
        self.last_bias_alpha = float(bias_alpha if last_bias_alpha is None else last_bias_alpha)

    @property
    def L(self) -> int:
        """Number of hidden-to-hidden layers: ``depth - 1``."""
        return self.depth - 1

    @property
    def dtype(self) -> torch.dtype:
        """What batches have, and outputs get."""
        return self.layers[0].dtype  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        """Outputs (b, d_out) of inputs (b, ...), which are flattened."""
        g = self.first_layer_alpha * self.layers[0](x.flatten(1))
        for layer in self.layers[1:]:
            g = layer(g)
        return (self.last_layer_alpha * g).to(self.dtype)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in NET_ALPHAS:
            destination[prefix + name] = torch.tensor(getattr(self, name), dtype=torch.float64)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:  # noqa: ANN401
        take_numbers(self, state_dict, prefix, NET_ALPHAS)
        super()._load_from_state_dict(state_dict, prefix, *args)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:  # noqa: ANN401
        """Load a published or own state dict; layers take the number of atoms that it has.

        Raises:
            ValueError: It is of a net of another depth, or its names or shapes differ; one message lists all.
        """
        found = count_layers(state_dict)
        if strict and found != len(self.layers):
            raise ValueError(
                f"the state is of a net of depth {found - 1}, this one has depth {self.depth}: build it with that"
            )
        try:
            return super().load_state_dict(state_dict, strict, assign)
        except RuntimeError as error:
            raise ValueError(" ".join(str(error).split())) from None


def count_layers(state: Mapping[str, Any]) -> int:
    """Number of layers in a state dict."""
    numbers = [name.split(".")[1] for name in state if name.startswith("layers.")]
    return 1 + max((int(number) for number in numbers if number.isdecimal()), default=-1)


class InfMLP(PiMLP):
    """An infinite-width perceptron that learns features (the pi-limit of Yang, Santacroce & Hu, 2022).

    Args:
        d_in: Width of the inputs, flattened.
        d_out: Width of the outputs.
        r: Rank of the probability space.
        L: Number of hidden-to-hidden layers, the published argument; or give ``depth``.
        first_layer_alpha: Multiplier of the first layer, bias included.
        last_layer_alpha: Multiplier of the output.
        bias_alpha: Multiplier of the biases; 0: no biases.
        last_bias_alpha: That of the last one; default: ``bias_alpha``.
        layernorm: Divide pre-activations by their norm before every activation.
        cuda_batch_size: Accepted as published, without effect.
        return_hidden: Give ``(output, [Hidden of each layer])``.
        device: Where the parameters are.
        depth: Number of ReLU layers, ``L + 1``; default: 2.
        dtype: Of atoms, batches and outputs. Default: torch's.
        readout_zero_init: Start with an output layer without atoms; default: random ones of size 1/r.
        generator: Of the initial values.
    """

    def __init__(
        self,
        d_in: int,
        d_out: int,
        r: int,
        L: int | None = None,
        first_layer_alpha: float = 1.0,
        last_layer_alpha: float = 1.0,
        bias_alpha: float = 1.0,
        last_bias_alpha: float | None = None,
        layernorm: bool = False,
        cuda_batch_size: int | None = None,
        return_hidden: bool = False,
        device: torch.device | str | None = None,
        *,
        depth: int | None = None,
        dtype: torch.dtype | None = None,
        readout_zero_init: bool = False,
        generator: torch.Generator | None = None,
    ) -> None:
        depth = resolve_depth(depth, L)
        super().__init__(
            d_in, d_out, depth, first_layer_alpha, last_layer_alpha, bias_alpha, last_bias_alpha, layernorm
        )
        if r < 1:
            raise ValueError(f"r, the rank of the probability space, must be at least 1, got {r}")
        self.r, self.return_hidden = r, return_hidden
        common: dict[str, Any] = {"device": device, "dtype": dtype, "generator": generator}
        first = InfPiInputLinearReLU(d_in, r, self.bias_alpha, layernorm, **common)
        hidden = [InfPiLinearReLU(r, r, self.bias_alpha, layernorm=layernorm, **common) for _ in range(depth - 1)]
        last = InfPiLinearReLU(
            r, d_out, self.last_bias_alpha, True, layernorm=layernorm, **common,
            initial_atoms=0 if readout_zero_init else None,
        )  # fmt: skip
        self.layers = nn.ModuleList([first, *hidden, last])

    def forward(self, x: Tensor) -> Any:  # noqa: ANN401
        """Outputs (b, d_out); with ``return_hidden`` also what each layer computed."""
        if not self.return_hidden:
            return super().forward(x)
        g = self.first_layer_alpha * self.layers[0](x.flatten(1))
        hidden: list[Hidden] = []
        for layer in self.infinite_layers():
            s, gbar = directions(g)
            q = gbar @ layer.atoms.tensors()[1].to(gbar).T
            g = layer(g)
            hidden.append(Hidden(g, gbar, q, s))
        return (self.last_layer_alpha * g).to(self.dtype), hidden

    def features(self, x: Tensor) -> Tensor:
        """Unit rows (b, r) that enter the output layer: the learned features, whose kernel is ``F00``."""
        return directions(self.pre_activations(x))[1]

    def pre_activations(self, x: Tensor) -> Tensor:
        """What enters the output layer, (b, r)."""
        g = self.first_layer_alpha * self.layers[0](x.flatten(1))
        for layer in self.infinite_layers()[:-1]:
            g = layer(g)
        return g

    def infinite_layers(self) -> list[InfPiLinearReLU]:
        """The layers with atoms."""
        return [layer for layer in self.layers if isinstance(layer, InfPiLinearReLU)]

    @property
    def config(self) -> dict[str, Any]:
        """Arguments that build a net of this shape; JSON."""
        names = ("d_in", "d_out", "r", "depth", *NET_ALPHAS, "layernorm")
        return {name: getattr(self, name) for name in names} | {"dtype": str(self.dtype).removeprefix("torch.")}


def resolve_depth(depth: int | None, L: int | None) -> int:
    """The number of ReLU layers from either argument."""
    if depth is not None and L is not None and depth != L + 1:
        raise ValueError(f"depth={depth} and L={L} contradict each other: L is depth - 1; give one of them")
    if depth is None:
        depth = 2 if L is None else L + 1
    return depth
