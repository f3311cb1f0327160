"""Observation and action spaces of the serving environments, with the bounds of every telemetry field."""

import numpy as np
from gymnasium import spaces

from engine.core.action import ActionGrid
from engine.core.telemetry import LOAD_FIELDS, NO_DEADLINE_S, RATE_BANDS

MOST_REQUESTS = 1e6
MOST_TOKENS = 1e9
MOST_SECONDS = NO_DEADLINE_S

LOAD_BOUNDS = {
    "num_decodes": MOST_REQUESTS,
    "decode_kv_tokens": MOST_TOKENS,
    "num_waiting": MOST_REQUESTS,
    "waiting_tokens": MOST_TOKENS,
    "prefilling_tokens": MOST_TOKENS,
    "free_kv_tokens": MOST_TOKENS,
    "free_seqs": MOST_REQUESTS,
    "interval_s": MOST_SECONDS,
    "iterations": MOST_REQUESTS,
    "arrivals": MOST_REQUESTS,
    "arrived_tokens": MOST_TOKENS,
    "finished": MOST_REQUESTS,
    "finished_tokens": MOST_TOKENS,
    "emitted_tokens": MOST_TOKENS,
    "preemptions": MOST_REQUESTS,
    "last_iteration_s": MOST_SECONDS,
    "last_candidates": MOST_REQUESTS,
    "last_prefill_tokens": MOST_TOKENS,
    "last_num_decodes": MOST_REQUESTS,
    "last_decode_kv_tokens": MOST_TOKENS,
    "last_emitted_tokens": MOST_TOKENS,
    "overdue": MOST_REQUESTS,
    "ttft_target_s": MOST_SECONDS,
}
"""Upper bound of every column of `load`; the lower bound is 0."""


def observation_space(queue_rows: int, max_candidates: int) -> spaces.Dict:
    """The Dict space of one engine's telemetry (`engine.core.telemetry.Observation` without its first axis)."""
    depth = max(1, max_candidates)
    load_high = np.array([LOAD_BOUNDS[name] for name in LOAD_FIELDS], dtype=np.float32)
    queue_low = np.zeros((queue_rows + 1, 2), dtype=np.float32)
    queue_low[:, 1] = -MOST_SECONDS
    queue_high = np.full((queue_rows + 1, 2), MOST_SECONDS, dtype=np.float32)
    queue_high[:, 0] = MOST_TOKENS
    return spaces.Dict(
        {
            "load": spaces.Box(np.zeros_like(load_high), load_high, dtype=np.float32),
            "queue": spaces.Box(queue_low, queue_high, dtype=np.float32),
            "drafted": spaces.Box(0.0, MOST_REQUESTS, shape=(depth,), dtype=np.float32),
            "accepted": spaces.Box(0.0, MOST_REQUESTS, shape=(depth,), dtype=np.float32),
            "rates": spaces.Box(0.0, MOST_REQUESTS, shape=(RATE_BANDS,), dtype=np.float32),
        }
    )


def action_space(grid: ActionGrid) -> spaces.MultiDiscrete:
    """Indices into the candidate choices and the budget choices."""
    return spaces.MultiDiscrete([len(grid.candidate_choices), len(grid.budget_choices)])
