"""What a profile's command says when it ends, in plain text: it has to be readable where nothing else is installed."""

from __future__ import annotations

import logging
from pathlib import Path

from runs.measured_folder import ENGINE, Result


def say(result: Result, folder: Path, log: logging.Logger) -> None:
    """Print held-out errors and what speculation got; log what can be done with the folder now."""
    groups = list(result.card["linear"])
    rows = [["", *groups]]
    rows += [[name, *(f"{100 * errors[group]:.1f}" for group in groups)] for name, errors in result.card.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"Held-out iteration times, mean absolute error in %, {len(result.measured)} points")
    for first, *others in rows:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)))
    gains = "  ".join(f"c={c}: {gain:.2f}" for c, gain in result.tokens_per_iteration.items())
    print(f"Tokens per iteration  {gains}")
    if result.missing:
        log.warning(
            "%s: not written, because pyarrow is not installed here; where it is, here or on a copy of the folder: "
            "python -m runs.profile --finish %s",
            " and ".join(result.missing),
            folder,
        )
    else:
        log.info("engine=%s simulates this engine in every app", folder / ENGINE)
