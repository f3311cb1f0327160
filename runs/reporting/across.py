"""The report's section over many scenarios: scores, their aggregates, results by load level, regret to the bounds."""

from dataclasses import dataclass

import pandas as pd

from runs.reporting import scores
from runs.reporting.scores import BOUNDS, LEVELS, Scored, leader_of, rival_of
from runs.reporting.tables import Column, Table, decimals, milliseconds, percent, text, whole

REGRETS_TOLD = ("optimizer", "bound")


@dataclass(frozen=True)
class Across:
    """What runs of several scenarios come to; `aggregates` as from `scores.aggregates`."""

    scored: Scored
    aggregates: pd.DataFrame
    levels: pd.DataFrame
    notes: tuple[str, ...]


def across(runs: pd.DataFrame) -> Across | None:
    """Scores over scenarios; None with a single scenario, or where nothing has a score."""
    if len(runs.drop_duplicates(["engine", "scenario"])) < 2:
        return None
    scored = scores.score(runs)
    if scored is None or scored.frame["score"].isna().all():
        return None
    aggregates, short = scores.aggregates(scored)
    if aggregates.empty:
        return None
    return Across(scored, aggregates, scores.by_level(scored), (*scored.notes, *short))


def tables(found: Across) -> list[Table]:
    """Aggregates and results by load level."""
    shown = scores.told(found.aggregates)
    places, runs = int(shown["scenarios"].iloc[0]), int(shown["runs"].max())
    aggregates = with_intervals(shown, "iqm", "better").assign(own=shown["label"] == leader_of(shown))
    note = f"{found.scored.rule} {scores.AGGREGATE_RULE.format(rival=rival_of(shown))}"
    return [
        Table(f"Scores over {places} scenarios, {runs} runs each", AGGREGATES, aggregates, note, emphasis="own"),
        level_table(found.levels, shown["label"].tolist()),
    ]


def level_table(levels: pd.DataFrame, labels: list[str]) -> Table:
    """IQM by label, one column a level of load."""
    written = levels.assign(text=[interval_text(row.iqm, row.iqm_low, row.iqm_high) for row in levels.itertuples()])
    pivot = written.pivot(index="label", columns="level", values="text").reindex(labels).reset_index()
    counts = levels.groupby("level")["scenarios"].first()
    columns = [
        Column(level, f"{level} ({counts[level]} scenarios)", text) for level in LEVELS if level in pivot.columns
    ]
    label = Column("label", "controller", text, number=False)
    return Table("Scores by load level", (label, *columns), pivot, scores.LEVEL_RULE)


def regret_table(regrets: pd.DataFrame) -> Table:
    """Regret of every controller, scenario by scenario."""
    frame = regrets[regrets["role"].isin(REGRETS_TOLD) | (regrets["label"] == scores.ZERO)].copy()
    columns = [*_PLACE, Column("objective", "objective", decimals(3))]
    for name in BOUNDS:
        if f"regret_{name}" in frame:
            frame = with_intervals(frame, f"regret_{name}", places=3)
            frame = with_intervals(frame, f"relative_{name}", places=1, factor=100.0)
            columns.append(_written(f"regret_{name}", f"regret to {name}"))
            columns.append(_written(f"relative_{name}", "in %"))
    return Table("Regret to the bounds", tuple(columns), frame, scores.REGRET_RULE)


def with_intervals(frame: pd.DataFrame, *keys: str, places: int = 2, factor: float = 1.0) -> pd.DataFrame:
    """Adds `KEY_text`, a figure with its interval, for each key that has `KEY_low` and `KEY_high` beside it."""
    added = {
        f"{key}_text": [
            interval_text(factor * value, factor * low, factor * high, places)
            for value, low, high in zip(frame[key], frame[f"{key}_low"], frame[f"{key}_high"], strict=True)
        ]
        for key in keys
    }
    return frame.assign(**added)


def interval_text(value: float, low: float, high: float, places: int = 2) -> str:
    """`0.63 [0.60, 0.66]`, or without brackets where there is no interval."""
    if pd.isna(value):
        return "–"
    # Adding 0 turns a rounded -0.0 into 0.0.
    figures = [f"{round(figure, places) + 0.0:.{places}f}" for figure in (value, low, high) if not pd.isna(figure)]
    return figures[0] if len(figures) < 3 else f"{figures[0]} [{figures[1]}, {figures[2]}]"


def _written(key: str, title: str) -> Column:
    return Column(f"{key}_text", title, text, sort_key=key)


_PLACE = (
    Column("engine", "engine", text, number=False),
    Column("scenario", "scenario", text, number=False),
    Column("label", "controller", text, number=False),
)
AGGREGATES = (
    Column("label", "controller", text, number=False),
    _written("iqm", "IQM of score"),
    _written("better", "P(better)"),
    Column("mean", "mean score", decimals(2)),
    Column("ttft_attainment", "TTFT attained", percent),
    Column("tpot_mean_s", "TPOT, ms", milliseconds),
    Column("runs", "runs", whole),
)
