"""What a controller sees: the telemetry that a production engine has, as fixed-shape float32 arrays.

Nothing here knows an output length, a future arrival or a future agreement.
"""

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.acceptance import own_acceptance
from engine.core.state import MAX_CANDIDATES, NOBODY, TOTALS

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
    """Telemetry of N instances, each array indexed by instance first, float32.

    load: (N, len(LOAD_FIELDS)) · queue: (N, M + 1, 2) rows of (prompt tokens remaining, slack to the TTFT deadline in
    s) for the first M requests whose prompt is not done, in order of service, then one row for the rest (their total
    tokens, the slack of the first of them that has a deadline); unused rows are zero · drafted, accepted: (N, C) how
    often, since the last observation, a candidate at draft depth 1..C was verified after all before it were accepted,
    and how often it was accepted too · rates: (N, RATE_BANDS) how many of the decoding requests have an acceptance rate
    of their own (`own_acceptance`) in each eighth of [0, 1].
    """

    load: NDArray[np.float32]
    queue: NDArray[np.float32]
    drafted: NDArray[np.float32]
    accepted: NDArray[np.float32]
    rates: NDArray[np.float32]


def allocate_observation(num_instances: int, queue_rows: int, max_candidates: int) -> Observation:
    """Zeroed arrays for `observe`; M = `queue_rows`, C = max(1, `max_candidates`)."""
    depth = max(1, max_candidates)
    return Observation(
        load=np.zeros((num_instances, len(LOAD_FIELDS)), dtype=np.float32),
        queue=np.zeros((num_instances, queue_rows + 1, 2), dtype=np.float32),
        drafted=np.zeros((num_instances, depth), dtype=np.float32),
        accepted=np.zeros((num_instances, depth), dtype=np.float32),
        rates=np.zeros((num_instances, RATE_BANDS), dtype=np.float32),
    )


def as_dict(observation: Observation, i: int = 0) -> dict[str, NDArray[Any]]:
    """Instance `i`'s rows of batched telemetry by name, as the environment has them (views)."""
    return {name: array[i] for name, array in zip(Observation._fields, observation, strict=True)}


class Seen(NamedTuple):
    """What an observer of N instances saw when it last looked; telemetry counts from there.

    now: (N,) s · totals: TOTALS (N,) · stopped, exhausted: (N, MAX_CANDIDATES + 1), as in `State`.
    """

    now: NDArray[np.float64]
    totals: NDArray[np.void]
    stopped: NDArray[np.int64]
    exhausted: NDArray[np.int64]


def new_seen(num_instances: int) -> Seen:
    """An observer that has not looked yet, at instances that have not run."""
    depths = (num_instances, MAX_CANDIDATES + 1)
    return Seen(
        now=np.zeros(num_instances),
        totals=np.zeros(num_instances, dtype=TOTALS),
        stopped=np.zeros(depths, dtype=np.int64),
        exhausted=np.zeros(depths, dtype=np.int64),
    )


def forget(seen: Seen, i: int) -> None:
    """Instance `i` was cleared: count from nothing."""
    for array in seen:
        array[i] = np.zeros((), dtype=array.dtype)


@kernel
def _observe_queue(state, i, queue):
    """Fill the queue rows in order of service: the prompts in progress, then the queue. Returns how many wait."""
    instance = state.instances[i]
    now = instance.now
    rows = queue.shape[1] - 1
    prefilling = instance.num_running - instance.num_decoding
    waiting = prefilling + instance.num_waiting
    listed_tokens = 0
    row = 0
    rest_slack = NO_DEADLINE_S
    position = instance.num_decoding
    queued = instance.head
    while position < instance.num_running or queued != NOBODY:
        if position < instance.num_running:
            r = state.running[i, position]
            position += 1
        else:
            r = queued
            queued = state.requests[r].next
        request = state.requests[r]
        slack = NO_DEADLINE_S
        if request.generated == 0:
            slack = max(request.arrival + request.ttft_target - now, -NO_DEADLINE_S)
        if row == rows:
            # Of those behind, the next to be served that has a deadline.
            if slack < NO_DEADLINE_S:
                rest_slack = slack
                break
            continue
        remaining = request.context - request.computed
        queue[i, row, 0] = remaining
        queue[i, row, 1] = slack
        listed_tokens += remaining
        row += 1
    for unused in range(row, rows):
        queue[i, unused, 0] = 0.0
        queue[i, unused, 1] = 0.0
    queue[i, rows, 0] = instance.waiting_tokens - listed_tokens
    queue[i, rows, 1] = rest_slack if waiting > rows else 0.0
    return waiting


@kernel
def _observe_acceptance(state, i, seen, drafted, accepted):
    """Per-depth counts from the growth of the histograms of accepted lengths."""
    depths = drafted.shape[1]
    # No count is above 0 past the deepest acceptance, which spares most of both histograms.
    last = min(state.totals[i].deepest + 1, MAX_CANDIDATES)
    for depth in range(last, depths):
        accepted[i, depth] = 0.0
        drafted[i, depth] = 0.0
    reached = 0
    for depth in range(last, 0, -1):
        stopped = state.stopped[i, depth] - seen.stopped[i, depth]
        reached += stopped + state.exhausted[i, depth] - seen.exhausted[i, depth]
        if depth <= depths:
            accepted[i, depth - 1] = reached
            drafted[i, depth - 1] = reached + state.stopped[i, depth - 1] - seen.stopped[i, depth - 1]
    for depth in range(last + 1):
        seen.stopped[i, depth] = state.stopped[i, depth]
        seen.exhausted[i, depth] = state.exhausted[i, depth]


@kernel
def observe(state, i, seen, observation):
    """Write instance `i`'s telemetry into `observation`, counted from `seen`, which then is the present.

    Nothing of the instance changes: several may look, each with a `Seen` of its own.
    """
    instance = state.instances[i]
    limits = state.limits[i]
    batch = state.batches[i]
    totals = state.totals[i]
    before = seen.totals[i]
    load = observation.load
    waiting = _observe_queue(state, i, observation.queue)
    _observe_acceptance(state, i, seen, observation.drafted, observation.accepted)
    for band in range(RATE_BANDS):
        observation.rates[i, band] = 0.0
    for position in range(instance.num_decoding):
        rate = own_acceptance(state.requests[state.running[i, position]])
        observation.rates[i, min(int(rate * RATE_BANDS), RATE_BANDS - 1)] += 1.0
    prefilling_tokens = 0
    for position in range(instance.num_decoding, instance.num_running):
        request = state.requests[state.running[i, position]]
        prefilling_tokens += request.context - request.computed
    load[i, NUM_DECODES] = instance.num_decoding
    load[i, DECODE_KV_TOKENS] = instance.kv_tokens
    load[i, NUM_WAITING] = waiting
    load[i, WAITING_TOKENS] = instance.waiting_tokens
    load[i, PREFILLING_TOKENS] = prefilling_tokens
    load[i, FREE_KV_TOKENS] = max(0, instance.free_blocks - limits.watermark_blocks) * limits.block_size
    load[i, FREE_SEQS] = limits.max_num_seqs - instance.num_running
    load[i, INTERVAL_S] = min(instance.now - seen.now[i], NO_DEADLINE_S)
    load[i, ITERATIONS] = totals.iterations - before.iterations
    load[i, ARRIVALS] = totals.arrivals - before.arrivals
    load[i, ARRIVED_TOKENS] = totals.arrived_tokens - before.arrived_tokens
    load[i, FINISHED_REQUESTS] = totals.finished - before.finished
    load[i, FINISHED_TOKENS] = totals.finished_tokens - before.finished_tokens
    load[i, EMITTED_TOKENS] = totals.emitted_tokens - before.emitted_tokens
    load[i, PREEMPTIONS] = totals.preemptions - before.preemptions
    load[i, LAST_ITERATION_S] = batch.elapsed
    load[i, LAST_CANDIDATES] = batch.candidates
    load[i, LAST_PREFILL_TOKENS] = batch.prefill_tokens
    load[i, LAST_NUM_DECODES] = batch.num_decodes
    load[i, LAST_DECODE_KV_TOKENS] = batch.decode_kv_tokens
    load[i, LAST_EMITTED_TOKENS] = batch.emitted_tokens
    load[i, OVERDUE] = instance.overdue
    load[i, TTFT_TARGET_S] = limits.ttft_target
    seen.now[i] = instance.now
    before.iterations = totals.iterations
    before.arrivals = totals.arrivals
    before.arrived_tokens = totals.arrived_tokens
    before.finished = totals.finished
    before.finished_tokens = totals.finished_tokens
    before.emitted_tokens = totals.emitted_tokens
    before.preemptions = totals.preemptions


@kernel
def look_away(state, i, seen, observation):
    """Observe nothing, in place of `observe`: for policies whose choice never changes."""
