"""Batches that another scheduler planned, written into the request table so that `commit` can close them.

An engine with a scheduler of its own (vLLM) is measured by the same clock, queue and `commit` as all others; only
`plan` is replaced. The other scheduler counts the blocks: a request's own count stays 0.
"""

from engine.compiled import kernel
from engine.core import membership
from engine.core.state import NOT_ADMITTED, PREEMPTED, PREFILLING


@kernel
def preempt(state, i, r):
    """Record that running request `r` lost its blocks; it recomputes its context when it returns."""
    position = 0
    while state.running[i, position] != r:
        position += 1
    membership.preempt(state, i, position)


@kernel
def _enter(state, i, r):
    """Record that request `r`, new or preempted, joins the batch."""
    instance = state.instances[i]
    request = state.requests[r]
    membership.unlink(state, i, r)
    if request.phase == NOT_ADMITTED:
        request.admitted = instance.now
    request.phase = PREFILLING
    state.running[i, instance.num_running] = r
    instance.num_running += 1


@kernel
def take_up(state, i, rows, tokens, num_decodes, candidates, token_budget, free_blocks):
    """Write the planned batch, decodes first, as `plan` would have.

    rows, tokens: (b,) requests and the tokens of each, 1 + its candidates for the first `num_decodes` ·
    candidates, token_budget: the c that was verified and the n · free_blocks: left by the batch.

    No request may be preempted between this call and `commit`.
    """
    instance = state.instances[i]
    batch = state.batches[i]
    totals = state.totals[i]
    decode_tokens = 0
    prefill_tokens = 0
    steps = 0
    completed = 0
    for slot in range(len(rows)):
        state.batch_request[i, slot] = rows[slot]
        state.batch_tokens[i, slot] = tokens[slot]
        if slot < num_decodes:
            state.reach[i, slot] = tokens[slot] - 1
            decode_tokens += tokens[slot]
            steps = max(steps, tokens[slot] - 1)
            continue
        request = state.requests[rows[slot]]
        if request.phase in (NOT_ADMITTED, PREEMPTED):
            _enter(state, i, rows[slot])
        prefill_tokens += tokens[slot]
        completed += tokens[slot] == request.context - request.computed
    batch.num_decodes = num_decodes
    batch.decode_tokens = decode_tokens
    batch.decode_kv_tokens = instance.kv_tokens
    batch.candidate_steps = steps
    batch.num_prefills = len(rows) - num_decodes
    batch.prefill_tokens = prefill_tokens
    batch.prompts_completed = completed
    batch.candidates = candidates
    batch.token_budget = token_budget
    instance.free_blocks = free_blocks
    totals.lowest_free_blocks = min(totals.lowest_free_blocks, free_blocks)
