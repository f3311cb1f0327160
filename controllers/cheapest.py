"""The best candidate count of an iteration with given prompt tokens, at a given value of a token in time."""

import math

from engine.compiled import kernel


@kernel
def cheapest_candidates(seconds, tokens, candidates, j, token_value):
    """Index of the c with the least time less value of its tokens, T(c, n_j) - mu G(c).

    seconds: (nC, nN + 1) predicted T · tokens: (C + 1,) G · candidates: (nC,) choices of c · token_value: mu in s.
    """
    best = math.inf
    chosen = 0
    for c in range(candidates.shape[0]):
        excess = seconds[c, j] - token_value * tokens[candidates[c]]
        if excess < best:
            best = excess
            chosen = c
    return chosen
