"""What a live engine does to its request table between iterations and that a recorded workload never needs.

Requests are appended while others run, are cancelled by the client that sent them, and end at a stop token before
their output limit. A simulated workload knows all its requests and their lengths before it begins.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.blocks import give_back
from engine.core.scheduler import drop_finished, skip_cancelled
from engine.core.state import CANCELLED, DECODING, FINISHED, NOT_ADMITTED, PREEMPTED, PREFILLING, State, allocate
from engine.limits import EngineLimits


def for_limits(limits: EngineLimits, num_requests: int, ttft_target: float) -> State:
    """One empty engine within these limits, with room for so many requests; `ttft_target` in s."""
    return allocate(
        1,
        num_requests,
        total_blocks=limits.total_blocks,
        block_size=limits.block_size,
        watermark_blocks=limits.watermark_blocks,
        max_num_seqs=limits.max_num_seqs,
        ttft_target=ttft_target,
        prefill=limits.prefill,
    )


def grown(state: State, num_requests: int) -> State:
    """The same engines with room for at least `num_requests` requests each; `state` itself if it has the room.

    Room at least doubles, so that appending one request after another costs amortised constant time.
    """
    have = state.requests.shape[1]
    if num_requests <= have:
        return state
    extra = max(num_requests, 2 * have) - have
    return state._replace(
        requests=np.pad(state.requests, ((0, 0), (0, extra))),
        preempted=np.pad(state.preempted, ((0, 0), (0, extra))),
    )


def retire(state: State, e: int) -> NDArray[Any]:
    """Take the earliest requests out of engine `e`'s table, up to the first that is not over; returns their rows.

    The others move up: row r becomes row r minus the number of rows returned, in the queues too. To be called between
    `commit` and the next `plan`. Totals and costs stay, so rows kept elsewhere and the table are together what the
    table would have been; a server that retires now and then runs for days in the memory of what is unfinished.
    """
    engines, rows = state.engines, state.requests[e]
    released, count = int(engines["released"][e]), int(engines["num_requests"][e])
    unfinished = np.flatnonzero((rows["phase"][:released] != FINISHED) & (rows["phase"][:released] != CANCELLED))
    over = int(unfinished[0]) if unfinished.size else released
    gone = rows[:over].copy()
    rows[: count - over] = rows[over:count].copy()
    state.running[e, : engines["num_running"][e]] -= over
    state.preempted[e, : engines["num_preempted"][e]] -= over
    for name in ("num_requests", "released", "next_new"):
        engines[name][e] -= over
    # A request that was over before its deadline was looked at is charged nothing by looking at it.
    engines["next_deadline"][e] = max(0, int(engines["next_deadline"][e]) - over)
    return gone


@kernel
def append(state, e, arrival, prompt, output):
    """Add a request of `prompt` tokens that may generate up to `output`; returns its row in the request table.

    `arrival` (s) must not be before an earlier request's, and after the time of the latest `release`: the caller
    checks. The table must have room (`grown`).
    """
    engine = state.engines[e]
    r = engine.num_requests
    request = state.requests[e, r]
    request.arrival = arrival
    request.admitted = math.nan
    request.first_token = math.nan
    request.last_token = math.nan
    request.max_itl = 0.0
    request.first_position = 0
    request.prompt = np.int32(prompt)
    request.output = np.int32(output)
    request.phase = np.int32(NOT_ADMITTED)
    request.context = np.int32(prompt)
    request.computed = np.int32(0)
    request.generated = np.int32(0)
    request.blocks = np.int32(0)
    request.preemptions = np.int32(0)
    request.drafted = np.int32(0)
    request.accepted = np.int32(0)
    request.rejections = np.int32(0)
    engine.num_requests += 1
    return r


@kernel
def leave_preempted(state, e, r):
    """Take request `r` out of the stack of preempted requests; the order of the others is kept."""
    engine = state.engines[e]
    kept = 0
    for i in range(engine.num_preempted):
        other = state.preempted[e, i]
        if other != r:
            state.preempted[e, kept] = other
            kept += 1
    engine.num_preempted = kept


@kernel
def cancel(state, e, r):
    """Drop request `r` in whatever phase it is and free its blocks; returns False when it was already over.

    To be called between `commit` and the next `plan`. Tokens emitted before stay emitted, and what the request has
    been charged (`tpot_cost`, `lateness`, a violated deadline) stays charged; it is charged nothing more.
    """
    engine = state.engines[e]
    request = state.requests[e, r]
    phase = request.phase
    if phase in (FINISHED, CANCELLED):
        return False
    request.phase = np.int32(CANCELLED)
    engine.num_cancelled += 1
    if math.isnan(request.first_token):
        if r < engine.next_deadline:
            engine.overdue -= 1
    elif request.output > 1:
        engine.tpot_weight -= 1.0 / (request.output - 1)
    if phase == DECODING:
        engine.kv_tokens -= request.computed
    elif r < engine.released:
        engine.waiting_tokens -= request.context - request.computed
    if phase in (DECODING, PREFILLING):
        give_back(engine, request)
        drop_finished(state, e)
    elif phase == PREEMPTED:
        leave_preempted(state, e, r)
    elif r < engine.released:
        engine.cancelled_waiting += 1
        skip_cancelled(state, e)
    return True


@kernel
def stop_after(state, e, r, tokens):
    """End the output of request `r` with the `tokens` >= 1 tokens that the planned iteration emits for it.

    To be called between `plan` and `commit`, which then finishes the request. Its share in `tpot_cost` is corrected to
    what it would have been charged had the true output length been known, so that the cost stays the sum of TPOT.
    """
    engine = state.engines[e]
    request = state.requests[e, r]
    output = request.generated + tokens
    if not math.isnan(request.first_token) and request.output > 1:
        correction = 1.0 / (output - 1) - 1.0 / (request.output - 1)
        engine.tpot_weight += correction
        engine.tpot_cost += correction * (engine.now - request.first_token)
    request.output = np.int32(output)
