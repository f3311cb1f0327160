"""Learned controllers against the analytic one: paired on the same requests, over training seeds and workload seeds."""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from runs.reporting.aggregate import DRAWS
from runs.reporting.collate import ReportError
from runs.reporting.statistics import CONFIDENCE
from runs.reporting.suite import table
from runs.reporting.tables import Column, Table, text

RIVAL = "analytic"
LEAST_GAIN, MOST_LOSS, ATTAINMENT_TOLERANCE = 0.05, 0.02, 0.01
"""The target: so much less TPOT on average, nowhere more than so much more, and no more than so much less on time."""
_SEED = re.compile(r"^(?P<family>.*) seed=(?P<seed>\d+)$")

MEASURES = ("tpot_ratio", "attainment_difference", "objective_ratio")
RULE = (
    "Every run is compared with `{rival}` on the same requests: the ratio of mean TPOT, the difference in the share of "
    "requests whose first token was in time (points), the ratio of the objective; below 1 is better than `{rival}`. In "
    "brackets 95 % bootstrap intervals that resample training seeds (the same in all scenarios) and workload seeds "
    "(within scenarios), so they hold for a policy trained again and for other requests. Means over scenarios are "
    "geometric for ratios."
)

Values = NDArray[np.float64]


def pairs(runs: pd.DataFrame, rival: str = RIVAL) -> pd.DataFrame:
    """One row a run of a controller and its twin under the rival on the same requests.

    Columns: `group` (the scenario's first part), `scenario`, `family` and `training_seed` (a label `NAME seed=K` is
    training seed K of NAME), `seed`, `peeks`, and `MEASURES`. ReportError when the rival has no runs.
    """
    place = ["engine", "scenario", "seed", "workload_digest"]
    base = runs[runs["label"] == rival]
    if base.empty:
        raise ReportError(f"there are no runs of {rival!r} to compare with")
    joined = runs[runs["label"] != rival].merge(base, on=place, suffixes=("", "_rival"))
    found = joined["label"].map(_SEED.match)
    return pd.DataFrame(
        {
            "group": joined["scenario"].str.split("/").str[0],
            "scenario": joined["engine"] + " " + joined["scenario"],
            "family": [
                match["family"] if match else label for match, label in zip(found, joined["label"], strict=True)
            ],
            "training_seed": [int(match["seed"]) if match else 0 for match in found],
            "seed": joined["seed"],
            "tpot_ratio": joined["tpot_mean_s"] / joined["tpot_mean_s_rival"],
            "attainment_difference": joined["ttft_attainment"] - joined["ttft_attainment_rival"],
            "objective_ratio": joined["objective"] / joined["objective_rival"],
        }
    )


def cube(rows: pd.DataFrame, measure: str) -> list[Values]:
    """One family's values: for each scenario an array (training seeds, workload seeds). ReportError for holes."""
    arrays = []
    for scenario, part in rows.groupby("scenario", sort=True):
        wide = part.pivot_table(index="training_seed", columns="seed", values=measure)
        if wide.isna().to_numpy().any():
            raise ReportError(f"{part['family'].iloc[0]} on {scenario}: not every training seed was run on every seed")
        arrays.append(wide.to_numpy(dtype=np.float64))
    if len({array.shape[0] for array in arrays}) > 1:
        raise ReportError(f"{rows['family'].iloc[0]}: its training seeds differ between scenarios")
    return arrays


def estimate(arrays: Sequence[Values], ratio: bool, seed: int = 0) -> tuple[float, float, float]:
    """Mean over scenarios of the mean over both kinds of seeds, with its interval; geometric over scenarios if `ratio`.

    The interval is NaN where there is one seed of each kind.
    """
    rng = np.random.default_rng(seed)
    trained = arrays[0].shape[0]
    policies = rng.integers(trained, size=(DRAWS, trained))
    means = np.array([array.mean() for array in arrays])
    drawn = np.empty((DRAWS, len(arrays)))
    for k, array in enumerate(arrays):
        workloads = rng.integers(array.shape[1], size=(DRAWS, array.shape[1]))
        drawn[:, k] = array[policies[:, :, None], workloads[:, None, :]].mean(axis=(1, 2))
    over: Callable[[Values], Any] = (
        (lambda v: np.exp(np.log(v).mean(axis=-1))) if ratio else (lambda v: v.mean(axis=-1))
    )
    low, high = np.quantile(over(drawn), [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    if trained == 1 and arrays[0].shape[1] == 1:
        low = high = math.nan
    return float(over(means)), float(low), float(high)


def summary(paired: pd.DataFrame, by: Sequence[str]) -> pd.DataFrame:
    """`MEASURES` with intervals for every family and each value of `by`."""
    rows = []
    for key, part in paired.groupby([*by, "family"], sort=True):
        row: dict[str, Any] = dict(zip([*by, "family"], key, strict=True))
        row["training_seeds"] = part["training_seed"].nunique()
        row["scenarios"] = part["scenario"].nunique()
        for measure in MEASURES:
            value, low, high = estimate(cube(part, measure), measure.endswith("ratio"))
            row |= {measure: value, f"{measure}_low": low, f"{measure}_high": high}
        rows.append(row)
    return pd.DataFrame(rows)


def verdicts(scenarios: pd.DataFrame, overall: pd.DataFrame, rival: str = RIVAL) -> list[str]:
    """Whether each family reaches the target, in a sentence."""
    said = []
    for _, row in overall.iterrows():
        own = scenarios[scenarios["family"] == row["family"]]
        worse = own[own["tpot_ratio"] > 1.0 + MOST_LOSS]
        late = own[own["attainment_difference"] < -ATTAINMENT_TOLERANCE]
        reached = row["tpot_ratio"] <= 1.0 - LEAST_GAIN and worse.empty and late.empty
        said.append(
            f"`{row['family']}`: TPOT {_ratio(row, 'tpot_ratio')} of `{rival}`'s over {len(own)} scenarios, above "
            f"{1.0 + MOST_LOSS:g} times it in {len(worse)}; more than {100 * ATTAINMENT_TOLERANCE:g} point fewer on "
            f"time in {len(late)}; objective {_ratio(row, 'objective_ratio')}. The target ({100 * LEAST_GAIN:g} % less "
            f"TPOT at equal attainment, nowhere more than {100 * MOST_LOSS:g} % more) is "
            f"{'reached' if reached else 'missed'}."
        )
    return said


def markdown(runs: pd.DataFrame, rival: str = RIVAL) -> str:
    """The page: verdicts, groups of scenarios, single scenarios."""
    paired = pairs(runs, rival)
    overall = summary(paired.assign(group="all"), ["group"]).drop(columns="group")
    groups, scenarios = summary(paired, ["group"]), summary(paired, ["group", "scenario"])
    body = [
        f"# Learned controllers against `{rival}`",
        RULE.format(rival=rival),
        "\n".join(f"* {sentence}" for sentence in verdicts(scenarios, overall, rival)),
        "## Groups of scenarios",
        table(Table("", _columns("group"), _written(groups))),
        "## Scenarios",
    ]
    for family, part in scenarios.groupby("family", sort=True):
        body += [f"### {family}", table(Table("", _columns("scenario")[1:], _written(part)))]
    return "\n\n".join(body) + "\n"


def csv(runs: pd.DataFrame, rival: str = RIVAL) -> str:
    """One row a family and scenario."""
    frame = summary(pairs(runs, rival), ["group", "scenario"])
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def _ratio(row: Any, key: str) -> str:
    return _interval(row[key], row[f"{key}_low"], row[f"{key}_high"], 3, 1.0)


def _interval(value: float, low: float, high: float, places: int, factor: float) -> str:
    shown = f"{factor * value:.{places}f}"
    return shown if math.isnan(low) else f"{shown} [{factor * low:.{places}f}, {factor * high:.{places}f}]"


def _written(frame: pd.DataFrame) -> pd.DataFrame:
    shown = frame[[name for name in ("group", "scenario", "family", "training_seeds") if name in frame]].copy()
    for measure in MEASURES:
        places, factor = (3, 1.0) if measure.endswith("ratio") else (1, 100.0)
        cells = zip(frame[measure], frame[f"{measure}_low"], frame[f"{measure}_high"], strict=True)
        shown[measure] = [_interval(*cell, places, factor) for cell in cells]
    return shown


def _columns(first: str) -> tuple[Column, ...]:
    heads = {
        "family": "controller",
        first: first,
        "training_seeds": "training seeds",
        "tpot_ratio": "TPOT, ratio",
        "attainment_difference": "on time, points",
        "objective_ratio": "objective, ratio",
    }
    return tuple(Column(key, head, text) for key, head in heads.items())
