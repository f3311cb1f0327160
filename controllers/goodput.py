"""SmartSpec: the candidate count of the highest estimated goodput, from a linear model of time fitted online."""

from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.acceptance import PRIOR_COUNT, expected_tokens, tokens_by_marginal_gain
from controllers.admission import admissible_tokens
from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.telemetry import (
    DECODE_KV_TOKENS,
    ITERATIONS,
    LAST_CANDIDATES,
    LAST_DECODE_KV_TOKENS,
    LAST_ITERATION_S,
    LAST_NUM_DECODES,
    LAST_PREFILL_TOKENS,
    NUM_DECODES,
    RATE_BANDS,
)
from engine.latency.lookup import LookupGrid
from engine.plant import Plant
from engine.policy import stacked
from engine.speculation.allocation import Speculation

FEATURES = 4
PRIOR_VARIANCE = 1.0
"""Of the offline coefficients, relative to the noise of one measured time: a few iterations weigh as much."""


class Params(NamedTuple):
    """candidates: (K,) choices of c · scale: (4,) divisors of the features · the rest as in `Goodput`."""

    candidates: NDArray[np.int64]
    scale: NDArray[np.float64]
    token_budget: int
    initial_acceptance: float
    weight: float
    forgetting: float
    every: int
    stop_at_decrease: bool
    zero_bonus: float
    per_request: bool


class Memory(NamedTuple):
    """acceptance: (N, 1) a · verified: (N, 2) fading counts of candidates verified and of those accepted · weights:
    (N, 4) T per scaled feature · covariance: (N, 4, 4) · features, gain: (N, 4) scratch · current: (N, 2) index of c,
    iterations until the next choice · tokens: (N, C + 1) l by k · scratch: (N, 2, bands).
    """

    acceptance: NDArray[np.float64]
    verified: NDArray[np.float64]
    weights: NDArray[np.float64]
    covariance: NDArray[np.float64]
    features: NDArray[np.float64]
    gain: NDArray[np.float64]
    current: NDArray[np.float64]
    tokens: NDArray[np.float64]
    scratch: NDArray[np.float64]


@kernel
def _row(memory, i):
    """Return the memory of instance `i`."""
    return Memory(
        memory.acceptance[i],
        memory.verified[i],
        memory.weights[i],
        memory.covariance[i],
        memory.features[i],
        memory.gain[i],
        memory.current[i],
        memory.tokens[i],
        memory.scratch[i],
    )


@kernel
def _set_features(features, scale, num_decodes, kv_tokens, prefill_tokens, candidates):
    """Context tokens, batched tokens, drafter steps and a constant, scaled to about 1."""
    features[0] = kv_tokens / scale[0]
    features[1] = (num_decodes * (1 + candidates) + prefill_tokens) / scale[1]
    features[2] = (candidates if num_decodes > 0 else 0) / scale[2]
    features[3] = 1.0


@kernel
def _fit(params, mine, seconds):
    """One step of recursive least squares with forgetting on the features that are set."""
    x, p, gain = mine.features, mine.covariance, mine.gain
    spread = params.forgetting
    error = seconds
    for i in range(FEATURES):
        gain[i] = 0.0
        for j in range(FEATURES):
            gain[i] += p[i, j] * x[j]
        error -= mine.weights[i] * x[i]
        spread += x[i] * gain[i]
    for i in range(FEATURES):
        mine.weights[i] += gain[i] / spread * error
    for i in range(FEATURES):
        for j in range(FEATURES):
            p[i, j] = (p[i, j] - gain[i] * gain[j] / spread) / params.forgetting


@kernel
def _learn(observation, e, params, mine):
    """Update the estimates with the latest iteration's time and accepted candidates."""
    load = observation.load
    if load[e, ITERATIONS] <= 0.0:
        return
    verified = mine.verified
    verified[0] *= params.forgetting
    verified[1] *= params.forgetting
    for depth in range(observation.drafted.shape[1]):
        verified[0] += observation.drafted[e, depth]
        verified[1] += observation.accepted[e, depth]
    rate = (verified[1] + PRIOR_COUNT * params.initial_acceptance) / (verified[0] + PRIOR_COUNT)
    mine.acceptance[0] += params.weight * (rate - mine.acceptance[0])
    _set_features(
        mine.features,
        params.scale,
        load[e, LAST_NUM_DECODES],
        load[e, LAST_DECODE_KV_TOKENS],
        load[e, LAST_PREFILL_TOKENS],
        load[e, LAST_CANDIDATES],
    )
    trace = 0.0
    for i in range(FEATURES):
        trace += mine.covariance[i, i]
    # Without new directions, forgetting lets the covariance grow without bound.
    if trace < 1e3 * FEATURES * PRIOR_VARIANCE:
        _fit(params, mine, float(load[e, LAST_ITERATION_S]))


@kernel
def _choose(observation, e, params, mine):
    """Index of the c of the highest goodput."""
    load = observation.load
    num_decodes = load[e, NUM_DECODES]
    prefill = min(admissible_tokens(observation, e), params.token_budget)
    for k in range(mine.tokens.shape[0]):
        mine.tokens[k] = expected_tokens(mine.acceptance[0], k)
    if params.per_request:
        tokens_by_marginal_gain(observation.rates[e], mine.tokens, mine.scratch)
    best = -1.0
    chosen = 0
    for i in range(params.candidates.shape[0]):
        k = params.candidates[i]
        _set_features(mine.features, params.scale, num_decodes, load[e, DECODE_KV_TOKENS], prefill, k)
        seconds = 0.0
        for j in range(FEATURES):
            seconds += mine.weights[j] * mine.features[j]
        goodput = num_decodes * mine.tokens[k] / max(seconds, 1e-6)
        if k == 0:
            goodput *= params.zero_bonus
        if goodput > best:
            best = goodput
            chosen = i
        elif params.stop_at_decrease:
            break
    return chosen


@kernel
def decide(observation, i, params, memory):
    """(the c of the highest goodput, chosen every `every` iterations, n as configured)."""
    mine = _row(memory, i)
    _learn(observation, i, params, mine)
    if mine.current[1] <= 0.0:
        mine.current[0] = _choose(observation, i, params, mine)
        mine.current[1] = params.every
    mine.current[1] -= 1.0
    return params.candidates[int(mine.current[0])], params.token_budget


@configured
class Goodput(KernelController):
    """k maximising l(a, k) B / T(k): generated tokens per second, SmartSpec's goodput.

    T(k) = alpha x context tokens + gamma x batched tokens + beta x k + delta: the target's time is the paper's linear
    model, and the drafter's k steps, which its T_batch adds, are the third term. The coefficients start from a least
    squares fit to the engine's predicted times, as the released code profiles offline, and follow the measured times by
    recursive least squares. The token acceptance rate a is a moving average of the share of candidates accepted so far,
    as in the released code. The share of each single iteration, a handful of candidates with few requests running, is
    noisy enough to reach k = 0, where nothing is drafted and acceptance is not observed. For the same reason old
    observations fade: after speculation stops, a returns to `initial_acceptance`, and speculation is tried again.

    X. Liu et al., "Optimizing Speculative Decoding for Serving Large Language Models Using Goodput" (arXiv 2406.14066,
    section 4; later TurboSpec). The released code chooses anew every 20 steps, stops searching k at the first decrease
    and multiplies the goodput of k = 0 by 1.1: `every=20 stop_at_decrease=true zero_bonus=1.1`.

    Args:
        token_budget: n; SmartSpec does not choose it.
        initial_acceptance: a before the first verification.
        weight: of the latest share in a.
        forgetting: factor per iteration on the weight of older times and acceptances.
        every: iterations between two choices of k.
        stop_at_decrease: stop the search at the first k that is worse than the one before.
        zero_bonus: factor on the goodput of k = 0.
        per_request: choose k x B candidates, which the engine gives to the requests with the largest gains, a_i^j for
            the j-th of request i; a_i is then measured per request.
    """

    decision_s = 10e-6
    decide = staticmethod(decide)

    token_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 512
    initial_acceptance: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    weight: Annotated[float, Field(gt=0.0, le=1.0)] = 0.25
    forgetting: Annotated[float, Field(gt=0.9, le=1.0)] = 0.999
    every: Annotated[int, Field(ge=1)] = 1
    stop_at_decrease: bool = False
    zero_bonus: Annotated[float, Field(ge=1.0)] = 1.0
    per_request: bool = False

    @property
    def speculation(self) -> Speculation | None:
        """Candidates by marginal gain, of each request's own acceptance rate, when lengths are per request."""
        return Speculation("global", score="acceptance") if self.per_request else None

    def _fitted(self, grid: LookupGrid) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        """(4,) scales of the features and (4,) coefficients, fitted to predicted times."""
        batch, kv, candidates, prefill = np.meshgrid(*grid[:4], indexing="ij")
        usual = (batch > 0) & (batch <= 64) & (prefill <= self.token_budget)
        columns = [kv, batch * (1 + candidates) + prefill, candidates, np.ones_like(batch)]
        features = np.stack([column[usual].astype(np.float64) for column in columns], axis=1)
        scale = np.maximum(features.max(axis=0), 1.0)
        seconds = grid.seconds[usual]
        relative = features / scale / seconds[:, None]
        weights, *_ = np.linalg.lstsq(relative, np.ones(len(seconds)), rcond=None)
        return scale, weights

    def params(self, plant: Plant) -> Params:
        """The choices, the scales of the features and the settings."""
        return Params(
            candidates=plant.grid.candidates,
            scale=self._fitted(plant.lookup.grid)[0],
            token_budget=self.token_budget,
            initial_acceptance=self.initial_acceptance,
            weight=self.weight,
            forgetting=self.forgetting,
            every=self.every,
            stop_at_decrease=self.stop_at_decrease,
            zero_bonus=self.zero_bonus,
            per_request=self.per_request,
        )

    def memory(self, plant: Plant, instances: int) -> Memory:
        """Coefficients fitted to predicted times, and the initial acceptance."""
        one = Memory(
            acceptance=np.array([self.initial_acceptance]),
            verified=np.zeros(2),
            weights=self._fitted(plant.lookup.grid)[1],
            covariance=np.eye(FEATURES) * PRIOR_VARIANCE,
            features=np.zeros(FEATURES),
            gain=np.zeros(FEATURES),
            current=np.zeros(2),
            tokens=np.ones(int(plant.grid.candidates.max()) + 1),
            scratch=np.zeros((2, RATE_BANDS)),
        )
        return stacked(one, instances)

    def label(self) -> str:
        """Label, for example `goodput n=512`."""
        return f"goodput{' per request' if self.per_request else ''} n={self.token_budget}"
