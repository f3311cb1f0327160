"""Lossless verification of chains: what is emitted is distributed as if the target had generated it alone.

Greedy requests accept candidates while they are the target's own choices. Sampled requests use speculative sampling
(Leviathan, Kalman, Matias, ICML 2023, algorithm 1 and appendix A.1; the same rule as Chen et al., 2023): candidate x,
drawn from the drafter's q, is accepted with probability min(1, p(x) / q(x)); at the first rejection the token is drawn
from norm(max(0, p - q)) instead, and when all are accepted one more token is drawn from the target's p.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.speculation.sampling import draw


@kernel
def accept_greedy(choices, first_row, candidates, accepted):
    """Accepted candidates of every request: those before the first that is not the target's choice.

    choices: (rows,) the target's choices at all verified rows · first_row: (B + 1,) where request i's rows begin, one
    more row than it has candidates · candidates: (B, C) · accepted: (B,) result. The token emitted after the accepted
    ones is `choices[first_row[i] + accepted[i]]`.
    """
    for i in range(len(accepted)):
        count = first_row[i + 1] - first_row[i] - 1
        a = 0
        while a < count and choices[first_row[i] + a] == candidates[i, a]:
            a += 1
        accepted[i] = a


def accept_sampled(
    target: NDArray[np.float64],
    drafter: NDArray[np.float64] | None,
    candidates: NDArray[np.integer],
    random: np.random.Generator,
) -> tuple[int, int]:
    """(accepted candidates, the token emitted after them) of one sampled request with a chain of c candidates.

    Args:
        target: (c + 1, V) p, the target's distribution at each candidate's position and at the one after.
        drafter: (c, V) q, what each candidate was drawn from; None when the drafter is certain (q(x) = 1).
        candidates: (c,) tokens.
        random: the request's own stream.
    """
    for i, token in enumerate(candidates):
        likelihood = 1.0 if drafter is None else drafter[i, token]
        if random.random() * likelihood < target[i, token]:
            continue
        if drafter is None:
            residual = target[i].copy()
            residual[token] = 0.0
        else:
            residual = np.maximum(target[i] - drafter[i], 0.0)
        # p = q up to rounding leaves nothing to draw from, and a rejection there is itself a rounding error.
        return i, draw(residual if residual.sum() > 0.0 else target[i], random)
    return len(candidates), draw(target[len(candidates)], random)
