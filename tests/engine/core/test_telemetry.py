"""The observation against what the request table says, and its blindness to the future."""

from __future__ import annotations

from dataclasses import replace
from itertools import cycle, islice

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import state as core
from engine.core.acceptance import PRIOR_COUNT, PRIOR_RATE
from engine.core.feed import Feed
from engine.core.membership import submit
from engine.core.scheduler import commit, plan
from engine.core.state import DECODING, FINISHED, NOT_ADMITTED, PREEMPTED, PREFILLING, State
from engine.core.telemetry import (
    ARRIVALS,
    ARRIVED_TOKENS,
    DECODE_KV_TOKENS,
    EMITTED_TOKENS,
    FINISHED_REQUESTS,
    FINISHED_TOKENS,
    FREE_KV_TOKENS,
    FREE_SEQS,
    INTERVAL_S,
    ITERATIONS,
    LAST_CANDIDATES,
    LAST_DECODE_KV_TOKENS,
    LAST_EMITTED_TOKENS,
    LAST_ITERATION_S,
    LAST_NUM_DECODES,
    LAST_PREFILL_TOKENS,
    LOAD_FIELDS,
    NO_DEADLINE_S,
    NUM_DECODES,
    NUM_WAITING,
    OVERDUE,
    PREEMPTIONS,
    PREFILLING_TOKENS,
    RATE_BANDS,
    TTFT_TARGET_S,
    WAITING_TOKENS,
    Observation,
    Seen,
    allocate_observation,
    new_seen,
    observe,
)
from tests.engine.core.cases import TTFT_TARGET_S as TARGET_S
from tests.engine.core.cases import Case, Figures, accept, arrived, batch, cases, elapsed, iterate, wake

QUEUE_ROWS = 2
DEPTH = 5


def _look(state: State, rows: int = QUEUE_ROWS, depth: int = DEPTH, seen: Seen | None = None) -> Observation:
    observation = allocate_observation(1, rows, depth)
    for array in observation:
        array.fill(-7.0)
    observe(state, 0, new_seen(1) if seen is None else seen, observation)
    return observation


def _queue(state: State, feed: Feed) -> list[tuple[int, int, float]]:
    """(request, prompt tokens remaining, slack) in order of service: by arrival, as no request overtakes another."""
    engine = Figures(state)
    rows = []
    for r, request in enumerate(arrived(state, feed)):
        if request["phase"] in (NOT_ADMITTED, PREFILLING, PREEMPTED):
            slack = NO_DEADLINE_S if request["generated"] else request["arrival"] + TARGET_S - engine["now"]
            rows.append((r, int(request["context"] - request["computed"]), float(slack)))
    return rows


@settings(max_examples=100, deadline=None)
@given(cases())
def test_queue_rows_are_the_first_requests_in_order_of_service(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        if moment != "begin":
            continue
        queue = _look(state).queue[0]
        expected = [(tokens, np.float32(slack)) for _, tokens, slack in _queue(state, feed)[:QUEUE_ROWS]]
        expected += [(0.0, 0.0)] * (QUEUE_ROWS - len(expected))
        assert [tuple(row) for row in queue[:QUEUE_ROWS]] == expected


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_last_row_sums_the_tokens_of_the_requests_that_are_not_listed(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        if moment == "begin":
            rest = _queue(state, feed)[QUEUE_ROWS:]
            assert _look(state).queue[0, QUEUE_ROWS, 0] == sum(tokens for _, tokens, _ in rest)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_last_row_has_the_smallest_slack_of_the_requests_that_are_not_listed(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        if moment == "begin":
            rest = _queue(state, feed)[1:]
            smallest = min((slack for *_, slack in rest), default=0.0)
            assert _look(state, rows=1).queue[0, 1, 1] == np.float32(smallest)


def test_the_smallest_slack_is_found_behind_a_preempted_request_without_deadline() -> None:
    state = _state_with_one_preempted_and_two_new()
    queue = _look(state, rows=1).queue[0]
    assert queue[0].tolist() == [3.0, NO_DEADLINE_S]
    assert queue[1].tolist() == [5.0, TARGET_S - 0.5]
    queue = _look(state, rows=2).queue[0]
    assert queue[1].tolist() == [4.0, TARGET_S - 0.5]
    assert queue[2].tolist() == [1.0, TARGET_S]


def test_a_preempted_request_whose_first_token_is_out_has_no_deadline() -> None:
    queue = _look(_state_with_one_preempted_and_two_new(), rows=4).queue[0]
    assert queue[:, 0].tolist() == [3.0, 4.0, 1.0, 0.0, 0.0]
    assert queue[:, 1].tolist() == [NO_DEADLINE_S, TARGET_S - 0.5, TARGET_S, 0.0, 0.0]


def _state_with_one_preempted_and_two_new() -> State:
    """At 2.5 s: one request decodes, one was preempted after its first token, two have just arrived."""
    requests = ((0.0, 2, 4), (0.0, 2, 3), (2.0, 4, 1), (2.5, 1, 1))
    case = Case(1, 5, 0, 4, tuple((a, p, o, (False,) * o) for a, p, o in requests), ((0, 8),))
    state, feed = case.system()
    for seconds in (1.0, 1.5):
        wake(state, feed)
        plan(state, 0, 0, 8)
        accept(state, case)
        commit(state, 0, seconds)
    wake(state, feed)
    assert state.requests["phase"].tolist() == [DECODING, PREEMPTED, NOT_ADMITTED, NOT_ADMITTED]
    return state


def test_the_smallest_slack_behind_two_preempted_requests_is_that_of_the_new_one() -> None:
    requests = ((0.0, 1, 9), (0.0, 1, 9), (0.0, 1, 9), (1.0, 4, 1))
    case = Case(1, 10, 0, 4, tuple((a, p, o, (False,) * o) for a, p, o in requests), ((0, 8),))
    state, feed = case.system()
    for _ in range(6):
        wake(state, feed)
        plan(state, 0, 0, 8)
        accept(state, case)
        commit(state, 0, 0.25)
    wake(state, feed)
    phases = state.requests["phase"].tolist()
    assert phases.count(PREEMPTED) >= 1
    assert phases[3] == NOT_ADMITTED
    rest = _queue(state, feed)
    assert rest[-1][0] == 3
    for rows in range(1, len(rest)):
        slack = min(slack for *_, slack in rest[rows:])
        assert _look(state, rows=rows).queue[0, rows, 1] == np.float32(slack)


@settings(max_examples=100, deadline=None)
@given(cases())
def test_the_load_equals_what_the_request_table_says(case: Case) -> None:
    state, feed = case.system()
    for moment, *_ in iterate(state, feed, case):
        if moment != "begin":
            continue
        engine, requests = Figures(state), arrived(state, feed)
        load = _look(state).load[0]
        decoding, filling = requests["phase"] == DECODING, requests["phase"] == PREFILLING
        remaining = requests["context"] - requests["computed"]
        assert load[NUM_DECODES] == decoding.sum()
        assert load[DECODE_KV_TOKENS] == requests["computed"][decoding].sum()
        assert load[NUM_WAITING] == len(_queue(state, feed))
        assert load[WAITING_TOKENS] == sum(tokens for _, tokens, _ in _queue(state, feed))
        assert load[PREFILLING_TOKENS] == remaining[filling].sum()
        free = case.total_blocks - requests["blocks"].sum() - case.watermark_blocks
        assert load[FREE_KV_TOKENS] == max(0, free) * case.block_size
        assert load[FREE_SEQS] == case.max_num_seqs - (decoding | filling).sum()
        late = np.isnan(requests["first_token"]) & (requests["arrival"] + TARGET_S < engine["now"])
        assert load[OVERDUE] == late.sum()
        assert load[TTFT_TARGET_S] == np.float32(TARGET_S)


@settings(max_examples=60, deadline=None)
@given(cases())
def test_the_last_columns_describe_the_last_batch(case: Case) -> None:
    state, feed = case.system()
    planned: list[tuple[int, int]] = []
    kv_tokens, generated, seconds = 0, 0, 0.0
    for moment, candidates, _ in iterate(state, feed, case):
        if moment == "planned":
            planned = batch(state)
            decodes = [r for r, _ in planned[: state.batches["num_decodes"][0]]]
            prefill_tokens = sum(tokens for _, tokens in planned[len(decodes) :])
            kv_tokens = sum(state.requests["computed"][r] for r in decodes)
            generated = state.requests["generated"].sum()
            seconds = elapsed(state, case)
        elif moment == "committed":
            load = _look(state).load[0]
            assert load[LAST_NUM_DECODES] == len(decodes)
            assert load[LAST_PREFILL_TOKENS] == prefill_tokens
            assert load[LAST_DECODE_KV_TOKENS] == kv_tokens
            assert load[LAST_EMITTED_TOKENS] == state.requests["generated"].sum() - generated
            assert load[LAST_ITERATION_S] == np.float32(seconds)
            assert load[LAST_CANDIDATES] == candidates


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 4))
def test_counters_cover_exactly_the_time_since_the_last_observation(case: Case, every: int) -> None:
    state, feed = case.system()
    observer = new_seen(1)
    seen = {"now": 0.0, "arrivals": 0, "finished": 0, "emitted": 0, "preemptions": 0, "iterations": 0}
    tokens = {"arrived": 0, "finished": 0}
    for count, (moment, *_) in enumerate(iterate(state, feed, case)):
        if moment != "begin" or (count // 3) % every:
            continue
        load = _look(state, seen=observer).load[0]
        engine, requests = Figures(state), state.requests
        finished = requests["phase"] == FINISHED
        now = {
            "now": float(engine["now"]),
            "arrivals": int(feed.next[0]),
            "finished": int(finished.sum()),
            "emitted": int(requests["generated"].sum()),
            "preemptions": int(requests["preemptions"].sum()),
            "iterations": count // 3,
        }
        arrived = int(requests["prompt"][: feed.next[0]].sum())
        finished_tokens = int(requests["generated"][finished].sum())
        assert load[INTERVAL_S] == np.float32(now["now"] - seen["now"])
        assert load[ARRIVALS] == now["arrivals"] - seen["arrivals"]
        assert load[FINISHED_REQUESTS] == now["finished"] - seen["finished"]
        assert load[EMITTED_TOKENS] == now["emitted"] - seen["emitted"]
        assert load[PREEMPTIONS] == now["preemptions"] - seen["preemptions"]
        assert load[ITERATIONS] == now["iterations"] - seen["iterations"]
        assert load[ARRIVED_TOKENS] == arrived - tokens["arrived"]
        assert load[FINISHED_TOKENS] == finished_tokens - tokens["finished"]
        seen, tokens = now, {"arrived": arrived, "finished": finished_tokens}


@settings(max_examples=60, deadline=None)
@given(cases())
def test_a_second_look_at_once_sees_the_same_engine_and_empty_counters(case: Case) -> None:
    state, feed = case.system()
    since = [INTERVAL_S, ITERATIONS, ARRIVALS, ARRIVED_TOKENS, FINISHED_REQUESTS, FINISHED_TOKENS, EMITTED_TOKENS]
    since.append(PREEMPTIONS)
    observer = new_seen(1)
    for moment, *_ in iterate(state, feed, case):
        if moment != "begin":
            continue
        first, second = _look(state, seen=observer), _look(state, seen=observer)
        assert np.array_equal(first.queue, second.queue)
        assert not second.load[0, since].any()
        assert not second.drafted.any()
        assert not second.accepted.any()
        rest = np.setdiff1d(np.arange(len(LOAD_FIELDS)), since)
        assert np.array_equal(first.load[0, rest], second.load[0, rest])


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 4), st.integers(1, 6))
def test_drafted_and_accepted_by_depth_equal_a_count_one_by_one(case: Case, every: int, depth: int) -> None:
    state, feed = case.system()
    drafted, accepted, observer = np.zeros(depth), np.zeros(depth), new_seen(1)
    for count, (moment, *_) in enumerate(iterate(state, feed, case)):
        if moment == "committed":
            decodes = batch(state)[: state.batches["num_decodes"][0]]
            for (_, tokens), right in zip(decodes, state.accepted[0].tolist(), strict=False):
                for d in range(1, min(depth, tokens - 1) + 1):
                    drafted[d - 1] += right >= d - 1
                    accepted[d - 1] += right >= d
        elif moment == "begin" and (count // 3) % every == 0:
            observation = _look(state, depth=depth, seen=observer)
            assert np.array_equal(observation.drafted[0], drafted)
            assert np.array_equal(observation.accepted[0], accepted)
            drafted[:], accepted[:] = 0.0, 0.0


@settings(max_examples=60, deadline=None)
@given(cases())
def test_rates_count_the_decoding_requests_by_their_own_acceptance(case: Case) -> None:
    state, feed = case.system()
    right = np.zeros(len(state.requests))
    wrong = np.zeros(len(state.requests))
    for moment, *_ in iterate(state, feed, case):
        if moment == "committed":
            decodes = batch(state)[: state.batches["num_decodes"][0]]
            for (request, tokens), accepted in zip(decodes, state.accepted[0].tolist(), strict=False):
                right[request] += accepted
                wrong[request] += accepted < tokens - 1
        elif moment == "begin":
            decoding = state.running[0, : state.instances["num_decoding"][0]]
            rates = (right[decoding] + PRIOR_RATE * PRIOR_COUNT) / (right[decoding] + wrong[decoding] + PRIOR_COUNT)
            expected = np.histogram(np.floor(rates * RATE_BANDS), np.arange(RATE_BANDS + 1))[0]
            assert np.array_equal(_look(state).rates[0], expected)


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_nothing_observed_depends_on_what_has_not_happened_yet(case: Case, data: st.DataObject) -> None:
    iterations = data.draw(st.integers(0, 12), label="iterations before the look")
    state, feed = case.system()
    _advance(state, feed, case, iterations)
    changed = _other_future(case, state, data)
    other, feed = changed.system()
    _advance(other, feed, changed, iterations)
    for one, two in zip(_look(state), _look(other), strict=True):
        assert np.array_equal(one, two)


def _advance(state: State, feed: Feed, case: Case, iterations: int) -> None:
    for candidates, token_budget in islice(cycle(case.actions), iterations):
        if not wake(state, feed):
            return
        plan(state, 0, candidates, token_budget)
        accept(state, case)
        commit(state, 0, elapsed(state, case))
    wake(state, feed)


def _other_future(case: Case, state: State, data: st.DataObject) -> Case:
    """The same past as `state` has had, but other arrivals, lengths and agreements from now on.

    A request whose last draft was already cut by its output limit keeps its length: an engine knows limits it met.
    """
    now = float(state.instances["now"][0])
    capacity = case.block_size * case.total_blocks
    widest = 1 + max(candidates for candidates, _ in case.actions)
    requests = []
    arrival = now
    for row, (arrives, prompt, output, agrees) in zip(state.requests, case.requests, strict=True):
        generated = int(row["generated"])
        past = list(agrees[:generated])
        if arrives > now:
            arrival += data.draw(st.sampled_from([0.25, 3.0]))
            arrives = arrival
            prompt = data.draw(st.integers(1, capacity - 1))
            output = data.draw(st.integers(1, capacity - prompt))
        elif generated < output:
            shortest = generated + 1 if generated == 0 else generated + widest
            if output >= shortest:
                output = data.draw(st.integers(shortest, max(shortest, capacity - prompt)))
        future = output - generated
        past += data.draw(st.lists(st.booleans(), min_size=future, max_size=future))
        requests.append((arrives, prompt, output, tuple(past)))
    return replace(case, requests=tuple(requests))


def test_observation_arrays_have_the_documented_shapes() -> None:
    observation = allocate_observation(3, 4, 0)
    assert observation.load.shape == (3, len(LOAD_FIELDS))
    assert observation.queue.shape == (3, 5, 2)
    assert observation.drafted.shape == observation.accepted.shape == (3, 1)
    assert {array.dtype for array in observation} == {np.dtype(np.float32)}


def test_engines_of_one_state_are_observed_separately() -> None:
    state = core.allocate(2, 2, total_blocks=8, block_size=1, watermark_blocks=0, max_num_seqs=2, ttft_target=TARGET_S)
    for e, prompt in enumerate((3, 5)):
        core.enter(state, e, np.zeros(1), np.array([prompt]), np.array([2]), np.zeros(1, dtype=np.int64), TARGET_S)
        submit(state, e, e)
    observation, seen = allocate_observation(2, 1, 1), new_seen(2)
    observe(state, 1, seen, observation)
    assert observation.queue[:, 0, 0].tolist() == [0.0, 5.0]
    observe(state, 0, seen, observation)
    assert observation.queue[:, 0, 0].tolist() == [3.0, 5.0]
