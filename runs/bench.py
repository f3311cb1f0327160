"""Writes the suite's table from its runs: `python -m runs.bench FOLDER... [--out runs/results/bench.md]`.

Beside the Markdown goes a CSV of the same name. Runs of an older version of the code, which a resumed sweep may have
left behind, are not counted.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from engine.files import write_whole
from runs.code import code_digest
from runs.endings import command
from runs.reporting import scores, suite
from runs.reporting.collate import ReportError, collate


def build(roots: Sequence[Path]) -> tuple[str, str, int]:
    """The table as Markdown and as CSV, and how many runs of other versions of the code were left out.

    Raises ReportError when the runs are broken, or hold nothing that scores can be made of.
    """
    runs = collate(roots, latest=True).runs
    latest = runs["code"].iloc[int(runs["written"].argmax())]
    now = code_digest()
    kept = runs[runs["code"] == (now if (runs["code"] == now).any() else latest)]
    scored = scores.score(kept)
    if scored is None or scored.frame["score"].isna().all():
        raise ReportError(f"no score can be given: {scores.ZERO!r} must be among the runs, and something better")
    return suite.markdown(kept, scored), suite.csv(scored, kept), len(runs) - len(kept)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 with the reason on stderr when there is nothing to make a table of."""
    parser = argparse.ArgumentParser(prog="python -m runs.bench", description="Writes the suite's table from its runs.")
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders to search for runs")
    parser.add_argument("--out", type=Path, default=Path("runs/results/bench.md"), help="Markdown file to write")
    options = parser.parse_args(arguments)
    console, complaints = Console(), Console(stderr=True)
    try:
        page, rows, left_out = build(options.folders)
    except ReportError as error:
        complaints.print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    options.out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.out.with_suffix(".csv"), rows.encode())
    write_whole(options.out, page.encode())
    if left_out:
        complaints.print(f"{left_out} runs of another version of the code were left out", highlight=False)
    console.print(f"Written: {options.out}, {options.out.with_suffix('.csv')}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    command(main)
