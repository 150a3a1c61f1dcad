"""Groups of what is connected."""

from __future__ import annotations

import numpy as np


def connected(n: int, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """The number of each of n things' group, int [n]: those that pairs (first[i], second[i]) connect, be it through
    others, share one."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    graph = coo_array((np.ones(len(first), np.int8), (first, second)), shape=(n, n))
    return connected_components(graph, directed=False)[1]
