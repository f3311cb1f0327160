"""Time of a planned batch under latency tables."""

from engine.compiled import kernel
from engine.latency.model import iteration_time, prefill_attention_time, unread_time


@kernel
def batch_time(state, i, tables):
    """Seconds the planned batch of instance `i` takes under the latency tables."""
    batch = state.batches[i]
    attention = 0.0
    for slot in range(batch.num_decodes, batch.num_decodes + batch.num_prefills):
        computed = state.requests[state.batch_request[i, slot]].computed
        attention += prefill_attention_time(tables, state.batch_tokens[i, slot], computed)
    kv_tokens = batch.decode_kv_tokens
    if tables.padding > 0.0:
        longest = 0
        for slot in range(batch.num_decodes):
            longest = max(longest, state.requests[state.batch_request[i, slot]].computed)
        kv_tokens += tables.padding * (batch.num_decodes * longest - kv_tokens)
    return iteration_time(
        tables,
        batch.num_decodes,
        batch.decode_tokens,
        batch.candidate_steps,
        kv_tokens,
        batch.num_prefills,
        batch.prefill_tokens,
        attention,
        batch.decode_tokens + batch.prompts_completed,
    )


@kernel
def reading_time(state, i, tables):
    """Drafter seconds in the planned iteration for tokens cached since it last drafted.

    The owners of these tokens are not tracked: the count is at most the cached tokens of the decoding requests.
    """
    instance = state.instances[i]
    batch = state.batches[i]
    seconds = 0.0
    if batch.candidate_steps > 0 and batch.num_decodes > 0:
        seconds = unread_time(tables, min(instance.unread_tokens, batch.decode_kv_tokens))
        instance.unread_tokens = 0
    else:
        instance.unread_tokens += batch.num_decodes
    instance.unread_tokens += batch.prefill_tokens
    return seconds
