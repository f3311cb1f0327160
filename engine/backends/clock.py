"""The clock of an engine that runs in real time."""

from __future__ import annotations

import time
from typing import Protocol


class Clock(Protocol):
    """Seconds since the engine began."""

    def now(self) -> float:
        """The time in s; never runs backwards."""

    def wait_until(self, moment: float) -> None:
        """Return when `now()` is at least `moment`."""


class WallClock:
    """Real time, zero when it is made."""

    def __init__(self) -> None:
        self._zero = time.perf_counter()

    def now(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._zero

    def wait_until(self, moment: float) -> None:
        """Sleep until `moment`."""
        while (left := moment - self.now()) > 0:
            time.sleep(left)


class SteppedClock:
    """Real time that can be paused: it stops between `stop` and `go`, and jumps over waits.

    For callers that step an engine by hand: time between steps does not count, and no wait for an arrival sleeps.
    """

    def __init__(self) -> None:
        self._passed = 0.0
        self._going: float | None = None

    def now(self) -> float:
        """Seconds that the clock ran or jumped."""
        return self._passed + (0.0 if self._going is None else time.perf_counter() - self._going)

    def wait_until(self, moment: float) -> None:
        """Jump to `moment` if it lies in the future."""
        self.advance(moment - self.now())

    def advance(self, seconds: float) -> None:
        """Advance by this many seconds at once; a negative number counts as 0."""
        self._passed += max(0.0, seconds)

    def go(self) -> None:
        """Resume real time."""
        if self._going is None:
            self._going = time.perf_counter()

    def stop(self) -> None:
        """Pause."""
        self._passed, self._going = self.now(), None
