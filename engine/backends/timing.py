"""How long the batch that the scheduler planned takes under latency tables."""

from engine.compiled import kernel
from engine.latency.model import iteration_time, prefill_attention_time, unread_time


@kernel
def batch_time(state, e, tables):
    """Seconds the planned batch of engine `e` takes under the latency tables."""
    engine = state.engines[e]
    attention = 0.0
    for i in range(engine.num_decodes, engine.num_decodes + engine.num_prefills):
        computed = state.requests[e, state.batch_request[e, i]].computed
        attention += prefill_attention_time(tables, state.batch_tokens[e, i], computed)
    kv_tokens = engine.decode_kv_tokens
    if tables.padding > 0.0:
        longest = 0
        for i in range(engine.num_decodes):
            longest = max(longest, state.requests[e, state.batch_request[e, i]].computed)
        kv_tokens += tables.padding * (engine.num_decodes * longest - kv_tokens)
    return iteration_time(
        tables,
        engine.num_decodes,
        engine.decode_tokens,
        engine.candidate_steps,
        kv_tokens,
        engine.num_prefills,
        engine.prefill_tokens,
        attention,
        engine.decode_tokens + engine.prompts_completed,
    )


@kernel
def reading_time(state, e, tables):
    """Seconds that the drafter takes in the planned iteration to read what was cached since it last drafted.

    Which requests these tokens belong to is not kept: they are at most what the decoding requests hold.
    """
    engine = state.engines[e]
    seconds = 0.0
    if engine.candidate_steps > 0 and engine.num_decodes > 0:
        seconds = unread_time(tables, min(engine.unread_tokens, engine.decode_kv_tokens))
        engine.unread_tokens = 0
    else:
        engine.unread_tokens += engine.num_decodes
    engine.unread_tokens += engine.prefill_tokens
    return seconds
