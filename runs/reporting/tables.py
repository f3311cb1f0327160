"""Tables for people: what each column means, how its numbers are written, and the terminal's form of them."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.table import Table as RichTable
from rich.text import Text

from runs.reporting.claims import NONE_ATTAINS, written_ratio
from runs.reporting.names import engine_name
from runs.reporting.statistics import ONE_SEED, SETTING, mark_best_fixed, over_seeds, paired_difference


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
    Column("tpot_mean_s", "TPOT mean, ms", milliseconds),
    Column("tpot_p50_s", "p50", milliseconds, detail=True),
    Column("tpot_p90_s", "p90", milliseconds, detail=True),
    Column("tpot_p99_s", "p99", milliseconds),
    Column("ttft_mean_s", "TTFT mean, s", seconds),
    Column("ttft_p99_s", "p99", seconds),
    Column("ttft_attainment", "TTFT attained", percent),
    Column("goodput_rps", "goodput, req/s", decimals(2)),
    Column("token_goodput_tps", "tokens/s", decimals(0), detail=True),
    Column("ratio", "TPOT / baseline", decimals(3)),
    Column("difference_s", "difference, ms", text, sort_key="difference_mean_s"),
    Column("verdict", "TPOT is", text, number=False),
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
    Column("token_budget", "n", whole),
    Column("windows", "windows", whole),
    Column("within", "within 1 %", whole),
    Column("share", "share", percent),
    Column("ratio_median", "TPOT / best c, median", decimals(3)),
    Column("ratio_worst", "worst", decimals(3)),
)
_AGAINST = (
    *_LOAD,
    Column("request_rate_rps", "req/s", decimals(2)),
    Column("ttft_attainment", "TTFT attained", percent),
    Column("tpot_mean_s", "TPOT, ms", milliseconds),
)
_RIVAL = (
    Column("against", "against", text, number=False),
    Column("against_attainment", "its attainment", percent),
    Column("against_tpot_mean_s", "its TPOT, ms", milliseconds, detail=True),
    Column("ratio", "TPOT ratio [95 % interval]", text, sort_key="tpot_ratio"),
    Column("interval_says", "interval says", text, number=False, detail=True),
)
BUDGETS = (*_AGAINST, *_RIVAL, Column("holds", "claim", text, number=False))
LOADS = (
    *_AGAINST,
    Column("attainment_difference", "minus best fixed's", lambda value: f"{100 * value:+.1f}\N{NO-BREAK SPACE}pt"),
    Column("attainment_holds", "attainment", text, number=False),
    *_RIVAL,
    Column("tpot_holds", "TPOT", text, number=False),
)
SUMMARY = (
    Column("rate", "load,\nreq/s", text),
    Column("label", "controller", text, number=False),
    Column("ttft_attainment", "TTFT\nattained", percent),
    Column("tpot_mean_s", "TPOT,\nms", milliseconds),
    Column("rival", "best fixed pair\nthat attains as much", text, number=False),
    Column("against_attainment", "it\nattains", percent),
    Column("ratio", "TPOT ratio\n[95 % interval]", text, number=False),
    Column("verdict", "verdict", text, number=False),
)
SUMMARY_RULE = (
    "holds: TTFT attainment at most 1 point below the best fixed pair's, or 95 %, and TPOT at most 2 % above that\n"
    "of the best fixed pair that attains as much (* none does: shown is the one that attains the most, and TPOT\n"
    "holds). ? the interval over seeds does not decide it."
)


def comparison(runs: pd.DataFrame, baseline: str | None = None) -> tuple[pd.DataFrame, list[str]]:
    """Every setting of every engine and load beside its baseline, and what could not be compared.

    The baseline is the best fixed setting of the load, or the setting labelled `baseline`. Adds to `mark_best_fixed`:
    `is_baseline`, `ratio`, `difference_mean_s`, `difference_low_s`, `difference_high_s`, `paired_seeds`, `verdict`,
    and `minor` (a fixed setting that is neither baseline nor best).
    """
    settings = mark_best_fixed(runs)
    settings["is_baseline"] = settings["label"] == baseline if baseline else settings["best_fixed"]
    notes: list[str] = []
    added = []
    needed = [*SETTING, "seed", "workload_digest", "folder", "tpot_mean_s"]
    by_setting = dict(list(runs[needed].groupby(["engine", "scenario", "label"])))
    for (engine, scenario), group in settings.groupby(["engine", "scenario"], sort=False):
        chosen = group.loc[group["is_baseline"], "label"]
        if chosen.empty:
            notes.append(
                f"{engine}, {scenario}: no {baseline or 'fixed setting'} was run, so there is nothing to pair with."
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
    frame["minor"] = (frame["role"] == "fixed") & ~frame["is_baseline"] & ~frame["best_fixed"]
    return frame, notes


def comparison_tables(frame: pd.DataFrame, runs: pd.DataFrame) -> list[Table]:
    """One table per engine and load, lightest load first: controllers that decide, fixed settings, then bounds."""
    order = {"optimizer": 0, "sarathi": 1, "fixed": 2, "bound": 3}
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
            f"TTFT target {target:g} s",
            f"seed {seeds[0]}: {ONE_SEED}" if len(seeds) == 1 else f"{len(seeds)} seeds",
        )
        tables.append(
            Table(f"{engine} · {scenario}", COMPARISON, group, emphasis="is_baseline", minor="minor", facts=facts)
        )
    return tables


def with_interval(claim: pd.DataFrame) -> pd.DataFrame:
    """A claim's frame with the ratio and its interval written out, for tables."""
    return claim.assign(ratio=[written_ratio(row) for row in claim.itertuples()])


def summary_tables(loads: pd.DataFrame) -> list[Table]:
    """The claim at every load in brief, one narrow table per engine and workload, for the terminal."""
    tables = []
    for (engine, family), group in loads.groupby(["engine", "family"], sort=False) if len(loads) else ():
        brief = group.copy()
        brief["rate"] = [f"{rate:.2f}" for rate in brief["request_rate_rps"]]
        brief.loc[brief.duplicated("scenario"), "rate"] = ""
        none = brief["tpot_holds"] == NONE_ATTAINS
        brief["rival"] = brief["against"].str.removeprefix("fixed ") + none.map({True: " *", False: ""})
        brief["ratio"] = [written_ratio(row) for row in brief.itertuples()]
        brief["verdict"] = [_brief_verdict(row) for row in brief.itertuples()]
        seeds = sorted(brief["seeds"].unique())
        facts = (
            f"TTFT target {brief['ttft_target_s'].iloc[0]:g} s",
            "one seed: no intervals" if seeds == [1] else f"{'-'.join(map(str, seeds))} seeds",
        )
        tables.append(Table(f"{engine_name(engine)} · {family}", SUMMARY, brief, facts=facts))
    return tables


def to_rich(table: Table, wrap: bool = True) -> RichTable:
    """The terminal's form; minor rows are counted, not shown."""
    caption = table.note
    frame = table.frame
    if table.minor is not None:
        hidden = int(frame[table.minor].sum())
        frame = frame[~frame[table.minor]]
        if hidden:
            caption = f"{hidden} more in report.html. {caption}".strip()
    # What is the same in every row is said once, above: a terminal is narrow.
    said = [c for c in table.columns if c.key in ("engine", "family") and frame[c.key].nunique() == 1]
    columns = [column for column in table.columns if column not in said and not column.detail]
    title = " · ".join([table.title, *(str(frame[column.key].iloc[0]) for column in said), *table.facts])
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
                "fixed": int((settings["role"] == "fixed").sum()),
                "others": ", ".join(settings.loc[settings["role"] != "fixed", "label"]),
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
    Column("fixed", "fixed settings", whole),
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


def _brief_verdict(row: Any) -> str:
    # The point decides, as the rule says; where the interval reaches over the limit, a question mark says so.
    doubt = "?" if row.interval_says == "undecided" else ""
    wrong = [] if row.attainment_holds == "holds" else ["TTFT"]
    if row.tpot_holds == "fails":
        return f"fails: {', '.join([*wrong, 'TPOT' + doubt])}"
    return f"fails: {', '.join(wrong)}" if wrong else "holds" + doubt


def _difference(row: pd.Series) -> str:
    if pd.isna(row["difference_mean_s"]):
        return "–"
    mean = f"{1e3 * row['difference_mean_s']:+.2f}"
    if pd.isna(row["difference_low_s"]):
        return mean
    return f"{mean} [{1e3 * row['difference_low_s']:+.2f}, {1e3 * row['difference_high_s']:+.2f}]"


def _colour(row: pd.Series) -> str:
    words = [str(row.get(key, "")) for key in ("holds", "attainment_holds", "tpot_holds")]
    return "red" if "fails" in words else ""
