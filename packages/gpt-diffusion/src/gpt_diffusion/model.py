"""The transformer G of G.pt (Peebles et al. 2022, "Learning to Learn with Generative Models of Neural Network Checkpoints").

Shapes: ``n`` samples, ``d`` weights of the task network, ``k`` tokens, ``c`` channels (``n_embd``).
"""

import itertools
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_common.tokens import LayerTokenizer, SplitPolicy

from gpt_diffusion.attention import attention
from gpt_diffusion.embedding import ScalarEmbedding

#: A denoiser with everything but the noised weights and the time step bound to it: (x (n, d), t (n,)) -> (n, d).
Denoise = Callable[[Tensor, Tensor], Tensor]

#: Steps of the process that every released model was trained on; t counts them, also when a process is respaced.
NUM_TIMESTEPS = 1000


class Denoiser(Protocol):
    """What training and sampling need of a model."""

    def __call__(self, x: Tensor, t: Tensor, loss_target: Tensor, *, loss_prev: Tensor, x_prev: Tensor) -> Tensor:
        """Prediction (n, d) for noised weights x (n, d) at steps t (n,)."""
        ...

    def condition(self, loss_target: Tensor, loss_prev: Tensor, x_prev: Tensor) -> Denoise:
        """The same function of (x, t), with everything that stays constant over a trajectory computed once."""
        ...


class TokenProjections(nn.ModuleList):
    """One small network without biases per token: Linear, then (GELU, Linear) as often as ``depth`` says.

    Every token has its own weights, under the published keys ``{token}.{2 layer}.weight``; tokens of equal sizes are
    computed together by one batched product (but when training on a CPU).

    Args:
        sizes: Layer widths of each token's network, first input to last output.
    """

    def __init__(self, sizes: Sequence[Sequence[int]]) -> None:
        """Build the layers."""
        super().__init__()
        for widths in sizes:
            layers: list[nn.Module] = []
            for width_in, width_out in itertools.pairwise(widths):
                layers += [nn.GELU(), nn.Linear(width_in, width_out, bias=False)]
            self.append(nn.Sequential(*layers[1:]))

    def bind(self, tokens: Sequence[int]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """Gather the weights of some tokens once.

        Args:
            tokens: Indices of the tokens to project.

        Returns:
            A function from their values, (n, in_i) each, to their projections, (n, out_i) each, in the same order.
        """
        weights = [[layer.weight for layer in self[k].children() if isinstance(layer, nn.Linear)] for k in tokens]
        groups: dict[object, list[int]] = {}
        # while a CPU trains, stacking costs more than it saves
        alone = torch.is_grad_enabled() and len(weights) > 0 and weights[0][0].device.type == "cpu"
        for i, layers in enumerate(weights):
            groups.setdefault(i if alone else tuple(w.shape for w in layers), []).append(i)
        single = {members[0]: weights[members[0]] for members in groups.values() if len(members) == 1}
        stacked = [
            (members, [torch.stack(layer).mT for layer in zip(*(weights[i] for i in members), strict=True)])
            for members in groups.values()
            if len(members) > 1
        ]

        def project(values: Sequence[Tensor]) -> list[Tensor]:
            out: list[Tensor] = [*values]
            for i, (first, *others) in single.items():
                out[i] = F.linear(values[i], first)
                for w in others:
                    out[i] = F.linear(F.gelu(out[i]), w)
            for members, (first, *others) in stacked:
                h = torch.stack([values[i] for i in members]) @ first
                for w in others:
                    h = F.gelu(h) @ w
                for i, projected in zip(members, h.unbind(), strict=True):
                    out[i] = projected
            return out

        return project


def _joined(layers: Sequence[nn.Linear], x: Tensor) -> tuple[Tensor, ...]:
    """The layers applied to one input, by a single product."""
    weight, bias = torch.cat([layer.weight for layer in layers]), torch.cat([layer.bias for layer in layers])
    return F.linear(x, weight, bias).chunk(len(layers), dim=-1)


class SelfAttention(nn.Module):
    """Multi-head attention without a mask, with biases, scaled by 1/sqrt(c / heads) (Vaswani et al. 2017)."""

    def __init__(self, n_embd: int, n_head: int, dropout_prob: float) -> None:
        """Build the layers."""
        super().__init__()
        self.key = nn.Linear(n_embd, n_embd)
        self.query = nn.Linear(n_embd, n_embd)
        self.value = nn.Linear(n_embd, n_embd)
        self.proj = nn.Linear(n_embd, n_embd)
        self.n_head = n_head
        self.dropout_prob = dropout_prob

    def forward(self, queries: Tensor, h: Tensor) -> Tensor:
        """Attend from queries (n, q, c) to all tokens h (n, k, c); shape (n, q, c)."""
        if queries is h:  # one product for all three
            parts = _joined((self.query, self.key, self.value), h)
        else:
            parts = (self.query(queries), *_joined((self.key, self.value), h))
        q, k, v = (x.unflatten(-1, (self.n_head, -1)).transpose(1, 2) for x in parts)
        dropout = self.dropout_prob if self.training else 0.0
        y = attention(q, k, v, dropout)
        return F.dropout(self.proj(y.transpose(1, 2).flatten(2)), dropout)


class Block(nn.Module):
    """Pre-norm transformer block: h += Attn(LN1(h)); h += MLP(LN2(h))."""

    def __init__(self, n_embd: int, n_head: int, dropout_prob: float) -> None:
        """Build the layers."""
        super().__init__()
        self.ln1 = nn.LayerNorm(n_embd)
        self.ln2 = nn.LayerNorm(n_embd)
        self.attn = SelfAttention(n_embd, n_head, dropout_prob)
        self.mlp = nn.Sequential(
            nn.Linear(n_embd, 4 * n_embd), nn.GELU(), nn.Linear(4 * n_embd, n_embd), nn.Dropout(dropout_prob)
        )

    def forward(self, h: Tensor, count: int | None = None) -> Tensor:
        """Map tokens h (n, k, c) to the new values of the first ``count`` of them (default: all)."""
        normed = self.ln1(h)
        h = h[:, :count] + self.attn(normed if count is None else normed[:, :count], normed)
        return h + self.mlp(self.ln2(h))


def _span(parts: Sequence[Tensor], start: int, stop: int) -> Tensor:
    """Columns start to stop of the parts side by side, (n, stop - start); a view where they lie in one part."""
    found = []
    for part in parts:
        if start < part.shape[1] and stop > 0:
            found.append(part[:, max(start, 0) : stop])
        start, stop = start - part.shape[1], stop - part.shape[1]
    return found[0] if len(found) == 1 else torch.cat(found, dim=1)


class TokenTransformer(nn.Module):
    """Encoders, blocks and decoders over tokens of different lengths: the part of G under the key ``decoder``."""

    def __init__(
        self,
        input_lengths: Sequence[int],
        output_lengths: Sequence[int],
        *,
        n_layer: int,
        n_head: int,
        n_embd: int,
        encoder_depth: int,
        decoder_depth: int,
        dropout_prob: float,
    ) -> None:
        """Build the layers."""
        super().__init__()
        self.pos_emb = nn.Parameter(torch.zeros(1, len(input_lengths), n_embd))
        self.drop = nn.Dropout(dropout_prob)
        self.blocks = nn.ModuleList(Block(n_embd, n_head, dropout_prob) for _ in range(n_layer))
        self.input_parameter_projections = TokenProjections([[k] + [n_embd] * encoder_depth for k in input_lengths])
        self.ln_in = nn.LayerNorm(n_embd)
        self.ln_f = nn.LayerNorm(n_embd)
        self.output_parameter_projections = TokenProjections([[n_embd] * decoder_depth + [k] for k in output_lengths])

    def encoder(self, tokens: Sequence[int]) -> Callable[[Sequence[Tensor]], list[Tensor]]:
        """LN_in(Enc) of some tokens, with their weights gathered once: values (n, length) -> embeddings (n, c), each."""
        project = self.input_parameter_projections.bind(tokens)

        def encode(values: Sequence[Tensor]) -> list[Tensor]:
            return [*self.ln_in(torch.stack(project(values))).unbind()] if values else []

        return encode

    def decoder(self) -> Callable[[Tensor], Tensor]:
        """Positions, blocks and decoders, the weights of the decoders gathered once: embeddings (n, k, c) -> (n, d).

        Only the leading tokens are decoded, so the last block computes no others.
        """
        count = len(self.output_parameter_projections)
        project = self.output_parameter_projections.bind(range(count))

        def decode(h: Tensor) -> Tensor:
            h = self.drop(h + self.pos_emb)
            for block in self.blocks[:-1]:
                h = block(h)
            h = self.ln_f(self.blocks[-1](h, count))
            return torch.cat(project(h.unbind(1)), dim=1)

        return decode


class GptModel(nn.Module):
    """Denoiser of checkpoints: predicts weights with a wanted metric from noised weights and a starting checkpoint.

    The input [x_t | x_prev | emb(t) | emb(target - prev) | emb(target) | emb(prev)] is cut into tokens, each with its own
    encoder; the output is decoded from the tokens of x_t and added to x_prev. A new model returns x_prev exactly. The
    state dict has the keys, order and shapes of the released G.pt files.

    Args:
        parameter_sizes: Sizes of the tensors of the task network, in state-dict order; d is their sum.
        parameter_names: Their names, for messages; as many as sizes.
        predict_xstart: Whether the output stands for x_0 (else for the noise). Kept with the model for whoever builds
            its diffusion process; x_prev is added in both cases.
        absolute_loss_conditioning: Also give the two metrics themselves, not only their difference.
        split_policy: How the input is cut into tokens, see :class:`zoo_common.tokens.LayerTokenizer`.
        chunk_size: Scalars in a full token.
        n_layer: Number of blocks, at least 1.
        n_head: Attention heads; divides ``n_embd``.
        n_embd: Channels.
        encoder_depth: Linear layers per token encoder, at least 1.
        decoder_depth: Linear layers per token decoder, at least 1.
        max_freq_log2: Exponent of the largest frequency of the scalar embedding (14 in all released models).
        num_frequencies: Frequencies of the scalar embedding.
        dropout_prob: Dropout after the positions, on attention weights and after both halves of a block.

    Raises:
        ValueError: Sizes that do not fit each other (the message names them).
    """

    def __init__(
        self,
        parameter_sizes: Sequence[int],
        parameter_names: Sequence[str] | None = None,
        *,
        predict_xstart: bool = True,
        absolute_loss_conditioning: bool = False,
        split_policy: SplitPolicy = "chunk",
        chunk_size: int | None = None,
        n_layer: int = 12,
        n_head: int = 12,
        n_embd: int = 768,
        encoder_depth: int = 1,
        decoder_depth: int = 1,
        max_freq_log2: float = 20,
        num_frequencies: int = 128,
        dropout_prob: float = 0.0,
    ) -> None:
        """Build the layers."""
        super().__init__()
        names = list(parameter_names or [])
        if parameter_names is not None and len(names) != len(parameter_sizes):
            raise ValueError(f"{len(names)} parameter names for {len(parameter_sizes)} parameter sizes")
        if n_embd % n_head:
            raise ValueError(f"n_embd ({n_embd}) must be a multiple of n_head ({n_head})")
        if min(n_layer, encoder_depth, decoder_depth) < 1:
            raise ValueError(f"{n_layer=}, {encoder_depth=} and {decoder_depth=} must be at least 1")
        embedding = ScalarEmbedding(num_frequencies, max_freq_log2)
        weights = tuple(parameter_sizes)
        self.num_scalars = 4 if absolute_loss_conditioning else 2
        groups = (weights, weights, *[(embedding.size,)] * self.num_scalars)
        self.tokenizer = LayerTokenizer(groups, split_policy, chunk_size)
        self.parameter_names = names
        self.predict_xstart = predict_xstart
        self.num_weights = d = sum(weights)
        # tokens that hold something of x_t or emb(t); all others are constant over a sampling trajectory
        stops = list(itertools.accumulate(self.tokenizer.lengths))
        self.spans = list(zip([0, *stops], stops, strict=False))
        varies = [a < d or (a < 2 * d + embedding.size and b > 2 * d) for a, b in self.spans]
        self.varying_tokens = [k for k, yes in enumerate(varies) if yes]
        self.constant_tokens = [k for k, yes in enumerate(varies) if not yes]
        self.decoder = TokenTransformer(
            self.tokenizer.lengths,
            LayerTokenizer((weights,), split_policy, chunk_size).lengths,
            n_layer=n_layer,
            n_head=n_head,
            n_embd=n_embd,
            encoder_depth=encoder_depth,
            decoder_depth=decoder_depth,
            dropout_prob=dropout_prob,
        )
        self.scalar_embedder = embedding
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Linear weights N(0, 0.02^2), biases and positions 0, layer norms 1 and 0; last layer of every decoder 0."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.LayerNorm):
                module.reset_parameters()
        nn.init.zeros_(self.decoder.pos_emb)
        for layers in self.decoder.output_parameter_projections:
            nn.init.zeros_(layers[-1].weight)  # type: ignore[index]

    def forward(self, x: Tensor, t: Tensor, loss_target: Tensor, *, loss_prev: Tensor, x_prev: Tensor) -> Tensor:
        """Predict x_0 (or the noise) in normalised space.

        Args:
            x: Noised weights x_t (n, d), normalised.
            t: Steps of the original process (n,) or (n, 1); embedded as they are.
            loss_target: Metric asked for (n,) or (n, 1), in its raw units, never normalised.
            loss_prev: Metric of ``x_prev``, likewise.
            x_prev: Weights of the starting checkpoint (n, d), normalised.

        Returns:
            Prediction (n, d).
        """
        return self._bind(loss_target, loss_prev, x_prev, self.scalar_embedder)(x, t)

    def condition(self, loss_target: Tensor, loss_prev: Tensor, x_prev: Tensor) -> Denoise:
        """Compute once what is constant over a sampling trajectory.

        That is: the embeddings of the metrics and of all time steps, the encoded tokens of ``x_prev`` and of the
        metrics, and the gathered weights of the token projections. The result is valid until the weights change.

        Args:
            loss_target: As for :meth:`forward`.
            loss_prev: As for :meth:`forward`.
            x_prev: As for :meth:`forward`.

        Returns:
            The function (x, t) -> (n, d), with t an int64 tensor of steps in 0..999.
        """
        table = self.scalar_embedder(torch.arange(NUM_TIMESTEPS, device=self.scalar_embedder.frequencies.device))
        return self._bind(loss_target, loss_prev, x_prev, lambda t: table[t])

    def _bind(
        self, loss_target: Tensor, loss_prev: Tensor, x_prev: Tensor, embed_time: Callable[[Tensor], Tensor]
    ) -> Denoise:
        """The network as a function of (x, t)."""
        if x_prev.ndim != 2 or x_prev.shape[1] != self.num_weights:
            raise ValueError(f"x_prev: expected (n, {self.num_weights}), got {tuple(x_prev.shape)}")
        dtype = self.decoder.pos_emb.dtype
        target, prev = loss_target.reshape(-1), loss_prev.reshape(-1)
        metrics = [target - prev, target, prev][: self.num_scalars - 1]
        constants = [x_prev, *(self.scalar_embedder(m) for m in metrics)]
        varying, constant = self.varying_tokens, self.constant_tokens
        encode, decode = self.decoder.encoder(varying), self.decoder.decoder()

        def tokens(which: Sequence[int], x: Tensor, time: Tensor) -> list[Tensor]:
            parts = [part.to(dtype) for part in (x, constants[0], time, *constants[1:])]
            return [_span(parts, *self.spans[k]) for k in which]

        # no constant token holds anything of x or of the time, which these two stand for
        known = self.decoder.encoder(constant)(tokens(constant, x_prev, constants[1]))

        def denoise(x: Tensor, t: Tensor) -> Tensor:
            if x.shape != x_prev.shape:
                raise ValueError(f"x: expected the shape of x_prev {tuple(x_prev.shape)}, got {tuple(x.shape)}")
            found = encode(tokens(varying, x, embed_time(t.reshape(-1))))
            h = dict(zip([*varying, *constant], found + known, strict=True))
            return decode(torch.stack([h[k] for k in range(len(h))], dim=1)) + x_prev

        return denoise
