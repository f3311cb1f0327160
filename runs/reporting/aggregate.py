"""What scores over many scenarios and seeds come to, after Agarwal et al., "Deep Reinforcement Learning at the Edge of
the Statistical Precipice" (NeurIPS 2021), section 4.

Scores are a flat array, and `strata` says which scenario each belongs to. Intervals are 95 % percentile bootstraps that
resample seeds within each scenario, as the paper's stratified bootstrap does; controllers are resampled together,
because they met the same requests.
"""

import functools
import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from runs.reporting.statistics import CONFIDENCE

DRAWS = 2000
TRIMMED = 0.25

Scores = NDArray[np.float64]
Strata = NDArray[np.int64]


def iqm(scores: Scores) -> Scores:
    """Interquartile mean over the last axis: the mean of what is left without the lowest and the highest quarter."""
    return np.asarray(stats.trim_mean(scores, TRIMMED, axis=-1))


def probability_of_improvement(one: Scores, other: Scores, strata: Strata) -> Scores:
    """How likely `one` scores higher than `other` in a scenario drawn at random.

    In a scenario, the share of all pairs of a run of `one` and a run of `other` in which the former is higher, ties
    counting half (the Mann-Whitney statistic); then the mean over scenarios. Over the last axis; the others broadcast.
    """
    shares = []
    for stratum in np.unique(strata):
        x, y = (scores[..., strata == stratum] for scores in (one, other))
        above = x[..., :, None] - y[..., None, :]
        shares.append(((above > 0) + 0.5 * (above == 0)).mean(axis=(-2, -1)))
    return np.asarray(np.mean(shares, axis=0))


def performance_profile(scores: Scores, thresholds: Scores) -> Scores:
    """Share of the runs, over the last axis of `scores`, that reach each threshold or more."""
    return np.stack([(scores >= threshold).mean(axis=-1) for threshold in thresholds], axis=-1)


def interval(statistic: Callable[..., Scores], strata: Strata, *scores: Scores) -> tuple[Scores, Scores]:
    """Bounds of `statistic(*scores)`, which takes arrays with a leading axis of draws.

    NaN where a scenario has a single seed: one draw of a workload says nothing about the next.
    """
    tail = (1 - CONFIDENCE) / 2
    drawn = resamples(tuple(strata.tolist()))
    found = statistic(*(values[drawn] for values in scores))
    low, high = np.quantile(found, [tail, 1 - tail], axis=0)
    if min(np.unique(strata, return_counts=True)[1]) < 2:
        return np.full_like(low, math.nan), np.full_like(high, math.nan)
    return low, high


@functools.lru_cache(maxsize=64)
def resamples(strata: tuple[int, ...], seed: int = 0) -> NDArray[np.int64]:
    """(draws, runs) places to resample from: as many of each scenario's seeds as it has, with replacement."""
    rng = np.random.default_rng(seed)
    labels = np.array(strata)
    members = [np.flatnonzero(labels == stratum) for stratum in np.unique(labels)]
    parts = [own[rng.integers(0, own.size, (DRAWS, own.size))] for own in members]
    drawn = np.concatenate(parts, axis=1)
    # Back in the order of `strata`, so that a draw has the scenarios where the scores have them.
    return drawn[:, np.argsort(np.concatenate(members), kind="stable")]
