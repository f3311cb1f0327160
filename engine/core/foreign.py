"""Batches that another scheduler planned, written into the request table so that `commit` can close them.

An engine with a scheduler of its own (vLLM) is measured by the same `advance_clock`, `release` and `commit` as all
others; only `plan` is replaced. Blocks are the other scheduler's to count: a request's own stay 0.
"""

import numpy as np

from engine.compiled import kernel
from engine.core.live import leave_preempted
from engine.core.scheduler import preempt_latest, skip_cancelled
from engine.core.state import NOT_ADMITTED, PREEMPTED, PREFILLING


@kernel
def preempt(state, e, r):
    """Request `r`, which runs, lost its blocks; it recomputes its context when it returns."""
    engine = state.engines[e]
    decoding = 0
    kept = 0
    for i in range(engine.num_running):
        other = state.running[e, i]
        if other != r:
            state.running[e, kept] = other
            kept += 1
            decoding += i < engine.num_decoding
    state.running[e, kept] = r
    preempt_latest(state, e)
    engine.num_decoding = decoding


@kernel
def _enter(state, e, r):
    """Request `r`, new or preempted, joins the batch."""
    engine = state.engines[e]
    request = state.requests[e, r]
    if request.phase == PREEMPTED:
        leave_preempted(state, e, r)
    else:
        engine.next_new += 1
        request.admitted = engine.now
        skip_cancelled(state, e)
    request.phase = np.int32(PREFILLING)
    state.running[e, engine.num_running] = r
    engine.num_running += 1


@kernel
def take_up(state, e, rows, tokens, num_decodes, candidates, token_budget, free_blocks):
    """Write the planned batch, decodes first, as `plan` would have.

    rows, tokens: (b,) requests and how many tokens each gets, 1 + its candidates for the first `num_decodes` ·
    candidates, token_budget: the c that was verified and the n · free_blocks: left by the batch.

    New requests enter in order of arrival: the caller checks. Nothing may be preempted between this and `commit`.
    """
    engine = state.engines[e]
    decode_tokens = 0
    prefill_tokens = 0
    steps = 0
    completed = 0
    for i in range(len(rows)):
        state.batch_request[e, i] = rows[i]
        state.batch_tokens[e, i] = tokens[i]
        if i < num_decodes:
            state.reach[e, i] = tokens[i] - 1
            decode_tokens += tokens[i]
            steps = max(steps, tokens[i] - 1)
            continue
        request = state.requests[e, rows[i]]
        if request.phase in (NOT_ADMITTED, PREEMPTED):
            _enter(state, e, rows[i])
        prefill_tokens += tokens[i]
        completed += tokens[i] == request.context - request.computed
    engine.num_decodes = num_decodes
    engine.decode_tokens = decode_tokens
    engine.decode_kv_tokens = engine.kv_tokens
    engine.candidate_steps = steps
    engine.num_prefills = len(rows) - num_decodes
    engine.prefill_tokens = prefill_tokens
    engine.prompts_completed = completed
    engine.last_candidates = candidates
    engine.last_budget = token_budget
    engine.free_blocks = free_blocks
    engine.lowest_free_blocks = min(engine.lowest_free_blocks, free_blocks)
