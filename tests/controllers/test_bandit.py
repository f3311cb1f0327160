"""Bandits: the best arm is found, rewards are as documented, and draws repeat with the seed."""

from __future__ import annotations

from typing import Any

import pytest

from controllers.bandit import Bandit
from engine.core.choices import ActionError
from tests.controllers.observed import linear_plant, observation

ARMS = {"candidates": [0, 2, 4], "token_budgets": [256, 1024]}


def _controller(**fields: Any) -> Bandit:
    controller = Bandit(**(ARMS | {"every": 1, "contextual": False} | fields))
    controller.reset(linear_plant(0.01, 1e-5, 0.0, 1e-3))
    return controller


def _play(
    controller: Bandit, seconds: dict[tuple[int, int], float], rounds: int, **load: float
) -> list[tuple[int, int]]:
    """Serve 4 requests, none of whose candidates is accepted, so an arm is as good as its iterations are short."""
    chosen, last = [], 0.0
    for _ in range(rounds):
        seen = observation(num_decodes=4, last_num_decodes=4 if last else 0, iterations=1, interval_s=last, **load)
        chosen.append(controller.choose(seen))
        last = seconds.get(chosen[-1], 0.03)
    return chosen


@pytest.mark.parametrize("kind", ["ucb", "exp3"])
def test_the_arm_of_the_shortest_iterations_is_played_most(kind: str) -> None:
    chosen = _play(_controller(kind=kind), {(2, 1024): 0.01}, 3000)
    assert set(chosen) == {(c, n) for c in ARMS["candidates"] for n in ARMS["token_budgets"]}
    assert chosen[-1000:].count((2, 1024)) > 600


def test_an_arm_under_which_a_deadline_passed_earned_nothing() -> None:
    controller = _controller()
    _play(controller, {}, 40, overdue=1.0)
    assert controller.current.memory.sums[0].sum() == 0.0
    assert controller.current.memory.pulls[0].sum() > 30


def test_nothing_is_learnt_while_nobody_decodes() -> None:
    controller = _controller()
    for _ in range(20):
        controller.choose(observation(iterations=1, interval_s=0.1))
    assert controller.current.memory.pulls[0].sum() == 0.0


def test_each_load_has_a_bandit_of_its_own() -> None:
    controller = _controller(contextual=True)
    for decodes in (1, 2, 3, 4, 100):
        controller.choose(observation(num_decodes=decodes))
        controller.choose(observation(num_decodes=decodes, last_num_decodes=decodes, interval_s=0.02))
    assert (controller.current.memory.pulls[0].sum(axis=1) > 0).sum() == 4


def test_the_same_seed_draws_the_same_arms() -> None:
    runs = [_play(_controller(kind="exp3", seed=seed), {}, 200) for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_an_arm_is_held_for_as_many_iterations_as_configured() -> None:
    chosen = _play(_controller(every=5), {}, 30)
    assert all(len(set(chosen[i : i + 5])) == 1 for i in range(0, 30, 5))


def test_arms_off_the_grid_are_refused() -> None:
    with pytest.raises(ActionError, match="token_budget=100"):
        _controller(token_budgets=[100])
