"""Means over seeds, paired differences with bootstrap intervals, and the best fixed setting of a load."""

import functools
import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from runs.reporting.collate import METRICS, ReportError

CONFIDENCE = 0.95
RESAMPLES = 9999
ATTAINMENT_MARGIN = 0.01
ATTAINMENT_SHARE = 0.1
ATTAINMENT_ENOUGH = 0.95
ROUNDING = 1e-12
SETTING = ["engine", "family", "scenario", "label", "controller", "role", "candidates", "token_budget"]
ONE_SEED = "one seed: no interval"


@dataclass(frozen=True)
class PairedDifference:
    """One controller against another on the same requests, means over seeds of what each seed gives.

    `difference` has the metric's unit; `ratio`, the mean of `ratios`, has none. Bounds are NaN with a single seed: one
    draw of the workload says nothing about the next.
    """

    seeds: tuple[int, ...]
    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ratios: tuple[float, ...]

    @property
    def verdict(self) -> str:
        """`lower` or `higher` where the interval excludes zero, `not separable` where it does not."""
        if len(self.seeds) < 2:
            return ONE_SEED
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "not separable"


def bootstrap_interval(values: ArrayLike, seed: int = 0) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `values`.

    One value a seed of the workload: the seed is what is resampled (Efron & Tibshirani 1993, chapter 13). Deterministic
    for a given `seed`. (NaN, NaN) for fewer than two values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return math.nan, math.nan
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(sample[_draws(sample.size, seed)].mean(axis=1), [tail, 1 - tail])
    return float(low), float(high)


@functools.cache
def _draws(size: int, seed: int) -> NDArray[np.int64]:
    return np.random.default_rng(seed).integers(0, size, (RESAMPLES, size))


def paired_difference(one: pd.DataFrame, other: pd.DataFrame, metric: str) -> PairedDifference | None:
    """`one` minus `other` in `metric`, seed by seed; frames of runs of one setting each.

    Paired by engine, scenario and seed; None when they share no seed. Raises ReportError when two runs that should
    pair did not meet the same requests (unequal workload digests).
    """
    theirs = _by_place(other, metric)
    pairs: list[tuple[int, float, float]] = []
    for place, (digest, folder, value) in sorted(_by_place(one, metric).items()):
        if place not in theirs:
            continue
        their_digest, their_folder, their_value = theirs[place]
        _, scenario, seed = place
        if their_digest != digest:
            raise ReportError(
                f"{folder} and {their_folder} cannot be paired: seed {seed} of {scenario} has different "
                "requests in them (workload_digest); run one of them again"
            )
        if not (math.isnan(value) or math.isnan(their_value)):
            pairs.append((int(seed), float(value), float(their_value)))
    if not pairs:
        return None
    values, reference = (np.array([pair[place] for pair in pairs]) for place in (1, 2))
    low, high = bootstrap_interval(values - reference)
    ratios = values / reference if (reference > 0).all() else np.full(len(pairs), math.nan)
    ratio_low, ratio_high = bootstrap_interval(ratios)
    return PairedDifference(
        seeds=tuple(pair[0] for pair in pairs),
        difference=float((values - reference).mean()),
        low=low,
        high=high,
        ratio=float(ratios.mean()),
        ratio_low=ratio_low,
        ratio_high=ratio_high,
        ratios=tuple(ratios.tolist()),
    )


def _by_place(runs: pd.DataFrame, metric: str) -> dict[tuple[str, str, int], tuple[str, str, float]]:
    places = zip(runs["engine"], runs["scenario"], runs["seed"], strict=True)
    return dict(zip(places, zip(runs["workload_digest"], runs["folder"], runs[metric], strict=True), strict=True))


def over_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a setting: the mean over seeds of each metric, percentiles included, and the number of seeds."""
    metrics = [*METRICS, "request_rate_rps", "ttft_target_s"]
    grouped = runs.groupby(SETTING, dropna=False, sort=False)
    means = grouped[metrics].mean()
    means["seeds"] = grouped["seed"].nunique()
    return means.reset_index()


def comparable_settings(runs: pd.DataFrame, label: str) -> pd.DataFrame:
    """Settings of one engine and scenario over the seeds that `label` ran, without those that miss any of them."""
    seeds = set(runs.loc[runs["label"] == label, "seed"])
    shared = runs[runs["seed"].isin(seeds)]
    settings = over_seeds(shared)
    return settings[settings["seeds"] == len(seeds)].reset_index(drop=True)


def best_fixed(settings: pd.DataFrame, attainment: float | None = None) -> pd.Series | None:
    """The best fixed setting of one engine and scenario at equal TTFT attainment, in hindsight; None if there is none.

    The lowest mean TPOT among the fixed settings that attain at least `attainment`, or at least 95 %. Without
    `attainment`: among those close to the highest that any fixed setting attains (`close_to`), or at least 95 %.
    """
    fixed = settings[(settings["role"] == "fixed") & settings["tpot_mean_s"].notna()]
    if fixed.empty:
        return None
    wanted = close_to(float(fixed["ttft_attainment"].max())) if attainment is None else attainment
    eligible = fixed[fixed["ttft_attainment"] >= min(wanted, ATTAINMENT_ENOUGH) - ROUNDING]
    if eligible.empty:
        return None
    return eligible.sort_values(["tpot_mean_s", "label"]).iloc[0]


def close_to(attainment: float) -> float:
    """The least attainment that counts as close to the given one: 1 point less, and no more than a tenth of it less.

    At twice the capacity the best setting may attain 2 %: another that attains 1 % is not as good there.
    """
    return max(attainment - ATTAINMENT_MARGIN, (1 - ATTAINMENT_SHARE) * attainment)


def mark_best_fixed(runs: pd.DataFrame) -> pd.DataFrame:
    """Settings of every engine and scenario, with `best_fixed` true on the one that the rule picks at each load.

    Only fixed settings with the most seeds of their scenario can be picked, so that a lucky single seed is not.
    """
    settings = over_seeds(runs)
    settings["best_fixed"] = False
    for _, group in settings.groupby(["engine", "scenario"]):
        fixed = group[group["role"] == "fixed"]
        best = best_fixed(fixed[fixed["seeds"] == fixed["seeds"].max()]) if len(fixed) else None
        if best is not None:
            settings.loc[best.name, "best_fixed"] = True
    return settings
