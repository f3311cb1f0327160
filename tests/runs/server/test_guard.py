"""A controller that fails: the fallback stands in, it is counted and logged, and nothing is raised."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

import pytest

from controllers.controller import Controller
from controllers.fixed import Fixed
from runs.live import Decision
from runs.server import guard as guarding
from runs.server.guard import REST_PER_SECOND, Guard

FALLBACK = Fixed(candidates=1, token_budget=64)


class Doing(Controller):
    """Chooses what a function says."""

    def __init__(self, choose: Callable[[], Any]) -> None:
        self._choose = choose

    def choose(self, observation: Mapping[str, Any]) -> tuple[int, int]:
        return self._choose()  # type: ignore[no-any-return]


def chosen(guard: Guard) -> tuple[int, int]:
    decision = guard({}, 1)
    assert isinstance(decision, Decision)
    return decision.candidates, decision.token_budget


def test_a_sound_controller_is_left_to_decide() -> None:
    guard = Guard(Fixed(candidates=2, token_budget=7), FALLBACK, 4, 10.0)
    assert chosen(guard) == (2, 7)
    assert not guard.faults
    assert guard.fallbacks == 0


@pytest.mark.parametrize(
    "nonsense",
    [
        None,
        "ab",
        (1,),
        (1, 2, 3),
        (1.5, 64),
        ("1", 64),
        (-1, 64),
        (5, 64),
        (1, -4),
        (1, 10**9),
        [[]],
    ],
    ids=repr,
)
def test_nonsense_is_not_done(nonsense: Any) -> None:
    guard = Guard(Doing(lambda: nonsense), FALLBACK, 4, 10.0)
    assert chosen(guard) == (1, 64)
    assert guard.faults == {"nonsense": 1}


def test_standing_still_is_nonsense_with_nothing_to_decode_and_a_choice_otherwise() -> None:
    guard = Guard(Doing(lambda: (2, 0)), FALLBACK, 4, 10.0)
    assert guard({}, 0)[:2] == (1, 64)
    assert guard({}, 3)[:2] == (2, 0)


def test_what_it_raises_is_logged_once_in_full_and_then_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Any:
        raise KeyError("memory")

    guard = Guard(Doing(fail), FALLBACK, 4, 10.0)
    with caplog.at_level(logging.WARNING):
        assert {chosen(guard) for _ in range(1000)} == {(1, 64)}
    assert guard.faults == {"raised": 1000}
    assert guard.fallbacks == 1000
    assert len(caplog.records) < 5, "a fault in every iteration does not fill the disk"
    assert caplog.records[0].exc_info is not None
    assert "raised KeyError: 'memory'; candidates=1 token_budget=64 instead" in caplog.text


def test_one_that_overruns_rests_so_that_overruns_cost_a_hundredth(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0

    def slow() -> Any:
        nonlocal now
        now += 1.0
        return 3, 128

    monkeypatch.setattr(guarding.time, "perf_counter", lambda: now)
    guard = Guard(Doing(slow), FALLBACK, 4, 0.1)
    asked = 0
    while now < 1000.0:
        before = now
        assert chosen(guard) == (1, 64), "what comes too late is not done either"
        asked += now > before
        now += 0.01
    assert guard.faults["overran"] == asked == pytest.approx(1000.0 / (1.0 + REST_PER_SECOND), abs=1)
    assert guard.fallbacks > 90_000


def test_the_fallback_too_keeps_to_what_the_drafter_proposes() -> None:
    guard = Guard(Doing(lambda: None), Fixed(candidates=3, token_budget=64), 0, 10.0)
    assert chosen(guard) == (0, 64)
