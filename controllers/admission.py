"""Prompt tokens of the queue that can be prefilled now, from telemetry."""

from engine.compiled import kernel
from engine.core.telemetry import FREE_KV_TOKENS, FREE_SEQS, NUM_DECODES, PREFILLING_TOKENS


@kernel
def admissible_tokens(observation, e):
    """Prompt tokens that the next iteration could prefill: the prompt in progress and those that fit after it.

    With the KV cache or the batch full, the result is small even for a long queue, and a budget chosen for the queue
    would go unused.
    """
    load = observation.load
    tokens = load[e, PREFILLING_TOKENS]
    free_kv = load[e, FREE_KV_TOKENS]
    free_seqs = load[e, FREE_SEQS]
    engine_empty = load[e, NUM_DECODES] <= 0.0 and tokens <= 0.0
    for row in range(1 if tokens > 0.0 else 0, observation.queue.shape[1] - 1):
        prompt = observation.queue[e, row, 0]
        if prompt <= 0.0 or free_seqs <= 0.0 or (prompt > free_kv and not (engine_empty and row == 0)):
            break
        tokens += prompt
        free_kv -= prompt
        free_seqs -= 1.0
    return tokens
