"""The law by which a drafter agrees with its target: a request's quality, and a two-state chain along its positions.

Holds only numbers and kernels; `engine.workload.agreement` has the configurable models.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray
from scipy.optimize import brentq
from scipy.special import betaincinv, expit, logit, zeta

from engine.workload.workload import offsets, run_lengths

FittedDrafter = Literal["draft68m", "eagle1", "medusa"]

_RANKS = 4096
_LEVELS = 32
_CONFIDENCES = 256
_VOCABULARY = 32_000


class Agreement(NamedTuple):
    """Per-position agreement of all requests, flat; see `Workload` for the meaning of each array."""

    run_length: NDArray[np.uint8]
    rank: NDArray[np.uint8]
    confidence: NDArray[np.float32]


@dataclass(frozen=True)
class MarkovChain:
    """Requests differ (Beta), and within a request hard and easy passages alternate (two-state chain).

    Request r has a base h_r ~ Beta(m s, (1 - m) s), with m = `base_mean`, s = `base_concentration` (None: no spread):
    how often the drafter's first choice is the target's token in a hard passage after a disagreement. An easy passage
    adds `easy_logit`, and an agreement at the position before adds `momentum`, to its logit. Along the positions the
    hidden state stays as it was with probability `persistence` and is otherwise drawn afresh, easy with probability
    `easy_share`. So the longer a run of agreements has lasted, the likelier the next one: acceptance rises along a
    draft, as it does in the logs, where a geometric law keeps it constant.

    When they disagree the target's token has rank j >= 1 in the drafter's order with probability proportional to
    j^-`rank_exponent` (j up to 32,000; stored capped at 255).

    Confidence is Beta(k a, k (1 - a)), with a the probability of agreeing here and k = `confidence_concentration`,
    tilted so that P(agree | confidence) = confidence (to within .02): Beta(k a + 1, k (1 - a)) where they agree and
    Beta(k a, k (1 - a) + 1) where they do not. It is calibrated, tells more than the state does, and is still wrong
    often; a smaller k makes it sharper. `confidence_temperature` T other than 1 bends it, logit(confidence) / T: below
    1 the drafter is over-confident, above 1 under-confident.

    The default rank exponent and confidence concentration are estimates. Rank: at 1.4 the target's token is among ranks
    1 to 3 in 51 % of the misses; EAGLE-1's tree, four tokens wide at its root, accepted .904 of the first
    positions where its first choice alone is right about .79 of the time (Li et al., ICML'24, 0-alpha): 54 %.
    Confidence: no log at hand records it.
    """

    base_mean: float
    base_concentration: float | None = None
    easy_share: float = 0.0
    easy_logit: float = 0.0
    persistence: float = 0.0
    momentum: float = 0.0
    rank_exponent: float = 1.4
    confidence_concentration: float = 2.0
    confidence_temperature: float = 1.0

    @property
    def chain(self) -> MarkovChain:
        """Return itself, as the law of an agreement model."""
        return self

    def draw(self, seed: int, request: NDArray[np.int64], output_tokens: NDArray[np.int32]) -> Agreement:
        """Agreement for requests numbered `request` (R,) with `output_tokens` (R,) output positions each."""
        offset = offsets(output_tokens)
        rank = np.empty(offset[-1], dtype=np.uint8)
        confidence = np.empty(offset[-1], dtype=np.float32)
        _fill(
            np.uint64(seed), np.ascontiguousarray(request, dtype=np.int64), offset, self.easy_share, self.persistence,
            self.agree(request_uniform(seed, request)), self.rank_quantiles, self.confidence_quantiles,
            rank, confidence,
        )  # fmt: skip
        return Agreement(run_lengths(rank, offset), rank, confidence)

    def agree(self, quality: NDArray[np.float64]) -> NDArray[np.float64]:
        """(R, 2, 2) probability of agreeing by request, state (hard, easy) and whether the position before agreed.

        `quality` (R,) in (0, 1) is the level of each request's base in its Beta law.
        """
        if self.base_concentration is None or not 0.0 < self.base_mean < 1.0:
            base = np.full(quality.size, self.base_mean)
        else:
            easy, hard = self.base_mean * self.base_concentration, (1.0 - self.base_mean) * self.base_concentration
            base = betaincinv(easy, hard, quality)
        added = np.array([[0.0, self.momentum], [self.easy_logit, self.easy_logit + self.momentum]])
        return expit(logit(base)[:, None, None] + added)

    @property
    def mean_agreement(self) -> float:
        """Expected agreement of a position far from the start, averaged over requests."""
        stay = self.persistence + (1.0 - self.persistence) * np.array([1.0 - self.easy_share, self.easy_share])
        transition = np.array([[stay[0], 1.0 - stay[0]], [1.0 - stay[1], stay[1]]])
        agree = self.agree((np.arange(128) + 0.5) / 128)
        # Joint law of (state, agreed), each request's chain run until it is stationary for all purposes.
        joint = np.broadcast_to(np.array([[1.0 - self.easy_share], [self.easy_share]]) * 0.5, agree.shape)
        for _ in range(100):
            before = np.einsum("rsy,st->rty", joint, transition)
            agreed = (before * agree).sum(axis=2)
            joint = np.stack((before.sum(axis=2) - agreed, agreed), axis=2)
        return float(joint[:, :, 1].sum(axis=1).mean())

    def shifted(self, by: float) -> MarkovChain:
        """The same model with the logit of the base's mean moved by `by`."""
        return replace(self, base_mean=float(expit(logit(np.clip(self.base_mean, 1e-9, 1 - 1e-9)) + by)))

    def with_mean(self, mean_agreement: float) -> MarkovChain:
        """The same model with the base's mean moved so that positions agree this often on average."""
        return self.shifted(brentq(lambda by: self.shifted(by).mean_agreement - mean_agreement, -12.0, 12.0, xtol=1e-4))

    @property
    def rank_quantiles(self) -> NDArray[np.uint8]:
        """(4096,) equally likely ranks of the target's token given that the first choice missed, capped at 255."""
        return _rank_quantiles(self.rank_exponent)

    @property
    def confidence_quantiles(self) -> NDArray[np.float32]:
        """(33, 2, 256) equally likely confidences by agreement probability (0, 1/32, ... 1) and by what happened."""
        return _confidence_quantiles(self.confidence_concentration, self.confidence_temperature)


# Fitted by `python -m engine.workload.fit_agreement` to acceptance logs of greedy Vicuna-7B on Spec-Bench (Xia et al.,
# 2024; even question ids, no RAG). Errors are held out: fitted to half of the questions, compared with the other half.
DRAFTERS: dict[FittedDrafter, MarkovChain] = {
    # Vicuna-68M chain, 238 turns, 35,000 positions seen; two looping turns left out. Tokens an iteration at c = 1..8
    # within 5.2 % (c <= 3: 0.9 %); log-likelihood a position -.630 against -.658 for iid; the spread of the turns' mean
    # accepted tokens is .84 where the log has .69, and the least predictable turns (translation) are not reached.
    "draft68m": MarkovChain(
        base_mean=0.525, base_concentration=60.0, easy_share=0.152, easy_logit=1.439, persistence=0.987, momentum=0.29
    ),
    # EAGLE-1's static tree, depth 5, as the chain that emits as many tokens an iteration (held out: within 5.1 % at
    # depth 1..5). Its negative momentum stands for the tree's narrowing with depth; constant drafts shorter than the
    # tree come out up to 4 % low.
    "eagle1": MarkovChain(
        base_mean=0.923,
        base_concentration=65.0,
        easy_share=0.0084,
        easy_logit=3.541,
        persistence=0.9975,
        momentum=-1.478,
    ),
    # Medusa's tree, depth 4, MT-Bench only, 80 turns, in the same way (held out: within 4.2 %; shorter drafts up to 7 %
    # low). Momentum is at the bound of the fit.
    "medusa": MarkovChain(
        base_mean=0.8216, base_concentration=83.6, easy_share=0.035, easy_logit=0.032, persistence=0.056, momentum=-1.5
    ),
}


def fitted(drafter: FittedDrafter, mean_agreement: float | None = None) -> MarkovChain:
    """A drafter's fitted law; with `mean_agreement` its base's mean is moved to that average agreement.

    Raises ValueError when `mean_agreement` is outside (0, 1).
    """
    chain = DRAFTERS[drafter]
    if mean_agreement is not None and not 0.0 < mean_agreement < 1.0:
        raise ValueError(f"mean_agreement={mean_agreement} must be above 0 and below 1")
    return chain if mean_agreement is None else chain.with_mean(mean_agreement)


@njit(cache=True, error_model="numpy")
def _mix(x):
    """SplitMix64's output function (Steele, Lea and Flood, OOPSLA 2014): 64 bits in, 64 well-mixed bits out."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


@njit(cache=True, error_model="numpy")
def _key(seed, request):
    """A request's own random stream: SplitMix64 started from two mixings of (seed, request)."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    return _mix(_mix(np.uint64(seed) + golden) ^ (np.uint64(request) * golden))


@njit(cache=True, error_model="numpy")
def _request_uniform(seed, request, out):
    for i in range(request.size):
        bits = _mix(_key(seed, request[i]))
        out[i] = (np.float64(bits >> np.uint64(11)) + 0.5) * 2.0**-53


def request_uniform(seed: int, request: NDArray[np.int64]) -> NDArray[np.float64]:
    """(R,) uniform numbers in (0, 1), each a function of (seed, request number)."""
    out = np.empty(request.size)
    _request_uniform(np.uint64(seed), request, out)
    return out


@njit(cache=True, error_model="numpy")
def confidence_at(confidences, probability, agrees, quantile):
    """Confidence where agreeing has this probability: the table's quantile (0..255), interpolated in probability."""
    place = probability * (confidences.shape[0] - 1)
    level = min(int(place), confidences.shape[0] - 2)
    part = place - level
    return (1.0 - part) * confidences[level, agrees, quantile] + part * confidences[level + 1, agrees, quantile]


@njit(cache=True, error_model="numpy")
def _fill(seed, request, offset, easy_share, persistence, agree, ranks, confidences, rank, confidence):
    """Walk every request's chain; `agree`, `ranks` and `confidences` as in `MarkovAgreement`."""
    golden = np.uint64(0x9E3779B97F4A7C15)
    low = np.uint64(0xFFFFFFFF)
    to_unit = 2.0**-32
    easy = easy_share * 4294967296.0
    for i in range(request.size):
        # The first number of the stream is the request's quality (request_uniform).
        counter = _key(seed, request[i]) + golden
        state = 1 if np.float64(_mix(counter) & low) < easy else 0
        agrees = 0
        for position in range(offset[i], offset[i + 1]):
            counter += golden
            bits = _mix(counter)
            if np.float64(bits >> np.uint64(32)) * to_unit >= persistence:
                state = 1 if np.float64(bits & low) < easy else 0
            counter += golden
            bits = _mix(counter)
            probability = agree[i, state, agrees]
            agrees = 1 if np.float64(bits >> np.uint64(32)) * to_unit < probability else 0
            # Three disjoint pieces of one word: 32 bits agreement, 8 bits confidence, 12 bits rank.
            quantile = np.int64((bits >> np.uint64(12)) & np.uint64(255))
            confidence[position] = confidence_at(confidences, probability, agrees, quantile)
            rank[position] = 0 if agrees == 1 else ranks[bits & np.uint64(4095)]


@lru_cache(maxsize=64)
def _rank_quantiles(exponent: float) -> NDArray[np.uint8]:
    ranks = np.arange(1, 256)
    total = zeta(exponent, 1) - zeta(exponent, _VOCABULARY)
    cumulative = np.cumsum(ranks**-exponent) / total
    levels = (np.arange(_RANKS) + 0.5) / _RANKS
    return np.minimum(np.searchsorted(cumulative, levels) + 1, 255).astype(np.uint8)


@lru_cache(maxsize=64)
def _confidence_quantiles(concentration: float, temperature: float) -> NDArray[np.float32]:
    # At 0 and 1 the Beta law degenerates to a point; a hair inside it is the same to float32.
    mean = np.clip(np.linspace(0.0, 1.0, _LEVELS + 1), 1e-6, 1.0 - 1e-6)[:, None, None]
    agrees = np.array([0.0, 1.0])[None, :, None]
    levels = (np.arange(_CONFIDENCES) + 0.5) / _CONFIDENCES
    values = betaincinv(concentration * mean + agrees, concentration * (1.0 - mean) + 1.0 - agrees, levels)
    return expit(logit(np.clip(values, 1e-7, 1.0 - 1e-7)) / temperature).astype(np.float32)
