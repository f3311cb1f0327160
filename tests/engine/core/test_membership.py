"""Requests that join, leave and change instances in any order: nothing is lost, and each is charged what it costs."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import state as core
from engine.core.deadlines import advance_clock
from engine.core.membership import adopt, cancel, submit, withdraw
from engine.core.objective import charges
from engine.core.scheduler import commit, plan
from engine.core.state import CANCELLED, DECODING, FINISHED, NOBODY, NOT_ADMITTED, PREEMPTED, PREFILLING, State
from engine.core.telemetry import ARRIVALS, NUM_WAITING, allocate_observation, new_seen, observe

BLOCKS = 12
SLOTS = 3


@dataclass
class Ledger:
    """What requests were charged, kept second by second in plain Python: their TPOT, violations and lateness."""

    tpot_s: float = 0.0
    lateness_s: float = 0.0
    late: set[int] = field(default_factory=set)

    def pass_time(self, state: State, rows: list[int], since: float, now: float) -> None:
        """Charge the requests of an instance for the time from `since` to `now`, during which none got a token."""
        for r in rows:
            request = state.requests[r]
            if math.isnan(request["first_token"]):
                deadline = request["arrival"] + request["ttft_target"]
                if deadline < now:
                    self.late.add(r)
                    self.lateness_s += now - max(deadline, since)
            elif request["output"] > 1:
                self.tpot_s += (now - since) / (request["output"] - 1)


def _system(arrivals: list[float], prompts: list[int], outputs: list[int], targets: list[float]) -> State:
    state = core.allocate(
        2, len(arrivals), total_blocks=BLOCKS, block_size=2, watermark_blocks=0, max_num_seqs=SLOTS, ttft_target=1.0
    )
    first = np.zeros(len(arrivals), dtype=np.int64)
    core.enter(state, 0, np.array(arrivals), np.array(prompts), np.array(outputs), first, 1.0)
    state.requests["ttft_target"] = targets
    return state


def _with(state: State, i: int) -> list[int]:
    """Requests with instance `i` that are not over."""
    rows = state.requests
    return np.flatnonzero((rows["instance"] == i) & ~np.isin(rows["phase"], (FINISHED, CANCELLED))).tolist()


def _assert_consistent(state: State) -> None:
    """Each request is in exactly one place, and every running count equals what a look at all requests gives."""
    rows = state.requests
    for i in range(len(state.instances)):
        instance = state.instances[i]
        here = np.zeros(len(rows), dtype=bool)
        here[_with(state, i)] = True
        running = state.running[i, : instance["num_running"]].tolist()
        waiting, r = [], int(instance["head"])
        while r != NOBODY:
            waiting.append(r)
            r = int(rows["next"][r])
        assert sorted(running + waiting) == np.flatnonzero(here).tolist()
        assert len(waiting) == instance["num_waiting"]
        decoding = here & (rows["phase"] == DECODING)
        assert sorted(running[: instance["num_decoding"]]) == np.flatnonzero(decoding).tolist()
        assert instance["kv_tokens"] == rows["computed"][decoding].sum()
        assert instance["free_blocks"] == BLOCKS - rows["blocks"][here].sum()
        to_prefill = here & np.isin(rows["phase"], (NOT_ADMITTED, PREEMPTED, PREFILLING))
        assert instance["waiting_tokens"] == (rows["context"] - rows["computed"])[to_prefill].sum()
        unanswered = here & np.isnan(rows["first_token"])
        assert instance["overdue"] == (unanswered & (rows["late"] == 1)).sum()
        due, r = [], int(instance["first_due"])
        while r != NOBODY:
            due.append(float(rows["arrival"][r] + rows["ttft_target"][r]))
            r = int(rows["due_after"][r])
        assert due == sorted(due)
        assert len(due) == (unanswered & (rows["late"] == 0)).sum()
        between = here & ~np.isnan(rows["first_token"]) & (rows["output"] > 1)
        assert instance["tpot_weight"] == pytest.approx((1.0 / (rows["output"][between] - 1)).sum(), abs=1e-9)
    assert not rows["blocks"][rows["instance"] == NOBODY].any()


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_order_of_joining_and_leaving_is_charged_what_it_costs(data: st.DataObject) -> None:
    """Two instances with one clock; requests come in any order, leave in any phase, and join the other one, or none."""
    count = data.draw(st.integers(1, 8))
    arrivals = data.draw(st.lists(st.sampled_from([0.0, 0.5, 1.0, 2.0]), min_size=count, max_size=count))
    prompts = data.draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    outputs = data.draw(st.lists(st.integers(1, 6), min_size=count, max_size=count))
    targets = data.draw(st.lists(st.sampled_from([0.25, 1.0, 4.0]), min_size=count, max_size=count))
    state, ledger, now = _system(arrivals, prompts, outputs, targets), Ledger(), 2.0
    left: dict[int, float] = {}
    for i in (0, 1):
        advance_clock(state, i, now)
    for _ in range(data.draw(st.integers(5, 25))):
        for r in range(count):
            request = state.requests[r]
            over = request["phase"] in (FINISHED, CANCELLED)
            move = data.draw(st.sampled_from(["stay", "stay", "stay", "go"]))
            if over or move == "stay":
                continue
            i = int(request["instance"])
            if i != NOBODY:
                assert withdraw(state, i, r)
                assert not withdraw(state, i, r)
                left[r] = now
                continue
            # What passed since it left, or was to be submitted, is charged when it joins.
            since = left.get(r, float(request["arrival"]))
            to = data.draw(st.integers(0, 1))
            decodes = request["generated"] > 0
            joined = bool(decodes and data.draw(st.booleans()) and adopt(state, to, r))
            if not joined:
                submit(state, to, r)
            ledger.pass_time(state, [r], since, now)
            assert request["instance"] == to
        _assert_consistent(state)
        seconds = data.draw(st.sampled_from([0.125, 0.5]))
        planned = [bool(plan(state, i, data.draw(st.integers(0, 3)), data.draw(st.integers(1, 12)))) for i in (0, 1)]
        for i in (0, 1):
            ledger.pass_time(state, _with(state, i), now, now + seconds)
            if planned[i]:
                decodes = int(state.batches["num_decodes"][i])
                room = state.batch_tokens[i, :decodes] - 1
                state.accepted[i, :decodes] = [data.draw(st.integers(0, int(most))) for most in room]
                commit(state, i, seconds)
            else:
                advance_clock(state, i, now + seconds)
        now += seconds
        _assert_consistent(state)
    tpot_s, violations, lateness_s = sum(charges(state, i) for i in (0, 1))
    assert tpot_s == pytest.approx(ledger.tpot_s, abs=1e-9)
    assert violations == len(ledger.late)
    assert lateness_s == pytest.approx(ledger.lateness_s, abs=1e-9)


def test_a_request_put_behind_a_later_one_is_charged_its_own_deadline() -> None:
    """One slot; the request that arrived at 0 s stands behind one of 10 s and gets its first token at 10.05 s."""
    state = core.allocate(1, 2, total_blocks=8, block_size=4, watermark_blocks=0, max_num_seqs=1, ttft_target=1.0)
    lengths = np.array([4, 4])
    core.enter(state, 0, np.array([10.0, 0.0]), lengths, np.array([1, 1]), np.zeros(2, dtype=np.int64), 1.0)
    advance_clock(state, 0, 10.0)
    submit(state, 0, 0)
    submit(state, 0, 1)
    for _ in range(2):
        plan(state, 0, 0, 4)
        commit(state, 0, 0.025)
    assert state.requests["first_token"].tolist() == [10.025, 10.05]
    assert state.totals["violations"][0] == 1
    assert state.totals["lateness"][0] == pytest.approx(9.05)


def test_the_latest_arrival_is_preempted_wherever_it_runs() -> None:
    """The later request was admitted first, so that it stands before the earlier one in the running list."""
    state = core.allocate(1, 2, total_blocks=5, block_size=1, watermark_blocks=0, max_num_seqs=2, ttft_target=9.0)
    lengths, outputs = np.array([2, 2]), np.array([3, 3])
    core.enter(state, 0, np.array([1.0, 0.0]), lengths, outputs, np.zeros(2, dtype=np.int64), 9.0)
    advance_clock(state, 0, 1.0)
    submit(state, 0, 0)
    submit(state, 0, 1)
    for _ in range(3):
        plan(state, 0, 0, 8)
        state.accepted[:] = 0
        commit(state, 0, 1.0)
    assert state.requests["preemptions"].tolist() == [1, 0]


def test_a_request_that_decodes_moves_with_its_cache() -> None:
    state = _system([0.0], [4], [6], [1.0])
    submit(state, 0, 0)
    plan(state, 0, 0, 8)
    commit(state, 0, 0.25)
    assert withdraw(state, 0, 0)
    advance_clock(state, 1, 0.25)
    assert adopt(state, 1, 0)
    request = state.requests[0]
    assert (request["phase"], request["computed"], request["blocks"]) == (DECODING, 4, 2)
    for _ in range(5):
        plan(state, 1, 0, 8)
        state.accepted[:] = 0
        commit(state, 1, 0.25)
    assert state.requests["phase"][0] == FINISHED
    assert state.requests["last_token"][0] == 1.5
    assert sum(charges(state, i)[0] for i in (0, 1)) == pytest.approx(1.25 / 5)


def test_a_full_instance_adopts_nobody_and_stays_as_it_was() -> None:
    state = _system([0.0] * 5, [4] * 5, [6] * 5, [1.0] * 5)
    for r in range(SLOTS):
        submit(state, 1, r)
    plan(state, 1, 0, 64)
    commit(state, 1, 0.25)
    submit(state, 0, 4)
    plan(state, 0, 0, 8)
    commit(state, 0, 0.25)
    withdraw(state, 0, 4)
    before = state.instances[1].copy(), state.requests[4].copy()
    assert not adopt(state, 1, 4)
    assert (state.instances[1].tobytes(), state.requests[4].tobytes()) == (before[0].tobytes(), before[1].tobytes())


def test_what_was_submitted_counts_at_once_also_while_an_iteration_runs() -> None:
    state = _system([0.0, 0.1], [4, 6], [3, 3], [1.0, 1.0])
    submit(state, 0, 0)
    plan(state, 0, 0, 8)
    submit(state, 0, 1)
    observation = allocate_observation(2, 4, 4)
    observe(state, 0, new_seen(2), observation)
    assert observation.load[0, NUM_WAITING] == 2
    assert observation.load[0, ARRIVALS] == 2
    assert state.instances["waiting_tokens"][0] == 10
    commit(state, 0, 0.25)
    assert state.instances["waiting_tokens"][0] == 6


def test_two_observers_do_not_disturb_each_other() -> None:
    state = _system([0.0], [4], [3], [1.0])
    first, second = new_seen(2), new_seen(2)
    observation = allocate_observation(2, 4, 4)
    submit(state, 0, 0)
    for seen in (first, second):
        observe(state, 0, seen, observation)
        assert observation.load[0, ARRIVALS] == 1
    observe(state, 0, first, observation)
    assert observation.load[0, ARRIVALS] == 0


def test_a_withdrawn_request_can_be_cancelled() -> None:
    state = _system([0.0], [4], [3], [1.0])
    submit(state, 0, 0)
    withdraw(state, 0, 0)
    assert cancel(state, 0, 0)
    assert not cancel(state, 0, 0)
    assert state.totals["cancelled"][0] == 1
