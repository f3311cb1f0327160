"""Reallocation of planned candidates between `plan` and `commit`, within the free KV blocks."""

from engine.compiled import kernel
from engine.core.blocks import blocks_for, take


@kernel
def redistribute(state, i, tokens):
    """Give the planned decodes `tokens[k]` >= 1 instead, as their drafter proposed and allocation left it.

    Call it between `plan` and `commit`. A decode that gets more than planned takes free KV blocks and is cut where
    there are none: no request is preempted, and `state.batch_tokens` holds the result. A decode that gets less keeps
    its blocks. Tokens of one decode must not exceed its output limit.
    """
    instance = state.instances[i]
    batch = state.batches[i]
    block_size = state.limits[i].block_size
    decode_tokens = 0
    steps = 0
    for slot in range(batch.num_decodes):
        got = tokens[slot]
        if got > state.batch_tokens[i, slot]:
            request = state.requests[state.batch_request[i, slot]]
            missing = blocks_for(request.computed + got, block_size) - request.blocks
            if missing > 0:
                if missing > instance.free_blocks:
                    missing = instance.free_blocks
                    got = (request.blocks + missing) * block_size - request.computed
                take(state, i, request, missing)
        state.batch_tokens[i, slot] = got
        state.reach[i, slot] = got - 1
        decode_tokens += got
        steps = max(steps, got - 1)
    batch.decode_tokens = decode_tokens
    batch.candidate_steps = steps
