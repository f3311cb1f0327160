"""The scheduler's memory: plain arrays that compiled code and Python share.

A `State` holds N independent engines. Everything is indexed `[e]` by engine first; the single engine is N = 1.
Per-request and per-engine values live in structured arrays, so that compiled code reads `state.requests[e, r].prompt`
and Python reads `state.requests["prompt"]`.
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

MAX_CANDIDATES = 32
"""Largest c the core's per-depth acceptance counters hold, in candidate tokens per request."""

ITL_BINS = 2048
ITL_LOWEST_S = 1e-5
ITL_BINS_PER_E = 100.0
"""ITL histogram: bin i holds gaps near ITL_LOWEST_S * exp(i / ITL_BINS_PER_E), so a quantile is within 0.5 %."""

REQUEST = np.dtype(
    [
        ("arrival", np.float64),  # s
        ("admitted", np.float64),  # s, first admission; NaN before
        ("first_token", np.float64),  # s; NaN before
        ("last_token", np.float64),  # s, latest emission
        ("max_itl", np.float64),  # s, largest gap between emissions
        ("first_position", np.int64),  # where its agreement run lengths start
        ("prompt", np.int32),  # tokens
        ("output", np.int32),  # tokens; the request finishes when `generated` reaches it
        ("phase", np.int32),
        ("context", np.int32),  # tokens its prefill must compute: the prompt, plus what it had generated if preempted
        ("computed", np.int32),  # tokens whose keys and values are in the cache
        ("generated", np.int32),  # output tokens emitted
        ("blocks", np.int32),  # KV blocks held
        ("preemptions", np.int32),
        ("drafted", np.int32),  # candidate tokens verified for it
        ("accepted", np.int32),  # candidate tokens accepted for it
        ("rejections", np.int32),  # verifications that ended at a rejected candidate
    ],
    align=True,
)

ENGINE = np.dtype(
    [
        # limits, set once
        ("ttft_target", np.float64),  # s
        ("block_size", np.int64),  # tokens
        ("total_blocks", np.int64),
        ("watermark_blocks", np.int64),  # kept free when a new request is admitted
        ("max_num_seqs", np.int64),
        ("prefill", np.int64),  # one of CHUNKED, WHOLE, FIRST, TURNS
        # clock and queues
        ("now", np.float64),  # s
        ("last_end", np.float64),  # s, end of the latest iteration
        ("num_requests", np.int64),  # rows of the request table in use
        ("released", np.int64),  # requests [0, released) have arrived
        ("next_new", np.int64),  # first request never admitted
        ("num_preempted", np.int64),
        ("cancelled_waiting", np.int64),  # of requests [next_new, released), those cancelled; never the first of them
        ("num_running", np.int64),
        ("num_decoding", np.int64),  # the first `num_decoding` of the running list decode; the rest prefill
        ("free_blocks", np.int64),
        ("kv_tokens", np.int64),  # cached tokens of the decoding requests
        ("num_finished", np.int64),
        ("num_cancelled", np.int64),
        ("waiting_tokens", np.int64),  # prompt tokens still to prefill over all released requests
        ("next_deadline", np.int64),  # first request whose TTFT deadline has not been looked at
        ("overdue", np.int64),  # requests past their TTFT deadline and without a first token
        ("tpot_weight", np.float64),  # sum of 1 / (output - 1) over requests between first and last token
        # the batch planned last
        ("num_decodes", np.int64),
        ("num_prefills", np.int64),
        ("decode_tokens", np.int64),  # sum of 1 + c_i
        ("decode_kv_tokens", np.int64),  # `kv_tokens` when the batch was planned
        ("candidate_steps", np.int64),  # largest c_i
        ("prefill_tokens", np.int64),
        ("prompts_completed", np.int64),  # of the batch's prefills, those whose last chunk this is
        ("emitted_tokens", np.int64),  # by the iteration committed last
        ("unread_tokens", np.int64),  # cached, and not read by a drafter that reads when it drafts (simulated only)
        # totals
        ("iterations", np.int64),
        ("batched_requests", np.int64),
        ("preemptions", np.int64),
        ("total_emitted", np.int64),
        ("total_drafted", np.int64),
        ("total_accepted", np.int64),
        ("total_decode_steps", np.int64),  # (request, iteration) pairs that decoded
        ("busy_s", np.float64),  # time inside iterations
        ("lowest_free_blocks", np.int64),
        # cost of the reward, in its own units (see engine.core.objective)
        ("tpot_cost", np.float64),  # s: integral of tpot_weight over time = sum of TPOT over requests
        ("violations", np.int64),  # TTFT deadlines missed
        ("lateness", np.float64),  # s: sum over requests of max(0, TTFT - target)
        # telemetry since the last observation
        ("seen_at", np.float64),  # s, when the last observation was taken
        ("seen_iterations", np.int64),
        ("seen_arrivals", np.int64),
        ("seen_arrived_tokens", np.int64),
        ("seen_finished", np.int64),
        ("seen_finished_tokens", np.int64),
        ("seen_emitted", np.int64),
        ("seen_preemptions", np.int64),
        ("last_elapsed", np.float64),  # s, duration of the latest iteration
        ("last_candidates", np.int64),
        ("last_budget", np.int64),
    ],
    align=True,
)


class State(NamedTuple):
    """N engines and their request tables; every array is indexed by engine first.

    requests: REQUEST (N, R) · engines: ENGINE (N,) · running, preempted: request ids (N, max_num_seqs) and
    (N, R), `preempted` a stack with the earliest arrival on top · batch_request, batch_tokens, accepted,
    reach: (N, 2 * max_num_seqs), decodes first, then prefills; `reach` is how many candidates the longest path had that
    begins with the accepted ones, as far as it was verified: c_i of a chain · stopped, exhausted: (N,
    MAX_CANDIDATES + 1) counts, since the last observation, of verifications that accepted exactly a candidates and then
    met a rejection, or accepted all a they had · itl: (N, ITL_BINS) histogram counts.
    """

    requests: NDArray[np.void]
    engines: NDArray[np.void]
    running: NDArray[np.int32]
    preempted: NDArray[np.int32]
    batch_request: NDArray[np.int32]
    batch_tokens: NDArray[np.int32]
    accepted: NDArray[np.int32]
    reach: NDArray[np.int32]
    stopped: NDArray[np.int64]
    exhausted: NDArray[np.int64]
    itl: NDArray[np.int64]


def allocate(
    num_engines: int,
    num_requests: int,
    *,
    total_blocks: int,
    block_size: int,
    watermark_blocks: int,
    max_num_seqs: int,
    ttft_target: float,
    prefill: str = PREFILL_ORDERS[CHUNKED],
) -> State:
    """Memory for `num_engines` empty engines with room for `num_requests` requests each."""
    engines = np.zeros(num_engines, dtype=ENGINE)
    engines["ttft_target"] = ttft_target
    engines["block_size"] = block_size
    engines["total_blocks"] = total_blocks
    engines["watermark_blocks"] = watermark_blocks
    engines["max_num_seqs"] = max_num_seqs
    engines["prefill"] = PREFILL_ORDERS.index(prefill)
    state = State(
        requests=np.zeros((num_engines, num_requests), dtype=REQUEST),
        engines=engines,
        running=np.zeros((num_engines, max_num_seqs), dtype=np.int32),
        preempted=np.zeros((num_engines, num_requests), dtype=np.int32),
        batch_request=np.zeros((num_engines, 2 * max_num_seqs), dtype=np.int32),
        batch_tokens=np.zeros((num_engines, 2 * max_num_seqs), dtype=np.int32),
        accepted=np.zeros((num_engines, 2 * max_num_seqs), dtype=np.int32),
        reach=np.zeros((num_engines, 2 * max_num_seqs), dtype=np.int32),
        stopped=np.zeros((num_engines, MAX_CANDIDATES + 1), dtype=np.int64),
        exhausted=np.zeros((num_engines, MAX_CANDIDATES + 1), dtype=np.int64),
        itl=np.zeros((num_engines, ITL_BINS), dtype=np.int64),
    )
    for e in range(num_engines):
        clear(state, e)
    return state


_LIMITS = ("ttft_target", "block_size", "total_blocks", "watermark_blocks", "max_num_seqs", "prefill")


def clear(state: State, e: int) -> None:
    """Empty engine `e`: no requests, clock at zero, all KV blocks free; its limits stay."""
    limits = [state.engines[e][name] for name in _LIMITS]
    state.engines[e] = np.zeros((), dtype=ENGINE)
    for name, value in zip(_LIMITS, limits, strict=True):
        state.engines[name][e] = value
    state.engines["free_blocks"][e] = state.engines["total_blocks"][e]
    state.engines["lowest_free_blocks"][e] = state.engines["total_blocks"][e]
    state.stopped[e] = 0
    state.exhausted[e] = 0
    state.itl[e] = 0


def load(
    state: State,
    e: int,
    arrival: NDArray[np.float64],
    prompt: NDArray[np.int32],
    output: NDArray[np.int32],
    first_position: NDArray[np.int64],
) -> None:
    """Fill engine `e`'s request table with R requests sorted by arrival; the engine is cleared first.

    `first_position[r]` is where request r's run lengths start in the agreement array that the simulator reads.
    """
    clear(state, e)
    count = len(arrival)
    rows = state.requests[e]
    # Padding included: assigning a record leaves it as it was, and tables are compared byte by byte.
    rows[:count].view(np.uint8)[:] = 0
    rows["arrival"][:count] = arrival
    rows["prompt"][:count] = prompt
    rows["context"][:count] = prompt
    rows["output"][:count] = output
    rows["first_position"][:count] = first_position[:count]
    for name in ("admitted", "first_token", "last_token"):
        rows[name][:count] = np.nan
    state.engines["num_requests"][e] = count
