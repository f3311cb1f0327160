"""Piecewise linear curves as columns of a least-squares problem with non-negative weights.

Lawson and Hanson, "Solving Least Squares Problems" (1974), chapter 23. Rows that fit badly are weighted down
(iteratively reweighted least squares towards least absolute errors), because the errors of times measured on a busy
machine are one-sided and heavy-tailed.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

FINE_FROM_POINTS = 1000
"""Points from which curves get twice as many nodes."""

REWEIGHTINGS = 8
SMALLEST_ERROR = 0.01
"""Relative errors below this count alike when rows are reweighted."""


def nodes(points: int, largest: float) -> NDArray[np.float64]:
    """Nodes of a curve from 1 to `largest`, each four times the one before it, or twice where there are many points."""
    ratio = 2.0 if points >= FINE_FROM_POINTS else 4.0
    inner = ratio ** np.arange(np.floor(np.log(max(largest, 2.0)) / np.log(ratio)) + 1)
    return np.array([*inner[inner < largest * 0.75], max(largest, 2.0)])


def rising(x: NDArray[Any], nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns of a curve that never falls, (..., nodes): its value at the first node, then its rise to each next.

    Zero where x is 0, flat below the first node.
    """
    x = np.asarray(x, dtype=np.float64)[..., None]
    rise = np.clip((x - nodes[:-1]) / np.diff(nodes), 0.0, 1.0)
    # Past the last node the slope of the last piece continues.
    rise[..., -1:] = np.maximum(0.0, (x - nodes[-2]) / (nodes[-1] - nodes[-2]))
    return np.concatenate([(x > 0).astype(np.float64), rise], axis=-1)


def hats(x: NDArray[Any], nodes: NDArray[np.float64]) -> NDArray[np.float64]:
    """Columns of a free piecewise linear curve, (S, nodes): how much each node's value counts at x."""
    x = np.clip(np.asarray(x, dtype=np.float64), nodes[0], nodes[-1])
    return np.stack([np.interp(x, nodes, row) for row in np.eye(len(nodes))], axis=-1)


def solve_weights(
    columns: list[NDArray[np.float64]], wanted_s: NDArray[np.float64], scale_s: NDArray[np.float64]
) -> tuple[list[NDArray[np.float64]], float]:
    """Non-negative weights of blocks of columns, and the mean absolute error relative to `scale_s`."""
    from scipy.optimize import nnls

    matrix = np.concatenate(columns, axis=1) / scale_s[:, None]
    target = wanted_s / scale_s
    # Columns of seconds per token and of seconds are many orders apart; equal norms keep the solver's tolerance fair.
    norm = np.linalg.norm(matrix, axis=0)
    norm[norm == 0.0] = 1.0
    row_weight = np.ones(len(target))
    weights = np.zeros(matrix.shape[1])
    for _ in range(REWEIGHTINGS):
        weights, _ = nnls(matrix / norm * row_weight[:, None], target * row_weight, maxiter=50 * matrix.shape[1])
        weights /= norm
        row_weight = 1.0 / np.sqrt(np.maximum(np.abs(matrix @ weights - target), SMALLEST_ERROR))
    edges = np.cumsum([block.shape[1] for block in columns])[:-1]
    return np.split(weights, edges), float(np.abs(matrix @ weights - target).mean())
