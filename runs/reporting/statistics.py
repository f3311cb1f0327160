"""Means over seeds, paired differences with t intervals, and the best static setting of a load."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from runs.reporting.collate import METRICS, ReportError

CONFIDENCE = 0.95
ATTAINMENT_MARGIN = 0.005
ATTAINMENT_SHARE = 0.1
ATTAINMENT_ENOUGH = 0.95
ROUNDING = 1e-12
SETTING = [
    "engine",
    "family",
    "scenario",
    "label",
    "controller",
    "role",
    "candidates",
    "token_budget",
    "total_budget",
    "budget",
]
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


def mean_interval(values: ArrayLike) -> tuple[float, float]:
    """95 % t interval of the mean of `values`, one value a seed of the workload; (NaN, NaN) for fewer than two."""
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return math.nan, math.nan
    half = float(stats.t.ppf((1 + CONFIDENCE) / 2, sample.size - 1) * stats.sem(sample))
    mean = float(sample.mean())
    return mean - half, mean + half


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
    low, high = mean_interval(values - reference)
    ratios = values / reference if (reference > 0).all() else np.full(len(pairs), math.nan)
    ratio_low, ratio_high = mean_interval(ratios)
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


def best_static(settings: pd.DataFrame, ttft_attainment: float | None = None) -> pd.Series | None:
    """The best static setting of one engine and scenario, chosen in hindsight; None where none was run.

    Of the static settings whose share of requests that meet both targets is close to the highest (`close_to`), that
    with the lowest mean TPOT. With `ttft_attainment`: of those whose TTFT attainment is close to it, or to the highest
    that any static setting reaches where that is lower.
    """
    static = settings[(settings["role"] == "static") & settings["tpot_mean_s"].notna()]
    if static.empty:
        return None
    metric = "slo_attainment" if ttft_attainment is None else "ttft_attainment"
    wanted = float(static[metric].max())
    if ttft_attainment is not None:
        wanted = min(wanted, ttft_attainment)
    eligible = static[static[metric] >= close_to(wanted) - ROUNDING]
    return eligible.sort_values(["tpot_mean_s", "label"]).iloc[0]


def close_to(attainment: float) -> float:
    """The least attainment that counts as equal to the given one: `margin` less."""
    return attainment - margin(attainment)


def margin(attainment: float) -> float:
    """Half a point, and no more than a tenth of the attainment: at twice the capacity the best may attain 2 %."""
    return min(ATTAINMENT_MARGIN, ATTAINMENT_SHARE * attainment)


def mark_best_static(runs: pd.DataFrame) -> pd.DataFrame:
    """Settings of every engine and scenario, with `best_static` true on the one that the rule picks at each load.

    Only static settings with the most seeds of their scenario can be picked, so that a lucky single seed is not.
    """
    settings = over_seeds(runs)
    settings["best_static"] = False
    for _, group in settings.groupby(["engine", "scenario"]):
        static = group[group["role"] == "static"]
        best = best_static(static[static["seeds"] == static["seeds"].max()]) if len(static) else None
        if best is not None:
            settings.loc[best.name, "best_static"] = True
    return settings
