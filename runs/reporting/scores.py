"""Scores from no speculation to a bound or the best static setting, and regret, over scenarios."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from runs.reporting.aggregate import interval, iqm, probability_of_improvement
from runs.reporting.collate import BOUND_SUFFIX
from runs.reporting.statistics import ATTAINMENT_ENOUGH, ROUNDING, mean_interval, over_seeds, paired_difference

ZERO = "fixed c=0 n=512"
"""The label of what scores 0: no speculation, and a small budget."""
ONE = "oracle" + BOUND_SUFFIX
BEST_STATIC = "the best static setting of each scenario"
BOUNDS = {"oracle_grid": "oracle_grid" + BOUND_SUFFIX, "oracle": ONE}
LEAST_ROOM = 0.01
LEVELS = ("light", "contended", "overload")
PLACE = ["engine", "scenario", "seed"]
SCORE_RULE = (
    "Score of a run: (J0 - J) / (J0 - J1), J the objective (mean over requests of TPOT / target, plus the prices of "
    f"late first tokens), J0 that of `{ZERO}` and J1 that of {{one}}, both on the same requests. "
    f"Where J1 is not at least {100 * LEAST_ROOM:.0f} % below J0 there is nothing to win, and no score."
)
AGGREGATE_RULE = (
    "IQM: mean of the scores without the lowest and highest quarter, over all scenarios and seeds. P(better): how "
    "likely a run scores higher than one of {rival}, the best single static setting, in the same scenario. In brackets "
    "95 % stratified-bootstrap intervals (seeds resampled within scenarios). Only settings run in every scored "
    "scenario are listed."
)
LEVEL_RULE = (
    f"light: `{ZERO}` attains 95 % of its TTFT targets; contended: it does not, and some setting does; overload: none "
    "does. IQM of the scores of those scenarios."
)
REGRET_RULE = (
    "Objective minus the bound's on the same requests, mean over seeds, and in percent of the bound's; in brackets "
    "95 % intervals over seeds."
)


@dataclass(frozen=True)
class Scored:
    """Scores of runs: `frame` is the runs with `zero` (J0), `one` (J1) and `score`, NaN where there is none.

    `one` names what scores 1; `notes` says where no score could be given.
    """

    frame: pd.DataFrame
    one: str
    notes: tuple[str, ...]

    @property
    def rule(self) -> str:
        """What the score is, in words."""
        return SCORE_RULE.format(one=f"`{self.one}`" if self.one == ONE else f"{self.one}, chosen in hindsight")


def score(runs: pd.DataFrame) -> Scored | None:
    """Every run's score; None where no run of `ZERO` is there to start from.

    1 is the oracle where it ran on all requests, else the static setting of the lowest mean objective in each scenario.
    """
    by_place = runs.set_index(PLACE)
    zero = by_place.loc[by_place["label"] == ZERO, "objective"]
    if zero.empty:
        return None
    oracle = by_place.loc[by_place["label"] == ONE, "objective"]
    complete = zero.index.isin(oracle.index).all()
    one = oracle if complete else _best_static(runs)
    ends = pd.DataFrame({"zero": zero, "one": one.reindex(zero.index)})
    frame = runs.join(ends, on=PLACE)
    called = ONE if complete else BEST_STATIC
    room = frame["zero"] - frame["one"]
    open_ = room > LEAST_ROOM * frame["zero"]
    frame["score"] = ((frame["zero"] - frame["objective"]) / room.where(open_)).astype(float)
    notes = []
    for (engine, scenario), group in frame[~open_ & frame["zero"].notna()].groupby(["engine", "scenario"], sort=False):
        seeds = ", ".join(str(seed) for seed in sorted(group["seed"].unique()))
        notes.append(f"{engine}, {scenario}: no score for seed {seeds}: {called} is no better than {ZERO}.")
    return Scored(frame, called, tuple(notes))


def _best_static(runs: pd.DataFrame) -> pd.Series:
    """Objective, by `PLACE`, of the static setting whose mean over the seeds of its scenario is the lowest."""
    static = runs[runs["role"] == "static"]
    settings = static.groupby(["engine", "scenario", "label"])["objective"].agg(["mean", "size"]).reset_index()
    full = settings[settings["size"] == settings.groupby(["engine", "scenario"])["size"].transform("max")]
    best = full.sort_values(["mean", "label"]).drop_duplicates(["engine", "scenario"])
    return static.merge(best[["engine", "scenario", "label"]]).set_index(PLACE)["objective"]


def scored_runs(frame: pd.DataFrame) -> pd.DataFrame:
    """The runs that have a score, with the number of their scenario as `stratum`."""
    kept = frame[frame["score"].notna()].copy()
    kept["stratum"] = kept.groupby(["engine", "scenario"]).ngroup()
    return kept


def rival_of(table: pd.DataFrame) -> str:
    """The best single static setting of `aggregates`, which others are compared with; empty where there is none."""
    static = table.loc[table["role"] == "static", "label"]
    return str(static.iloc[0]) if len(static) else ""


def leader_of(table: pd.DataFrame) -> str:
    """The controller of the highest score of `aggregates` that decides; empty where there is none."""
    deciding = table.loc[table["role"] == "optimizer", "label"]
    return str(deciding.iloc[0]) if len(deciding) else ""


def aggregates(scored: Scored) -> tuple[pd.DataFrame, list[str]]:
    """One row a setting that ran on all the requests that have a score, the best first, bounds last; and who did not.

    Columns: `label`, `role`, `controller`, `scenarios`, `runs`, `iqm`, `better` (probability of improvement over
    `rival_of` them), each with `_low` and `_high`, `mean`, `ttft_attainment` and `tpot_mean_s` (means over scenarios).
    """
    frame = scored_runs(scored.frame)
    places = len(frame.drop_duplicates(["stratum", "seed"]))
    rows: list[dict[str, Any]] = []
    short: list[str] = []
    for label, group in frame.groupby("label", sort=False):
        if len(group) < places:
            short.append(str(label))
            continue
        mine = group.set_index(["stratum", "seed"]).sort_index()
        row = mine.iloc[0][["label", "role", "controller"]].to_dict()
        means = mine.groupby(level="stratum")[["score", "ttft_attainment", "tpot_mean_s"]].mean().mean()
        row |= {"scenarios": group["stratum"].nunique(), "runs": places}
        row |= {**iqm_with_interval(group), **means.to_dict()}
        rows.append(row)
    table = pd.DataFrame(rows).rename(columns={"score": "mean"})
    if len(table):
        table["bound"] = table["role"] == "bound"
        table = table.sort_values(["bound", "iqm", "label"], ascending=[True, False, True]).reset_index(drop=True)
        by_label = {label: group.set_index(["stratum", "seed"])["score"] for label, group in frame.groupby("label")}
        theirs = by_label.get(rival_of(table), frame["score"].iloc[:0])
        better = pd.DataFrame([_better(by_label[label], theirs) for label in table["label"]])
        table = pd.concat([table, better], axis=1)
    return table, [f"Not aggregated, for want of runs in every scored scenario: {', '.join(short)}."] if short else []


def iqm_with_interval(scores: pd.DataFrame) -> dict[str, float]:
    """`iqm`, `iqm_low` and `iqm_high` of the column `score`, scenarios told apart by `stratum`."""
    values, strata = scores["score"].to_numpy(float), scores["stratum"].to_numpy(np.int64)
    low, high = interval(iqm, strata, values)
    return {"iqm": float(iqm(values)), "iqm_low": float(low), "iqm_high": float(high)}


def by_level(scored: Scored) -> pd.DataFrame:
    """IQM with interval by label and level of load: `label`, `role`, `level`, `scenarios`, `iqm`, `iqm_low`, ..."""
    frame = scored_runs(scored.frame)
    level = levels(scored.frame)
    frame = frame.assign(level=[level[place] for place in zip(frame["engine"], frame["scenario"], strict=True)])
    places = frame.groupby("level")["stratum"].nunique()
    rows = [
        {"label": label, "role": group["role"].iloc[0], "level": name, "scenarios": int(places[name])}
        | iqm_with_interval(group)
        for (label, name), group in frame.groupby(["label", "level"], sort=False)
        if group["stratum"].nunique() == places[name]
    ]
    return pd.DataFrame(rows)


def levels(runs: pd.DataFrame) -> dict[tuple[str, str], str]:
    """How loaded each (engine, scenario) is, by what `ZERO` and the other settings attain (`LEVEL_RULE`)."""
    found = {}
    for place, group in runs[runs["role"] != "bound"].groupby(["engine", "scenario"], sort=False):
        attained = group.groupby("label")["ttft_attainment"].mean()
        enough = ATTAINMENT_ENOUGH - ROUNDING
        light = ZERO in attained and attained[ZERO] >= enough
        found[place] = "light" if light else "contended" if attained.max() >= enough else "overload"
    return found


def by_scenario(scored: Scored) -> pd.DataFrame:
    """Means over seeds of each setting and scenario: `score` with its interval, `objective`, TPOT and attainment."""
    frame = scored.frame[scored.frame["zero"].notna()]
    rows = []
    for _, group in frame.groupby(["engine", "scenario", "label"], sort=False):
        scores = group["score"].dropna().to_numpy(float)
        low, high = mean_interval(scores)
        row = group.iloc[0][["engine", "scenario", "label", "role", "controller"]].to_dict()
        row |= {"seeds": len(group), "score": float(scores.mean()) if scores.size else math.nan}
        row |= {"score_low": low, "score_high": high}
        rows.append(row | group[["objective", "tpot_mean_s", "ttft_attainment"]].mean().to_dict())
    return pd.DataFrame(rows)


def regrets(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an engine, scenario and setting: how far its objective is above each bound that was run there.

    Columns: `regret_B`, `relative_B`, each with `_low` and `_high`, for B of `BOUNDS`; NaN without runs of the bound.
    Empty where no bound was run at all.
    """
    rows = []
    present = {name: label for name, label in BOUNDS.items() if (runs["label"] == label).any()}
    for _, place in runs.groupby(["engine", "scenario"], sort=False) if present else ():
        by_label = dict(list(place.groupby("label", sort=False)))
        for setting in over_seeds(place).itertuples():
            row = {name: getattr(setting, name) for name in ("engine", "scenario", "label", "role", "objective")}
            for name, label in present.items():
                paired = None
                if label in by_label and setting.role != "bound":
                    paired = paired_difference(by_label[setting.label], by_label[label], "objective")
                figures: tuple[float, ...] = (math.nan,) * 6
                if paired is not None:
                    relative = (value - 1.0 for value in (paired.ratio, paired.ratio_low, paired.ratio_high))
                    figures = (paired.difference, paired.low, paired.high, *relative)
                row |= dict(zip(regret_columns(name), figures, strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def told(table: pd.DataFrame, named: Sequence[str] = (ZERO,)) -> pd.DataFrame:
    """The rows of `aggregates` worth showing: of the static settings only those named and the best."""
    static = table["role"] == "static"
    best = table.index == (static[static].index[0] if static.any() else -1)
    return table[~static | best | table["label"].isin(named)].reset_index(drop=True)


def regret_columns(bound: str) -> Sequence[str]:
    """The columns of `regrets` that hold the regret to one of `BOUNDS`."""
    return tuple(f"{kind}_{bound}{part}" for kind in ("regret", "relative") for part in ("", "_low", "_high"))


def _better(mine: pd.Series, theirs: pd.Series) -> dict[str, float]:
    """Probability of improvement over the requests that both met; NaN when they share none, or are the same."""
    shared = mine.index.intersection(theirs.index).sort_values()
    if not len(shared) or mine.loc[shared].equals(theirs.loc[shared]):
        return dict.fromkeys(("better", "better_low", "better_high"), math.nan)
    one, other = (scores.loc[shared].to_numpy(float) for scores in (mine, theirs))
    strata = shared.get_level_values("stratum").to_numpy(np.int64)
    low, high = interval(lambda x, y: probability_of_improvement(x, y, strata), strata, one, other)
    better = float(probability_of_improvement(one, other, strata))
    return {"better": better, "better_low": float(low), "better_high": float(high)}
