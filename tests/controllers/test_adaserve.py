"""AdaServe: the budget comes from the predicted times, and candidates go where they are needed."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError

from controllers.adaserve import AdaServe, cheap_tokens
from engine.core.action import ActionGrid
from engine.latency.lookup import LookupGrid
from tests.controllers.observed import linear_plant, observation

GRID = ActionGrid(candidate_choices=(0, 1, 2, 4, 8), budget_choices=(64, 128, 256, 512))


def _controller(**fields: Any) -> AdaServe:
    controller = AdaServe(**fields)
    # A forward of n prompt tokens alone takes 10 ms + n x .05 ms: at 64 tokens 13.2 ms.
    controller.reset(linear_plant(0.010, 5e-5, 0.0, 0.0, GRID))
    return controller


def test_the_budget_is_where_a_forward_takes_half_as_long_again() -> None:
    # 1.5 x 13.2 ms = 19.8 ms = 10 ms + 196 x .05 ms.
    assert _controller().current.params.verified_tokens == pytest.approx(196.0)
    assert _controller(slowdown=100.0).current.params.verified_tokens == 512.0


def test_the_budget_is_read_off_the_last_time_that_keeps_within_it_where_times_fall() -> None:
    axes = np.array([0.0, 8.0]), np.array([0.0, 1e4]), np.array([0]), np.array([0, 64, 128, 256])
    seconds = np.broadcast_to(np.array([0.0, 0.010, 0.020, 0.018]), (2, 2, 1, 4)).copy()
    assert cheap_tokens(LookupGrid(*axes, seconds), 1.5) == pytest.approx(96.0)


@pytest.mark.parametrize(("decodes", "chosen"), [(0, 8), (1, 8), (20, 8), (22, 4), (39, 4), (40, 2), (98, 1), (99, 0)])
def test_c_is_the_largest_whose_tokens_fit_the_budget(decodes: int, chosen: int) -> None:
    assert _controller(verified_tokens=196).choose(observation(num_decodes=decodes)) == (chosen, 512)


def test_the_engine_serves_needs_first() -> None:
    wanted = _controller(tpot_target=0.03).speculation
    assert (wanted.allocation, wanted.tpot_target) == ("slo", 0.03)


@pytest.mark.parametrize("fields", [{"tpot_target": 0.0}, {"slowdown": 1.0}, {"verified_tokens": 0}, {"budget": 3}])
def test_impossible_settings_are_refused_by_key(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        AdaServe(**fields)
