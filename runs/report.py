"""Collates run folders into one report: `python -m runs.report DIR... [--out DIR]`.

Reads the files that `runs.evaluate` left and nothing else; writes `report.html` (one self-contained page), the figures
as PNG, `runs.csv`, `comparison.csv`, `windows.csv` and `claims.json`, and prints the claims in brief (`--full`: all
their tables and the main rows of every load). Runs of several scenarios are also scored (`scores.csv`), and where a
bound was run there is the regret to it (`regrets.csv`).
"""

import argparse
import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import pandas as pd
from rich.console import Console
from rich.progress import track

from engine.files import locked, write_whole
from runs.endings import command
from runs.reporting import (
    across,
    allocation,
    chunked,
    claims,
    envelope,
    figures,
    page,
    palette,
    profiles,
    published,
    scores,
    tables,
)
from runs.reporting.across import Across
from runs.reporting.collate import Collation, ReportError, collate
from runs.reporting.published import Published
from runs.reporting.tables import Table

MOST_PRINTED = 12
PRINTED_WIDTH = 110
FULL_WIDTH = 150
MOST_SINGLE_LOADS = 9
CAPTIONS = {
    "profiles": (
        "All scenarios: how many runs reach a score",
        "Up and right is better: the height at tau is the share of runs, over all scenarios and seeds, whose score is "
        "at least tau; where a line lies above another throughout, it is better in any aggregate. Bands are 95 % "
        "stratified-bootstrap intervals. Dotted bounds see the future and are no controllers.",
    ),
    "allocation": (
        "Who gets the candidates: uniform, local and global allocation at equal budget",
        "Above 1 in the upper row: more tokens per iteration than chains of c for every request; below 1 in the lower "
        "row: a lower TPOT, drafting included. Drafting deeper costs every request of the batch a drafter step. Bands "
        "are 95 % t intervals over seeds.",
    ),
    "envelope": (
        "Real runs: TPOT against request rate",
        "Measured on the engine itself, not simulated. Above, where the lines of static c cross: candidates pay while "
        "few requests run together and cost when many do. Below, a controller's TPOT over the best static c of each "
        "load, chosen in hindsight; shaded is 5 % around it, bars are 95 % t intervals over seeds.",
    ),
    "speculation": (
        "Speculation: TPOT against load, window by window",
        "Look at where the lines of static c cross: many candidates pay while few requests run together, and cost "
        "when many do. Mean over the time windows with about that request rate, pooled over loads and seeds; bands are "
        "95 % bootstrap intervals over windows. All c run with one budget: the one with which some c is as good as the "
        "best static setting at the most loads. Controllers that move their budget too gain or lose by that as well.",
    ),
    "chunked_prefill": (
        "Chunked prefill: TPOT against TTFT attainment",
        "Right and down is better. One panel a load; the line joins the static budgets (numbers) at the best static "
        "setting's c, faint dots are the other static settings: a larger budget buys attainment with TPOT, and the "
        "budget that suffices moves with the load. The scales are each panel's own. Of more than four loads the "
        "lightest, an overloaded one, and those between are drawn where settings differ most: the most that a static "
        "setting attains is 20 to 99.9 %.",
    ),
    "overview": (
        "Every load: requests that meet both targets above, TPOT below",
        "Each grey line is one static setting, kept at every load; the dashed line is the best one of each load, "
        "chosen in hindsight. A hollow mark has fewer requests that meet both targets than that, by more than half a "
        "point. Shaded: loads at which no static setting lets 90 % of the requests meet both.",
    ),
}


@dataclass(frozen=True)
class Report:
    """Everything a report holds, before it is written.

    `envelope` is of the real engines' runs; `across` is None where there are no scores over several scenarios.
    """

    collation: Collation
    comparison: pd.DataFrame
    envelope: pd.DataFrame
    allocation: pd.DataFrame
    across: Across | None
    regrets: pd.DataFrame
    claims: dict[str, pd.DataFrame]
    published: Published
    sentences: list[str]
    notes: list[str]
    claim_tables: list[Table]
    comparison_tables: list[Table]


def build(collation: Collation, baseline: str | None = None) -> Report:
    """Counts the claims and compares every setting. Raises ReportError when `baseline` is no label of these runs."""
    runs = collation.runs
    labels = sorted(runs["label"].unique())
    if baseline is not None and baseline not in labels:
        raise ReportError(f"--baseline {baseline!r}: no run has this label; there are: {', '.join(labels)}")
    frame, unpaired = tables.comparison(runs, baseline)
    window = claims.window_claim(collation.windows, claims.headline_budgets(frame))
    found = {
        "windows": window,
        "windows_pooled": claims.pool_windows(window),
        "budgets": claims.budget_claim(runs),
        "loads": claims.load_claim(runs),
    }
    others = published.find(runs)
    over_scenarios = across.across(runs)
    followed = envelope.envelope(runs[runs["real"]], claims.panel_budgets(frame))
    shared = allocation.allocations(runs)
    return Report(
        collation=collation,
        comparison=frame,
        envelope=followed,
        allocation=shared,
        across=over_scenarios,
        regrets=scores.regrets(runs),
        claims=found,
        published=others,
        sentences=[*others.sentences, *claims.sentences(found["windows_pooled"], found["budgets"], found["loads"])],
        notes=[
            *(f"Left out: {reason}" for reason in collation.skipped),
            *unpaired,
            *(over_scenarios.notes if over_scenarios else ()),
        ],
        claim_tables=[
            *others.tables,
            *([envelope.table(followed)] if len(followed) else []),
            *([allocation.table(shared)] if len(shared) else []),
            *_claim_tables(found),
        ],
        comparison_tables=tables.comparison_tables(frame, runs),
    )


def draw(report: Report) -> list[page.Picture]:
    """The figures of a report, as PNG."""
    budgets = claims.panel_budgets(report.comparison)
    jobs = dict(report.published.figures)
    if len(report.envelope):
        jobs["envelope"] = lambda: envelope.draw(report.envelope)
    if len(report.allocation):
        jobs["allocation"] = lambda: allocation.draw(report.allocation)
    over_scenarios = report.across
    if over_scenarios is not None:
        jobs["profiles"] = lambda: profiles.profiles(
            over_scenarios.scored.frame, over_scenarios.aggregates, over_scenarios.scored.one
        )
    settings, windows = (_with_loads(frame) for frame in (report.comparison, report.collation.windows))
    if len(settings):
        jobs |= {
            "speculation": lambda: figures.speculation(windows, budgets),
            "chunked_prefill": lambda: chunked.chunked_prefill(settings),
            "overview": lambda: figures.overview(settings),
        }
    captions = CAPTIONS | published.CAPTIONS
    return [page.Picture(name, *captions[name], palette.png(job())) for name, job in jobs.items()]


def _with_loads(frame: pd.DataFrame) -> pd.DataFrame:
    """What is drawn against load: of very many workloads only those that ran at several loads."""
    loads = frame.groupby(["engine", "family"])["scenario"].transform("nunique")
    families = len(frame.drop_duplicates(["engine", "family"]))
    return frame[loads > 1] if families > MOST_SINGLE_LOADS else frame


def write(report: Report, pictures: Sequence[page.Picture], out: Path) -> None:
    """Writes the report's files into `out`, the page last: where it exists, everything else does."""
    runs = report.collation.runs
    html = page.render(
        facts=describe(runs),
        verdicts=report.sentences,
        pictures=pictures,
        across=across.tables(report.across) if report.across is not None else [],
        claims=[*report.claim_tables, *([across.regret_table(report.regrets)] if len(report.regrets) else [])],
        comparisons=report.comparison_tables,
        ran=[
            Table("Scenarios", tables.IDENTITY, tables.identity(runs)),
            Table(f"All {len(runs)} runs", tables.RUNS, runs),
        ],
        rules={
            "Best static setting": claims.BEST_STATIC_RULE,
            "Every load": claims.RULES["loads"],
            "Equal TTFT attainment": claims.RULES["budgets"],
            "Load windows": claims.RULES["windows"],
            "Intervals": (
                "95 % t intervals of the mean over seeds of the paired differences, or of the paired ratios; only runs "
                "with equal engine, scenario, seed and workload digest are paired. With one seed there is none. They "
                "do not count that the best static setting was picked from the same runs."
            ),
        },
        notes=report.notes,
    )
    out.mkdir(parents=True, exist_ok=True)
    for picture in pictures:
        write_whole(out / f"{picture.name}.png", picture.png)
    runs.drop(columns="written").to_csv(out / "runs.csv", index=False)
    report.comparison.to_csv(out / "comparison.csv", index=False)
    if report.across is not None:
        report.across.aggregates.to_csv(out / "scores.csv", index=False)
    if len(report.regrets):
        report.regrets.to_csv(out / "regrets.csv", index=False)
    if len(report.envelope):
        report.envelope.to_csv(out / "envelope.csv", index=False)
    if len(report.allocation):
        report.allocation.to_csv(out / "allocation.csv", index=False)
    report.collation.windows.to_csv(out / "windows.csv", index=False)
    for name, frame in report.published.frames.items():
        frame.to_csv(out / f"{name}.csv", index=False)
    counted = {name: json.loads(frame.to_json(orient="records")) for name, frame in report.claims.items()}
    content = {"rules": {"best_static": claims.BEST_STATIC_RULE, **claims.RULES}, "said": report.sentences, **counted}
    write_whole(out / "claims.json", (json.dumps(content, indent=1) + "\n").encode())
    write_whole(out / "report.html", html.encode())


def describe(runs: pd.DataFrame) -> str:
    """One line on what was run, with a digest over all configurations and workloads."""
    identity = sorted(zip(runs["config_digest"], runs["workload_digest"], runs["label"], runs["seed"], strict=True))
    digest = hashlib.sha256(repr([tuple(map(str, row)) for row in identity]).encode()).hexdigest()[:12]
    number = {"runs": len(runs), "engines": runs["engine"].nunique(), "seeds": runs["seed"].nunique()}
    number |= {"scenarios": runs["scenario"].nunique(), "settings": runs["label"].nunique()}
    counted = ", ".join(f"{count} {name if count != 1 else name[:-1]}" for name, count in number.items())
    return f"{counted}; {int(runs['requests_total'].sum()):,} requests simulated or served; digest {digest}"


def show(report: Report, console: Console, full: bool = False) -> None:
    """Prints the claim at every load in brief and what the claims come to; `full`: all claims, every load's main rows.

    Without a static setting or without an optimizer there is no claim, and the main rows are shown.
    """
    brief = tables.summary_tables(report.claims["loads"])
    loads = report.comparison_tables if len(report.comparison_tables) <= MOST_PRINTED else []
    shown = brief if brief and not full else [*loads, *report.claim_tables]
    for table in shown:
        if len(table.frame):
            console.print(tables.to_rich(table, wrap=shown is not brief))
    if shown is brief:
        console.print(tables.SUMMARY_RULE, "", highlight=False, style="dim")
    for sentence in report.sentences:
        console.print(f"• {sentence}", highlight=False)
    for note in report.notes:
        console.print(f"[yellow]! {note}[/yellow]", highlight=False)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 with the reason on stderr when the input cannot be reported."""
    options = _parser().parse_args(arguments)
    # A pipe has no width of its own, and in a narrow window folded lines are better than columns cut off.
    console = Console(width=max(Console().width, FULL_WIDTH if options.full else PRINTED_WIDTH))
    complaints = Console(stderr=True)
    out = options.out or Path("runs/outputs/report") / f"{datetime.now():%Y-%m-%d_%H-%M-%S}"
    try:
        collation = collate(
            options.folders,
            window_s=options.window_s,
            ttft_target_s=options.ttft_target,
            skip_broken=options.skip_broken,
            latest=options.latest,
            track=lambda folders: track(folders, "Reading runs", console=complaints, transient=True),
        )
        with complaints.status("Comparing"):
            report = build(collation, options.baseline)
        with complaints.status("Drawing"):
            pictures = draw(report)
    except ReportError as error:
        complaints.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    with locked(out):
        write(report, pictures, out)
    show(report, console, options.full)
    console.print(f"Report: {out / 'report.html'}", highlight=False, soft_wrap=True)
    return 0


def _claim_tables(found: dict[str, pd.DataFrame]) -> list[Table]:
    pooled, window = found["windows_pooled"].copy(), found["windows"]
    if len(pooled):
        pooled["decides"] = pooled["role"] == "optimizer"
        window = window[window["role"] == "optimizer"].sort_values("headline", ascending=False, kind="stable")
        window["aside"] = ~window["headline"]
    budgets, loads = (tables.with_interval(found[name]) for name in ("budgets", "loads"))
    return [
        Table("Every load: against the best static setting", tables.LOADS, loads, claims.RULES["loads"]),
        Table(
            "Equal TTFT attainment: against the lowest TPOT of a static setting",
            tables.BUDGETS,
            budgets,
            claims.RULES["budgets"],
        ),
        Table(
            "Load windows at the best static c, over all loads",
            tables.WINDOWS_POOLED,
            pooled,
            claims.RULES["windows"],
            emphasis="decides" if len(pooled) else None,
        ),
        Table(
            "Load windows by load and budget (first the budget of the best static setting)",
            tables.WINDOWS,
            window,
            emphasis="headline" if len(window) else None,
            minor="aside" if len(window) else None,
        ),
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m runs.report", description="Collates run folders into one report.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders to search for runs")
    parser.add_argument("--out", type=Path, help="where to write (default: runs/outputs/report/TIME)")
    parser.add_argument(
        "--baseline", metavar="LABEL", help="compare with this label (default: best static setting of each load)"
    )
    parser.add_argument("--ttft-target", type=float, metavar="S", help="recount attainment against this target, s")
    parser.add_argument("--window-s", type=float, default=60.0, metavar="S", help="length of a load window, s (60)")
    parser.add_argument("--skip-broken", action="store_true", help="leave broken or half-written run folders out")
    parser.add_argument("--full", action="store_true", help="print all tables (150 columns wide), not the brief one")
    parser.add_argument("--latest", action="store_true", help="of two runs of the same thing keep the newer")
    return parser


if __name__ == "__main__":
    command(main)
