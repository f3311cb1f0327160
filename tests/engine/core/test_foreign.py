"""A run whose batches another scheduler planned is measured like one of our own."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import state as core
from engine.core.feed import Feed, feed_from, new_feed, settle
from engine.core.foreign import preempt, take_up
from engine.core.metrics import request_table
from engine.core.scheduler import commit, plan
from engine.core.state import State
from engine.core.telemetry import allocate_observation, new_seen, observe
from tests.engine.core.cases import Figures

BLOCK_SIZE = 4
THEIRS = {"free_blocks", "lowest_free_blocks"}
"""Blocks are the other scheduler's to count."""


def _loaded(prompts: list[int], outputs: list[int], arrivals: np.ndarray, blocks: int) -> tuple[State, Feed]:
    state = core.allocate(
        1,
        len(prompts),
        total_blocks=blocks,
        block_size=BLOCK_SIZE,
        watermark_blocks=0,
        max_num_seqs=4,
        ttft_target=0.5,
    )
    first = np.zeros(len(prompts), dtype=np.int64)
    core.enter(state, 0, arrivals, np.array(prompts), np.array(outputs), first, 0.5)
    feed = new_feed(1)
    feed_from(feed, 0, 0, len(prompts))
    return state, feed


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_run_written_down_is_the_run(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = data.draw(st.integers(1, 9))
    prompts, outputs = rng.integers(1, 20, count).tolist(), rng.integers(1, 14, count).tolist()
    arrivals = np.cumsum(rng.exponential(0.3, count))
    # Room for the longest request, and little more: some are preempted.
    blocks = -(-max(p + o for p, o in zip(prompts, outputs, strict=True)) // BLOCK_SIZE) + data.draw(st.integers(0, 6))
    (own, feed), (copy, feed_of_copy) = (_loaded(prompts, outputs, arrivals, blocks) for _ in range(2))
    engine = Figures(own)
    looks = [(new_seen(1), allocate_observation(1, 3, 8)) for _ in range(2)]
    while engine["finished"] < count:
        settle(own, 0, feed)
        settle(copy, 0, feed_of_copy)
        for state, (seen, observation) in zip((own, copy), looks, strict=True):
            observe(state, 0, seen, observation)
        for mine, others in zip(looks[0][1], looks[1][1], strict=True):
            np.testing.assert_array_equal(mine, others)
        before, candidates, budget = (
            own.requests["preemptions"].copy(),
            int(rng.integers(0, 5)),
            int(rng.integers(1, 24)),
        )
        plan(own, 0, candidates, budget)
        for row in np.flatnonzero(own.requests["preemptions"] > before)[::-1].tolist():
            preempt(copy, 0, row)
        decodes = int(engine["num_decodes"])
        batch = decodes + int(engine["num_prefills"])
        rows, tokens = (array[0, :batch].copy() for array in (own.batch_request, own.batch_tokens))
        take_up(copy, 0, rows, tokens, decodes, candidates, budget, int(engine["free_blocks"]))
        accepted = rng.integers(0, tokens[:decodes]) if decodes else np.zeros(0, dtype=np.int64)
        elapsed = float(rng.exponential(0.1))
        for state in (own, copy):
            state.accepted[0, :decodes] = accepted
            commit(state, 0, elapsed)
        copy.instances["free_blocks"] = own.instances["free_blocks"]
    for mine, others in ((own.instances, copy.instances), (own.batches, copy.batches), (own.totals, copy.totals)):
        for name in set(mine.dtype.names or ()) - THEIRS:
            assert mine[name][0] == others[name][0], name
    for name, column in request_table(own.requests).items():
        np.testing.assert_array_equal(column, request_table(copy.requests)[name], err_msg=name)
    np.testing.assert_array_equal(own.itl, copy.itl)
    assert copy.totals["lowest_free_blocks"][0] >= own.totals["lowest_free_blocks"][0]
