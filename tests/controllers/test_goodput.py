"""SmartSpec's goodput: its formula, its fit, and the released code's habits."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from controllers.acceptance import expected_tokens
from controllers.goodput import Goodput
from tests.controllers.observed import linear_plant, observation, verified

BASE_S, ROW_S, KV_S, STEP_S = 0.010, 1e-4, 1e-8, 1e-3


def _controller(**fields: Any) -> Goodput:
    controller = Goodput(**fields)
    controller.reset(linear_plant(BASE_S, ROW_S, KV_S, STEP_S))
    return controller


def _seconds(decodes: int, candidates: int, kv: float, prefill: float) -> float:
    return BASE_S + ROW_S * (decodes * (1 + candidates) + prefill) + KV_S * kv + STEP_S * candidates


@pytest.mark.parametrize("decodes", [1, 4, 16, 64])
@pytest.mark.parametrize("acceptance", [0.3, 0.6, 0.9])
def test_k_has_the_highest_goodput_of_all(decodes: int, acceptance: float) -> None:
    controller = _controller(initial_acceptance=acceptance)
    goodput = [decodes * expected_tokens(acceptance, k) / _seconds(decodes, k, 5000, 0) for k in range(9)]
    chosen = controller.choose(observation(num_decodes=decodes, decode_kv_tokens=5000))
    assert chosen == (int(np.argmax(goodput)), 512)


def test_the_acceptance_rate_is_a_moving_average_from_nine_tenths_of_the_share_accepted_so_far() -> None:
    """2 of 3 candidates of 5 requests are accepted, then nothing is drafted; 20 candidates' worth of belief in 0.9."""
    controller = _controller(forgetting=1.0)
    share = (5 * 2 + 20 * 0.9) / (5 * 3 + 20)
    controller.choose(verified(5, 2, 3, last_iteration_s=0.02))
    once = 0.9 + 0.25 * (share - 0.9)
    assert controller.current.memory.acceptance[0, 0] == pytest.approx(once)
    controller.choose(observation(num_decodes=5, iterations=1.0, last_num_decodes=5, last_iteration_s=0.02))
    assert controller.current.memory.acceptance[0, 0] == pytest.approx(once + 0.25 * (share - once))


def test_bad_luck_with_one_request_running_does_not_end_speculation() -> None:
    """Seven rejections in a row, one in 400 at 0.58: averaged one by one they would bring a to 0.12, and k to 0."""
    controller = _controller(initial_acceptance=0.58)
    for _ in range(7):
        chosen, _ = controller.choose(verified(1, 0, 1, last_iteration_s=0.0112))
    assert 0.58 * 0.75**7 < 0.12
    assert chosen > 0


def test_an_engine_that_stopped_speculating_tries_again() -> None:
    controller = _controller()
    for _ in range(400):
        controller.choose(verified(4, 0, 3, last_iteration_s=_seconds(4, 3, 0, 0)))
    silent = observation(num_decodes=4, iterations=1.0, last_num_decodes=4, last_iteration_s=_seconds(4, 0, 0, 0))
    assert controller.choose(silent)[0] == 0
    waited = next(count for count in range(20_000) if controller.choose(silent)[0] > 0)
    assert waited > 1000


def test_prompts_that_cannot_be_admitted_do_not_make_candidates_cheap() -> None:
    """With the cache full the next iteration prefills nothing, however long the queue is."""
    busy = {"num_decodes": 48, "free_seqs": 100, "queue": [(4000, 0.5)] * 3, "waiting_tokens": 12_000}
    controller = _controller(initial_acceptance=0.3, token_budget=4096)
    alone = controller.choose(observation(num_decodes=48))[0]
    assert controller.choose(observation(**busy, free_kv_tokens=100))[0] == alone
    assert controller.choose(observation(**busy, free_kv_tokens=60_000))[0] > alone


def test_the_fit_follows_an_engine_that_is_not_as_predicted() -> None:
    """Every iteration takes twice as long as profiled; after a few hundred the fit says so."""
    controller = _controller()
    random = np.random.default_rng(0)
    for _ in range(600):
        decodes, k = int(random.integers(1, 64)), int(random.integers(0, 9))
        kv, prefill = float(random.integers(0, 50_000)), float(random.integers(0, 512))
        seen = verified(
            decodes,
            0,
            k,
            last_decode_kv_tokens=kv,
            last_prefill_tokens=prefill,
            last_iteration_s=2.0 * _seconds(decodes, k, kv, prefill),
        )
        controller.choose(seen)
    params, memory = controller.current.params, controller.current.memory
    x = np.array([20_000, 10 * 4 + 256, 3, 1.0]) / params.scale
    assert float(memory.weights[0] @ x) == pytest.approx(2.0 * _seconds(10, 3, 20_000, 256), rel=0.02)


def test_k_is_chosen_anew_only_every_so_many_iterations() -> None:
    controller = _controller(every=3, initial_acceptance=0.9)
    seen = [observation(num_decodes=1), *[observation(num_decodes=64)] * 3]
    chosen = [controller.choose(o)[0] for o in seen]
    fresh = _controller(initial_acceptance=0.9).choose(observation(num_decodes=64))[0]
    assert chosen[0] == chosen[1] == chosen[2] != fresh == chosen[3]


def test_the_bonus_of_no_speculation_tips_a_close_decision() -> None:
    seen = observation(num_decodes=16)
    gain = [expected_tokens(0.25, k) / _seconds(16, k, 0, 0) for k in range(9)]
    assert 1.0 < max(gain) / gain[0] < 1.1
    assert _controller(initial_acceptance=0.25).choose(seen)[0] > 0
    assert _controller(initial_acceptance=0.25, zero_bonus=1.1).choose(seen)[0] == 0


def test_a_length_per_request_counts_what_the_gainers_gain() -> None:
    """Four requests accept 15 of 16, four 1 of 16: with candidates by gain the first four get nearly all of them."""
    rates = (4.0, 0, 0, 0, 0, 0, 0, 4.0)
    decodes, high, low = 8, 15 / 16, 1 / 16
    controller = _controller(per_request=True, token_budget=64)
    goodput = []
    for k in range(9):
        gains = sorted([high**j for j in range(1, 17)] * 4 + [low**j for j in range(1, 17)] * 4, reverse=True)
        goodput.append((decodes + sum(gains[: k * decodes])) / _seconds(decodes, k, 100, 0))
    chosen, _ = controller.choose(observation(num_decodes=decodes, decode_kv_tokens=100, rates=rates))
    assert chosen == int(np.argmax(goodput))
    alike = _controller(initial_acceptance=0.5, token_budget=64)
    assert alike.choose(observation(num_decodes=decodes, decode_kv_tokens=100, rates=rates))[0] < chosen


def test_lengths_per_request_need_an_engine_that_shares_by_acceptance() -> None:
    assert _controller().speculation is None
    wanted = _controller(per_request=True).speculation
    assert wanted is not None
    assert (wanted.allocation, wanted.score) == ("global", "acceptance")
