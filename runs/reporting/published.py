"""What others published, counted from runs of this project's engine: Sarathi-Serve's ablation and SmartSpec's claim.

Each part appears in a report where its runs are (`conf/experiment/sarathi_claims.yaml`, `smartspec_claims.yaml`).
Engines that differ only in how they prefill are compared with each other here, on the same requests.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from runs.reporting import published_figures
from runs.reporting.statistics import ONE_SEED, PairedDifference, mean_interval, paired_difference
from runs.reporting.tables import Column, Table, decimals, milliseconds, text, whole

SCHEDULERS = {
    "first": "prompts first",
    "whole": "hybrid batching only",
    "turns": "chunked prefills only",
    "chunked": "both (Sarathi-Serve)",
}
"""What each order of prefill is in Sarathi-Serve's words."""

PUBLISHED_ABLATION = {
    "sharegpt": {"whole": (0.53, 0.68), "turns": (1.04, 0.17), "chunked": (0.76, 0.14)},
    "arxiv": {"whole": (3.78, 1.38), "turns": (5.38, 0.20), "chunked": (3.90, 0.17)},
}
"""P50 TTFT and P99 TBT in s, Yi-34B on two A100s: Agrawal et al., OSDI 2024, Table 4."""

_PREFILL = " prefill="


@dataclass(frozen=True)
class Comparison:
    """One sentence of the ablation: the metric of one scheduler over that of another is below 1, or above it."""

    key: str
    title: str
    one: str
    other: str
    metric: str
    below: bool

    def published(self, family: str) -> float:
        """The ratio in the published table for these lengths; NaN if it has none."""
        for lengths, cells in PUBLISHED_ABLATION.items():
            if lengths in family:
                place = 0 if self.metric == "ttft_p50_s" else 1
                return cells[self.one][place] / cells[self.other][place]
        return float("nan")


ABLATION = (
    Comparison("hybrid_ttft", "hybrid only: TTFT below both's", "whole", "chunked", "ttft_p50_s", True),
    Comparison("hybrid_tbt", "hybrid only: TBT above both's", "whole", "chunked", "itl_p99_s", False),
    Comparison("chunked_ttft", "chunked only: TTFT above both's", "turns", "chunked", "ttft_p50_s", False),
    Comparison("chunked_tbt", "chunked only: TBT below hybrid's", "turns", "whole", "itl_p99_s", True),
    Comparison("both_tbt", "both: TBT below chunked only's", "chunked", "turns", "itl_p99_s", True),
)
ABLATION_RULE = (
    "Median TTFT and 99th percentile of TBT (time between tokens, the ITL of the other tables) of one scheduler over "
    "another's, paired seed by seed on the same requests: the mean over seeds of the ratios of the runs' percentiles, "
    "and its 95 % t interval. 'holds' and 'fails' are said where the interval lies on one side of 1. In "
    "parentheses the ratio in Sarathi-Serve's Table 4 (Yi-34B, two A100s)."
)
GOODPUT_RULE = (
    "Mean end-to-end latency without speculation over the setting's, paired seed by seed on the same requests: above 1 "
    "is faster. 'slower' and 'faster' are said where the 95 % interval lies on one side of 1. The last column compares "
    "the controller with the fixed k that is best at that load, chosen in hindsight."
)


@dataclass(frozen=True)
class Published:
    """What a report says of published claims: sentences, tables, figures still to be drawn, frames for files."""

    sentences: list[str]
    tables: list[Table]
    figures: dict[str, Callable[[], Figure]]
    frames: dict[str, pd.DataFrame]


CAPTIONS = {
    "sarathi_claims": (
        "Sarathi-Serve's ablation: median TTFT above, 99th percentile of TBT below",
        "Whole prompts beside decodes (hybrid) give the first token early and stall decodes; chunks in turns with "
        "decodes do the reverse; chunks beside decodes are between in TTFT and lowest in TBT. At light load fewer than "
        "one token in a hundred meets a prompt, and the 99th percentile does not see the stalls. Bars are 95 % "
        "t intervals over seeds.",
    ),
    "smartspec_claims": (
        "SmartSpec's claim: mean latency without speculation over with it",
        "Below the line at 1 speculation costs. Each grey line is one fixed candidate count k; the controller should "
        "never be below 1. Bars are 95 % t intervals over seeds, on the same requests.",
    ),
}


def find(runs: pd.DataFrame) -> Published:
    """The claims that these runs are about; empty where there are none. `runs` as in `Collation.runs`."""
    found = Published([], [], {}, {})
    ablation = sarathi_ablation(runs)
    if len(ablation):
        schedulers = scheduler_values(runs)
        found.sentences.extend(_ablation_sentences(ablation))
        found.tables.extend(_ablation_tables(schedulers, ablation))
        found.frames.update(sarathi_values=schedulers, sarathi_claims=ablation)
        found.figures["sarathi_claims"] = lambda: published_figures.sarathi(schedulers)
    speedups = smartspec_speedups(runs)
    if len(speedups):
        found.sentences.extend(_speedup_sentences(speedups))
        found.tables.append(_speedup_table(speedups))
        found.frames["smartspec_claims"] = speedups
        found.figures["smartspec_claims"] = lambda: published_figures.smartspec(speedups)
    return found


def by_scheduler(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs without speculation with `engine` cut to what all schedulers share, `prefill`, and `budget` (tokens).

    The budget of Sarathi-Serve's controller is its total, of another its n; whole prompts have none (0).
    """
    parts = runs["engine"].str.partition(_PREFILL)
    budget = runs["total_budget"].fillna(runs["token_budget"])
    cut = runs.assign(engine=parts[0], prefill=parts[2].where(parts[1] != "", "chunked"), budget=budget)
    kept = cut[cut["candidates"].eq(0).fillna(False) & cut["budget"].notna()].copy()
    kept.loc[kept["prefill"].isin(("first", "whole")), "budget"] = 0
    return kept.astype({"budget": int})


def scheduler_values(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an engine, scenario, scheduler and budget: means over seeds of median TTFT and P99 TBT with intervals."""
    rows = []
    keys = ["engine", "family", "scenario", "prefill", "budget"]
    for place, group in by_scheduler(runs).groupby(keys, sort=False):
        row = dict(zip(keys, place, strict=True)) | {"request_rate_rps": group["request_rate_rps"].mean()}
        for name, metric in (("ttft", "ttft_p50_s"), ("tbt", "itl_p99_s")):
            low, high = mean_interval(group[metric])
            row |= {f"{name}_s": group[metric].mean(), f"{name}_low_s": low, f"{name}_high_s": high}
        rows.append(row | {"seeds": group["seed"].nunique()})
    frame = pd.DataFrame(rows)
    return frame.sort_values(["engine", "family", "request_rate_rps"], kind="stable") if len(frame) else frame


def sarathi_ablation(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an engine, scenario, budget and comparison of `ABLATION`: ratio, interval, published ratio, verdict.

    Only where whole prompts, chunks in turns, and chunks beside decodes of the same budget were run.
    """
    rows: list[dict[str, Any]] = []
    if not runs["engine"].str.contains(_PREFILL).any():
        return pd.DataFrame(rows)
    for (engine, family, scenario), group in by_scheduler(runs).groupby(["engine", "family", "scenario"], sort=False):
        of = dict(list(group.groupby(["prefill", "budget"])))
        budgets = sorted({budget for prefill, budget in of if prefill == "turns"})
        for budget in budgets:
            mine = {"whole": of.get(("whole", 0)), "turns": of["turns", budget], "chunked": of.get(("chunked", budget))}
            for comparison in ABLATION:
                one, other = mine[comparison.one], mine[comparison.other]
                if one is None or other is None:
                    continue
                paired = paired_difference(one, other, comparison.metric)
                if paired is not None:
                    place = {"engine": engine, "family": family, "scenario": scenario, "budget": budget}
                    rows.append(
                        place
                        | {"request_rate_rps": group["request_rate_rps"].mean(), "comparison": comparison.key}
                        | _ratio(paired)
                        | {
                            "published": comparison.published(family),
                            "verdict": verdict(paired.ratio_low, paired.ratio_high, comparison.below),
                        }
                    )
    frame = pd.DataFrame(rows)
    return frame.sort_values(["engine", "family", "request_rate_rps", "budget"], kind="stable") if rows else frame


def verdict(low: float, high: float, below: bool) -> str:
    """`holds` or `fails` where an interval of a ratio lies on one side of 1, else `not separable`."""
    if np.isnan(low):
        return ONE_SEED
    if high < 1:
        return "holds" if below else "fails"
    if low > 1:
        return "fails" if below else "holds"
    return "not separable"


def smartspec_speedups(runs: pd.DataFrame) -> pd.DataFrame:
    """One row an engine, scenario and setting: speed-up of mean latency over no speculation at the same n, verdict.

    Only engines that prefill whole prompts first, as SmartSpec's did, and scenarios with a goodput controller, no
    speculation, and other fixed k. `over_best` is the speed-up over the best fixed k of the load.
    """
    rows = []
    mine = runs[runs["engine"].str.endswith(f"{_PREFILL}first")]
    for (engine, family, scenario), group in mine.groupby(["engine", "family", "scenario"], sort=False):
        for _, part in group.groupby("token_budget"):
            settings = dict(list(part.groupby("label")))
            fixed = part[part["role"] == "static"].drop_duplicates("label").set_index("label")["candidates"]
            none = [label for label, candidates in fixed.items() if candidates == 0]
            if not none or len(fixed) < 2 or "goodput" not in set(part["controller"]):
                continue
            best = min(fixed.index, key=lambda label: settings[label]["e2e_mean_s"].mean())
            for label, setting in settings.items():
                paired = paired_difference(settings[none[0]], setting, "e2e_mean_s")
                over = paired_difference(settings[best], setting, "e2e_mean_s")
                if paired is None or over is None:
                    continue
                row = setting.iloc[0]
                rows.append(
                    {
                        "engine": engine,
                        "family": family,
                        "scenario": scenario,
                        "label": label,
                        **row[["controller", "role", "candidates", "token_budget"]],
                        "request_rate_rps": group["request_rate_rps"].mean(),
                        "e2e_mean_s": setting["e2e_mean_s"].mean(),
                        "tpot_mean_s": setting["tpot_mean_s"].mean(),
                        **_ratio(paired),
                        "over_best": over.ratio,
                        "over_best_low": over.ratio_low,
                        "over_best_high": over.ratio_high,
                        "best": best,
                        "verdict": "faster" if paired.ratio_low > 1 else "slower" if paired.ratio_high < 1 else "equal",
                    }
                )
    frame = pd.DataFrame(rows)
    return frame.sort_values(["engine", "family", "request_rate_rps"], kind="stable") if rows else frame


def _ratio(paired: PairedDifference) -> dict[str, float]:
    return {"ratio": paired.ratio, "low": paired.ratio_low, "high": paired.ratio_high, "seeds": len(paired.seeds)}


def _written(ratio: float, low: float, high: float) -> str:
    return f"{ratio:.2f}" + (f" [{low:.2f}, {high:.2f}]" if np.isfinite(low) else "")


def _ablation_sentences(frame: pd.DataFrame) -> list[str]:
    said = []
    for comparison in ABLATION:
        mine = frame[frame["comparison"] == comparison.key]
        counts = mine["verdict"].value_counts()
        said.append(
            f"Sarathi-Serve, Table 4, {comparison.title}: holds at {counts.get('holds', 0)} of {len(mine)} loads and "
            f"budgets, fails at {counts.get('fails', 0)}; ratio {mine['ratio'].min():.2f} to {mine['ratio'].max():.2f}."
        )
    return said


def _ablation_tables(values: pd.DataFrame, frame: pd.DataFrame) -> list[Table]:
    shown = values.assign(scheduler=values["prefill"].map(SCHEDULERS), budget=values["budget"].replace(0, pd.NA))
    for name in ("ttft", "tbt"):
        shown[name] = [
            f"{mean:.3f}" + (f" [{low:.3f}, {high:.3f}]" if np.isfinite(low) else "")
            for mean, low, high in zip(*(shown[f"{name}{part}_s"] for part in ("", "_low", "_high")), strict=True)
        ]
    wide = []
    for place, group in frame.groupby(["engine", "scenario", "budget"], sort=False):
        row = dict(zip(("engine", "scenario", "budget"), place, strict=True))
        for line in group.itertuples():
            published = f" ({line.published:.2f})" if np.isfinite(line.published) else ""
            row[line.comparison] = f"{line.verdict}: {_written(line.ratio, line.low, line.high)}{published}"
        wide.append(row | {"request_rate_rps": group["request_rate_rps"].iloc[0]})
    verdicts = pd.DataFrame(wide).reindex(columns=[column.key for column in _VERDICTS])
    return [
        Table("Sarathi-Serve's ablation: verdicts", _VERDICTS, verdicts, ABLATION_RULE),
        Table("Sarathi-Serve's ablation: median TTFT and 99th percentile of TBT", _VALUES, shown),
    ]


def _speedup_sentences(frame: pd.DataFrame) -> list[str]:
    said = []
    for label, mine in frame[frame["controller"] == "goodput"].groupby("label", sort=False):
        top = mine.loc[mine["ratio"].idxmax()]
        slower = mine[mine["verdict"] == "slower"]["scenario"]
        said.append(
            f"SmartSpec, {label}: slower than no speculation at {len(slower)} of {len(mine)} loads"
            + (f" ({', '.join(slower)})" if len(slower) else "")
            + f"; largest speed-up {_written(top['ratio'], top['low'], top['high'])} at {top['scenario']}; between "
            f"{mine['over_best'].min():.2f} and {mine['over_best'].max():.2f} times as fast as the best fixed k."
        )
    fixed = frame[(frame["role"] == "static") & (frame["candidates"] > 0)]
    for family, group in fixed.groupby("family", sort=False):
        parts = []
        for candidates, mine in group.groupby("candidates"):
            slower = mine[mine["verdict"] == "slower"]["request_rate_rps"]
            worst = mine.loc[mine["ratio"].idxmin(), "ratio"]
            where = f"slower from {slower.min():.3g}/s" if len(slower) else "never slower"
            parts.append(f"k = {candidates} {where} (lowest {worst:.2f})")
        said.append(f"SmartSpec, fixed k on {family}, against no speculation: {'; '.join(parts)}.")
    return said


def _speedup_table(frame: pd.DataFrame) -> Table:
    shown = frame.assign(
        speedup=[_written(row.ratio, row.low, row.high) for row in frame.itertuples()],
        against_best=[_written(row.over_best, row.over_best_low, row.over_best_high) for row in frame.itertuples()],
        mine=frame["controller"] == "goodput",
    )
    return Table("SmartSpec: latency against no speculation", _SPEEDUPS, shown, GOODPUT_RULE, emphasis="mine")


_PLACE = (
    Column("engine", "engine", text, number=False),
    Column("scenario", "scenario", text, number=False),
    Column("request_rate_rps", "req/s", decimals(2), detail=True),
)
_VERDICTS = (
    *_PLACE,
    Column("budget", "budget", whole),
    *(Column(comparison.key, comparison.title, text, number=False) for comparison in ABLATION),
)
_VALUES = (
    *_PLACE,
    Column("scheduler", "scheduler", text, number=False),
    Column("budget", "budget", whole),
    Column("ttft", "TTFT p50, s", text, sort_key="ttft_s"),
    Column("tbt", "TBT p99, s", text, sort_key="tbt_s"),
    Column("seeds", "seeds", whole),
)
_SPEEDUPS = (
    *_PLACE,
    Column("label", "setting", text, number=False),
    Column("e2e_mean_s", "latency mean, s", decimals(3)),
    Column("tpot_mean_s", "TPOT mean, ms", milliseconds),
    Column("speedup", "speed-up [95 % interval]", text, sort_key="ratio"),
    Column("verdict", "verdict", text, number=False),
    Column("against_best", "over the best fixed k", text, sort_key="over_best"),
    Column("seeds", "seeds", whole),
)
