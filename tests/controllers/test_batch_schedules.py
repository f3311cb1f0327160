"""vLLM's and TensorRT-LLM's schedules by batch size, and P-PAS."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from controllers.compiled import KernelController
from controllers.p_pas import PPas
from controllers.sglang_adaptive import SglangAdaptive, default_slots
from controllers.trtllm_schedule import TrtllmSchedule
from controllers.vllm_schedule import VllmSchedule
from tests.controllers.observed import linear_plant, observation

PLANT = linear_plant(0.01, 1e-5, 0.0, 1e-3)


def _ready(controller: KernelController) -> KernelController:
    controller.reset(PLANT)
    return controller


@pytest.mark.parametrize(
    ("batch", "candidates"),
    [(0, 3), (1, 3), (16, 3), (17, 3), (31, 3), (32, 2), (128, 2), (255, 2), (256, 0), (9999, 0)],
)
def test_vllms_gaps_and_sizes_past_the_end_keep_the_k_before_them(batch: int, candidates: int) -> None:
    controller = _ready(VllmSchedule(schedule=[(1, 16, 3), (32, 128, 2), (256, 2048, 0)], total_budget=60_000))
    assert controller.choose(observation(num_decodes=batch)) == (candidates, 60_000 - batch * (1 + candidates) or 1)


def test_vllms_k_is_cut_to_the_configured_maximum() -> None:
    controller = _ready(VllmSchedule(schedule=[(1, 8, 7)], num_speculative_tokens=5))
    assert controller.choose(observation(num_decodes=2))[0] == 5


@pytest.mark.parametrize(
    ("queue", "prompt_tokens"),
    [
        ((), 1024 - 100 * 3 - 1),
        (((50, 0.5),), 1024 - 100 * 3 - 2),
        (((50, 0.5), (5000, 0.5), (7, 0.5)), 1024 - 100 * 3 - 2),
        (((720, 0.5), (3, 0.5)), 1024 - 100 * 3 - 2),
        (((723, 0.5), (3, 0.5)), 1024 - 100 * 3 - 1),
    ],
)
def test_vllms_draft_slots_come_off_the_budget_for_every_request_in_a_step(
    queue: tuple[tuple[float, float], ...], prompt_tokens: int
) -> None:
    """One a request for a draft model: 100 decodes with c = 1 take 300 tokens, every prompt that is served one more."""
    controller = _ready(VllmSchedule(schedule=[(1, 256, 1)], total_budget=1024, draft_slots=1))
    assert controller.choose(observation(queue, num_decodes=100)) == (1, prompt_tokens)


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        ([[2, 4, 1]], "must begin at batch size 1"),
        ([[1, 4, 1], [4, 8, 0]], r"\[4, 8, 0\] begins at or before 4"),
        ([[1, 4, 1], [9, 8, 0]], "ends before it begins"),
        ([[1, 4, -1]], "K must be at least 0"),
        ([], "schedule"),
    ],
)
def test_a_schedule_that_vllm_refuses_is_refused_with_its_entry(schedule: Any, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        VllmSchedule(schedule=schedule)


@pytest.mark.parametrize(("batch", "candidates"), [(0, 4), (1, 4), (4, 4), (5, 2), (8, 2), (9, 1), (32, 1), (33, 0)])
def test_tensorrts_bounds_are_upper_bounds_and_nothing_is_drafted_past_the_last(batch: int, candidates: int) -> None:
    controller = _ready(TrtllmSchedule(draft_len_schedule={8: 2, 4: 4, 32: 1}))
    assert controller.choose(observation(num_decodes=batch))[0] == candidates


@pytest.mark.parametrize("schedule", [{0: 1}, {4: -1}, {4: 99}, {}])
def test_an_impossible_draft_length_is_refused(schedule: dict[int, int]) -> None:
    with pytest.raises(ValidationError, match="draft_len_schedule"):
        TrtllmSchedule(draft_len_schedule=schedule)


def test_a_schedule_is_given_whole_or_not_at_all() -> None:
    """Entries that a command line adds one by one have texts as keys, beside the numbers of those there were."""
    assert TrtllmSchedule(draft_len_schedule=None).draft_len_schedule == {4: 4, 16: 3, 64: 1}  # type: ignore[arg-type]
    assert SglangAdaptive(slots=None).slots == default_slots()  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match="entries of 8 were added to others one by one"):
        TrtllmSchedule(draft_len_schedule={4: 4, "8": 2})  # type: ignore[dict-item]
    with pytest.raises(ValidationError, match="entries of 8 were added to others one by one"):
        SglangAdaptive(slots={1: {"candidate_steps": [1]}, "8": {"candidate_steps": [0]}})  # type: ignore[dict-item]


@given(st.integers(0, 300), st.integers(1, 4096))
def test_no_schedule_ever_stops_an_engine_that_decodes_nothing(batch: int, total: int) -> None:
    for controller in (VllmSchedule(total_budget=total), TrtllmSchedule(total_budget=total)):
        candidates, budget = _ready(controller).choose(observation(num_decodes=batch))
        assert budget == max(total - batch * (1 + candidates), 0 if batch else 1)


@pytest.mark.parametrize(
    ("decodes", "waiting", "total"), [(5, 2, 2048), (5, 9, 2048), (5, 1, 16384), (5, 0, 16384), (0, 3, 16384)]
)
def test_p_pas_takes_the_small_total_only_where_prompts_contend_with_decodes(
    decodes: int, waiting: int, total: int
) -> None:
    seen = observation(num_decodes=decodes, num_waiting=waiting)
    assert _ready(PPas(candidates=3)).choose(seen) == (3, total - 4 * decodes)
