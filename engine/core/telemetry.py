"""What a controller sees: the telemetry that a production engine has, as fixed-shape float32 arrays.

Nothing here knows an output length, a future arrival or a future agreement.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.acceptance import own_acceptance
from engine.core.state import CANCELLED, MAX_CANDIDATES

LOAD_FIELDS = (
    "num_decodes",
    "decode_kv_tokens",
    "num_waiting",
    "waiting_tokens",
    "prefilling_tokens",
    "free_kv_tokens",
    "free_seqs",
    "interval_s",
    "iterations",
    "arrivals",
    "arrived_tokens",
    "finished",
    "finished_tokens",
    "emitted_tokens",
    "preemptions",
    "last_iteration_s",
    "last_candidates",
    "last_prefill_tokens",
    "last_num_decodes",
    "last_decode_kv_tokens",
    "last_emitted_tokens",
    "overdue",
    "ttft_target_s",
)
"""Columns of `Observation.load`; `envs.serving.ServingEnv` documents each with unit and bounds."""

NUM_DECODES = LOAD_FIELDS.index("num_decodes")
DECODE_KV_TOKENS = LOAD_FIELDS.index("decode_kv_tokens")
NUM_WAITING = LOAD_FIELDS.index("num_waiting")
WAITING_TOKENS = LOAD_FIELDS.index("waiting_tokens")
PREFILLING_TOKENS = LOAD_FIELDS.index("prefilling_tokens")
FREE_KV_TOKENS = LOAD_FIELDS.index("free_kv_tokens")
FREE_SEQS = LOAD_FIELDS.index("free_seqs")
INTERVAL_S = LOAD_FIELDS.index("interval_s")
ITERATIONS = LOAD_FIELDS.index("iterations")
ARRIVALS = LOAD_FIELDS.index("arrivals")
ARRIVED_TOKENS = LOAD_FIELDS.index("arrived_tokens")
FINISHED_REQUESTS = LOAD_FIELDS.index("finished")
FINISHED_TOKENS = LOAD_FIELDS.index("finished_tokens")
EMITTED_TOKENS = LOAD_FIELDS.index("emitted_tokens")
PREEMPTIONS = LOAD_FIELDS.index("preemptions")
LAST_ITERATION_S = LOAD_FIELDS.index("last_iteration_s")
LAST_CANDIDATES = LOAD_FIELDS.index("last_candidates")
LAST_PREFILL_TOKENS = LOAD_FIELDS.index("last_prefill_tokens")
LAST_NUM_DECODES = LOAD_FIELDS.index("last_num_decodes")
LAST_DECODE_KV_TOKENS = LOAD_FIELDS.index("last_decode_kv_tokens")
LAST_EMITTED_TOKENS = LOAD_FIELDS.index("last_emitted_tokens")
OVERDUE = LOAD_FIELDS.index("overdue")
TTFT_TARGET_S = LOAD_FIELDS.index("ttft_target_s")

NO_DEADLINE_S = 1e6
"""Slack of a queued request whose first token is already out (it was preempted): no TTFT deadline binds it."""


RATE_BANDS = 8
"""Equal parts of [0, 1] that requests' own acceptance rates are counted by."""


class Observation(NamedTuple):
    """Telemetry of N engines, each array indexed by engine first, float32.

    load: (N, len(LOAD_FIELDS)) · queue: (N, M + 1, 2) rows of (prompt tokens remaining, slack to the TTFT deadline in
    s) for the first M requests whose prompt is not done, in order of service, then one row that sums the rest (total
    tokens, smallest slack); unused rows are zero · drafted, accepted: (N, C) how often, since the last observation, a
    candidate at draft depth 1..C was verified after all before it were accepted, and how often it was accepted too ·
    rates: (N, RATE_BANDS) how many of the decoding requests have an acceptance rate of their own (`own_acceptance`)
    in each eighth of [0, 1].
    """

    load: NDArray[np.float32]
    queue: NDArray[np.float32]
    drafted: NDArray[np.float32]
    accepted: NDArray[np.float32]
    rates: NDArray[np.float32]


def allocate_observation(num_engines: int, queue_rows: int, max_candidates: int) -> Observation:
    """Zeroed arrays for `observe`; M = `queue_rows`, C = max(1, `max_candidates`)."""
    depth = max(1, max_candidates)
    return Observation(
        load=np.zeros((num_engines, len(LOAD_FIELDS)), dtype=np.float32),
        queue=np.zeros((num_engines, queue_rows + 1, 2), dtype=np.float32),
        drafted=np.zeros((num_engines, depth), dtype=np.float32),
        accepted=np.zeros((num_engines, depth), dtype=np.float32),
        rates=np.zeros((num_engines, RATE_BANDS), dtype=np.float32),
    )


def as_dict(observation: Observation, e: int = 0) -> dict[str, NDArray[Any]]:
    """Engine `e`'s rows of batched telemetry by name, as the environment has them (views)."""
    return {name: array[e] for name, array in zip(Observation._fields, observation, strict=True)}


@kernel
def _observe_queue(state, e, queue):
    """Fill the queue rows in order of service: the prompt in progress, the preempted, then the new."""
    engine = state.engines[e]
    rows = queue.shape[1] - 1
    row = 0
    listed_tokens = 0
    rest_slack = NO_DEADLINE_S
    prefilling = engine.num_running - engine.num_decoding
    waiting = prefilling + engine.num_preempted + engine.released - engine.next_new - engine.cancelled_waiting
    new = engine.next_new
    for position in range(min(waiting, rows + 1 + engine.num_preempted)):
        if position < prefilling:
            r = state.running[e, engine.num_decoding + position]
        elif position < prefilling + engine.num_preempted:
            r = state.preempted[e, engine.num_preempted - 1 - (position - prefilling)]
        else:
            while state.requests[e, new].phase == CANCELLED:
                new += 1
            r = np.int32(new)
            new += 1
        request = state.requests[e, r]
        slack = NO_DEADLINE_S
        if request.generated == 0:
            slack = max(request.arrival + engine.ttft_target - engine.now, -NO_DEADLINE_S)
        if position >= rows:
            # Those behind arrived later: the first that has a deadline has the smallest slack.
            if slack < NO_DEADLINE_S:
                rest_slack = slack
                break
            continue
        remaining = request.context - request.computed
        queue[e, row, 0] = remaining
        queue[e, row, 1] = slack
        listed_tokens += remaining
        row += 1
    for unused in range(row, rows):
        queue[e, unused, 0] = 0.0
        queue[e, unused, 1] = 0.0
    queue[e, rows, 0] = engine.waiting_tokens - listed_tokens
    queue[e, rows, 1] = rest_slack if waiting > rows else 0.0
    return waiting


@kernel
def _observe_acceptance(state, e, drafted, accepted):
    """Per-depth counts from the histograms of accepted lengths, which are emptied."""
    depths = drafted.shape[1]
    reached = 0
    for depth in range(MAX_CANDIDATES, 0, -1):
        reached += state.stopped[e, depth] + state.exhausted[e, depth]
        if depth <= depths:
            accepted[e, depth - 1] = reached
            drafted[e, depth - 1] = reached + state.stopped[e, depth - 1]
    for depth in range(MAX_CANDIDATES + 1):
        state.stopped[e, depth] = 0
        state.exhausted[e, depth] = 0


@kernel
def observe(state, e, observation):
    """Write engine `e`'s telemetry into `observation` and restart its since-last-observation counters."""
    engine = state.engines[e]
    load = observation.load
    waiting = _observe_queue(state, e, observation.queue)
    _observe_acceptance(state, e, observation.drafted, observation.accepted)
    for band in range(RATE_BANDS):
        observation.rates[e, band] = 0.0
    for i in range(engine.num_decoding):
        rate = own_acceptance(state.requests[e, state.running[e, i]])
        observation.rates[e, min(int(rate * RATE_BANDS), RATE_BANDS - 1)] += 1.0
    prefilling_tokens = 0
    for i in range(engine.num_decoding, engine.num_running):
        request = state.requests[e, state.running[e, i]]
        prefilling_tokens += request.context - request.computed
    load[e, NUM_DECODES] = engine.num_decoding
    load[e, DECODE_KV_TOKENS] = engine.kv_tokens
    load[e, NUM_WAITING] = waiting
    load[e, WAITING_TOKENS] = engine.waiting_tokens
    load[e, PREFILLING_TOKENS] = prefilling_tokens
    load[e, FREE_KV_TOKENS] = max(0, engine.free_blocks - engine.watermark_blocks) * engine.block_size
    load[e, FREE_SEQS] = engine.max_num_seqs - engine.num_running
    load[e, INTERVAL_S] = min(engine.now - engine.seen_at, NO_DEADLINE_S)
    load[e, ITERATIONS] = engine.seen_iterations
    load[e, ARRIVALS] = engine.seen_arrivals
    load[e, ARRIVED_TOKENS] = engine.seen_arrived_tokens
    load[e, FINISHED_REQUESTS] = engine.seen_finished
    load[e, FINISHED_TOKENS] = engine.seen_finished_tokens
    load[e, EMITTED_TOKENS] = engine.seen_emitted
    load[e, PREEMPTIONS] = engine.seen_preemptions
    load[e, LAST_ITERATION_S] = engine.last_elapsed
    load[e, LAST_CANDIDATES] = engine.last_candidates
    load[e, LAST_PREFILL_TOKENS] = engine.prefill_tokens
    load[e, LAST_NUM_DECODES] = engine.num_decodes
    load[e, LAST_DECODE_KV_TOKENS] = engine.decode_kv_tokens
    load[e, LAST_EMITTED_TOKENS] = engine.emitted_tokens
    load[e, OVERDUE] = engine.overdue
    load[e, TTFT_TARGET_S] = engine.ttft_target
    engine.seen_at = engine.now
    engine.seen_iterations = 0
    engine.seen_arrivals = 0
    engine.seen_arrived_tokens = 0
    engine.seen_finished = 0
    engine.seen_finished_tokens = 0
    engine.seen_emitted = 0
    engine.seen_preemptions = 0
