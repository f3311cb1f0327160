"""A progress bar for long work, on a terminal only; a note on what is compiled, everywhere."""

import importlib.util
import sys
import threading
import time
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


NOTED_AFTER_S = 0.2
"""Compilation that is over sooner is not worth a word."""

SECONDS_PER_NOTE = 10.0


@contextmanager
def compiling() -> Iterator[None]:
    """Say on stderr while functions are compiled: the first run on a machine takes a minute of it, later ones none.

    On a terminal one line counts them; elsewhere there is a line at the beginning, now and then, and at the end.
    """
    from numba.core import event

    notes = _CompileNotes()
    listener = _Listener(notes)
    event.register("numba:compile", listener)
    try:
        yield
    finally:
        event.unregister("numba:compile", listener)
        notes.close()


class _CompileNotes:
    """What is said of compilation; a thread says it while the compiler runs."""

    def __init__(self) -> None:
        self._terminal = sys.stderr.isatty()
        self._depth, self._count, self._begun, self._spent = 0, 0, 0.0, 0.0
        self._said = 0.0
        self._over: threading.Event | None = None

    def start(self) -> None:
        self._depth += 1
        if self._depth == 1:
            self._begun = time.monotonic()
        if self._over is None:
            self._over = threading.Event()
            threading.Thread(target=self._speak, args=(self._over,), daemon=True).start()

    def end(self) -> None:
        self._depth -= 1
        self._count += 1
        if self._depth == 0:
            self._spent += time.monotonic() - self._begun

    def close(self) -> None:
        if self._over is not None:
            self._over.set()
        if self._said:
            self._say(
                f"compiled {self._count} functions in {self._seconds():.0f} s; they are kept for later runs", end="\n"
            )

    def _seconds(self) -> float:
        return self._spent + (time.monotonic() - self._begun if self._depth > 0 else 0.0)

    def _speak(self, over: threading.Event) -> None:
        while not over.wait(0.1):
            seconds = self._seconds()
            due = NOTED_AFTER_S if self._said == 0.0 else self._said + (0.2 if self._terminal else SECONDS_PER_NOTE)
            if self._depth > 0 and seconds >= due:
                first = self._terminal or self._said == 0.0
                what = "compiling for this machine, once (up to a minute)" if first else "compiling"
                self._say(f"{what}: {self._count} functions, {seconds:.0f} s")
                self._said = seconds

    def _say(self, text: str, end: str = "") -> None:
        if self._terminal:
            print(f"\r\x1b[K{text}", end=end, file=sys.stderr, flush=True)
        else:
            print(text, file=sys.stderr, flush=True)


def _Listener(notes: _CompileNotes) -> Any:  # noqa: N802 - a class, made where numba is imported
    from numba.core import event

    class Listener(event.Listener):
        """Passes the compiler's events on."""

        def on_start(self, event: Any) -> None:
            notes.start()

        def on_end(self, event: Any) -> None:
            notes.end()

    return Listener()
