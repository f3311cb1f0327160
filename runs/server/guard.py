"""Asks a controller and never fails: what it gets wrong is done by a fixed setting, counted and logged."""

from __future__ import annotations

import logging
import time
from collections import Counter
from typing import Any, Literal

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.core.action import ActionError
from runs.live import Decision, Strict

log = logging.getLogger(__name__)

Fault = Literal["raised", "nonsense", "overran"]

REST_PER_SECOND = 100.0
"""A controller that overran is left alone for so many times the time it took: overruns cost at most 1 % of the time."""
SECONDS_PER_WARNING = 10.0


class Guard:
    """Chooses as the controller does, or the fallback where the controller raises, asks for the impossible, or rests.

    What was chosen too late is thrown away, and the controller rests then (`REST_PER_SECOND`). A decision that never
    ends cannot be helped from here: the engine stands still, and /health says so.

    Args:
        controller: reset.
        fallback: what is done in its place.
        max_candidates: most the engine's drafter proposes.
        limit_s: longest a decision may take.
    """

    def __init__(self, controller: Controller, fallback: Fixed, max_candidates: int, limit_s: float) -> None:
        self._label, self._ask, self._limit_s = controller.label(), Strict(controller, max_candidates), limit_s
        self._fallback = min(fallback.candidates, max_candidates), fallback.token_budget
        self._rests_until = -1.0
        self._warned_at = -SECONDS_PER_WARNING
        self.faults: Counter[str] = Counter()
        """How often the controller did what."""
        self.fallbacks = 0
        """Decisions that were the fallback's."""

    def __call__(self, view: dict[str, Any], decoding: int) -> Decision:
        """The controller's decision, or the fallback."""
        begin = time.perf_counter()
        if begin >= self._rests_until:
            try:
                decision = self._ask(view, decoding)
                if decision.seconds <= self._limit_s:
                    return decision
                self._rests_until = begin + decision.seconds * (1.0 + REST_PER_SECOND)
                self._note("overran", f"took {decision.seconds:.3f} s, and decision_limit_s={self._limit_s:g}")
            except ActionError as error:
                self._note("nonsense", str(error), error)
            except Exception as error:
                self._note("raised", f"raised {type(error).__name__}: {error}", error)
        self.fallbacks += 1
        return Decision(*self._fallback, time.perf_counter() - begin)

    def _note(self, fault: Fault, what: str, error: Exception | None = None) -> None:
        """Count; log now and then, with the traceback the first time."""
        first = fault not in self.faults
        self.faults[fault] += 1
        now = time.perf_counter()
        if first or now - self._warned_at > SECONDS_PER_WARNING:
            self._warned_at = now
            log.warning(
                "controller %s: %s; candidates=%d token_budget=%d instead (%d times so far)",
                self._label,
                what,
                *self._fallback,
                self.faults.total(),
                exc_info=error if first else None,
            )
