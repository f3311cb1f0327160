"""The scheduler's memory: plain arrays that compiled code and Python share.

A `State` holds one table of requests for the whole system and N instances of the engine. Per-request and per-instance
values live in structured arrays, so that compiled code reads `state.requests[r].prompt` and Python reads
`state.requests["prompt"]`. A single engine is N = 1.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

NOT_ADMITTED = 0
PREFILLING = 1
DECODING = 2
FINISHED = 3
PREEMPTED = 4
CANCELLED = 5

CHUNKED = 0
WHOLE = 1
FIRST = 2
TURNS = 3
PREFILL_ORDERS = ("chunked", "whole", "first", "turns")
"""How prompts are scheduled beside decodes (see `engine.core.scheduler`), by the numbers above."""

NOBODY = -1
"""In place of a request or an instance: none."""

MAX_CANDIDATES = 32
"""Largest c the core's per-depth acceptance counters hold, in candidate tokens per request."""

ITL_BINS = 2048
ITL_LOWEST_S = 1e-5
ITL_BINS_PER_E = 100.0
"""ITL histogram: bin i holds gaps near ITL_LOWEST_S * exp(i / ITL_BINS_PER_E), so a quantile is within 0.5 %."""

REQUEST = np.dtype(
    [
        # read of every request that waits, whenever telemetry is: together, in as few cache lines as may be
        ("next", np.int64),  # in the queue of its instance; NOBODY at the end
        ("context", np.int64),  # tokens its prefill must compute: the prompt, plus what it had generated if preempted
        ("computed", np.int64),  # tokens whose keys and values are in the cache
        ("generated", np.int64),  # output tokens emitted
        ("arrival", np.float64),  # s
        ("ttft_target", np.float64),  # s
        # read and written of every request that decodes
        ("phase", np.int64),
        ("output", np.int64),  # tokens; the request finishes when `generated` reaches it
        ("first_position", np.int64),  # where its agreement run lengths start
        ("blocks", np.int64),  # KV blocks held
        ("drafted", np.int64),  # candidate tokens verified for it
        ("accepted", np.int64),  # candidate tokens accepted for it
        ("rejections", np.int64),  # verifications that ended at a rejected candidate
        ("last_token", np.float64),  # s, latest emission
        ("max_itl", np.float64),  # s, largest gap between emissions
        # the rest of its life
        ("prompt", np.int64),  # tokens
        ("admitted", np.float64),  # s, first admission; NaN before
        ("first_token", np.float64),  # s; NaN before
        ("left", np.float64),  # s, when it was withdrawn from an instance; NaN if it never was
        ("preemptions", np.int64),
        ("late", np.int64),  # 1 once its TTFT deadline has passed without a first token
        ("instance", np.int64),  # where it is or was served; NOBODY: nowhere yet, or it was withdrawn
        ("previous", np.int64),  # in the queue of its instance; NOBODY at the beginning
        ("due_before", np.int64),  # in its instance's list of deadlines; NOBODY at the end
        ("due_after", np.int64),
    ],
    align=True,
)

LIMITS = np.dtype(
    [
        ("block_size", np.int64),  # tokens
        ("total_blocks", np.int64),
        ("watermark_blocks", np.int64),  # kept free when a new request is admitted
        ("max_num_seqs", np.int64),
        ("prefill", np.int64),  # one of CHUNKED, WHOLE, FIRST, TURNS
        ("ttft_target", np.float64),  # s, of requests that have none of their own, and in telemetry
        ("model", np.int64),  # row of the latency tables
    ],
    align=True,
)
"""An instance's limits, set once."""

INSTANCE = np.dtype(
    [
        ("now", np.float64),  # s, the instance's clock
        ("last_end", np.float64),  # s, end of the latest iteration
        ("head", np.int64),  # the queue: first request to admit, last one, how many
        ("tail", np.int64),
        ("num_waiting", np.int64),
        ("num_running", np.int64),
        ("num_decoding", np.int64),  # the first `num_decoding` of the running list decode; the rest prefill
        ("free_blocks", np.int64),
        ("kv_tokens", np.int64),  # cached tokens of the decoding requests
        ("waiting_tokens", np.int64),  # prompt tokens still to prefill over all its requests
        ("first_due", np.int64),  # requests without a first token whose deadline is to come, by deadline
        ("last_due", np.int64),
        ("overdue", np.int64),  # requests past their TTFT deadline and without a first token
        ("tpot_weight", np.float64),  # sum of 1 / (output - 1) over requests between first and last token
        ("unread_tokens", np.int64),  # cached, and not read by a drafter that reads when it drafts (simulated only)
    ],
    align=True,
)
"""An instance's queue and clock."""

BATCH = np.dtype(
    [
        ("candidates", np.int64),  # the action it was planned with
        ("token_budget", np.int64),
        ("num_decodes", np.int64),
        ("num_prefills", np.int64),
        ("decode_tokens", np.int64),  # sum of 1 + c_i
        ("decode_kv_tokens", np.int64),  # `kv_tokens` when the batch was planned
        ("candidate_steps", np.int64),  # largest c_i
        ("prefill_tokens", np.int64),
        ("prompts_completed", np.int64),  # of the batch's prefills, those whose last chunk this is
        ("emitted_tokens", np.int64),  # by the iteration committed last
        ("elapsed", np.float64),  # s, duration of the iteration committed last
    ],
    align=True,
)
"""The batch planned last."""

TOTALS = np.dtype(
    [
        ("arrivals", np.int64),  # requests submitted
        ("arrived_tokens", np.int64),  # their prompt tokens
        ("finished", np.int64),
        ("finished_tokens", np.int64),  # output tokens of finished requests
        ("cancelled", np.int64),
        ("iterations", np.int64),
        ("batched_requests", np.int64),
        ("preemptions", np.int64),
        ("emitted_tokens", np.int64),
        ("drafted", np.int64),
        ("accepted", np.int64),
        ("decode_steps", np.int64),  # (request, iteration) pairs that decoded
        ("deepest", np.int64),  # most candidates that one verification accepted, of those that are counted by depth
        ("busy_s", np.float64),  # time inside iterations
        ("lowest_free_blocks", np.int64),  # the one that falls
        # cost of the reward, in its own units (see engine.core.objective)
        ("tpot_cost", np.float64),  # s: integral of tpot_weight over time = sum of TPOT over requests
        ("violations", np.int64),  # TTFT deadlines missed
        ("lateness", np.float64),  # s: sum over requests of max(0, TTFT - target)
    ],
    align=True,
)
"""What an instance has done so far; nothing is reset by looking at it."""


class State(NamedTuple):
    """A system's request table and its N instances; all but `requests` are indexed by instance first.

    requests: REQUEST (R,) · limits: LIMITS (N,) · instances: INSTANCE (N,) · batches: BATCH (N,) · totals: TOTALS (N,)
    · running: (N, max_num_seqs) rows of the request table, decodes first · batch_request, batch_tokens, accepted,
    reach: (N, 2 * max_num_seqs), decodes first, then prefills; `reach` is how many candidates the longest path had that
    begins with the accepted ones, as far as it was verified: c_i of a chain · stopped, exhausted: (N,
    MAX_CANDIDATES + 1) counts of verifications that accepted exactly a candidates and then met a rejection, or accepted
    all a they had · itl: (N, ITL_BINS) histogram counts.
    """

    requests: NDArray[np.void]
    limits: NDArray[np.void]
    instances: NDArray[np.void]
    batches: NDArray[np.void]
    totals: NDArray[np.void]
    running: NDArray[np.int64]
    batch_request: NDArray[np.int64]
    batch_tokens: NDArray[np.int64]
    accepted: NDArray[np.int64]
    reach: NDArray[np.int64]
    stopped: NDArray[np.int64]
    exhausted: NDArray[np.int64]
    itl: NDArray[np.int64]


def allocate(
    num_instances: int,
    num_requests: int,
    *,
    total_blocks: int,
    block_size: int,
    watermark_blocks: int,
    max_num_seqs: int,
    ttft_target: float,
    prefill: str = PREFILL_ORDERS[CHUNKED],
) -> State:
    """Memory for `num_instances` empty instances of one kind, and room for `num_requests` requests in all."""
    limits = np.zeros(num_instances, dtype=LIMITS)
    limits["ttft_target"] = ttft_target
    limits["block_size"] = block_size
    limits["total_blocks"] = total_blocks
    limits["watermark_blocks"] = watermark_blocks
    limits["max_num_seqs"] = max_num_seqs
    limits["prefill"] = PREFILL_ORDERS.index(prefill)
    in_batch = (num_instances, 2 * max_num_seqs)
    depths = (num_instances, MAX_CANDIDATES + 1)
    state = State(
        requests=np.zeros(num_requests, dtype=REQUEST),
        limits=limits,
        instances=np.zeros(num_instances, dtype=INSTANCE),
        batches=np.zeros(num_instances, dtype=BATCH),
        totals=np.zeros(num_instances, dtype=TOTALS),
        running=np.zeros((num_instances, max_num_seqs), dtype=np.int64),
        batch_request=np.zeros(in_batch, dtype=np.int64),
        batch_tokens=np.zeros(in_batch, dtype=np.int64),
        accepted=np.zeros(in_batch, dtype=np.int64),
        reach=np.zeros(in_batch, dtype=np.int64),
        stopped=np.zeros(depths, dtype=np.int64),
        exhausted=np.zeros(depths, dtype=np.int64),
        itl=np.zeros((num_instances, ITL_BINS), dtype=np.int64),
    )
    for i in range(num_instances):
        clear(state, i)
    return state


def clear(state: State, i: int) -> None:
    """Empty instance `i`: no requests, clock at zero, all KV blocks free; its limits stay."""
    for array in (state.instances, state.batches, state.totals):
        array[i] = np.zeros((), dtype=array.dtype)
    for name in ("head", "tail", "first_due", "last_due"):
        state.instances[name][i] = NOBODY
    state.instances["free_blocks"][i] = state.limits["total_blocks"][i]
    state.totals["lowest_free_blocks"][i] = state.limits["total_blocks"][i]
    state.stopped[i] = 0
    state.exhausted[i] = 0
    state.itl[i] = 0


def enter(
    state: State,
    first: int,
    arrival: NDArray[np.float64],
    prompt: NDArray[np.integer],
    output: NDArray[np.integer],
    first_position: NDArray[np.int64],
    ttft_target: float,
) -> None:
    """Write new requests into the rows of the table from `first` on; `submit` gives them to an instance.

    `first_position[r]` is where request r's run lengths start in the acceptance trace that the simulator reads.
    """
    rows = state.requests[first : first + len(arrival)]
    # Padding included: assigning a record leaves it as it was, and tables are compared byte by byte.
    rows.view(np.uint8)[:] = 0
    rows["arrival"] = arrival
    rows["prompt"] = prompt
    rows["context"] = prompt
    rows["output"] = output
    rows["first_position"] = first_position
    rows["ttft_target"] = ttft_target
    for name in ("admitted", "first_token", "last_token", "left"):
        rows[name] = np.nan
    for name in ("instance", "previous", "next", "due_before", "due_after"):
        rows[name] = NOBODY


def grown(state: State, num_requests: int) -> State:
    """The same system with room for at least `num_requests` requests; `state` itself if it has the room.

    Room at least doubles, so that entering one request after another costs amortised constant time.
    """
    have = len(state.requests)
    if num_requests <= have:
        return state
    extra = max(num_requests, 2 * have) - have
    return state._replace(requests=np.pad(state.requests, (0, extra)))
