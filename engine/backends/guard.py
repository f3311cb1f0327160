"""Guard around a controller: decisions have a time limit, and the engine continues without a controller that fails."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.core.choices import ActionError, check_action

log = logging.getLogger(__name__)

View = Mapping[str, NDArray[np.float32]]
"""One engine's telemetry (`engine.core.telemetry.as_dict`)."""

Choose = Callable[[View], Any]
"""A controller's `choose`: maps telemetry to (c, n) in tokens."""

SECONDS_PER_LOG_LINE = 10.0

Fault = Literal["raised", "overran", "nonsense"]


@dataclass
class Tally:
    """Outcome counts of the requested decisions."""

    asked: int = 0
    """Decisions requested while the controller was on."""
    raised: int = 0
    """The controller raised an exception."""
    overran: int = 0
    """It had not answered within the time limit, or was still busy with an earlier decision."""
    nonsense: int = 0
    """Its answer was not valid for the engine."""

    @property
    def failed(self) -> int:
        """Number of decisions that failed or came too late."""
        return sum(self.faults.values())

    @property
    def faults(self) -> dict[str, int]:
        """Kinds of fault and their counts."""
        return {name: getattr(self, name) for name in ("raised", "overran", "nonsense")}


def check_decision(answer: Any, num_decodes: int) -> tuple[int, int]:
    """Validated (c, n) from a controller's answer, given the number of decoding requests.

    Raises ActionError unless the answer is two whole numbers with which the engine makes progress.
    """
    try:
        candidates, token_budget = answer
    except (TypeError, ValueError) as error:
        raise ActionError(f"a decision is the two whole numbers (c, n), got {answer!r}") from error
    for name, value in (("candidates", candidates), ("token_budget", token_budget)):
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise ActionError(f"{name}={value!r} must be a whole number of tokens")
    check_action(int(candidates), max(int(token_budget), 1))
    if token_budget < 0 or (token_budget == 0 and num_decodes == 0):
        raise ActionError(
            f"token_budget={token_budget} with {num_decodes} requests decoding: the engine would make no progress"
        )
    return int(candidates), int(token_budget)


class Guard:
    """Calls a controller in a separate thread, so that its faults do not reach the engine.

    A decision that raises, is late or is invalid is counted and logged, at most every `SECONDS_PER_LOG_LINE`. The first
    exception is logged with its traceback. While the controller is still busy with a late decision it is not called
    again and the engine does not wait: overruns cost at most `time_limit_s` per decision. After `most_failures`
    consecutive calls without an answer in time the controller is switched off.

    Args:
        choose: called with telemetry that is not modified afterwards.
        time_limit_s: longest wait for one decision.
        most_failures: consecutive failures after which the controller is switched off.
        clock: seconds, for the distance between log lines.
        log: receives the log lines.
    """

    def __init__(
        self,
        choose: Choose,
        *,
        time_limit_s: float,
        most_failures: int,
        clock: Callable[[], float] = time.monotonic,
        log: logging.Logger = log,
    ) -> None:
        self.tally = Tally()
        self.on = True
        self._choose = choose
        self._time_limit_s = time_limit_s
        self._most_failures = most_failures
        self._clock = clock
        self._log = log
        self._in_a_row = 0
        self._logged_at = -np.inf
        self._unlogged = 0
        self._questions: SimpleQueue[View | None] = SimpleQueue()
        self._answers: SimpleQueue[tuple[Any, BaseException | None]] = SimpleQueue()
        self._busy = False
        self._thread: threading.Thread | None = None

    def ask(self, view: View, num_decodes: int) -> tuple[int, int] | None:
        """(c, n) for this number of decoding requests, or None: the engine's own setting holds."""
        if not self.on:
            return None
        self.tally.asked += 1
        if self._busy and not self._answered(0.0):
            self._count("overran", "is still busy with an earlier decision")
            return None
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="governor", daemon=True)
            self._thread.start()
        self._busy = True
        self._questions.put(view)
        answer = self._answered(self._time_limit_s)
        if answer is None:
            self._fail("overran", f"has not answered within {self._time_limit_s:g} s")
            return None
        decision, error = answer
        if error is not None:
            self._fail("raised", f"raised {type(error).__name__}: {error}", error)
            return None
        try:
            candidates, token_budget = check_decision(decision, num_decodes)
        except ActionError as refusal:
            self._fail("nonsense", f"answered nonsense: {refusal}")
            return None
        self._in_a_row = 0
        return candidates, token_budget

    def close(self) -> None:
        """End the thread; the controller is not called again."""
        self.on = False
        self._questions.put(None)

    def _answered(self, wait_s: float) -> tuple[Any, BaseException | None] | None:
        """Answer to the latest call, if it arrives within `wait_s`."""
        try:
            answer = self._answers.get(block=wait_s > 0.0, timeout=wait_s or None)
        except Empty:
            return None
        self._busy = False
        return answer

    def _serve(self) -> None:
        while (view := self._questions.get()) is not None:
            try:
                self._answers.put((self._choose(view), None))
            except BaseException as error:
                self._answers.put((None, error))

    def _fail(self, kind: Fault, what: str, error: BaseException | None = None) -> None:
        """Count a call without a usable answer."""
        self._in_a_row += 1
        self._count(kind, what, error)
        if self._in_a_row >= self._most_failures:
            self.close()
            self._log.error("the controller is switched off after %d failures in a row; it %s", self._in_a_row, what)

    def _count(self, kind: Fault, what: str, error: BaseException | None = None) -> None:
        """Count a decision that the engine has to do without."""
        setattr(self.tally, kind, getattr(self.tally, kind) + 1)
        self._unlogged += 1
        if self._clock() - self._logged_at >= SECONDS_PER_LOG_LINE:
            self._log.warning(
                "the controller %s; the engine's own setting holds for this step (%d failures since the last line)",
                what,
                self._unlogged,
                exc_info=error if self.tally.raised == 1 else None,
            )
            self._logged_at = self._clock()
            self._unlogged = 0
