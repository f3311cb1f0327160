"""The compiled scheduler against a plain-Python reference, its invariants, and timelines computed by hand."""

from __future__ import annotations

import math
from itertools import cycle
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core.scheduler import commit, plan
from engine.core.state import (
    DECODING,
    FINISHED,
    ITL_BINS,
    ITL_BINS_PER_E,
    ITL_LOWEST_S,
    NOT_ADMITTED,
    PREEMPTED,
    PREFILL_ORDERS,
    PREFILLING,
    State,
)
from tests.engine.core.cases import (
    MOST_ITERATIONS,
    TTFT_TARGET_S,
    Case,
    Figures,
    accept,
    batch,
    cases,
    elapsed,
    iterate,
    queue,
    run,
    wake,
)
from tests.engine.core.reference import Engine, Request

PHASES = {
    "queued": (NOT_ADMITTED, PREEMPTED),
    "prefilling": (PREFILLING,),
    "decoding": (DECODING,),
    "finished": (FINISHED,),
}


@pytest.mark.parametrize("prefill", PREFILL_ORDERS)
@settings(max_examples=120, deadline=None)
@given(data=st.data())
def test_every_iteration_agrees_with_the_reference(prefill: str, data: st.DataObject) -> None:
    _assert_agrees_with_the_reference(data.draw(cases(prefill=(prefill,))))


def _assert_agrees_with_the_reference(case: Case) -> State:
    (state, feed), reference = case.system(), case.reference()
    for count, (candidates, token_budget) in enumerate(cycle(case.actions)):
        assert count < MOST_ITERATIONS
        more = wake(state, feed)
        assert more == (not reference.done)
        if not more:
            break
        reference.wake()
        assert state.instances["now"][0] == reference.now
        plan(state, 0, candidates, token_budget)
        assert batch(state) == reference.plan(candidates, token_budget)
        _assert_same_requests(state, reference)
        accept(state, case)
        seconds = elapsed(state, case)
        assert state.accepted[0, : len(reference.decodes)].tolist() == reference.accepted()
        commit(state, 0, seconds)
        reference.commit(seconds)
        _assert_same_requests(state, reference)
    _assert_same_totals(state, reference)
    return state


def _assert_same_requests(state: State, reference: Engine) -> None:
    engine = Figures(state)
    assert engine["now"] == reference.now
    assert engine["free_blocks"] == reference.free_blocks
    assert state.running[0, : engine["num_running"]].tolist() == [
        *(request.number for request in reference.running if request.phase == "decoding"),
        *(request.number for request in reference.running if request.phase == "prefilling"),
    ]
    for row, request in zip(state.requests, reference.requests, strict=True):
        assert row["phase"] in PHASES[request.phase]
        assert row["generated"] == request.generated
        assert row["preemptions"] == request.preemptions
        assert row["blocks"] == reference.blocks(request.slots)
        assert _same_time(row["admitted"], request.admitted)
        if request.phase != "finished":
            assert (row["computed"], row["context"]) == (request.cached, request.context)
        if request.emissions:
            assert row["first_token"] == request.emissions[0][0]
            assert row["last_token"] == request.emissions[-1][0]
            assert row["max_itl"] == max(request.gaps, default=0.0)
        else:
            assert math.isnan(row["first_token"])


def _same_time(a: float, b: float) -> bool:
    return a == b or (math.isnan(a) and math.isnan(b))


def _assert_same_totals(state: State, reference: Engine) -> None:
    engine = Figures(state)
    requests = reference.requests
    for row, request in zip(state.requests, requests, strict=True):
        assert row["drafted"] == sum(drafted for drafted, _ in request.drafts)
        assert row["accepted"] == sum(accepted for _, accepted in request.drafts)
    assert engine["drafted"] == sum(drafted for r in requests for drafted, _ in r.drafts)
    assert engine["accepted"] == sum(accepted for r in requests for _, accepted in r.drafts)
    assert engine["decode_steps"] == sum(len(r.drafts) for r in requests)
    assert engine["preemptions"] == sum(r.preemptions for r in requests)
    bins = np.repeat(np.arange(ITL_BINS), state.itl[0])
    gaps = sorted(gap for r in requests for gap in r.gaps)
    assert len(bins) == len(gaps)
    np.testing.assert_allclose(ITL_LOWEST_S * np.exp((bins + 0.5) / ITL_BINS_PER_E), gaps, rtol=0.00502)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_blocks_are_conserved_and_never_overcommitted(case: Case) -> None:
    state, feed = case.system()
    engine, requests = state.instances, state.requests
    lowest = case.total_blocks
    for _ in iterate(state, feed, case):
        assert engine["free_blocks"][0] >= 0
        assert engine["free_blocks"][0] + requests["blocks"].sum() == case.total_blocks
        assert np.all(requests["blocks"] >= 0)
        lowest = min(lowest, int(engine["free_blocks"][0]))
    assert engine["free_blocks"][0] == case.total_blocks
    assert 0 <= state.totals["lowest_free_blocks"][0] <= lowest


@settings(max_examples=100, deadline=None)
@given(cases())
def test_each_request_in_a_batch_holds_blocks_for_all_it_will_cache(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        held = state.requests["blocks"] * case.block_size
        assert np.all(held >= state.requests["computed"] * (state.requests["phase"] != FINISHED))
        if moment == "planned":
            for r, tokens in batch(state):
                assert held[r] >= state.requests["computed"][r] + tokens


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_running_list_is_in_order_of_arrival_with_decodes_first(case: Case) -> None:
    state, feed = case.system()
    engine = Figures(state)
    for moment, *_ in iterate(state, feed, case):
        running = state.running[0, : engine["num_running"]]
        phases = state.requests["phase"][running]
        assert len(running) <= case.max_num_seqs
        assert np.all(np.diff(running) > 0)
        assert np.all(phases[: engine["num_decoding"]] == DECODING)
        assert np.all(phases[engine["num_decoding"] :] == PREFILLING)
        if moment == "begin":
            assert len(running) - engine["num_decoding"] <= (case.prefill in ("chunked", "turns"))


@settings(max_examples=100, deadline=None)
@given(cases())
def test_candidates_stay_within_c_and_the_output_limit_and_prompts_within_n_unless_one_is_whole(
    case: Case,
) -> None:
    state, feed = case.system()
    engine = Figures(state)
    for moment, candidates, token_budget in iterate(state, feed, case):
        if moment != "planned":
            continue
        planned = batch(state)
        decodes, prefills = planned[: engine["num_decodes"]], planned[engine["num_decodes"] :]
        for r, tokens in decodes:
            request = state.requests[r]
            assert 1 <= tokens <= 1 + candidates
            assert request["generated"] + tokens <= request["output"]
        alone = case.prefill in ("whole", "first") and len(prefills) == 1
        assert alone or sum(tokens for _, tokens in prefills) <= token_budget
        assert all(tokens >= 1 for _, tokens in prefills)
        assert engine["decode_tokens"] == sum(tokens for _, tokens in decodes)
        assert engine["prefill_tokens"] == sum(tokens for _, tokens in prefills)
        assert engine["candidate_steps"] == max((tokens - 1 for _, tokens in decodes), default=0)
        assert engine["decode_kv_tokens"] == sum(state.requests["computed"][r] for r, _ in decodes)


@settings(max_examples=100, deadline=None)
@given(cases(prefill=("whole", "first")))
def test_a_prompt_that_must_not_be_cut_is_computed_in_one_iteration(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        if moment == "planned":
            decodes = state.batches["num_decodes"][0]
            assert [tokens for _, tokens in batch(state)[decodes:]] == [
                state.requests["context"][r] for r, _ in batch(state)[decodes:]
            ]


@settings(max_examples=100, deadline=None)
@given(cases(prefill=("first", "turns")))
def test_prompts_and_decodes_apart_share_no_iteration_and_neither_waits_without_need(case: Case) -> None:
    (state, feed), prompts_before = case.system(), False
    engine, requests = Figures(state), state.requests
    for moment, *_ in iterate(state, feed, case):
        if moment == "begin":
            decoding = bool(engine["num_decoding"])
            could_run = engine["num_running"] > engine["num_decoding"] or _head_fits(state)
        if moment == "planned":
            assert (engine["num_decodes"] == 0) != (engine["num_prefills"] == 0)
            decodes_turn = case.prefill == "turns" and prompts_before and decoding
            assert (engine["num_prefills"] > 0) == (could_run and not decodes_turn)
            assert decoding or engine["num_prefills"] > 0
            prompts_before = engine["num_prefills"] > 0
            # Who sits out keeps its cache: only decodes that run can need another's blocks.
            assert not prompts_before or np.all(requests["blocks"][requests["phase"] == DECODING] > 0)


def _head_fits(state: State) -> bool:
    """Whether the first of the queue could be admitted, by what the tables say."""
    engine, requests = Figures(state), state.requests
    waiting = queue(state)
    if not waiting or engine["num_running"] == engine["max_num_seqs"]:
        return False
    need = -(-int(requests["context"][waiting[0]]) // int(engine["block_size"]))
    return bool(need + (engine["watermark_blocks"] if engine["num_running"] else 0) <= engine["free_blocks"])


@settings(max_examples=100, deadline=None)
@given(cases())
def test_no_request_is_served_a_prompt_token_before_one_that_arrived_earlier(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        if moment != "planned":
            continue
        served = [r for r, _ in batch(state)[state.batches["num_decodes"][0] :]]
        assert served == sorted(served)
        waiting = np.isin(state.requests["phase"], (NOT_ADMITTED, PREEMPTED))
        assert not served or not waiting[: served[-1]].any()


@settings(max_examples=100, deadline=None)
@given(cases())
def test_nothing_is_lost_or_duplicated(case: Case) -> None:
    state, feed = case.system()
    engine = Figures(state)
    for moment, *_ in iterate(state, feed, case):
        planned = [r for r, _ in batch(state)]
        if moment == "planned":
            assert len(planned) == len(set(planned))
        running = state.running[0, : engine["num_running"]].tolist()
        waiting, to_come = queue(state), range(feed.next[0], len(case.requests))
        finished = np.flatnonzero(state.requests["phase"] == FINISHED).tolist()
        assert sorted([*running, *waiting, *to_come, *finished]) == list(range(len(case.requests)))
        assert waiting == sorted(waiting)
        assert engine["finished"] == len(finished)
    assert np.all(state.requests["phase"] == FINISHED)
    assert np.array_equal(state.requests["generated"], state.requests["output"])
    assert engine["emitted_tokens"] == sum(output for _, _, output, _ in case.requests)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_running_counters_equal_what_the_request_table_says(case: Case) -> None:
    state, feed = case.system()
    engine, requests = Figures(state), state.requests
    for moment, *_ in iterate(state, feed, case):
        now = engine["now"]
        released = np.arange(len(requests)) < feed.next[0]
        if moment == "begin":
            assert np.array_equal(released, requests["arrival"] <= now)
        prefilled = np.isin(requests["phase"], (DECODING, FINISHED))
        remaining = np.where(released & ~prefilled, requests["context"] - requests["computed"], 0)
        assert engine["waiting_tokens"] == remaining.sum()
        _assert_costs(engine, requests, now)
    assert engine["waiting_tokens"] == 0
    assert engine["tpot_weight"] == pytest.approx(0.0, abs=1e-12)


def _assert_costs(engine: Figures, requests: np.ndarray, now: float) -> None:
    started = ~np.isnan(requests["first_token"])
    deadline = requests["arrival"] + TTFT_TARGET_S
    first = np.where(started, requests["first_token"], now)
    late = np.maximum(0.0, first - deadline)
    assert engine["violations"] == np.count_nonzero(late > 0.0)
    assert engine["overdue"] == np.count_nonzero((late > 0.0) & ~started)
    assert engine["lateness"] == pytest.approx(late.sum(), abs=1e-9)
    several = started & (requests["output"] > 1)
    weight = 1.0 / np.maximum(requests["output"] - 1, 1)
    alive = several & (requests["phase"] != FINISHED)
    last = np.where(alive, now, requests["last_token"])
    assert engine["tpot_weight"] == pytest.approx(weight[alive].sum(), abs=1e-9)
    assert engine["tpot_cost"] == pytest.approx(((last - first) * weight)[several].sum(), abs=1e-9)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_busy_time_and_batch_totals_add_up_over_iterations(case: Case) -> None:
    state, feed = case.system()
    iterations, batched, busy = 0, 0, 0.0
    for moment, *_ in iterate(state, feed, case):
        if moment == "planned":
            iterations += 1
            batched += len(batch(state))
            busy += elapsed(state, case)
    engine = Figures(state)
    assert (engine["iterations"], engine["batched_requests"], engine["busy_s"]) == (iterations, batched, busy)


def test_two_requests_on_a_constant_iteration_of_one_second() -> None:
    state = _timeline(((0.0, 4, 3), (0.5, 6, 2)), c=0, n=4)
    assert state.requests["admitted"].tolist() == [0.0, 1.0]
    assert state.requests["first_token"].tolist() == [1.0, 3.0]
    assert state.requests["last_token"].tolist() == [3.0, 4.0]
    assert state.totals["iterations"][0] == 4
    assert state.totals["violations"][0] == 1
    assert state.totals["lateness"][0] == 1.5
    assert state.totals["tpot_cost"][0] == 1.0 + 1.0


def test_two_prompts_share_one_budget() -> None:
    state = _timeline(((0.0, 3, 1), (0.0, 4, 2)), c=0, n=5)
    assert state.requests["first_token"].tolist() == [1.0, 2.0]
    assert state.requests["last_token"].tolist() == [1.0, 3.0]
    assert state.totals["batched_requests"][0] == 2 + 1 + 1


# Decodes of one request while another's prompt of 6 tokens comes, at n = 4.
INTERRUPTED = ((0.0, 2, 6), (0.5, 6, 2))


def test_chunks_beside_decodes_delay_neither() -> None:
    state = _timeline(INTERRUPTED, c=0, n=4)
    assert state.requests["first_token"].tolist() == [1.0, 3.0]
    assert state.requests["last_token"].tolist() == [6.0, 4.0]
    assert state.requests["max_itl"].tolist() == [1.0, 1.0]


def test_a_whole_prompt_beside_decodes_may_exceed_n() -> None:
    state = _timeline(INTERRUPTED, c=0, n=4, prefill="whole")
    assert state.requests["first_token"].tolist() == [1.0, 2.0]
    assert state.requests["last_token"].tolist() == [6.0, 3.0]
    assert state.requests["max_itl"].tolist() == [1.0, 1.0]


def test_prompts_first_let_decodes_wait_for_all_of_them() -> None:
    state = _timeline((*INTERRUPTED, (0.5, 3, 1)), c=0, n=4, prefill="first")
    assert state.requests["first_token"].tolist() == [1.0, 2.0, 3.0]
    assert state.requests["last_token"].tolist() == [8.0, 4.0, 3.0]
    assert state.requests["max_itl"].tolist() == [3.0, 2.0, 0.0]


def test_in_turns_a_decode_follows_every_chunk() -> None:
    state = _timeline(INTERRUPTED, c=0, n=4, prefill="turns")
    assert state.requests["first_token"].tolist() == [1.0, 5.0]
    assert state.requests["last_token"].tolist() == [8.0, 6.0]
    assert state.requests["max_itl"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("prefill", ["whole", "first"])
def test_whole_prompts_fill_n_in_order_and_none_overtakes(prefill: str) -> None:
    state = _timeline(((0.0, 3, 1), (0.0, 1, 1), (0.0, 2, 1)), c=0, n=5, prefill=prefill)
    assert state.requests["first_token"].tolist() == [1.0, 1.0, 2.0]
    later = _timeline(((0.0, 3, 1), (0.0, 4, 1), (0.0, 1, 1)), c=0, n=5, prefill=prefill)
    assert later.requests["first_token"].tolist() == [1.0, 2.0, 2.0]


def test_no_prompt_starts_while_n_is_zero() -> None:
    for prefill in PREFILL_ORDERS:
        case = Case(1, 100, 0, 8, ((0.0, 2, 6, (False,) * 6), (0.5, 6, 2, (False,) * 2)), ((0, 4), (0, 0)), prefill)
        state, feed = case.system()
        for moment, _, token_budget in iterate(state, feed, case):
            if moment == "planned" and token_budget == 0:
                assert state.batches["num_prefills"][0] == 0 < state.batches["num_decodes"][0]


def test_perfect_drafts_emit_one_plus_c_tokens_an_iteration() -> None:
    state = _timeline(((0.0, 2, 8),), c=3, n=8, agrees=True)
    assert state.requests["last_token"][0] == 3.0
    assert state.requests["drafted"][0] == 3 + 2
    assert state.requests["accepted"][0] == 5


def test_wrong_drafts_emit_one_token_an_iteration() -> None:
    state = _timeline(((0.0, 2, 4),), c=3, n=8, agrees=False)
    assert state.requests["last_token"][0] == 4.0
    assert state.requests["drafted"][0] == 2 + 1 + 0
    assert state.requests["accepted"][0] == 0


def test_a_seat_is_taken_in_the_iteration_after_it_became_free() -> None:
    state = _timeline(((0.0, 1, 2), (0.0, 1, 1), (0.0, 1, 1)), c=0, n=8, max_num_seqs=1)
    assert state.requests["admitted"].tolist() == [0.0, 2.0, 3.0]
    assert state.requests["first_token"].tolist() == [1.0, 3.0, 4.0]


def test_an_idle_engine_jumps_to_the_next_arrival() -> None:
    state = _timeline(((2.0, 1, 1), (10.0, 1, 1)), c=0, n=8)
    assert state.requests["first_token"].tolist() == [3.0, 11.0]
    assert state.totals["busy_s"][0] == 2.0


def test_the_latest_arrival_is_preempted_and_recomputes_what_it_had() -> None:
    state = _timeline(((0.0, 2, 3), (0.0, 2, 3)), c=0, n=8, total_blocks=5)
    assert state.requests["preemptions"].tolist() == [0, 1]
    assert state.requests["first_token"].tolist() == [1.0, 1.0]
    assert state.requests["last_token"].tolist() == [3.0, 5.0]
    assert state.requests["max_itl"].tolist() == [1.0, 3.0]
    assert state.requests["generated"].tolist() == [3, 3]


def test_nothing_is_admitted_in_an_iteration_that_had_to_preempt() -> None:
    requests = ((0.0, 2, 10, (True,) * 10), (0.0, 2, 10, (False,) * 10))
    case = Case(1, 12, 0, 2, requests, ((3, 64), (3, 64), (0, 64), (0, 64)))
    _assert_agrees_with_the_reference(case)
    state, feed = case.system()
    batches = [batch(state) for moment, *_ in iterate(state, feed, case) if moment == "planned"]
    assert batches[:4] == [[(0, 2), (1, 2)], [(0, 4), (1, 4)], [(0, 1)], [(0, 1), (1, 4)]]


def test_the_watermark_delays_the_second_request_but_never_the_first() -> None:
    state = _timeline(((0.0, 3, 1), (0.0, 2, 1)), c=0, n=8, total_blocks=5, watermark_blocks=1)
    assert state.requests["admitted"].tolist() == [0.0, 1.0]


def _timeline(requests: tuple, *, c: int, n: int, agrees: bool = False, **limits: Any) -> State:
    """Run (arrival, prompt, output) requests with blocks of one token and iterations of one second."""
    rows = tuple((arrival, prompt, output, (agrees,) * output) for arrival, prompt, output in requests)
    sizes = {"total_blocks": 100, "watermark_blocks": 0, "max_num_seqs": 8, **limits}
    return run(_OneSecond(block_size=1, requests=rows, actions=((c, n),), **sizes))


class _OneSecond(Case):
    def elapsed(self, batch_tokens: int, batch_size: int) -> float:
        return 1.0


@settings(max_examples=100, deadline=None)
@given(cases())
def test_recomputing_after_preemption_emits_no_token_twice(case: Case) -> None:
    state, feed = case.system()
    seen = np.zeros(len(case.requests), dtype=int)
    for moment, *_ in iterate(state, feed, case):
        generated = state.requests["generated"].astype(int)
        assert np.all(generated >= seen)
        if moment == "committed":
            assert state.batches["emitted_tokens"][0] == (generated - seen).sum()
            served = {r for r, _ in batch(state)}
            assert {int(r) for r in np.flatnonzero(generated > seen)} <= served
        seen = generated
    assert seen.tolist() == [output for _, _, output, _ in case.requests]


def test_a_storm_of_preemptions_ends_and_spares_the_first_arrival() -> None:
    requests = tuple((0.0, 4, 12, (True,) * 12) for _ in range(8))
    case = Case(1, 17, 0, 8, requests, ((3, 64),))
    state = _assert_agrees_with_the_reference(case)
    assert state.totals["preemptions"][0] > len(requests)
    assert state.requests["preemptions"][0] == 0


def test_the_reference_itself_accepts_only_up_to_the_first_disagreement() -> None:
    request = Request(0, 0.0, 1, 6, [True, True, True, False, True, True])
    engine = Engine([request], block_size=1, total_blocks=10, watermark_blocks=0, max_num_seqs=1)
    for tokens in (1, 3, 2):
        engine.plan(4, 8)
        engine.commit(1.0)
        assert request.emissions[-1][1] == tokens
    assert engine.done
