"""SGLang's adaptive steps: thresholds, hysteresis, warm-up, and slots by batch size."""

from __future__ import annotations

from typing import Any

import pytest

from controllers.sglang_adaptive import SglangAdaptive, Slot
from tests.controllers.observed import linear_plant, observation, verified

PLANT = linear_plant(0.01, 1e-5, 0.0, 1e-3)


def _controller(**fields: Any) -> SglangAdaptive:
    controller = SglangAdaptive(**({"warmup_batches": 0, "update_interval": 1, "ema_alpha": 1.0} | fields))
    controller.reset(PLANT)
    return controller


def _steps(controller: SglangAdaptive, accepted: int, requests: int = 2) -> int:
    """The steps chosen after an iteration that accepted so many candidates of each request."""
    current = int(controller.choose(observation(num_decodes=requests))[0])
    return controller.choose(verified(requests, min(accepted, current), current))[0]


def test_steps_rise_while_nearly_everything_is_accepted() -> None:
    controller = _controller(initial_steps=1)
    assert [_steps(controller, accepted=7) for _ in range(4)] == [3, 5, 7, 7]


def test_steps_fall_as_far_as_the_average_is_low() -> None:
    """From 7: 0 accepted is at most 5 - 0.75, 3 - 0.75 and 1 - 0.75 = 0.25, so three moves in one update."""
    assert _steps(_controller(initial_steps=7), accepted=0) == 1
    assert _steps(_controller(initial_steps=7), accepted=2) == 3
    assert _steps(_controller(initial_steps=7), accepted=5) == 7


def test_hysteresis_moves_the_thresholds() -> None:
    """Average 2 at steps 5: falls to 3 where 2 <= 3 - 0.5 + down."""
    for down, steps in ((-0.5, 3), (-0.75, 5)):
        slots = {1: Slot(candidate_steps=[1, 3, 5], down_hysteresis=down)}
        assert _steps(_controller(slots=slots, initial_steps=5), accepted=2) == steps
    for up, steps in ((0.4, 3), (0.5, 1)):
        slots = {1: Slot(candidate_steps=[1, 3], up_hysteresis=up)}
        assert _steps(_controller(slots=slots, initial_steps=1), accepted=1) == steps


def test_zero_steps_try_again_at_the_next_update() -> None:
    controller = _controller(slots={1: Slot(candidate_steps=[0, 2], down_hysteresis=0.0)}, initial_steps=2)
    assert [_steps(controller, accepted=0) for _ in range(4)] == [0, 2, 0, 2]


def test_the_ceiling_caps_what_was_not_just_raised() -> None:
    slots = {1: Slot(candidate_steps=[1, 2, 5], down_hysteresis=-9.0, ceiling_coeff=1.0)}
    assert _steps(_controller(slots=slots, initial_steps=5), accepted=2) == 2


def test_nothing_moves_in_the_warm_up_and_between_updates() -> None:
    controller = _controller(initial_steps=7, warmup_batches=3, update_interval=2)
    assert [_steps(controller, accepted=0) for _ in range(5)] == [7, 7, 7, 7, 1]


@pytest.mark.parametrize(("requests", "steps"), [(1, 3), (7, 3), (8, 3), (31, 3), (32, 1), (63, 1), (64, 0), (500, 0)])
def test_a_slot_holds_from_its_batch_size_up_to_the_next(requests: int, steps: int) -> None:
    assert _controller().choose(observation(num_decodes=requests))[0] == steps


def test_slots_learn_apart() -> None:
    controller = _controller()
    assert _steps(controller, accepted=0, requests=2) == 1
    assert controller.choose(observation(num_decodes=10))[0] == 3


def test_the_average_weighs_the_latest_iteration_as_configured() -> None:
    """(1 - 0.2) x 2 + 0.2 x 0 = 1.6 from the neutral start of 3 - 1."""
    controller = _controller(ema_alpha=0.2)
    controller.choose(verified(4, 0, 3))
    assert controller.current.memory.average[0, 0] == pytest.approx(1.6)
