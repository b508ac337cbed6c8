r"""The node network of GHN-3: a transformer whose attention knows the distances in the graph.

Knyazev, Hwang, Lacoste-Julien (2023), after Ying et al. (2021): the logits of attention between nodes :math:`i, j` get
a bias that is a function of the two directed distances between them.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_DEGREES, _INPUT_DISTANCES, _DISTANCES = 101, 1001, 257
_NO_EDGE = 2
"""Row of the distance table for 0; the rows before it are never read."""


class Attention(nn.Module):
    """Multi-head attention within each of several graphs."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_qkv = nn.Linear(dim, 3 * dim, bias=False)
        self.to_out = nn.Sequential(nn.Linear(dim, dim))

    def forward(self, x: Tensor, biases: Sequence[Tensor]) -> Tensor:
        """Attend among the nodes of each graph; ``x`` is ``(nodes of all graphs, dim)``."""
        parts = self.to_qkv(x).split([bias.shape[-1] for bias in biases])
        return self.to_out(torch.cat([self._attend(part, bias) for part, bias in zip(parts, biases, strict=True)]))

    def _attend(self, qkv: Tensor, bias: Tensor) -> Tensor:
        q, k, v = qkv.view(len(qkv), 3, self.heads, -1).permute(1, 2, 0, 3)[:, None]
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias[None].to(q.dtype))
        return out[0].transpose(0, 1).flatten(1)


class EdgeAttention(Attention):
    """Attention of the first layer, which makes the bias that all layers share.

    Graphs have thousands of node pairs but few different pairs of distances, and the first layer of the network that
    maps them to a bias is a sum of a function of each. So it is evaluated once per pair of distances, and looked up.
    """

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__(dim, heads)
        self.edge_embed = nn.ModuleDict({"embed": nn.Embedding(_DISTANCES, dim)})
        self.proj_e = nn.Sequential(nn.Linear(2 * dim, dim), nn.ReLU(), nn.Linear(dim, heads))

    def table(self, size: int) -> Tensor:
        """Bias ``(heads, size, size)`` for distances ``(from i to j, from j to i)`` below ``size``."""
        embedding, first, last = self.edge_embed["embed"], self.proj_e[0], self.proj_e[2]
        assert isinstance(embedding, nn.Embedding) and isinstance(first, nn.Linear)
        rows = embedding.weight[_NO_EDGE : _NO_EDGE + size]
        there, back = (F.linear(rows, part) for part in first.weight.chunk(2, dim=1))
        return last(F.relu(there[:, None] + (back + first.bias))).permute(2, 0, 1)

    def biases(self, distances: Sequence[Tensor]) -> list[Tensor]:
        """Bias ``(heads, n, n)`` for each matrix ``(n, n)`` of distances."""
        size = 1 + max(int(matrix.max()) for matrix in distances)
        if size > _DISTANCES - _NO_EDGE:
            raise ValueError(f"a graph holds the distance {size - 1}; the largest is {_DISTANCES - _NO_EDGE - 1}")
        table = self.table(size).flatten(1)
        indices = [(matrix * size + matrix.T).flatten() for matrix in distances]
        return [table.index_select(1, i).view(-1, *m.shape) for i, m in zip(indices, distances, strict=True)]


class _Layer(nn.Module):
    """Pre-norm transformer layer."""

    def __init__(self, dim: int, attention: Attention) -> None:
        super().__init__()
        self.ln1, self.ln2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.attn = attention
        # Two places stand for the dropout of the published layout, which is never used.
        net = [nn.Linear(dim, 4 * dim), nn.GELU(), nn.Identity(), nn.Linear(4 * dim, dim)]
        self.ff = nn.ModuleDict({"net": nn.Sequential(*net)})

    def forward(self, x: Tensor, biases: Sequence[Tensor]) -> Tensor:
        x = x + self.attn(self.ln1(x), biases)
        return x + self.ff["net"](self.ln2(x))


class Graphormer(nn.Sequential):
    """A stack of transformer layers over graphs; the first one also holds the tables of what it knows of a graph.

    Args:
        dim: Width of node embeddings.
        heads: Attention heads, a divisor of ``dim``.
        layers: At least one.
    """

    def __init__(self, dim: int, heads: int, layers: int) -> None:
        if dim % heads:
            raise ValueError(f"hid ({dim}) must be a multiple of heads ({heads})")
        kinds = [EdgeAttention] + [Attention] * (layers - 1)
        super().__init__(*(_Layer(dim, kind(dim, heads)) for kind in kinds))
        first = self[0]
        first.centrality_embed_in = nn.Embedding(_DEGREES, dim)
        first.centrality_embed_out = nn.Embedding(_DEGREES, dim)
        first.input_dist_embed = nn.Embedding(_INPUT_DISTANCES, dim)

    def forward(self, x: Tensor, distances: Sequence[Tensor]) -> Tensor:  # type: ignore[override]
        """New embeddings of the nodes.

        Args:
            x: Embeddings ``(n_1 + ... + n_b, dim)`` of the nodes of ``b`` graphs.
            distances: For each graph ``(n, n)`` int64: distance from row to column; 1 is an edge, 0 no path.
        """
        first: Any = self[0]
        distances = [matrix.to(x.device) for matrix in distances]
        edges = [matrix == 1 for matrix in distances]
        into = torch.cat([edge.sum(0) for edge in edges]).clamp(max=_DEGREES - 1)
        out = torch.cat([edge.sum(1) for edge in edges]).clamp(max=_DEGREES - 1)
        start = torch.cat([matrix[0] for matrix in distances]).clamp(max=_INPUT_DISTANCES - 1)
        x = x + first.centrality_embed_in(into) + first.centrality_embed_out(out) + first.input_dist_embed(start)
        biases = first.attn.biases(distances)
        for layer in self:
            x = layer(x, biases)
        return x
