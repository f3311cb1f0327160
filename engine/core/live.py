"""A live request table: requests are appended while others run, end at a stop token, and are retired when finished.

A simulated workload knows all its requests and their lengths before it begins.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.feed import Feed
from engine.core.state import CANCELLED, FINISHED, NOBODY, NOT_ADMITTED, State, allocate
from engine.limits import EngineLimits


def for_limits(limits: EngineLimits, num_requests: int, ttft_target: float) -> State:
    """One empty instance within these limits, with room for `num_requests` requests; `ttft_target` in s."""
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


def retire(state: State, feed: Feed) -> NDArray[Any]:
    """Remove the earliest requests from a single instance's table, up to the first that is not finished.

    Returns their rows. The others move up: row r becomes row r minus the number of rows returned, also in the queue.
    Call it between `commit` and the next `plan`. Totals and costs stay, so the returned rows and the table together
    equal the full table. A server that retires regularly needs memory only for unfinished requests.
    """
    rows, instance = state.requests, state.instances
    known, count = int(feed.next[0]), int(feed.end[0])
    unfinished = np.flatnonzero((rows["phase"][:known] != FINISHED) & (rows["phase"][:known] != CANCELLED))
    over = int(unfinished[0]) if unfinished.size else known
    gone = rows[:over].copy()
    rows[: count - over] = rows[over:count].copy()
    links = [rows[name][: count - over] for name in ("previous", "next", "due_before", "due_after")]
    for link in (*links, *(instance[name][:1] for name in ("head", "tail", "first_due", "last_due"))):
        link[link != NOBODY] -= over
    state.running[0, : instance["num_running"][0]] -= over
    feed.next[0] -= over
    feed.end[0] -= over
    return gone


@kernel
def append(state, feed, arrival, prompt, output):
    """Add a request of `prompt` tokens that may generate up to `output` to a single instance's feed; returns its row.

    `arrival` (s) must not precede that of an earlier request, and must be after the time of the latest `deliver`; the
    caller checks. The table must have room (`grown`).
    """
    r = feed.end[0]
    request = state.requests[r]
    request.phase = NOT_ADMITTED
    request.output = output
    request.first_position = 0
    request.computed = 0
    request.generated = 0
    request.blocks = 0
    request.context = prompt
    request.drafted = 0
    request.accepted = 0
    request.rejections = 0
    request.last_token = math.nan
    request.max_itl = 0.0
    request.arrival = arrival
    request.prompt = prompt
    request.ttft_target = state.limits[0].ttft_target
    request.admitted = math.nan
    request.first_token = math.nan
    request.left = math.nan
    request.preemptions = 0
    request.late = 0
    request.instance = NOBODY
    request.previous = NOBODY
    request.next = NOBODY
    request.due_before = NOBODY
    request.due_after = NOBODY
    feed.end[0] += 1
    return r


@kernel
def stop_after(state, i, r, tokens):
    """End the output of request `r` with the `tokens` >= 1 tokens that the planned iteration emits for it.

    Call it between `plan` and `commit`, which then finishes the request. Its share in `tpot_cost` is corrected to the
    charge for the true output length, so that the cost stays the sum of TPOT.
    """
    instance = state.instances[i]
    request = state.requests[r]
    output = request.generated + tokens
    if not math.isnan(request.first_token) and request.output > 1:
        correction = 1.0 / (output - 1) - 1.0 / (request.output - 1)
        instance.tpot_weight += correction
        state.totals[i].tpot_cost += correction * (instance.now - request.first_token)
    request.output = output
