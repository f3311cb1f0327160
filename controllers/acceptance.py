"""Tokens per iteration, learnt online from how often candidates at each draft depth are accepted."""

import math

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel

PRIOR_ACCEPTANCE = 0.6
PRIOR_COUNT = 20.0
MEMORY_S = 60.0


def new_memory(max_candidates: int) -> NDArray[np.float64]:
    """Counts of candidates verified and accepted by depth, (2, C), empty."""
    return np.zeros((2, max(1, max_candidates)))


@kernel
def learn_acceptance(memory, drafted, accepted, elapsed_s, tokens):
    """Update the counts with the latest observation and write G into `tokens`.

    Old counts fade with a time constant of `MEMORY_S`. The chance that a candidate at depth d is accepted, given that
    those before it were, is (accepted_d + k p_(d-1)) / (drafted_d + k) with k = PRIOR_COUNT and p_0 =
    PRIOR_ACCEPTANCE: a depth that is never drafted is believed to be like the one before it, and an engine that stopped
    speculating drifts back to the prior and tries again.

    Args:
        memory: (2, C) from `new_memory`.
        drafted, accepted: the observation's counts; a depth it does not have counts as never drafted.
        elapsed_s: seconds since the last observation.
        tokens: (C + 1,) G by candidate count: 1 + sum over depths of the product of the chances.
    """
    keep = math.exp(-elapsed_s / MEMORY_S)
    chance = PRIOR_ACCEPTANCE
    survival = 1.0
    tokens[0] = 1.0
    for depth in range(memory.shape[1]):
        seen = depth < drafted.shape[0]
        memory[0, depth] = memory[0, depth] * keep + (drafted[depth] if seen else 0.0)
        memory[1, depth] = memory[1, depth] * keep + (accepted[depth] if seen else 0.0)
        chance = (memory[1, depth] + PRIOR_COUNT * chance) / (memory[0, depth] + PRIOR_COUNT)
        survival *= chance
        tokens[depth + 1] = tokens[depth] + survival
