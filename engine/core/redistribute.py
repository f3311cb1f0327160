"""Candidates that are shared out otherwise than planned: between `plan` and `commit`, within the free KV blocks."""

from engine.compiled import kernel
from engine.core.blocks import blocks_for, take


@kernel
def redistribute(state, e, tokens):
    """Give the planned decodes `tokens[i]` >= 1 instead, as their drafter proposed and allocation left it.

    To be called between `plan` and `commit`. A decode that gets more than planned takes KV blocks where they are free
    and is cut where there are none: nobody is preempted, and `state.batch_tokens` says what it got. One that gets less
    keeps the blocks it took. Tokens of one decode must not exceed its output limit.
    """
    engine = state.engines[e]
    block_size = engine.block_size
    decode_tokens = 0
    steps = 0
    for i in range(engine.num_decodes):
        got = tokens[i]
        if got > state.batch_tokens[e, i]:
            request = state.requests[e, state.batch_request[e, i]]
            missing = blocks_for(request.computed + got, block_size) - request.blocks
            if missing > 0:
                if missing > engine.free_blocks:
                    missing = engine.free_blocks
                    got = (request.blocks + missing) * block_size - request.computed
                take(engine, request, missing)
        state.batch_tokens[e, i] = got
        state.reach[e, i] = got - 1
        decode_tokens += got
        steps = max(steps, got - 1)
    engine.decode_tokens = decode_tokens
    engine.candidate_steps = steps
