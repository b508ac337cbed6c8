"""The autoencoder of SANE (Schürholt, Mahoney, Borth 2024), with the published state-dict keys.

Shapes: ``b`` sequences of ``t`` tokens with ``i`` scalars, width ``d``, latents of ``l`` numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_PROJECTION = 30
"""Width of the projection head."""


@dataclass(frozen=True)
class AutoencoderConfig:
    """Sizes of the autoencoder. Published: CNN 1024 / 8 heads / 8 layers, ResNet-18 2048 / 16 / 8, latents of 128."""

    token_size: int
    """Scalars in a token, i."""
    max_positions: tuple[int, ...]
    """Rows of the position tables: tokens in a sequence, layers, channels of a layer (or only the first and last)."""
    window: int = 64
    """Tokens in a window; fixes the projection head, not the autoencoder."""
    d_model: int = 256
    heads: int = 8
    layers: int = 4
    """Blocks of the encoder, and as many of the decoder."""
    latent: int = 32
    """Numbers that each token is compressed to, l."""
    dropout: float = 0.0
    kind: Literal["gpt2", "legacy_pytorch"] = "gpt2"
    """``legacy_pytorch``: torch's post-norm layers, which attend over the batch; only to load such files."""

    def __post_init__(self) -> None:
        """Reject sizes that do not fit each other."""
        for name in ("token_size", "window", "d_model", "heads", "layers", "latent"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout must be from 0 to below 1, got {self.dropout}")
        if self.d_model % self.heads or self.d_model % 2:
            raise ValueError(f"d_model ({self.d_model}) must be even and a multiple of heads ({self.heads})")
        if len(self.max_positions) not in (2, 3) or min(self.max_positions) < 1:
            raise ValueError(f"max_positions must be two or three positive numbers, got {self.max_positions}")


class Attention(nn.Module):
    """Bidirectional self-attention; no (t, t) matrix is kept in memory."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.c_attn = nn.Linear(d, 3 * d, bias=False)
        self.c_proj = nn.Linear(d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        q, k, v = (part.unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=-1))
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=self.dropout if self.training else 0.0)
        return F.dropout(self.c_proj(y.transpose(1, 2).flatten(2)), self.dropout, self.training)


class Mlp(nn.Module):
    """Two layers with an exact GELU between them."""

    def __init__(self, d: int, dropout: float) -> None:
        super().__init__()
        self.c_fc = nn.Linear(d, 4 * d, bias=False)
        self.c_proj = nn.Linear(4 * d, d, bias=False)
        self.dropout = dropout

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        return F.dropout(self.c_proj(F.gelu(self.c_fc(x))), self.dropout, self.training)


class Block(nn.Module):
    """x + attn(ln_1(x)), then x + mlp(ln_2(x))."""

    def __init__(self, d: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(d, bias=False)
        self.attn = Attention(d, heads, dropout)
        self.ln_2 = nn.LayerNorm(d, bias=False)
        self.mlp = Mlp(d, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """Blocks one after the other, without a final normalisation."""

    def __init__(self, d: int, heads: int, layers: int, dropout: float) -> None:
        super().__init__()
        self.transformer = nn.ModuleList(Block(d, heads, dropout) for _ in range(layers))

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        for block in self.transformer:
            x = block(x)
        return x


class Positions(nn.Module):
    """Learned tables: concat(pe1[p0] + pe2[p1], pe3[p2]), or with two tables concat(pe1[p0], pe2[p1])."""

    def __init__(self, d: int, max_positions: Sequence[int]) -> None:
        super().__init__()
        self.max_positions = tuple(max_positions)
        for k, rows in enumerate(max_positions):
            setattr(self, f"pe{k + 1}", nn.Embedding(rows, d // 2))

    def forward(self, p: Tensor) -> Tensor:
        """Positions (b, t, 2 or 3) -> (b, t, d).

        Raises:
            ValueError: Fewer columns than tables.
            IndexError: A position without a row in its table (on CUDA an assertion; :func:`sane.model.check_fit` tells
                before).
        """
        columns = p.long().unbind(-1)
        if len(columns) < len(self.max_positions):
            raise ValueError(f"positions have {len(columns)} columns, the autoencoder needs {len(self.max_positions)}")
        found = [getattr(self, f"pe{k + 1}")(columns[k]) for k in range(len(self.max_positions))]
        return torch.cat([sum(found[1:-1], found[0]), found[-1]], dim=-1)


class ProjectionHead(nn.Module):
    """Two layers with layer norms and ReLUs on all latents of a window."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.head = nn.Sequential(
            nn.Linear(inputs, _PROJECTION, bias=False),
            nn.LayerNorm(_PROJECTION),
            nn.ReLU(),
            nn.Linear(_PROJECTION, _PROJECTION, bias=False),
            nn.LayerNorm(_PROJECTION),
            nn.ReLU(),
        )

    def forward(self, z: Tensor) -> Tensor:
        """(b, w, l) -> (b, 30)."""
        return self.head(z.flatten(1))


class Autoencoder(nn.Module):
    """Encodes each token, in the context of its sequence, to a latent of ``l`` numbers, and back."""

    def __init__(self, config: AutoencoderConfig) -> None:
        super().__init__()
        self.config, c = config, config
        self.tokenizer = nn.Linear(c.token_size, c.d_model)
        self.transformer_encoder = self._stack()
        self.encoder_comp = nn.Linear(c.d_model, c.latent)
        self.detokenizer = nn.Linear(c.d_model, c.token_size)
        self.transformer_decoder = self._stack(decoder=True)
        self.decoder_comp = nn.Linear(c.latent, c.d_model)
        self.pe = Positions(c.d_model, c.max_positions)
        self.projection_head = ProjectionHead(c.window * c.latent)
        self.apply(_initialise)
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, 0.0, 0.02 / math.sqrt(2 * c.layers))

    def _stack(self, decoder: bool = False) -> nn.Module:
        c = self.config
        if c.kind == "gpt2":
            return Transformer(c.d_model, c.heads, c.layers, c.dropout)
        layer = nn.TransformerEncoderLayer(c.d_model, c.heads, 2048, 0.1 if decoder else c.dropout)
        return nn.TransformerEncoder(layer, c.layers, enable_nested_tensor=False)

    def encode(self, x: Tensor, p: Tensor) -> Tensor:
        """Latents (b, t, l) of tokens (b, t, i) at positions (b, t, 3), for sequences of any length t."""
        h = F.dropout(self.tokenizer(x) + self.pe(p), self.config.dropout, self.training)
        return self.encoder_comp(self.transformer_encoder(h))

    def decode(self, z: Tensor, p: Tensor) -> Tensor:
        """Tokens (b, t, i) of latents (b, t, l)."""
        h = F.dropout(self.decoder_comp(z) + self.pe(p), self.config.dropout, self.training)
        return self.detokenizer(self.transformer_decoder(h))

    def project(self, z: Tensor) -> Tensor:
        """Projections (b, 30) of the latents of whole windows (b, w, l), for the contrastive loss.

        Raises:
            ValueError: The windows have another length than the head was made for.
        """
        if z.shape[1] != self.config.window:
            raise ValueError(f"the projection head is for windows of {self.config.window} tokens, got {z.shape[1]}")
        return self.projection_head(z)

    def forward(self, x: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, reconstructed tokens and projections of windows."""
        z = self.encode(x, p)
        return z, self.decode(z, p), self.project(z)

    def embed(self, x: Tensor, p: Tensor) -> Tensor:
        """Mean latent (b, l) of whole sequences."""
        return self.encode(x, p).mean(1)


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear | nn.Embedding):
        nn.init.normal_(module.weight, 0.0, 0.02)
    if isinstance(module, nn.Linear) and module.bias is not None:
        nn.init.zeros_(module.bias)
