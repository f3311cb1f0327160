"""A run whose batches another scheduler planned is measured like one of our own."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.core import state as core
from engine.core.foreign import preempt, take_up
from engine.core.metrics import request_table
from engine.core.scheduler import advance_clock, commit, has_work, plan, release
from engine.core.state import State
from engine.core.telemetry import allocate_observation, observe

BLOCK_SIZE = 4
THEIRS = {"free_blocks", "lowest_free_blocks"}
"""Blocks are the other scheduler's to count."""


def _loaded(prompts: list[int], outputs: list[int], arrivals: np.ndarray, blocks: int) -> State:
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
    core.load(state, 0, arrivals, np.array(prompts, np.int32), np.array(outputs, np.int32), first)
    return state


@settings(max_examples=60, deadline=None)
@given(data=st.data(), seed=st.integers(0, 2**31))
def test_a_run_written_down_is_the_run(data: st.DataObject, seed: int) -> None:
    rng = np.random.default_rng(seed)
    count = data.draw(st.integers(1, 9))
    prompts, outputs = rng.integers(1, 20, count).tolist(), rng.integers(1, 14, count).tolist()
    arrivals = np.cumsum(rng.exponential(0.3, count))
    # Room for the longest request, and little more: some are preempted.
    blocks = -(-max(p + o for p, o in zip(prompts, outputs, strict=True)) // BLOCK_SIZE) + data.draw(st.integers(0, 6))
    own, copy = (_loaded(prompts, outputs, arrivals, blocks) for _ in range(2))
    engine = own.engines[0]
    seen, seen_of_copy = (allocate_observation(1, 3, 8) for _ in range(2))
    while engine["num_finished"] < count:
        for state in (own, copy):
            release(state, 0)
        if not has_work(own, 0):
            for state in (own, copy):
                advance_clock(state, 0, float(own.requests["arrival"][0, engine["released"]]))
            continue
        observe(own, 0, seen)
        observe(copy, 0, seen_of_copy)
        for mine, others in zip(seen, seen_of_copy, strict=True):
            np.testing.assert_array_equal(mine, others)
        stacked, candidates, budget = int(engine["num_preempted"]), int(rng.integers(0, 5)), int(rng.integers(1, 24))
        plan(own, 0, candidates, budget)
        for row in own.preempted[0, stacked : int(engine["num_preempted"])].tolist():
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
        copy.engines["free_blocks"] = own.engines["free_blocks"]
    for name in own.engines.dtype.names or ():
        if name not in THEIRS:
            assert own.engines[name][0] == copy.engines[name][0], name
    for name, column in request_table(own).items():
        np.testing.assert_array_equal(column, request_table(copy)[name], err_msg=name)
    np.testing.assert_array_equal(own.itl, copy.itl)
    assert copy.engines["lowest_free_blocks"][0] >= own.engines["lowest_free_blocks"][0]
