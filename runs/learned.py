"""Compares learned controllers with the analytic one: `python -m runs.learned FOLDER... [--out FILE.md]`.

Beside the Markdown goes a CSV of the same name. The folders are searched for runs of `runs.evaluate`; controllers whose
label ends in `seed=K` count as training seed K of one kind.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from engine.files import write_whole
from runs.endings import command
from runs.reporting import learned
from runs.reporting.collate import ReportError, collate


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 with the reason on stderr when there is nothing to compare."""
    parser = argparse.ArgumentParser(
        prog="python -m runs.learned", description="Compares learned controllers with the analytic one."
    )
    parser.add_argument("folders", nargs="+", type=Path, metavar="DIR", help="folders to search for runs")
    parser.add_argument("--out", type=Path, default=Path("runs/results/learned.md"), help="Markdown file to write")
    options = parser.parse_args(arguments)
    try:
        runs = collate(options.folders, latest=True).runs
        page, rows = learned.markdown(runs), learned.csv(runs)
    except ReportError as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    write_whole(options.out.with_suffix(".csv"), rows.encode())
    write_whole(options.out, page.encode())
    Console().print(f"Written: {options.out}, {options.out.with_suffix('.csv')}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    command(main)
