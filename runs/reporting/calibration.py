"""What a calibration card counts: real runs beside the same runs simulated, iteration times beside predicted ones.

Frames are tidy. A pair is one figure of one run in reality and in simulation, with its `level` of load, the `label` of
the controller, the `repeat`, and the `way` the run was simulated. An iteration is one of a real run with the time it
took and the time that the latency tables give the same batch.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import ArrayLike, NDArray

from runs.reporting.statistics import mean_interval

TIMES = ("ttft_mean_s", "ttft_p99_s", "tpot_mean_s", "tpot_p99_s")
COUNTS = ("tokens_per_iteration", "iterations", "ttft_attainment")
METRICS = (*TIMES, *COUNTS)
PREDICTED = "predicted"
OWN_AGREEMENTS = "own agreements"
TARGET = 0.10
"""How far mean TTFT and TPOT may be off at any load level, as a share."""
BATCH_EDGES = (1, 2, 3, 5, 9, 17, 33, 65, 129, 257)
IDENTITY = ["level", "label", "way"]


def latencies(ttft_s: ArrayLike, tpot_s: ArrayLike) -> dict[str, float]:
    """Mean and P99 of TTFT and TPOT over requests; those of one token have no TPOT (NaN) and are left out there."""
    found = {}
    for name, values in (("ttft", ttft_s), ("tpot", tpot_s)):
        finite = np.asarray(values, dtype=np.float64)
        finite = finite[np.isfinite(finite)]
        found[f"{name}_mean_s"] = float(finite.mean()) if finite.size else math.nan
        found[f"{name}_p99_s"] = float(np.percentile(finite, 99)) if finite.size else math.nan
    return found


def pair(
    level: str, label: str, repeat: int, way: str, real: Mapping[str, Any], simulated: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """The pairs of one run, a row for each of `METRICS` that both sides have."""
    names = [name for name in METRICS if real.get(name) is not None and simulated.get(name) is not None]
    place = {"level": level, "label": label, "repeat": repeat, "way": way}
    return [{**place, "metric": m, "real": float(real[m]), "simulated": float(simulated[m])} for m in names]


def over_repeats(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row a level, label, way and metric: means of both sides, and the ratio real / simulated.

    `ratio` is the mean over repeats of each repeat's ratio, `low` and `high` its 95 % t bounds (NaN with a
    single repeat). Order of appearance is kept.
    """
    rows = []
    for key, group in pairs.groupby([*IDENTITY, "metric"], sort=False):
        ratios = _ratios(group)
        low, high = mean_interval(ratios)
        rows.append(
            dict(zip([*IDENTITY, "metric"], key, strict=True))
            | {"real": group["real"].mean(), "simulated": group["simulated"].mean()}
            | {"ratio": float(np.mean(ratios)), "low": low, "high": high, "repeats": len(group)}
        )
    return pd.DataFrame(rows)


def over_labels(pairs: pd.DataFrame) -> pd.DataFrame:
    """One row a level, way and metric: the mean ratio over its controllers, and the controller farthest off.

    The controllers of a repeat serve the same requests, so a repeat's mean over them is what is resampled for `low` and
    `high`.
    """
    rows = []
    for (level, way, metric), group in pairs.groupby(["level", "way", "metric"], sort=False):
        group = group.assign(ratio=_ratios(group))
        each = group.groupby("repeat")["ratio"].mean()
        low, high = mean_interval(each)
        labels = group.groupby("label", sort=False)["ratio"].mean()
        worst = (labels - 1.0).abs().idxmax()
        rows.append(
            {"level": level, "way": way, "metric": metric, "ratio": float(each.mean()), "low": low, "high": high}
            | {"worst_label": worst, "worst_ratio": float(labels[worst]), "labels": len(labels), "repeats": len(each)}
        )
    return pd.DataFrame(rows)


def _ratios(group: pd.DataFrame) -> NDArray[np.float64]:
    real, simulated = group["real"].to_numpy(np.float64), group["simulated"].to_numpy(np.float64)
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = real / simulated
    # Zero of zero, an attainment that is nil on both sides, is agreement.
    return np.where((real == 0) & (simulated == 0), 1.0, ratios)


def by_batch(iterations: pd.DataFrame, edges: Sequence[int] = BATCH_EDGES) -> pd.DataFrame:
    """How far the tables are from the iterations of real runs, by kind of batch and B.

    `iterations`: `num_decodes`, `candidate_steps`, `prefill_tokens`, `measured_s`, `predicted_s`. Kinds are `decode`
    (c = 0), `verify` (c > 0), `mixed` (decodes beside prompt chunks) and `prefill` alone. `ratio` is total measured
    over total predicted time, which is what runs feel; `median_ratio` and `mape` are over single iterations; `share`
    is of all measured time. The last row is over everything.
    """
    kinds = np.select(
        [
            iterations["num_decodes"] == 0,
            iterations["prefill_tokens"] > 0,
            iterations["candidate_steps"] > 0,
        ],
        ["prefill", "mixed", "verify"],
        "decode",
    )
    total_s = float(iterations["measured_s"].sum())
    rows = []
    for kind in ("decode", "verify", "mixed", "prefill"):
        mine = iterations[kinds == kind]
        if kind == "prefill":
            rows += [_errors(kind, "", mine, total_s)] if len(mine) else []
            continue
        for low, high in pairwise(edges):
            bucket = mine[(mine["num_decodes"] >= low) & (mine["num_decodes"] < high)]
            if len(bucket):
                rows.append(_errors(kind, str(low) if high == low + 1 else f"{low}-{high - 1}", bucket, total_s))
    rows.append(_errors("all", "", iterations, total_s))
    return pd.DataFrame(rows)


def _errors(kind: str, decodes: str, rows: pd.DataFrame, total_s: float) -> dict[str, Any]:
    measured, predicted = rows["measured_s"].to_numpy(), rows["predicted_s"].to_numpy()
    return {
        "kind": kind,
        "num_decodes": decodes,
        "iterations": len(rows),
        "share": float(measured.sum()) / total_s if total_s > 0 else math.nan,
        "ratio": float(measured.sum() / predicted.sum()) if len(rows) else math.nan,
        "median_ratio": float(np.median(measured / predicted)) if len(rows) else math.nan,
        "mape": float(np.abs(predicted / measured - 1.0).mean()) if len(rows) else math.nan,
    }


def sentences(pooled: pd.DataFrame, iterations: pd.DataFrame, parity: Mapping[str, int]) -> list[str]:
    """What the card comes to, one line each: a level's mean TTFT and TPOT, the tables' error, replay parity."""
    said = []
    for level in pooled["level"].unique():
        mine = pooled[(pooled["level"] == level) & (pooled["way"] == PREDICTED)].set_index("metric")
        parts = [
            f"mean {name} real / simulated {written_ratio(mine.loc[metric])}, {_verdict(mine.loc[metric])}"
            for name, metric in (("TPOT", "tpot_mean_s"), ("TTFT", "ttft_mean_s"))
            if metric in mine.index
        ]
        said.append(f"{level}: {'; '.join(parts)}.")
    if len(iterations):
        total = by_batch(iterations).iloc[-1]
        said.append(
            f"The {total['iterations']:,} iterations of the real runs took {total['ratio']:.3f} of the time that the "
            f"profile's table gives the same batches; one is off by {100 * total['mape']:.1f} % on average."
        )
    if parity:
        said.append(
            f"Replay parity: {parity['identical']} of {parity['runs']} recorded runs, given their own iteration times "
            "and acceptances, have the identical timeline in the simulator."
        )
    return said


def _verdict(row: pd.Series) -> str:
    if abs(row["ratio"] - 1.0) <= TARGET:
        return f"within {100 * TARGET:.0f} %"
    return f"outside {100 * TARGET:.0f} %"


def written_ratio(row: Any) -> str:
    """A ratio with its interval where there is one: `1.03 [0.99, 1.06]`."""
    if not math.isfinite(row["ratio"]):
        return "–"
    if not math.isfinite(row["low"]):
        return f"{row['ratio']:.3f}"
    return f"{row['ratio']:.3f} [{row['low']:.3f}, {row['high']:.3f}]"
