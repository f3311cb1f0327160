"""The benchmark suite's committed table: Markdown for people, CSV for programs, from the runs of `experiment=bench`."""

import pandas as pd

from runs.reporting import claims, scores
from runs.reporting.across import interval_text, level_table, with_intervals
from runs.reporting.names import engine_name
from runs.reporting.scores import ZERO, Scored, leader_of, rival_of
from runs.reporting.tables import Column, Table, decimals, milliseconds, percent, text, whole, with_interval

NAMED = (ZERO, "fixed c=3 n=256")
"""Static settings that are always listed, beside the best of all."""


def markdown(runs: pd.DataFrame, scored: Scored) -> str:
    """The table as committed. All but its last section depend on configurations and seeds alone."""
    aggregates, short = scores.aggregates(scored)
    shown = scores.told(aggregates, NAMED)
    labels = shown["label"].tolist()
    seeds = sorted(runs["seed"].unique())
    scenarios = runs.drop_duplicates(["engine", "scenario"])
    leader, rival = leader_of(aggregates), rival_of(aggregates)
    body = [
        "# The benchmark suite",
        f"{len(scenarios)} scenarios, seeds {', '.join(map(str, seeds))}, {len(runs)} runs. `make bench-suite` writes "
        "this page; `conf/experiment/bench.yaml` says what was run.",
        scored.rule,
        *[f"* {note}" for note in (*scored.notes, *short)],
        "## Controllers",
        scores.AGGREGATE_RULE.format(rival=rival)
        + " Attainment and TPOT are means over scenarios."
        + " A bound sees what no controller can see.",
        table(Table("", _CONTROLLERS, with_intervals(shown, "iqm", "better"))),
        "## Scores, scenario by scenario",
        "Means over seeds with 95 % t intervals.",
        *_by_scenario(scores.by_scenario(scored), labels),
        "## Scores by load level",
        scores.LEVEL_RULE,
        table(level_table(scores.by_level(scored), labels)),
        *_regret(runs, labels),
        *(_against_static(runs, leader) if leader else ()),
        "## What deciding cost",
        "Measured while the suite ran, so these differ each time: p50 and p99 of a decision (median over runs) and "
        "the seconds that a run took.",
        table(Table("", _COSTS, _costs(runs, labels))),
    ]
    return "\n\n".join(body) + "\n"


def csv(scored: Scored, runs: pd.DataFrame) -> str:
    """One row an engine, scenario and setting: score, objective, attainment, TPOT, and regret to the bounds."""
    frame = scores.by_scenario(scored)
    regrets = scores.regrets(runs)
    if len(regrets):
        frame = frame.merge(regrets.drop(columns=["role", "objective"]), on=["engine", "scenario", "label"], how="left")
    return frame.to_csv(index=False, float_format="%.6g", lineterminator="\n")


def table(content: Table) -> str:
    """A table in Markdown."""
    rule = ["---:" if column.number else "---" for column in content.columns]
    rows = [[column.write(value) for value in content.frame[column.key]] for column in content.columns]
    lines = [[column.title for column in content.columns], rule, *(list(row) for row in zip(*rows, strict=True))]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _by_scenario(frame: pd.DataFrame, labels: list[str]) -> list[str]:
    """One table an engine: controllers down, scenarios across."""
    found = []
    for engine, group in frame.groupby("engine", sort=False):
        written = group.assign(
            text=[interval_text(row.score, row.score_low, row.score_high) for row in group.itertuples()]
        )
        pivot = written.pivot(index="label", columns="scenario", values="text").reindex(labels).reset_index()
        order = written["scenario"].drop_duplicates()
        columns = [Column("label", engine_name(str(engine)), text, number=False)]
        found.append(table(Table("", (*columns, *(Column(name, name, text) for name in order)), pivot)))
    return found


def _regret(runs: pd.DataFrame, labels: list[str]) -> list[str]:
    """Mean regret over scenarios; scenario by scenario it is in the CSV."""
    regrets = scores.regrets(runs)
    if regrets.empty:
        return []
    keys = [key for key in regrets if key.startswith(("regret_", "relative_")) and not key.endswith(("_low", "_high"))]
    means = regrets.groupby("label")[keys].mean().reindex(labels).reset_index()
    columns = [Column("label", "controller", text, number=False)]
    for key in keys:
        kind, bound = key.split("_", 1)
        write = decimals(3) if kind == "regret" else percent
        columns.append(Column(key, f"regret to {bound}" if kind == "regret" else "relative", write))
    note = "Objective minus the bound's on the same requests, and in percent of it: means over scenarios and seeds."
    return ["## Regret", note, table(Table("", tuple(columns), means))]


def _against_static(runs: pd.DataFrame, leader: str) -> list[str]:
    """The controller of the highest score beside the best static setting of each scenario."""
    loads = claims.load_claim(runs)
    mine = loads[loads["label"] == leader] if len(loads) else loads
    if mine.empty:
        return []
    return [
        f"## `{leader}` against the best static setting of each scenario",
        f"{claims.BEST_STATIC_RULE} {claims.RULES['loads']}",
        table(Table("", _AGAINST, with_interval(mine))),
        *claims.sentences(pd.DataFrame(), pd.DataFrame(), mine),
    ]


def _costs(runs: pd.DataFrame, labels: list[str]) -> pd.DataFrame:
    keys = ["decision_time_p50_s", "decision_time_p99_s", "sim_wall_s"]
    present = runs.reindex(columns=["label", *keys])
    found = present.groupby("label")[keys].agg(
        {"decision_time_p50_s": "median", "decision_time_p99_s": "median", "sim_wall_s": "mean"}
    )
    return found.reindex(labels).reset_index()


def _microseconds(seconds: float) -> str:
    return "–" if pd.isna(seconds) else f"{1e6 * seconds:.1f}"


_CONTROLLERS = (
    Column("label", "controller", text, number=False),
    Column("iqm_text", "IQM of score", text),
    Column("better_text", "P(better)", text),
    Column("mean", "mean score", decimals(2)),
    Column("ttft_attainment", "TTFT attained", percent),
    Column("tpot_mean_s", "TPOT, ms", milliseconds),
    Column("runs", "runs", whole),
)
_AGAINST = (
    Column("scenario", "scenario", text, number=False),
    Column("said", "verdict", text, number=False),
    Column("slo_attainment", "both met", percent),
    Column("against", "best static", text, number=False),
    Column("against_slo_attainment", "both met", percent),
    Column("points", "difference, points [95 %]", text),
    Column("ratio", "TPOT ratio [95 %]", text),
)
_COSTS = (
    Column("label", "controller", text, number=False),
    Column("decision_time_p50_s", "decision p50, us", _microseconds),
    Column("decision_time_p99_s", "p99, us", _microseconds),
    Column("sim_wall_s", "run, s", decimals(3)),
)
