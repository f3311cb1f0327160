"""Notes on compilation, which is most of a first run."""

import sys
import threading

import pytest
from numba.core import event

from runs import progress


class _Stderr:
    """Keeps what is written, and wakes who waits for the first line."""

    def __init__(self) -> None:
        self.lines: list[str] = []
        self.written = threading.Event()

    def write(self, text: str) -> None:
        if text.strip():
            self.lines.append(text.strip())
            self.written.set()

    def flush(self) -> None:
        pass

    def isatty(self) -> bool:
        return False


def _watched(monkeypatch: pytest.MonkeyPatch) -> _Stderr:
    """Take the place of stderr, to which any compilation is worth a word."""
    stream = _Stderr()
    monkeypatch.setattr(sys, "stderr", stream)
    monkeypatch.setattr(progress, "NOTED_AFTER_S", 0.0)
    return stream


def test_compilation_is_announced_while_it_lasts_and_summed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = _watched(monkeypatch)
    with progress.compiling():
        with event.trigger_event("numba:compile"):
            assert stderr.written.wait(60.0)
            assert stderr.lines[0].startswith("compiling for this machine, once (up to a minute)")
        with event.trigger_event("numba:compile"), event.trigger_event("numba:compile"):
            pass
    assert stderr.lines[-1].startswith("compiled 3 functions in")


def test_nothing_is_said_where_nothing_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    stderr = _watched(monkeypatch)
    with progress.compiling():
        pass
    assert stderr.lines == []
