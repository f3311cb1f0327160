"""Online estimates of tokens per iteration G(c): by draft depth, from the requests' own rates, or by the chosen c."""

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
    PRIOR_ACCEPTANCE: a depth that is never drafted is estimated like the one before it, and after speculation stops the
    estimate returns to the prior, so that speculation is tried again.

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


@kernel
def expected_tokens(acceptance, candidates):
    """l(a, k) = (1 - a^(k + 1)) / (1 - a), tokens a request emits with k candidates of acceptance a each.

    Leviathan et al., ICML 2023, equation 1.
    """
    if acceptance >= 1.0:
        return candidates + 1.0
    return (1.0 - acceptance ** (candidates + 1)) / (1.0 - acceptance)


@kernel
def tokens_of_requests(rates, tokens):
    """Write G(c) of c candidates for each decoding request into `tokens`, by the requests' own acceptance rates.

    Args:
        rates: (bands,) requests by acceptance rate, as in the observation; each counts with the middle of its band.
        tokens: (C + 1,) left alone when no request decodes.
    """
    bands = rates.shape[0]
    requests = 0.0
    for band in range(bands):
        requests += rates[band]
    if requests <= 0.0:
        return
    for c in range(tokens.shape[0]):
        total = 0.0
        for band in range(bands):
            total += rates[band] * expected_tokens((band + 0.5) / bands, c)
        tokens[c] = total / requests


@kernel
def tokens_by_marginal_gain(rates, tokens, scratch):
    """The same, with the c x B candidates given one by one to the request with the largest marginal gain.

    A request's k-th candidate gains a^k (SmartSpec's length per request; X. Liu et al., 2024, section 4). `scratch` is
    (2, bands): marginal gain of one more candidate in each band, and the number of its requests that have it.
    """
    bands = rates.shape[0]
    gain, had = scratch[0], scratch[1]
    requests = 0.0
    for band in range(bands):
        requests += rates[band]
        gain[band] = (band + 0.5) / bands if rates[band] > 0.0 else -1.0
        had[band] = 0.0
    if requests <= 0.0:
        return
    emitted = requests
    tokens[0] = 1.0
    for c in range(1, tokens.shape[0]):
        left = requests
        while left > 0.0:
            best = 0
            for band in range(1, bands):
                if gain[band] >= gain[best]:
                    best = band
            given = min(left, rates[best] - had[best])
            emitted += given * gain[best]
            left -= given
            had[best] += given
            if had[best] >= rates[best]:
                gain[best] *= (best + 0.5) / bands
                had[best] = 0.0
        tokens[c] = emitted / requests


def new_choice_memory(max_candidates: int) -> NDArray[np.float64]:
    """(2, C + 2) for `learn_by_choice`, empty."""
    return np.zeros((2, max_candidates + 2))


@kernel
def learn_by_choice(memory, chosen, decodes, accepted, elapsed_s, tokens):
    """Correct G in `tokens` by the tokens emitted under each chosen c, for any allocation of candidates.

    G by depth assumes that every request has a chain of c candidates. For other allocations, or trees, measurements
    under a c gradually replace this prior, which has the weight of PRIOR_COUNT requests. For a c that was not tried,
    the prior is scaled by its overall error.

    Args:
        memory: (2, C + 2) fading sums of requests that decoded, and of tokens accepted, by c; the last column holds
            tokens supposed and accepted over all c.
        chosen: c of the latest iterations; decodes: requests that decoded in them, summed; accepted: their tokens
            accepted, summed.
        elapsed_s: seconds since the last observation.
        tokens: (C + 1,) G by depth, corrected in place.
    """
    keep = math.exp(-elapsed_s / MEMORY_S)
    last = memory.shape[1] - 1
    for c in range(memory.shape[1]):
        memory[0, c] *= keep
        memory[1, c] *= keep
    if chosen > 0 and chosen < last:
        memory[0, chosen] += decodes
        memory[1, chosen] += accepted
        memory[0, last] += decodes * (tokens[chosen] - 1.0)
        memory[1, last] += accepted
    scale = (memory[1, last] + PRIOR_COUNT) / (memory[0, last] + PRIOR_COUNT)
    for c in range(1, min(last, tokens.shape[0])):
        supposed = scale * (tokens[c] - 1.0)
        tokens[c] = 1.0 + (memory[1, c] + PRIOR_COUNT * supposed) / (memory[0, c] + PRIOR_COUNT)
