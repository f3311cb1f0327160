"""What decides in a server: the controller, or a fixed setting where the controller has no answer."""

from __future__ import annotations

import time
from typing import Any

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.backends.guard import Guard
from runs.live import Decision


class Guarded:
    """Chooses as the controller does, or the fallback where the controller raises, is late or asks for the impossible.

    A c above what the drafter proposes is cut to that.

    Args:
        controller: reset.
        fallback: what is done in its place.
        max_candidates: most the engine's drafter proposes.
        limit_s: longest a decision is waited for.
        most_failures: failures in a row that switch the controller off.
    """

    def __init__(
        self, controller: Controller, fallback: Fixed, max_candidates: int, limit_s: float, most_failures: int
    ) -> None:
        self._guard = Guard(controller.choose, time_limit_s=limit_s, most_failures=most_failures)
        self._fallback = fallback.candidates, fallback.token_budget
        self._max_candidates = max_candidates
        self.fallbacks = 0
        """Decisions that were the fallback's."""

    def __call__(self, view: dict[str, Any], decoding: int) -> Decision:
        """The controller's decision, or the fallback."""
        begin = time.perf_counter()
        # A controller that is late still reads what it was asked with.
        answer = self._guard.ask({name: array.copy() for name, array in view.items()}, decoding)
        if answer is None:
            self.fallbacks += 1
        candidates, token_budget = answer or self._fallback
        return Decision(min(candidates, self._max_candidates), token_budget, time.perf_counter() - begin)

    @property
    def faults(self) -> dict[str, int]:
        """What the controller did wrong, and how often."""
        return {fault: number for fault, number in self._guard.tally.faults.items() if number}

    def close(self) -> None:
        """Ask the controller nothing more."""
        self._guard.close()
