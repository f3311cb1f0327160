"""A progress bar for long work, on a terminal only; a line that counts where rich is not installed."""

import importlib.util
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def progress(what: str = "Serving") -> Iterator[Callable[..., Any] | None]:
    """Yields a function of (done, total, note="") that draws a bar; None where nobody would see one."""
    if not sys.stderr.isatty():
        yield None
        return
    if importlib.util.find_spec("rich") is None:
        yield lambda done, total, note="": print(f"\r{what} {done}/{total} {note}", end="", file=sys.stderr, flush=True)
        print(file=sys.stderr)
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        task = bars.add_task(what, total=None, note="")
        yield lambda done, total, note="": bars.update(task, completed=done, total=total, note=note)
