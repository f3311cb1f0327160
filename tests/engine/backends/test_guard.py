"""A controller's faults stay with the controller: the engine gets an answer in time, or none."""

from __future__ import annotations

import logging
import threading
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.backends.guard import SECONDS_PER_LOG_LINE, Guard, check_decision
from engine.core.choices import MAX_TOKEN_BUDGET, ActionError
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import allocate_observation, as_dict

SEEN = as_dict(allocate_observation(1, 4, 4))
LONG_S = 60.0


def _guard(choose: Any, **settings: Any) -> Guard:
    return Guard(choose, **{"time_limit_s": LONG_S, "most_failures": 3} | settings)


def test_a_good_decision_comes_through() -> None:
    guard = _guard(lambda view: (np.int64(3), 512))
    assert guard.ask(SEEN, 1) == (3, 512)
    assert (guard.tally.asked, guard.tally.failed) == (1, 0)


def test_the_controller_sees_one_engine_by_the_names_of_the_telemetry() -> None:
    views: list[Any] = []
    guard = _guard(lambda view: views.append(view) or (0, 64))
    guard.ask(SEEN, 0)
    assert {name: array.shape for name, array in views[0].items()} == {
        name: array.shape for name, array in SEEN.items()
    }


def test_one_that_raises_is_done_without_and_asked_again() -> None:
    answers = iter([ZeroDivisionError("no load"), SystemExit(), (2, 64)])

    def choose(_: Any) -> Any:
        answer = next(answers)
        if isinstance(answer, BaseException):
            raise answer
        return answer

    guard = _guard(choose)
    assert [guard.ask(SEEN, 1) for _ in range(3)] == [None, None, (2, 64)]
    assert guard.tally.raised == 2
    assert guard.on


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        3,
        "ab",
        (1,),
        (1, 2, 3),
        (1.0, 64),
        (True, 64),
        ("1", 64),
        (-1, 64),
        (MAX_CANDIDATES + 1, 64),
        (1, -1),
        (1, 0),
    ],
)
def test_nonsense_is_refused(nonsense: Any) -> None:
    guard = _guard(lambda view: nonsense)
    assert guard.ask(SEEN, num_decodes=0) is None
    assert guard.tally.nonsense == 1


def test_no_prompt_tokens_are_no_nonsense_while_requests_decode() -> None:
    assert check_decision((1, 0), num_decodes=1) == (1, 0)


@given(st.integers(0, MAX_CANDIDATES), st.integers(1, MAX_TOKEN_BUDGET), st.integers(0, 3))
def test_whatever_an_engine_can_run_is_accepted(candidates: int, token_budget: int, num_decodes: int) -> None:
    assert check_decision((candidates, token_budget), num_decodes) == (candidates, token_budget)


@given(st.tuples(st.integers(), st.integers()) | st.floats() | st.text() | st.lists(st.integers()))
def test_whatever_is_answered_is_accepted_or_refused(answer: Any) -> None:
    try:
        candidates, token_budget = check_decision(answer, 0)
    except ActionError:
        return
    assert 0 <= candidates <= MAX_CANDIDATES
    assert 1 <= token_budget <= MAX_TOKEN_BUDGET


def test_a_late_decision_is_not_waited_for_and_never_used() -> None:
    free, answered = threading.Event(), threading.Event()

    def choose(_: Any) -> tuple[int, int]:
        free.wait()
        answered.set()
        return 1, 64

    guard = _guard(choose, time_limit_s=1e-3, most_failures=10**9)
    assert guard.ask(SEEN, 1) is None
    assert guard.ask(SEEN, 1) is None
    assert guard.tally.overran == 2
    free.set()
    answered.wait()
    guard._time_limit_s = LONG_S
    # The late answer may be on its way; once it is there it is dropped, and the next question is asked anew.
    while guard.ask(SEEN, 1) is None:
        pass
    assert guard.tally.raised == guard.tally.nonsense == 0
    guard.close()


def test_one_that_hangs_is_waited_for_once_and_never_switched_off() -> None:
    free = threading.Event()
    asked: list[int] = []

    def choose(_: Any) -> tuple[int, int]:
        asked.append(1)
        free.wait()
        return 1, 64

    guard = _guard(choose, time_limit_s=1e-3, most_failures=3)
    assert [guard.ask(SEEN, 1) for _ in range(50)] == [None] * 50
    assert guard.tally.overran == 50
    assert len(asked) == 1
    assert guard.on
    free.set()
    guard.close()


def test_failures_in_a_row_switch_it_off_with_one_line(caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []

    def choose(_: Any) -> Any:
        calls.append(1)
        raise ValueError("broken")

    guard = _guard(choose, most_failures=3)
    with caplog.at_level(logging.WARNING):
        assert [guard.ask(SEEN, 1) for _ in range(10)] == [None] * 10
    assert len(calls) == guard.tally.asked == guard.tally.raised == 3
    assert not guard.on
    assert [record.levelname for record in caplog.records] == ["WARNING", "ERROR"]
    assert "switched off after 3 failures" in caplog.records[-1].getMessage()
    assert "ValueError: broken" in caplog.records[-1].getMessage()


def test_failures_with_successes_between_never_switch_it_off() -> None:
    answers = iter([None, (1, 64)] * 20)
    guard = _guard(lambda view: next(answers), most_failures=2)
    for _ in range(40):
        guard.ask(SEEN, 1)
    assert guard.on
    assert guard.tally.nonsense == 20


def test_the_log_is_written_at_most_every_few_seconds(caplog: pytest.LogCaptureFixture) -> None:
    now = [0.0]
    guard = _guard(lambda view: None, most_failures=1000, clock=lambda: now[0])
    with caplog.at_level(logging.WARNING):
        for _ in range(5):
            guard.ask(SEEN, 1)
        now[0] = SECONDS_PER_LOG_LINE
        guard.ask(SEEN, 1)
    assert len(caplog.records) == 2
    assert "(5 failures since" in caplog.records[1].getMessage()
