"""Far more work than fits: nothing is lost or served twice, the engine gets through, and memory does not grow."""

from __future__ import annotations

import gc
import tracemalloc

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.table import CacheTable
from engine.core.membership import cancel
from engine.core.state import CANCELLED, FINISHED
from engine.limits import EngineLimits
from engine.speculation.ngram import NgramDrafter
from tests.engine.backends.torch.models import ManualClock, generated, limits, model, paged, prompts
from tests.engine.core.cases import Case, Figures, batch, cases, iterate

REQUESTS = 2000
MOST_TOKENS = 24
ROW_BYTES = 512
"""What a request that is over may leave behind: its row of times and counts."""

BOUNDS = limits(total_blocks=26, max_num_seqs=6)
PROMPTS = prompts((20, 3, 44, 9, 31, 14, 1, 26, 38, 7, 17, 50))


def _engine(drafter: NgramDrafter) -> TorchEngine:
    return TorchEngine(paged(model("llama"), BOUNDS, exact=False), BOUNDS, drafter, clock=ManualClock())


def _capacity() -> float:
    """Requests per second that the engine serves when it never waits for one."""
    served = _engine(NgramDrafter())
    random = np.random.default_rng(1)
    for _ in range(200):
        served.submit(PROMPTS[random.integers(len(PROMPTS))], int(random.integers(1, MOST_TOKENS)), arrival=0.0)
    served.run(3, 32)
    return 200 / float(served.state.instances["now"][0])


class _Storm:
    """Requests at a rate, some cancelled in whatever phase they are; checked as they end."""

    def __init__(self, served: TorchEngine, rate: float) -> None:
        self._served, self._rate = served, rate
        self._random = np.random.default_rng(0)
        self.finished = self.cancelled = 0

    def pass_over(self, requests: int) -> None:
        """Submit so many, run until all are over and collect their outputs."""
        served, random = self._served, self._random
        asked: dict[int, tuple[list[int], int]] = {}
        emitted: dict[int, list[int]] = {}
        arrival, submitted, turns = served.clock.now(), 0, 0
        while submitted < requests or asked:
            while submitted < requests and arrival <= served.clock.now():
                prompt, most = PROMPTS[random.integers(len(PROMPTS))], int(random.integers(1, MOST_TOKENS))
                asked[served.submit(prompt, most)] = prompt, most
                arrival += random.exponential(1.0 / self._rate)
                submitted += 1
            if asked and random.random() < 0.1:
                self._drop(int(random.choice(list(asked))), asked, emitted)
            served.step(int(random.integers(0, 6)), int(random.integers(1, 60)))
            for number, tokens in served.emitted:
                emitted.setdefault(number, []).extend(tokens)
            for number in [n for n, _ in served.emitted if served.state.requests["phase"][n] == FINISHED]:
                prompt, most = asked.pop(number)
                output = served.collect(number)
                assert output == emitted.pop(number) == generated("llama", prompt, MOST_TOKENS)[:most]
                self.finished += 1
            self._check_blocks()
            turns += 1
            assert turns < 100 * requests, "the engine makes no progress"
        assert not emitted, "tokens were emitted for a request that was over"

    def _drop(self, number: int, asked: dict[int, tuple[list[int], int]], emitted: dict[int, list[int]]) -> None:
        served = self._served
        assert served.cancel(number)
        prompt, most = asked.pop(number)
        output = served.collect(number)
        assert output == emitted.pop(number, []) == generated("llama", prompt, MOST_TOKENS)[: len(output)]
        assert len(output) < most
        self.cancelled += 1

    def _check_blocks(self) -> None:
        table = self._served.table
        held = int(table.held.sum())
        assert held + table.free_blocks == BOUNDS.total_blocks
        named = [table.blocks[seat, : table.held[seat]] for seat in range(len(table.held))]
        assert len(np.unique(np.concatenate(named))) == held, "no block is held twice"


def test_twice_the_capacity_loses_nothing_and_leaves_no_memory_behind() -> None:
    drafter = NgramDrafter()
    served = _engine(drafter)
    storm = _Storm(served, 2.0 * _capacity())
    storm.pass_over(REQUESTS // 2)
    gc.collect()
    tracemalloc.start()
    try:
        before = tracemalloc.get_traced_memory()[0]
        storm.pass_over(REQUESTS // 2)
        gc.collect()
        grown = tracemalloc.get_traced_memory()[0] - before
    finally:
        tracemalloc.stop()
    assert grown < ROW_BYTES * REQUESTS
    state = Figures(served.state)
    assert storm.finished + storm.cancelled == REQUESTS
    assert (state["finished"], state["cancelled"]) == (storm.finished, storm.cancelled)
    assert storm.cancelled > REQUESTS // 50
    assert state["preemptions"] > REQUESTS // 10, "the pool was meant to be too small"
    assert state["free_blocks"] == BOUNDS.total_blocks
    phases = served.state.requests["phase"][:REQUESTS]
    assert np.isin(phases, (FINISHED, CANCELLED)).all()
    assert state["accepted"] > 0
    assert not drafter._indices


@settings(max_examples=100, deadline=None)
@given(cases(), st.lists(st.tuples(st.integers(0, 30), st.integers(0, 7)), max_size=12))
def test_named_blocks_are_the_counted_ones_whatever_is_cancelled(case: Case, drops: list[tuple[int, int]]) -> None:
    """Requests are cancelled between iterations, while they wait, prefill, decode or are preempted."""
    state, feed = case.system()
    table = CacheTable(EngineLimits(**case.limits, max_model_len=case.block_size * case.total_blocks))
    iteration = 0
    for moment, _, _ in iterate(state, feed, case):
        if moment == "committed":
            for when, r in drops:
                if when == iteration and r < feed.next[0]:
                    cancel(state, 0, r)
            iteration += 1
        if moment != "planned":
            continue
        table.follow(state)
        named = np.concatenate([table.blocks[seat, : table.held[seat]] for seat in range(len(table.held))])
        assert len(np.unique(named)) == len(named)
        assert len(named) + table.free_blocks == case.total_blocks
        assert table.free_blocks == state.instances["free_blocks"][0]
        for r, tokens in batch(state):
            row = state.requests[r]
            seat = table.seat_of[r]
            assert table.owner[seat] == r
            assert table.held[seat] == row["blocks"]
            assert row["computed"] + tokens <= row["blocks"] * case.block_size, "every token has a slot"
    phases = state.requests["phase"][: len(case.requests)]
    assert np.isin(phases, (FINISHED, CANCELLED)).all()
    assert state.instances["free_blocks"][0] == case.total_blocks
