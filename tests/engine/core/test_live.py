"""Requests that come, are cancelled and stop early while the engine runs: nothing is lost and every counter holds."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import state as core
from engine.core.feed import Feed, arrive, new_feed, settle
from engine.core.live import append, retire, stop_after
from engine.core.membership import cancel
from engine.core.metrics import request_table
from engine.core.redistribute import redistribute
from engine.core.scheduler import commit, has_work, plan
from engine.core.state import CANCELLED, DECODING, FINISHED, NOT_ADMITTED, PREEMPTED, PREFILLING, State
from engine.core.telemetry import LOAD_FIELDS, allocate_observation, new_seen, observe
from tests.engine.core.cases import Case, Figures, accept, arrived, batch, cases, elapsed, iterate, queue, run

TTFT_TARGET_S = 1.0


def _assert_counters_hold(state: State, feed: Feed) -> None:
    """Every running count equals what a look at all requests gives."""
    engine = Figures(state)
    rows = state.requests[: feed.end[0]]
    phase = rows["phase"]
    here = np.arange(rows.size) < feed.next[0]
    waiting = here & np.isin(phase, (NOT_ADMITTED, PREFILLING, PREEMPTED))
    assert engine["waiting_tokens"] == (rows["context"] - rows["computed"])[waiting].sum()
    assert engine["kv_tokens"] == rows["computed"][phase == DECODING].sum()
    assert engine["free_blocks"] == engine["total_blocks"] - rows["blocks"].sum()
    assert not rows["blocks"][np.isin(phase, (NOT_ADMITTED, PREEMPTED, FINISHED, CANCELLED))].any()
    running = state.running[0, : engine["num_running"]].tolist()
    assert running == sorted(np.flatnonzero(np.isin(phase, (DECODING, PREFILLING))).tolist())
    assert engine["num_decoding"] == (phase == DECODING).sum()
    assert queue(state) == np.flatnonzero(here & np.isin(phase, (NOT_ADMITTED, PREEMPTED))).tolist()
    assert engine["finished"] == (phase == FINISHED).sum()
    assert engine["cancelled"] == (phase == CANCELLED).sum()
    between = np.isfinite(rows["first_token"]) & np.isin(phase, (DECODING, PREFILLING, PREEMPTED))
    shares = [1 / (output - 1) for output in rows["output"][between] if output > 1]
    assert engine["tpot_weight"] == pytest.approx(sum(shares), abs=1e-9)
    late = here & (rows["arrival"] + rows["ttft_target"] < engine["now"])
    assert engine["overdue"] == (late & np.isnan(rows["first_token"]) & (phase != CANCELLED)).sum()


def _assert_queue_is_seen_right(state: State, feed: Feed) -> None:
    observation = allocate_observation(1, 3, 4)
    observe(state, 0, new_seen(1), observation)
    rows = arrived(state, feed)
    waiting = np.isin(rows["phase"], (NOT_ADMITTED, PREFILLING, PREEMPTED))
    left = (rows["context"] - rows["computed"])[waiting]
    assert observation.load[0, LOAD_FIELDS.index("num_waiting")] == waiting.sum()
    np.testing.assert_array_equal(observation.queue[0, : min(3, left.size), 0], left[:3])
    assert observation.queue[0, 3, 0] == left[3:].sum()


def _wake(state: State, feed: Feed, case: Case) -> None:
    """Deliver arrivals; with nothing to do, wait for the next request of the case."""
    while not settle(state, 0, feed) and feed.end[0] < len(case.requests):
        _send(state, feed, case)


def _send(state: State, feed: Feed, case: Case) -> None:
    sent = int(feed.end[0])
    arrival, prompt, output, _ = case.requests[sent]
    assert append(state, feed, max(arrival, float(state.instances["now"][0])), prompt, output) == sent


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_counters_hold_whatever_is_cancelled_stopped_or_sent_while_running(case: Case, data: st.DataObject) -> None:
    state, feed = core.allocate(1, len(case.requests), ttft_target=TTFT_TARGET_S, **case.limits), new_feed(1)
    ended = {}
    for turn in range(5000):
        _wake(state, feed, case)
        if not has_work(state, 0):
            break
        if feed.end[0] < len(case.requests) and data.draw(st.booleans()):
            _send(state, feed, case)
        assert plan(state, 0, *case.actions[turn % len(case.actions)])
        accept(state, case)
        for i, (r, tokens) in enumerate(batch(state)):
            row = state.requests[r]
            decodes = i < state.batches["num_decodes"][0]
            emits = state.accepted[0, i] + 1 if decodes else int(row["computed"] + tokens == row["context"])
            if emits and data.draw(st.integers(0, 7)) == 0:
                emits = data.draw(st.integers(1, emits))
                state.accepted[0, i] = emits - 1
                ended[r] = int(row["generated"]) + emits
                stop_after(state, 0, r, emits)
        commit(state, 0, elapsed(state, case))
        _assert_counters_hold(state, feed)
        sent = int(feed.end[0])
        if sent and data.draw(st.integers(0, 3)) == 0:
            victim = data.draw(st.integers(0, sent - 1))
            over = state.requests["phase"][victim] in (FINISHED, CANCELLED)
            assert cancel(state, 0, victim) is not over
            _assert_counters_hold(state, feed)
            _assert_queue_is_seen_right(state, feed)
    rows = state.requests[: feed.end[0]]
    assert len(rows) == len(case.requests)
    assert np.isin(rows["phase"], (FINISHED, CANCELLED)).all()
    assert state.instances["free_blocks"][0] == case.total_blocks
    for r, tokens in ended.items():
        if rows["phase"][r] == FINISHED:
            assert rows["generated"][r] == rows["output"][r] == tokens


@settings(max_examples=60, deadline=None)
@given(cases())
def test_stopping_at_known_lengths_costs_what_knowing_them_would_have_cost(case: Case) -> None:
    """Without speculation nothing else depends on the output limit, so runs and costs must agree."""
    case = Case(**{**case.__dict__, "actions": tuple((0, n) for _, n in case.actions)})
    known = run(case)
    state, feed = case.system()
    state.requests["output"] *= 2
    turn = 0
    while True:
        if not settle(state, 0, feed):
            break
        plan(state, 0, *case.actions[turn % len(case.actions)])
        state.accepted[:] = 0
        for i, (r, tokens) in enumerate(batch(state)):
            row = state.requests[r]
            emits = i < state.batches["num_decodes"][0] or row["computed"] + tokens == row["context"]
            if emits and row["generated"] + 1 == case.requests[r][2]:
                stop_after(state, 0, r, 1)
        commit(state, 0, elapsed(state, case))
        turn += 1
    for name, column in request_table(state.requests).items():
        np.testing.assert_array_equal(column, request_table(known.requests)[name], err_msg=name)
    assert state.totals["tpot_cost"][0] == pytest.approx(known.totals["tpot_cost"][0])
    assert state.totals["lateness"][0] == known.totals["lateness"][0]


def test_a_request_cancelled_before_it_arrives_is_never_served() -> None:
    state = core.allocate(1, 4, ttft_target=1.0, total_blocks=8, block_size=4, watermark_blocks=0, max_num_seqs=2)
    feed = new_feed(1)
    for arrival in (1.0, 2.0):
        append(state, feed, arrival, 4, 2)
    assert cancel(state, 0, 0)
    arrive(state, 0, feed, 3.5)
    assert state.instances["waiting_tokens"][0] == 4
    assert state.totals["violations"][0] == 1, "only the request that was still wanted is late"
    assert plan(state, 0, 0, 16)
    assert batch(state) == [(1, 4)]
    assert math.isnan(state.requests["admitted"][0])


def _arrives_at_once(state: State, prompt: int, output: int) -> None:
    feed = new_feed(1)
    append(state, feed, 0.0, prompt, output)
    arrive(state, 0, feed, 0.0)


def test_shortened_drafts_count_as_never_drafted() -> None:
    state = core.allocate(1, 1, ttft_target=1.0, total_blocks=8, block_size=4, watermark_blocks=0, max_num_seqs=2)
    _arrives_at_once(state, 4, 8)
    plan(state, 0, 0, 16)
    commit(state, 0, 0.5)
    plan(state, 0, 4, 16)
    assert batch(state) == [(0, 5)]
    redistribute(state, 0, np.array([2]))
    state.accepted[0, 0] = 1
    commit(state, 0, 0.5)
    row, engine = state.requests[0], Figures(state)
    assert (row["drafted"], row["accepted"], row["generated"]) == (1, 1, 3)
    assert (engine["decode_tokens"], engine["candidate_steps"], engine["drafted"]) == (2, 1, 1)
    assert row["blocks"] == 3, "blocks of the planned tokens stay with the request"


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_redistributed_candidates_take_free_blocks_and_nobody_elses(case: Case, data: st.DataObject) -> None:
    """Whatever allocation asks for: blocks add up, nobody is preempted for it, and tokens fit the blocks held."""
    state, feed = case.system()
    for moment, _, _ in iterate(state, feed, case):
        rows = state.requests
        if moment != "planned":
            assert state.instances["free_blocks"][0] == case.total_blocks - rows["blocks"].sum()
            continue
        decodes = int(state.batches["num_decodes"][0])
        members = state.batch_request[0, :decodes]
        most = rows["output"][members] - rows["generated"][members]
        asked = np.array([data.draw(st.integers(1, int(room))) for room in most], dtype=np.int64)
        preemptions, planned = int(state.totals["preemptions"][0]), state.batch_tokens[0, :decodes].copy()
        redistribute(state, 0, asked)
        got = state.batch_tokens[0, :decodes]
        assert state.totals["preemptions"][0] == preemptions
        assert (got <= asked).all()
        assert (got >= np.minimum(asked, planned)).all()
        assert (rows["computed"][members] + got <= rows["blocks"][members] * case.block_size).all()
        assert state.batches["decode_tokens"][0] == got.sum()
        if (got < asked).any():
            assert state.instances["free_blocks"][0] == 0, "cut only where nothing was left"
        before = rows["blocks"].copy(), state.instances.copy(), state.batches.copy()
        redistribute(state, 0, got.astype(np.int64))
        np.testing.assert_array_equal(rows["blocks"], before[0], err_msg="what was got can be replayed")
        np.testing.assert_array_equal(state.instances, before[1])
        np.testing.assert_array_equal(state.batches, before[2])


def test_a_path_that_ends_at_a_leaf_is_exhausted_and_one_with_rejected_children_stopped() -> None:
    """Three candidates verified as a tree: one accepted, and nothing behind it; then again, with something behind."""
    state = core.allocate(1, 1, ttft_target=1.0, total_blocks=8, block_size=4, watermark_blocks=0, max_num_seqs=2)
    _arrives_at_once(state, 4, 12)
    plan(state, 0, 0, 16)
    commit(state, 0, 0.5)
    for reach, counts in ((1, (0, 1)), (2, (1, 1))):
        plan(state, 0, 3, 16)
        state.accepted[0, 0], state.reach[0, 0] = 1, reach
        commit(state, 0, 0.5)
        assert (state.stopped[0, 1], state.exhausted[0, 1]) == counts


def test_growing_keeps_what_is_in_the_table() -> None:
    state = core.allocate(1, 1, ttft_target=1.0, total_blocks=8, block_size=4, watermark_blocks=0, max_num_seqs=2)
    feed = new_feed(1)
    append(state, feed, 0.25, 4, 8)
    assert core.grown(state, 1) is state
    state = core.grown(state, 2)
    assert append(state, feed, 0.5, 3, 2) == 1
    assert state.requests["arrival"][:2].tolist() == [0.25, 0.5]


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_rows_taken_out_and_the_table_are_what_the_table_would_have_been(case: Case, data: st.DataObject) -> None:
    """Whatever is cancelled: the same run, once with a table that keeps everything and once with one that does not."""
    (whole, feed), (short, short_feed) = case.system(), case.system()
    kept: list[np.ndarray] = []
    gone = 0
    for moment, candidates, token_budget in iterate(whole, feed, case):
        if moment == "begin":
            arrive(short, 0, short_feed, float(whole.instances["now"][0]))
            _assert_same_queue(whole, short)
            if data.draw(st.integers(0, 3)) == 0:
                victim = data.draw(st.integers(0, len(case.requests) - 1))
                cancelled = cancel(whole, 0, victim)
                assert cancelled == (victim >= gone and cancel(short, 0, victim - gone))
            if data.draw(st.booleans()):
                kept.append(retire(short, short_feed))
                gone += len(kept[-1])
                _assert_same_queue(whole, short)
            if not has_work(whole, 0):
                # What the driver meant to run was cancelled.
                assert not has_work(short, 0)
                return
            plan(short, 0, candidates, token_budget)
        elif moment == "planned":
            assert [(r + gone, tokens) for r, tokens in batch(short)] == batch(whole)
        else:
            short.accepted[:], short.reach[:] = whole.accepted, whole.reach
            commit(short, 0, float(whole.batches["elapsed"][0]))
    arrive(short, 0, short_feed, float(whole.instances["now"][0]))
    kept.append(retire(short, short_feed))
    rows = np.concatenate([*kept, short.requests[: short_feed.end[0]]])
    for name in rows.dtype.names or ():
        np.testing.assert_array_equal(rows[name], whole.requests[name][: len(case.requests)], err_msg=name)
    for one, other in (
        (short.totals, whole.totals),
        (short.batches, whole.batches),
        (short.instances, whole.instances),
    ):
        np.testing.assert_array_equal(one, other)


def _assert_same_queue(whole: State, short: State) -> None:
    seen = []
    for state in (whole, short):
        observation = allocate_observation(1, 8, 4)
        observe(state, 0, new_seen(1), observation)
        seen.append(observation)
    for name, one, other in zip(seen[0]._fields, *seen, strict=True):
        np.testing.assert_array_equal(one, other, err_msg=name)
