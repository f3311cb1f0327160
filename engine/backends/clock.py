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
