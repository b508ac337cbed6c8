"""Lengths of the shortest directed paths in a graph: the virtual edges."""

import numpy as np
from scipy.sparse import csr_array
from scipy.sparse.csgraph import dijkstra


def path_lengths(n: int, edges: np.ndarray, cutoff: int) -> np.ndarray:
    """Shortest directed path lengths up to a limit.

    Args:
        n: Number of nodes.
        edges: From and to, (m, 2) int64.
        cutoff: Longer paths count as absent; 1 keeps the edges alone.

    Returns:
        (n, n) uint8 (int64 where ``cutoff`` exceeds 255), 0 where there is no path, and on the diagonal.
    """
    found = np.zeros((n, n), np.uint8 if cutoff <= 255 else np.int64)
    if cutoff <= 1:
        found[edges[:, 0], edges[:, 1]] = 1
    elif len(edges):
        matrix = csr_array((np.ones(len(edges)), (edges[:, 0], edges[:, 1])), shape=(n, n))
        lengths = dijkstra(matrix, unweighted=True, limit=cutoff)
        lengths[np.isinf(lengths)] = 0
        found[:] = lengths
    return found
