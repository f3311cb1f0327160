"""Spreads work that nothing else in the process can run beside."""

from __future__ import annotations

import time

SHARE = 0.2
"""Of the time."""


class Pace:
    """Says when to go on so that one kind of work takes at most `SHARE` of the time.

    Pieces of work shorter than `free_s` of CPU time are free.
    """

    def __init__(self, free_s: float) -> None:
        self._free_s = free_s
        self._next = 0.0

    def pause(self, spent: float) -> float:
        """Seconds until there may be more, after a piece of work that took `spent` seconds of CPU time."""
        if spent < self._free_s:
            return 0.0
        now = time.monotonic()
        self._next = max(now, self._next) + spent * (1.0 / SHARE - 1.0)
        return self._next - now
