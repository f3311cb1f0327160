"""A controller that fails: the fallback stands in, it is counted, and nothing is raised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from threading import Event
from typing import Any

import numpy as np
import pytest

from controllers.controller import Controller
from controllers.fixed import Fixed
from runs.live import Decision
from runs.server.guard import Guarded

FALLBACK = Fixed(candidates=1, token_budget=64)
LONG_S = 60.0


class Doing(Controller):
    """Chooses what a function of the load says."""

    def __init__(self, choose: Callable[[Any], Any]) -> None:
        self._choose = choose

    def choose(self, observation: Mapping[str, Any]) -> tuple[int, int]:
        return self._choose(observation.get("load"))  # type: ignore[no-any-return]


@contextmanager
def guarding(choose: Callable[[Any], Any], max_candidates: int = 4, limit_s: float = LONG_S) -> Iterator[Guarded]:
    guarded = Guarded(Doing(choose), FALLBACK, max_candidates, limit_s, most_failures=3)
    yield guarded
    guarded.close()


def chosen(guarded: Guarded, decoding: int = 1) -> tuple[int, int]:
    decision = guarded({}, decoding)
    assert isinstance(decision, Decision)
    return decision.candidates, decision.token_budget


def test_a_sound_controller_is_left_to_decide() -> None:
    with guarding(lambda _: (2, 7)) as guarded:
        assert chosen(guarded) == (2, 7)
        assert not guarded.faults
        assert guarded.fallbacks == 0


@pytest.mark.parametrize("nonsense", [None, (1.5, 64), (-1, 64), (1, -4), (1, 10**9)], ids=repr)
def test_nonsense_is_not_done(nonsense: Any) -> None:
    with guarding(lambda _: nonsense) as guarded:
        assert chosen(guarded) == (1, 64)
        assert guarded.faults == {"nonsense": 1}
        assert guarded.fallbacks == 1


def test_standing_still_is_nonsense_with_nothing_to_decode_and_a_choice_otherwise() -> None:
    with guarding(lambda _: (2, 0)) as guarded:
        assert chosen(guarded, decoding=0) == (1, 64)
        assert chosen(guarded, decoding=3) == (2, 0)


def test_more_candidates_than_the_drafter_proposes_are_cut_to_that() -> None:
    with guarding(lambda _: (3, 7), max_candidates=2) as guarded:
        assert chosen(guarded) == (2, 7)
    with guarding(lambda _: None, max_candidates=0) as guarded:
        assert chosen(guarded) == (0, 64)


def test_after_enough_failures_the_fallback_holds_for_good() -> None:
    asked: list[None] = []
    with guarding(lambda _: asked.append(None)) as guarded:
        assert {chosen(guarded) for _ in range(10)} == {(1, 64)}
    assert len(asked) == 3
    assert guarded.faults == {"nonsense": 3}
    assert guarded.fallbacks == 10


def test_one_that_is_late_reads_what_it_was_asked_with() -> None:
    go, seen, read = Event(), [], Event()

    def late(load: Any) -> tuple[int, int]:
        go.wait()
        seen.append(load[0])
        read.set()
        return 2, 7

    load = np.array([5.0])
    with guarding(late, limit_s=1e-3) as guarded:
        assert guarded({"load": load}, 1)[:2] == (1, 64)
        load[0] = 9.0
        go.set()
        read.wait()
    assert seen == [5.0]
    assert guarded.faults == {"overran": 1}
