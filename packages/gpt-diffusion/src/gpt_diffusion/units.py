r"""Unit tokens: a denoiser over hidden units instead of layer chunks (our addition to the published model).

One token stands for one hidden unit of the task network: its incoming weights, its bias and its outgoing weights, for
the noisy weights and for the starting weights. Units carry no position, so permuting the hidden units of the input
permutes the output in the same way: the model is permutation-equivariant by construction and needs neither
augmentation nor alignment. Which weights belong to which unit follows from the symmetry of the task network.

Shapes: ``b`` networks, ``D`` weights each, ``u`` units in a group, ``n`` the width of the model.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_common.symmetry import Symmetry

from gpt_diffusion.attention import attention


@dataclass(frozen=True)
class Pair:
    """Weights between the units of two groups, ``index`` of shape (u_a, u_b, f)."""

    a: int
    b: int
    index: Tensor


@dataclass(frozen=True)
class UnitTokens:
    """Where the weights of each hidden unit stand in the flat vector.

    Every coordinate stands in exactly one place: in a row of ``own`` (one group of units permutes it), in a pair (two
    groups permute it, as between two hidden layers) or in ``rest`` (no permutation moves it, as the output bias).
    """

    own: tuple[Tensor, ...]  # per group (u, k)
    pairs: tuple[Pair, ...]
    rest: Tensor  # (r,)

    @classmethod
    def from_symmetry(cls, symmetry: Symmetry) -> UnitTokens:
        """Read them off the permutation groups of a task network."""
        own: list[list[Tensor]] = [[] for _ in symmetry.groups]
        pairs: dict[tuple[int, int], list[Tensor]] = {}
        rest: list[Tensor] = []
        for spec in symmetry.layout.tensors:
            where = symmetry.layout.slices[spec.name]
            index = torch.arange(where.start, where.stop).reshape(spec.shape)
            moved = sorted(symmetry.moves.get(spec.name, {}).items())
            for axis, members in reversed(moved):  # from the last axis, so that earlier axes keep their place
                positions = members[0][1].positions
                if len(members) > 1 or positions.numel() != spec.shape[axis]:
                    raise ValueError(f"{spec.name!r}: unit tokens need all of axis {axis} in one group of units")
                index = index.index_select(axis, positions.flatten()).unflatten(axis, tuple(positions.shape))
            index = index.movedim([axis + i for i, (axis, _) in enumerate(moved)], list(range(len(moved))))
            match [members[0][0] for _, members in moved]:
                case []:
                    rest.append(index.flatten())
                case [g]:
                    own[g].append(index.reshape(index.shape[0], -1))
                case [a, b]:
                    pairs.setdefault((a, b), []).append(index.reshape(*index.shape[:2], -1))
                case groups:
                    raise ValueError(f"{spec.name!r}: {len(groups)} axes are permuted, unit tokens know at most two")
        if not symmetry.groups:
            raise ValueError("unit tokens need a network with hidden units; no permutation group was found")
        return cls(
            own=tuple(
                torch.cat(parts, 1) if parts else torch.empty(group.size, 0, dtype=torch.int64)
                for parts, group in zip(own, symmetry.groups, strict=True)
            ),
            pairs=tuple(Pair(a, b, torch.cat(parts, 2)) for (a, b), parts in pairs.items()),
            rest=torch.cat(rest) if rest else torch.empty(0, dtype=torch.int64),
        )

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> UnitTokens:
        """Inverse of :meth:`to_json`."""
        return cls(
            own=tuple(
                torch.tensor(rows, dtype=torch.int64).reshape(units, -1)
                for rows, units in zip(data["own"], data["units"], strict=True)
            ),
            pairs=tuple(Pair(a, b, torch.tensor(index, dtype=torch.int64)) for a, b, index in data["pairs"]),
            rest=torch.tensor(data["rest"], dtype=torch.int64),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain lists, stored beside the weights of a model."""
        return {
            "units": [len(index) for index in self.own],
            "own": [index.tolist() for index in self.own],
            "pairs": [[pair.a, pair.b, pair.index.tolist()] for pair in self.pairs],
            "rest": self.rest.tolist(),
        }

    def flat(self) -> Tensor:
        """All coordinates in the order own, pairs, rest: a permutation of ``range(D)``."""
        return torch.cat([*(i.flatten() for i in self.own), *(p.index.flatten() for p in self.pairs), self.rest])


class _Waves(nn.Module):
    """``(b,) -> (b, 33)``: sine and cosine of 16 slow frequencies and the value itself, in float32."""

    width = 33
    frequencies: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", 2.0 ** torch.linspace(-2, 4, 16), persistent=False)

    def forward(self, value: Tensor) -> Tensor:
        """Embed scalars (b,)."""
        angle = value[:, None] * self.frequencies
        return torch.cat([angle.sin(), angle.cos(), value[:, None]], 1)


class _Token(nn.Module):
    """Encoder of units without weights of their own (all theirs are pairs): one learned token for the group."""

    def __init__(self, n: int) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.randn(n))

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (b, u, 0) -> (b, u, n)."""
        return self.value.expand(*rows.shape[:-1], -1)


class _Block(nn.Module):
    """Pre-norm attention block whose norms are scaled, shifted and gated by the condition (adaLN, Peebles & Xie 2023)."""

    def __init__(self, n: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(n, 3 * n)
        self.proj = nn.Linear(n, n)
        self.mlp = nn.Sequential(nn.Linear(n, 4 * n), nn.GELU(), nn.Linear(4 * n, n))
        self.modulation = nn.Linear(n, 6 * n)
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def forward(self, h: Tensor, c: Tensor) -> Tensor:
        """Tokens ``h`` (b, tokens, n), condition ``c`` (b, n)."""
        scale, shift, gate, scale2, shift2, gate2 = self.modulation(c)[:, None].chunk(6, dim=-1)
        y = F.layer_norm(h, h.shape[-1:]) * (1 + scale) + shift
        q, k, v = self.qkv(y).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        h = h + (1 + gate) * self.proj(attention(q, k, v).transpose(1, 2).flatten(2))
        y = F.layer_norm(h, h.shape[-1:]) * (1 + scale2) + shift2
        return h + (1 + gate2) * self.mlp(y)


class _PairMessages(nn.Module):
    """Read and write the weights between two groups without giving any unit a position.

    Reading: each unit receives the sum over the units of the other group of weight times projected token. Writing: the
    weight between units i and j is a bilinear form of their tokens plus a multiple of its own noisy and starting value.
    """

    def __init__(self, n: int, f: int) -> None:
        super().__init__()
        self.f = f
        self.read = nn.ModuleList(nn.Linear(n, 2 * f * n, bias=False) for _ in range(2))  # from b to a, from a to b
        self.left, self.right = nn.Linear(n, f * n), nn.Linear(n, f * n)
        self.keep = nn.Linear(n, 2 * f)
        for layer in (self.left, self.keep):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def message(self, weights: Tensor, tokens: Tensor, *, to_a: bool) -> Tensor:
        """Weights (b, u_a, u_b, 2f) and tokens of the sending group (b, u, n) -> (b, u', n)."""
        values = self.read[0 if to_a else 1](tokens).unflatten(-1, (2 * self.f, -1))
        equation = "bijf,bjfn->bin" if to_a else "bijf,bifn->bjn"
        return torch.einsum(equation, weights, values) / values.shape[1] ** 0.5

    def write(self, weights: Tensor, ha: Tensor, hb: Tensor, c: Tensor) -> Tensor:
        """Update of the weights, (b, u_a, u_b, f)."""
        left, right = self.left(ha).unflatten(-1, (self.f, -1)), self.right(hb).unflatten(-1, (self.f, -1))
        update = torch.einsum("bifn,bjfn->bijf", left, right) / left.shape[-1] ** 0.5
        keep = self.keep(c)[:, None, None].unflatten(-1, (2, self.f))
        return update + (keep * weights.unflatten(-1, (2, self.f))).sum(-2)


class UnitModel(nn.Module):
    """Denoiser with unit tokens: predicted x0 = start + heads(transformer(units)), all in normalised space.

    The condition (diffusion time, wanted metric, metric of the start) enters every block through adaLN. All heads are
    zero at initialisation, so the untrained model returns the start, as the published model does.

    Args:
        units: Where the weights of each unit stand; :meth:`UnitTokens.from_symmetry`.
        n_embd: Width n of the tokens.
        n_layer: Transformer blocks.
        n_head: Attention heads; must divide ``n_embd``.
        metric_log: Feed the logarithm of the metric (losses); otherwise metric / ``metric_scale``.
        metric_scale: Typical size of the metric, only for ``metric_log=False``.
        metric_floor: Best metric seen in training, only for ``metric_log=True``: a lower prompt means this one, as the
            logarithm would carry it far from everything learned.
        num_timesteps: Steps of the original diffusion process; times are given as 0 ... num_timesteps - 1.
    """

    index: Tensor
    inverse: Tensor

    def __init__(
        self,
        units: UnitTokens,
        *,
        n_embd: int = 128,
        n_layer: int = 4,
        n_head: int = 4,
        metric_log: bool = True,
        metric_scale: float = 1.0,
        metric_floor: float = 1e-6,
        num_timesteps: int = 1000,
    ) -> None:
        super().__init__()
        if n_embd % n_head:
            raise ValueError(f"n_embd ({n_embd}) must be a multiple of n_head ({n_head})")
        self.units = units
        self.metric_log, self.metric_scale, self.num_timesteps = metric_log, metric_scale, num_timesteps
        self.metric_floor = max(metric_floor, 1e-6)
        self.register_buffer("index", units.flat(), persistent=False)
        self.register_buffer("inverse", torch.argsort(units.flat()), persistent=False)
        self.waves = _Waves()
        self.condition_mlp = nn.Sequential(
            nn.Linear(3 * _Waves.width, n_embd), nn.SiLU(), nn.Linear(n_embd, n_embd), nn.SiLU()
        )
        widths = [index.shape[1] for index in units.own]
        self.encoders = nn.ModuleList(nn.Linear(2 * k, n_embd) if k else _Token(n_embd) for k in widths)
        self.pairs = nn.ModuleList(_PairMessages(n_embd, pair.index.shape[2]) for pair in units.pairs)
        self.blocks = nn.ModuleList(_Block(n_embd, n_head) for _ in range(n_layer))
        self.heads = nn.ModuleList(nn.Linear(n_embd, k) for k in widths if k)
        if len(units.rest):
            self.encoders.append(nn.Linear(2 * len(units.rest), n_embd))
            self.heads.append(nn.Linear(n_embd, len(units.rest)))
        for parameter in self.heads.parameters():
            nn.init.zeros_(parameter)
        self._sizes = [i.numel() for i in units.own] + [p.index.numel() for p in units.pairs] + [len(units.rest)]

    def metric_input(self, metric: Tensor) -> Tensor:
        """What the condition sees of a metric (b,)."""
        value = metric.float().flatten()
        return 2 * (value.clamp_min(self.metric_floor).log() if self.metric_log else value / self.metric_scale)

    def condition(self, loss_target: Tensor, loss_prev: Tensor, x_prev: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
        """Fix what is constant over a sampling trajectory; returns ``(x_t, t) -> predicted x0``."""
        prompt = torch.cat([self.waves(self.metric_input(m)) for m in (loss_target, loss_prev)], 1)
        start = x_prev[:, self.index]

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            time = self.waves(t.float().flatten() * (4 / self.num_timesteps))
            c = self.condition_mlp(torch.cat([time, prompt], 1).to(x_prev.dtype))
            update = self._update(x[:, self.index], start, c)
            return update[:, self.inverse].to(x.dtype) + x_prev

        return denoise

    def forward(self, x: Tensor, t: Tensor, loss_target: Tensor, *, loss_prev: Tensor, x_prev: Tensor) -> Tensor:
        """Predicted clean weights (b, D) from noisy ``x`` (b, D) at time ``t`` (b,), given start and prompt."""
        return self.condition(loss_target, loss_prev, x_prev)(x, t)

    def _update(self, x: Tensor, start: Tensor, c: Tensor) -> Tensor:
        """Change of the weights in the order of :meth:`UnitTokens.flat`; ``x`` and ``start`` come in that order."""
        parts = [torch.stack(p, -1) for p in zip(x.split(self._sizes, 1), start.split(self._sizes, 1), strict=True)]
        groups = len(self.units.own)
        rows = [p.unflatten(1, i.shape).flatten(2) for p, i in zip(parts, self.units.own, strict=False)]
        weights = [
            p.unflatten(1, pair.index.shape).transpose(-1, -2).flatten(3)  # (b, u_a, u_b, 2f): noisy, then start
            for p, pair in zip(parts[groups:], self.units.pairs, strict=False)
        ]
        if len(self.units.rest):
            rows.append(parts[-1].flatten(1)[:, None])
        tokens = [encode(row) for encode, row in zip(self.encoders, rows, strict=True)]
        tokens = self._exchange(tokens, weights)
        h = torch.cat(tokens, 1)
        for block in self.blocks:
            h = block(h, c)
        tokens = list(F.layer_norm(h, h.shape[-1:]).split([t.shape[1] for t in tokens], 1))
        written = [t for t, row in zip(tokens, rows, strict=True) if row.shape[-1]]
        own = [head(t).flatten(1) for head, t in zip(self.heads, written, strict=True)]
        between = [
            module.write(w, tokens[pair.a], tokens[pair.b], c).flatten(1) for module, pair, w in self._pairs(weights)
        ]
        rest = [own.pop()] if len(self.units.rest) else []
        return torch.cat([*own, *between, *rest], 1)

    def _exchange(self, tokens: list[Tensor], weights: Sequence[Tensor]) -> list[Tensor]:
        """Send every pair's weights forward, then backward, so that each unit of a deep network is told apart."""
        steps = self._pairs(weights)
        for to_a, order in ((False, steps), (True, steps[::-1])):
            for module, pair, w in order:
                sender, receiver = (pair.b, pair.a) if to_a else (pair.a, pair.b)
                tokens[receiver] = tokens[receiver] + module.message(w, tokens[sender], to_a=to_a)
        return tokens

    def _pairs(self, weights: Sequence[Tensor]) -> list[tuple[_PairMessages, Pair, Tensor]]:
        """For each pair of groups its module, its place, and its weights."""
        modules = [module for module in self.pairs if isinstance(module, _PairMessages)]
        return list(zip(modules, self.units.pairs, weights, strict=True))
