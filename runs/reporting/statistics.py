"""Means over seeds, paired differences with bootstrap intervals, and the best fixed setting of a load."""

import math
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike
from scipy import stats

from runs.reporting.collate import METRICS, ReportError

CONFIDENCE = 0.95
RESAMPLES = 9999
ATTAINMENT_MARGIN = 0.01
ATTAINMENT_ENOUGH = 0.95
SETTING = ["engine", "family", "scenario", "label", "controller", "role", "candidates", "token_budget"]
ONE_SEED = "one seed: no interval"


@dataclass(frozen=True)
class PairedDifference:
    """One controller against another on the same requests; `difference` has the metric's unit, `ratio` none.

    Bounds are NaN with a single seed: one draw of the workload says nothing about the next.
    """

    seeds: tuple[int, ...]
    difference: float
    low: float
    high: float
    ratio: float
    ratio_low: float
    ratio_high: float

    @property
    def verdict(self) -> str:
        """`lower` or `higher` where the interval excludes zero, `not separable` where it does not."""
        if len(self.seeds) < 2:
            return ONE_SEED
        if self.high < 0:
            return "lower"
        return "higher" if self.low > 0 else "not separable"


def bootstrap_interval(values: ArrayLike, reference: ArrayLike | None = None, seed: int = 0) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of the mean of `values`, or of mean(values) / mean(reference), paired.

    One value a seed of the workload: the seed is what is resampled (Efron & Tibshirani 1993, chapter 13). Deterministic
    for a given `seed`. (NaN, NaN) for fewer than two values.
    """
    sample = np.asarray(values, dtype=np.float64)
    if sample.size < 2:
        return math.nan, math.nan
    rng = np.random.default_rng(seed)
    data: tuple[np.ndarray, ...] = (sample,)
    if reference is not None:
        data = (sample, np.asarray(reference, dtype=np.float64))

    def statistic(*draws: np.ndarray, axis: int) -> np.ndarray:
        means = [draw.mean(axis=axis) for draw in draws]
        return means[0] if len(means) == 1 else means[0] / means[1]

    interval = stats.bootstrap(
        data,
        statistic,
        paired=True,
        vectorized=True,
        n_resamples=RESAMPLES,
        confidence_level=CONFIDENCE,
        method="percentile",
        rng=rng,
    ).confidence_interval
    return float(interval.low), float(interval.high)


def paired_difference(one: pd.DataFrame, other: pd.DataFrame, metric: str) -> PairedDifference | None:
    """`one` minus `other` in `metric`, seed by seed; frames of runs of one setting each.

    Paired by engine, scenario and seed; None when they share no seed. Raises ReportError when two runs that should
    pair did not meet the same requests (unequal workload digests).
    """
    theirs = {(run.engine, run.scenario, run.seed): run for run in _narrow(other, metric).itertuples()}
    pairs: list[tuple[int, float, float]] = []
    for run in _narrow(one, metric).sort_values("seed").itertuples():
        match = theirs.get((run.engine, run.scenario, run.seed))
        if match is None:
            continue
        if match.workload_digest != run.workload_digest:
            raise ReportError(
                f"{run.folder} and {match.folder} cannot be paired: seed {run.seed} of {run.scenario} has different "
                "requests in them (workload_digest); run one of them again"
            )
        if not (math.isnan(run.value) or math.isnan(match.value)):
            pairs.append((int(run.seed), float(run.value), float(match.value)))
    if not pairs:
        return None
    values, reference = (np.array([pair[place] for pair in pairs]) for place in (1, 2))
    low, high = bootstrap_interval(values - reference)
    comparable = bool((reference > 0).all())
    ratio_low, ratio_high = bootstrap_interval(values, reference) if comparable else (math.nan, math.nan)
    return PairedDifference(
        seeds=tuple(pair[0] for pair in pairs),
        difference=float((values - reference).mean()),
        low=low,
        high=high,
        ratio=float(values.mean() / reference.mean()) if comparable else math.nan,
        ratio_low=ratio_low,
        ratio_high=ratio_high,
    )


def _narrow(runs: pd.DataFrame, metric: str) -> pd.DataFrame:
    columns = ["engine", "scenario", "seed", "workload_digest", "folder", metric]
    return runs[columns].rename(columns={metric: "value"})


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

    The lowest mean TPOT among the fixed settings whose attainment is at most 1 point below `attainment` (default: the
    highest that any fixed setting reaches), or at least 95 %.
    """
    fixed = settings[(settings["role"] == "fixed") & settings["tpot_mean_s"].notna()]
    if fixed.empty:
        return None
    wanted = float(fixed["ttft_attainment"].max()) if attainment is None else attainment
    # The tiny allowance keeps 0.94 - 0.01 from refusing 0.93 by rounding.
    needed = min(wanted - ATTAINMENT_MARGIN, ATTAINMENT_ENOUGH) - 1e-12
    eligible = fixed[fixed["ttft_attainment"] >= needed]
    if eligible.empty:
        return None
    return eligible.sort_values(["tpot_mean_s", "label"]).iloc[0]


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
