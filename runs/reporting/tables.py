"""Tables for people: what each column means, how its numbers are written, and the terminal's form of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from runs.reporting.claims import UNDECIDED, WORSE, written_points, written_ratio
from runs.reporting.names import engine_name
from runs.reporting.statistics import ONE_SEED, SETTING, mark_best_static, over_seeds, paired_difference


@dataclass(frozen=True)
class Column:
    """One column: the frame's `key`, the `title` people read, how a value is written, and whether it is a number.

    `sort_key` names the frame's column to sort by where the written one is text; `detail` columns are not in the
    terminal's form.
    """

    key: str
    title: str
    write: Callable[[Any], str] = str
    number: bool = True
    sort_key: str | None = None
    detail: bool = False


@dataclass(frozen=True)
class Table:
    """A frame with its columns; rows whose `emphasis` is true stand out, those whose `minor` is true may be hidden."""

    title: str
    columns: tuple[Column, ...]
    frame: pd.DataFrame
    note: str = ""
    emphasis: str | None = None
    minor: str | None = None
    facts: tuple[str, ...] = field(default=())


def milliseconds(seconds: float) -> str:
    return "–" if pd.isna(seconds) else f"{1e3 * seconds:.2f}"


def seconds(value: float) -> str:
    return "–" if pd.isna(value) else f"{value:.3f}" if value < 10 else f"{value:.1f}"


def percent(value: float) -> str:
    return "–" if pd.isna(value) else f"{100 * value:.1f}\N{NO-BREAK SPACE}%"


def decimals(places: int) -> Callable[[Any], str]:
    return lambda value: "–" if pd.isna(value) else f"{value:.{places}f}"


def whole(value: Any) -> str:
    return "–" if pd.isna(value) else f"{int(value):,}"


def text(value: Any) -> str:
    return "–" if value is None or value is pd.NA or value != value else str(value)


WRAPPED_BEYOND = 28
COMPARISON = (
    Column("label", "controller", text, number=False),
    Column("verdict", "TPOT is", text, number=False),
    Column("slo_attainment", "both met", percent),
    Column("tpot_mean_s", "TPOT mean, ms", milliseconds),
    Column("tpot_p50_s", "p50", milliseconds, detail=True),
    Column("tpot_p90_s", "p90", milliseconds, detail=True),
    Column("tpot_p99_s", "p99", milliseconds),
    Column("ttft_mean_s", "TTFT mean, s", seconds),
    Column("ttft_p99_s", "p99", seconds),
    Column("ttft_attainment", "TTFT attained", percent),
    Column("tpot_attainment", "TPOT attained", percent),
    Column("goodput_rps", "goodput, req/s", decimals(2)),
    Column("token_goodput_tps", "tokens/s", decimals(0), detail=True),
    Column("ratio", "TPOT / baseline", decimals(3)),
    Column("difference_s", "difference, ms", text, sort_key="difference_mean_s"),
)
_LOAD = (
    Column("engine", "engine", text, number=False),
    Column("scenario", "scenario", text, number=False),
    Column("label", "controller", text, number=False),
)
WINDOWS_POOLED = (
    Column("engine", "engine", text, number=False),
    Column("family", "workload", text, number=False),
    Column("label", "controller", text, number=False),
    Column("windows", "load windows", whole),
    Column("within", "within 1 % of best c", whole),
    Column("share", "share", percent),
)
WINDOWS = (
    *_LOAD,
    Column("budget", "budget", text, number=False),
    Column("windows", "windows", whole),
    Column("within", "within 1 %", whole),
    Column("share", "share", percent),
    Column("ratio_median", "TPOT / best c, median", decimals(3)),
    Column("ratio_worst", "worst", decimals(3)),
)
_VERDICT = (
    *_LOAD,
    Column("said", "verdict", text, number=False),
    Column("request_rate_rps", "req/s", decimals(2)),
)
_RATIO = Column("ratio", "TPOT ratio [95 %]", text, sort_key="tpot_ratio")
BUDGETS = (
    *_VERDICT,
    Column("ttft_attainment", "TTFT attained", percent),
    Column("tpot_mean_s", "TPOT, ms", milliseconds),
    Column("against", "lowest static", text, number=False),
    Column("against_ttft_attainment", "its TTFT attained", percent),
    Column("against_tpot_mean_s", "its TPOT, ms", milliseconds, detail=True),
    _RATIO,
    Column("interval_says", "interval says", text, number=False, detail=True),
)
LOADS = (
    *_VERDICT,
    Column("slo_attainment", "both met", percent),
    Column("ttft_attainment", "TTFT", percent, detail=True),
    Column("tpot_attainment", "TPOT", percent, detail=True),
    Column("against", "best static", text, number=False),
    Column("against_slo_attainment", "both met", percent),
    Column("against_ttft_attainment", "TTFT", percent, detail=True),
    Column("against_tpot_attainment", "TPOT", percent, detail=True),
    Column("points", "difference, points [95 %]", text, sort_key="slo_difference"),
    _RATIO,
)
SUMMARY = (
    Column("rate", "load,\nreq/s", text),
    Column("label", "controller", text, number=False),
    Column("said", "verdict", text, number=False),
    Column("slo_attainment", "both\nmet", percent),
    Column("against", "best static\nsetting", text, number=False),
    Column("points", "difference, points\n[95 % interval]", text, number=False),
    Column("ratio", "TPOT ratio\n[95 % interval]", text, number=False),
)
SUMMARY_RULE = (
    "both met: requests that meet the TTFT and the TPOT target. Best static setting: of each load, in hindsight.\n"
    "better, worse: more than half a point apart, or as many requests and mean TPOT more than 2 % apart.\n"
    "? the interval over seeds leaves the verdict open."
)


def comparison(runs: pd.DataFrame, baseline: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Every setting of every engine and load beside its baseline, and what could not be compared.

    The baseline is the best static setting of the load, or the setting labelled `baseline`. Adds to `mark_best_static`:
    `is_baseline`, `ratio`, `difference_mean_s`, `difference_low_s`, `difference_high_s`, `paired_seeds`, `verdict`,
    and `minor` (a static setting that is neither baseline nor best).
    """
    settings = mark_best_static(runs)
    settings["is_baseline"] = settings["label"] == baseline if baseline else settings["best_static"]
    notes: list[str] = []
    added = []
    needed = [*SETTING, "seed", "workload_digest", "folder", "tpot_mean_s"]
    by_setting = dict(list(runs[needed].groupby(["engine", "scenario", "label"])))
    for (engine, scenario), group in settings.groupby(["engine", "scenario"], sort=False):
        chosen = group.loc[group["is_baseline"], "label"]
        if chosen.empty:
            notes.append(
                f"{engine}, {scenario}: no {baseline or 'static setting'} was run, so there is nothing to pair with."
            )
        for index, row in group.iterrows():
            cells: dict[str, Any] = {"index": index, "paired_seeds": 0, "verdict": "not paired"}
            if len(chosen) and not row["is_baseline"]:
                paired = paired_difference(
                    by_setting[engine, scenario, row["label"]],
                    by_setting[engine, scenario, chosen.iloc[0]],
                    "tpot_mean_s",
                )
                if paired is None:
                    notes.append(
                        f"{engine}, {scenario}: {row['label']} has no seed with a TPOT in common with {chosen.iloc[0]}."
                    )
                else:
                    cells.update(
                        ratio=paired.ratio,
                        difference_mean_s=paired.difference,
                        difference_low_s=paired.low,
                        difference_high_s=paired.high,
                        paired_seeds=len(paired.seeds),
                        verdict="bound" if row["role"] == "bound" else paired.verdict,
                    )
            elif row["is_baseline"]:
                cells["verdict"] = "baseline"
            added.append(cells)
    frame = settings.join(pd.DataFrame(added).set_index("index"))
    for key in ("ratio", "difference_mean_s", "difference_low_s", "difference_high_s"):
        if key not in frame:
            frame[key] = float("nan")
    frame["minor"] = (frame["role"] == "static") & ~frame["is_baseline"] & ~frame["best_static"]
    return frame, notes


def comparison_tables(frame: pd.DataFrame, runs: pd.DataFrame) -> list[Table]:
    """One table per engine and load, lightest load first: controllers that decide, static settings, then bounds."""
    order = {"optimizer": 0, "static": 1, "bound": 2}
    tables = []
    for (engine, scenario), group in frame.groupby(["engine", "scenario"], sort=False):
        rank = pd.DataFrame({"role": group["role"].map(order), "minor": group["minor"], "tpot": group["tpot_mean_s"]})
        group = group.loc[rank.sort_values(["role", "minor", "tpot"]).index].copy()
        group["difference_s"] = [_difference(row) for _, row in group.iterrows()]
        mine = runs[(runs["engine"] == engine) & (runs["scenario"] == scenario)]
        seeds = sorted(mine["seed"].unique())
        rate, target = mine["request_rate_rps"].mean(), mine["ttft_target_s"].iloc[0]
        facts = (
            f"{rate:.2f} requests/s",
            f"{int(mine['requests_total'].mean()):,} requests",
            f"targets: TTFT {target:g} s, TPOT {1e3 * mine['tpot_target_s'].iloc[0]:g} ms",
            f"seed {seeds[0]}: {ONE_SEED}" if len(seeds) == 1 else f"{len(seeds)} seeds",
        )
        tables.append(
            Table(f"{engine} · {scenario}", COMPARISON, group, emphasis="is_baseline", minor="minor", facts=facts)
        )
    return tables


def with_interval(claim: pd.DataFrame) -> pd.DataFrame:
    """A claim's frame with verdict, difference, and ratio with its interval written out, for tables."""
    if claim.empty:
        return claim
    decided = claim["decided"] if "decided" in claim else pd.Series(True, claim.index)
    return claim.assign(
        said=claim["verdict"] + decided.map({True: "", False: UNDECIDED}),
        points=[written_points(row) for row in claim.itertuples()],
        ratio=[written_ratio(row) for row in claim.itertuples()],
    )


def summary_tables(loads: pd.DataFrame) -> list[Table]:
    """The claim at every load in brief, one narrow table per engine and workload, for the terminal."""
    tables = []
    for (engine, family), group in loads.groupby(["engine", "family"], sort=False) if len(loads) else ():
        brief = with_interval(group)
        brief["rate"] = [f"{rate:.2f}" for rate in brief["request_rate_rps"]]
        brief.loc[brief.duplicated("scenario"), "rate"] = ""
        seeds = sorted(brief["seeds"].unique())
        facts = (
            f"TTFT target {brief['ttft_target_s'].iloc[0]:g} s",
            "one seed: no intervals" if seeds == [1] else f"{'-'.join(map(str, seeds))} seeds",
        )
        tables.append(Table(f"{engine_name(engine)} · {family}", SUMMARY, brief, facts=facts))
    return tables


def heading(table: Table) -> tuple[str, tuple[Column, ...]]:
    """The title and the columns to show: an engine or workload that is the same in every row is in the title."""
    said = [c for c in table.columns if c.key in ("engine", "family") and table.frame[c.key].nunique() == 1]
    title = " · ".join([table.title, *(str(table.frame[column.key].iloc[0]) for column in said)])
    return title, tuple(column for column in table.columns if column not in said)


def to_rich(table: Table, wrap: bool = True) -> RichTable:
    """The terminal's form; minor rows are counted, not shown."""
    caption = table.note
    frame = table.frame
    if table.minor is not None:
        hidden = int(frame[table.minor].sum())
        frame = frame[~frame[table.minor]]
        if hidden:
            caption = f"{hidden} more in report.html. {caption}".strip()
    title, columns = heading(table)
    columns = tuple(column for column in columns if not column.detail)
    title = " · ".join([title, *table.facts])
    rich_table = RichTable(
        title=title,
        caption=caption or None,
        title_justify="left",
        caption_justify="left",
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    cells = [[column.write(value) for value in frame[column.key]] for column in columns]
    for column, written in zip(columns, cells, strict=True):
        narrowest = min(max(map(len, written)), WRAPPED_BEYOND)
        rich_table.add_column(
            column.title,
            justify="right" if column.number else "left",
            min_width=narrowest if wrap else None,
            no_wrap=not wrap,
        )
    for place, (_, row) in enumerate(frame.iterrows()):
        rich_table.add_row(
            *(Text(written[place]) for written in cells),
            style="bold" if table.emphasis and row[table.emphasis] else _colour(row),
        )
    return rich_table


def identity(runs: pd.DataFrame) -> pd.DataFrame:
    """What was run, one row per engine and scenario: settings, seeds, requests, workload digests."""
    rows = []
    for (engine, scenario), group in runs.groupby(["engine", "scenario"], sort=False):
        settings = over_seeds(group)
        digests = group.drop_duplicates("seed").sort_values("seed")
        rows.append(
            {
                "engine": engine,
                "scenario": scenario,
                "request_rate_rps": group["request_rate_rps"].mean(),
                "static": int((settings["role"] == "static").sum()),
                "others": ", ".join(settings.loc[settings["role"] != "static", "label"]),
                "seeds": ", ".join(str(seed) for seed in digests["seed"]),
                "requests": int(digests["requests_total"].sum()),
                "digests": " ".join(digest[:10] for digest in digests["workload_digest"].unique()),
            }
        )
    return pd.DataFrame(rows)


IDENTITY = (
    Column("engine", "engine", text, number=False),
    Column("scenario", "scenario", text, number=False),
    Column("request_rate_rps", "req/s", decimals(2)),
    Column("static", "static settings", whole),
    Column("others", "other controllers", text, number=False),
    Column("seeds", "seeds", text, number=False),
    Column("requests", "requests", whole),
    Column("digests", "workload digest, by seed", text, number=False),
)
RUNS = (
    Column("engine", "engine", text, number=False),
    Column("scenario", "scenario", text, number=False),
    Column("label", "controller", text, number=False),
    Column("seed", "seed", whole),
    Column("requests_total", "requests", whole),
    Column("workload_digest", "workload digest", lambda value: value[:10], number=False),
    Column("config_digest", "config digest", text, number=False),
    Column("folder", "folder", text, number=False),
)


def _difference(row: pd.Series) -> str:
    if pd.isna(row["difference_mean_s"]):
        return "–"
    mean = f"{1e3 * row['difference_mean_s']:+.2f}"
    if pd.isna(row["difference_low_s"]):
        return mean
    return f"{mean} [{1e3 * row['difference_low_s']:+.2f}, {1e3 * row['difference_high_s']:+.2f}]"


def _colour(row: pd.Series) -> str:
    words = {str(row.get(key, "")) for key in ("holds", "verdict")}
    return "red" if words & {"fails", WORSE} else ""
