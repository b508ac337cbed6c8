"""Node networks of GHN-1, GHN-2 and the MLP baseline."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

_LARGEST_BLOCK = 4096
"""Nodes of graphs that are swept together; the adjacency matrix of all of them is held."""


class NodeMlp(nn.Module):
    """Two layers with ReLU after each, applied to every row."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc = nn.Sequential(nn.Linear(dim, hidden), nn.ReLU(), nn.Linear(hidden, dim), nn.ReLU())

    def forward(self, x: Tensor, distances: Sequence[Tensor] = ()) -> Tensor:
        """The same for any graphs, which are ignored."""
        return self.fc(x)


class GatedGNN(nn.Module):
    r"""A sweep through the graph from the input to the output and one back (Zhang et al. 2019; Knyazev et al. 2021).

    Nodes are updated one after the other, :math:`h_k \leftarrow \mathrm{GRU}(m_k, h_k)`, with the message

    .. math:: m_k = \sum_{u \to k, d = 1} \mathrm{MLP}(h_u) + \sum_{u \to k} \mathrm{MLP_{ve}}(h_u) / d

    over edges of distance :math:`d`. A node hears its predecessors only, so all nodes of one topological level are
    updated together, and each MLP is evaluated once per node, not once per edge.

    Args:
        dim: Width of node embeddings.
        ve: Whether there is the second sum, over virtual edges.
    """

    def __init__(self, dim: int, ve: bool) -> None:
        super().__init__()
        self.mlp = NodeMlp(dim, dim // 2 if ve else dim)
        self.mlp_ve = NodeMlp(dim, dim // 2) if ve else None
        self.gru = nn.GRUCell(dim, dim)

    def forward(self, x: Tensor, distances: Sequence[Tensor]) -> Tensor:
        """New embeddings; arguments as of :class:`ghn.graphormer.Graphormer`."""
        done, start = [], 0
        for block in _blocks(distances):
            stop = start + sum(map(len, block))
            done.append(self._sweep_both(x[start:stop], block))
            start = stop
        return torch.cat(done)

    def _sweep_both(self, h: Tensor, distances: Sequence[Tensor]) -> Tensor:
        there = [matrix.cpu() for matrix in distances]
        back = [matrix.flip(0, 1).T for matrix in reversed(there)]
        h = self._sweep(h, torch.block_diag(*there), _levels(there))
        return self._sweep(h.flip(0), torch.block_diag(*back), _levels(back)).flip(0)

    def _sweep(self, h: Tensor, distance: Tensor, levels: Tensor) -> Tensor:
        """Update all nodes, the earlier first; ``distance`` is ``(n, n)`` from row to column."""
        order = torch.argsort(levels, stable=True)
        ends = torch.bincount(levels).cumsum(0).tolist()
        position = order.to(h.device)
        own, weights = h[position], self._weights(distance[order][:, order], order).to(h)
        inbox = torch.zeros_like(h)
        if weights[1].any():  # of nodes that come later in the order: what they are before the sweep
            inbox = inbox + weights[1].flatten(0, 1).T @ self._messages(own)
        weights, done, start = weights[0], [], 0
        for end in ends:
            done.append(self.gru(inbox[start:end].clone(), own[start:end]))
            inbox.addmm_(weights[start:end].flatten(0, 1).T, self._messages(done[-1]))
            start = end
        return torch.cat(done)[torch.argsort(position)]

    def _weights(self, distance: Tensor, order: Tensor) -> Tensor:
        """How much a node hears of each message of another, ``(earlier or later sender, sender, message, receiver)``."""
        direct = (distance == 1).double()
        inverse = torch.where(distance > 0, 1 / distance.clamp(min=1).double(), 0.0)
        kinds = [direct] if self.mlp_ve is None else [direct, inverse]
        weights = torch.stack(kinds, dim=1)
        is_later = (order[:, None] > order)[:, None]
        return torch.stack([weights.masked_fill(is_later, 0), weights.masked_fill(~is_later, 0)])

    def _messages(self, h: Tensor) -> Tensor:
        """Messages of nodes, one row per node, or two: over edges and over virtual edges."""
        if self.mlp_ve is None:
            return self.mlp(h)
        first, second = self.mlp.fc, self.mlp_ve.fc
        return torch.stack([first(h), second(h)], dim=1).flatten(0, 1)


def _blocks(distances: Sequence[Tensor]) -> list[list[Tensor]]:
    """Consecutive graphs, so many that their common adjacency matrix stays small."""
    blocks: list[list[Tensor]] = []
    nodes = _LARGEST_BLOCK
    for matrix in distances:
        if nodes + len(matrix) > _LARGEST_BLOCK:
            blocks.append([])
            nodes = 0
        blocks[-1].append(matrix)
        nodes += len(matrix)
    return blocks


def _levels(distances: Sequence[Tensor]) -> Tensor:
    """Level of every node: one more than the highest of the earlier nodes that it hears, or 0; ``(n,)`` int64."""
    levels = []
    for matrix in distances:
        hears = (matrix > 0).numpy()
        own = np.ones(len(hears), dtype=np.int64)
        for k in range(1, len(own)):
            own[k] += (own[:k] * hears[:k, k]).max()
        levels.append(own - 1)
    return torch.from_numpy(np.concatenate(levels))
