"""Feedback on TTFT slack: hand-computed moves of the budget, and its bounds."""

from __future__ import annotations

import math
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from controllers.feedback import Feedback
from engine.core.telemetry import NO_DEADLINE_S
from tests.controllers.observed import linear_plant, observation


def _controller(**fields: Any) -> Feedback:
    controller = Feedback(lowest_budget=64, highest_budget=4096, **fields)
    controller.reset(linear_plant(0.01, 1e-5, 0.0, 1e-3))
    return controller


def _budgets(controller: Feedback, slack: float, times: int, interval_s: float = 0.1) -> list[int]:
    seen = observation(((500.0, slack),), num_decodes=4, interval_s=interval_s)
    return [controller.choose(seen)[1] for _ in range(times)]


def test_aimd_doubles_while_slack_is_short_and_steps_down_after() -> None:
    controller = _controller(kind="aimd", wanted_slack=0.5, step_tokens=100.0, backoff=0.5)
    assert _budgets(controller, 0.3, 4) == [128, 256, 512, 1024]
    assert _budgets(controller, 0.7, 3) == [924, 824, 724]


def test_pi_sets_the_logarithm_between_the_bounds() -> None:
    """Error 0.5 - 0.1 = 0.4; integral after 0.1 s at gain 1 is 0.04; share = 0.04 + 0.5 x 0.4 = 0.24."""
    controller = _controller(kind="pi", wanted_slack=0.5, proportional=0.5, integral_per_s=1.0)
    (budget,) = _budgets(controller, 0.1, 1)
    assert budget == round(64 * math.exp(0.24 * math.log(64)))


def test_pi_comes_to_rest_where_the_error_is_nought_and_does_not_wind_up() -> None:
    controller = _controller(kind="pi", wanted_slack=0.5, proportional=0.0, integral_per_s=1.0)
    assert _budgets(controller, 0.0, 100)[-1] == 4096
    assert len(set(_budgets(controller, 0.5, 5))) == 1
    assert _budgets(controller, 1.0, 20)[-1] == 64, "two seconds of plenty undo any length of shortage"


def test_a_request_without_a_deadline_is_not_urgent_and_an_overdue_one_is() -> None:
    controller = _controller(kind="aimd", step_tokens=1.0)
    preempted = observation(((500.0, NO_DEADLINE_S),), num_decodes=4)
    assert controller.choose(preempted)[1] == 64
    assert controller.choose(observation(num_decodes=4, overdue=1.0))[1] == 128


def test_slack_counts_against_the_controllers_own_target() -> None:
    """Telemetry told with l = 1 s and 0.4 s left is 1.4 s left of l = 2 s: 0.7, more than the wanted half."""
    seen = observation(((500.0, 0.4),), num_decodes=4)
    assert _controller(kind="aimd", wanted_slack=0.5, ttft_target=1.0).choose(seen)[1] == 128
    assert _controller(kind="aimd", wanted_slack=0.5, ttft_target=2.0).choose(seen)[1] == 64


@given(st.lists(st.floats(-5.0, 5.0), min_size=1, max_size=40), st.sampled_from(["pi", "aimd"]))
def test_the_budget_stays_within_its_bounds(slacks: list[float], kind: str) -> None:
    controller = _controller(kind=kind)
    for slack in slacks:
        assert 64 <= _budgets(controller, slack, 1)[0] <= 4096


def test_bounds_in_the_wrong_order_are_refused() -> None:
    with pytest.raises(ValidationError, match="lowest_budget=512 must be below highest_budget=512"):
        Feedback(lowest_budget=512, highest_budget=512)
