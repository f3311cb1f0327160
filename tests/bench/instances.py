"""A thousand instances of the engine behind one queue, on the scheduler's own verbs: `python -m tests.bench.instances`.

The least that a cluster needs: one request table, an event heap with one entry an instance, arrivals as a cursor, and
the least loaded instance for every arrival.
"""

from __future__ import annotations

import os
import sys
import time

import numpy as np

from engine.compiled import kernel
from engine.config import EngineConfig
from engine.core import state as core
from engine.core.deadlines import advance_clock
from engine.core.membership import submit
from engine.core.scheduler import commit, has_work, plan
from engine.core.state import State
from engine.simulator.candidates import AcceptanceTrace, accept_chains
from engine.simulator.timing import batch_time, reading_time
from tests.bench import measure

CANDIDATES, BUDGET = 3, 512
OUTPUTS = 400
REQUESTS_PER_INSTANCE_S = 4.0
CASES = ((16, 100_000), (1000, 300_000))


@kernel
def _sift_up(times, order, place):
    while place > 0:
        above = (place - 1) // 2
        if (times[above], order[above]) <= (times[place], order[place]):
            break
        times[above], times[place] = times[place], times[above]
        order[above], order[place] = order[place], order[above]
        place = above


@kernel
def _sift_down(times, order, size):
    place = 0
    while 2 * place + 1 < size:
        below = 2 * place + 1
        if below + 1 < size and (times[below + 1], order[below + 1]) < (times[below], order[below]):
            below += 1
        if (times[place], order[place]) <= (times[below], order[below]):
            break
        times[below], times[place] = times[place], times[below]
        order[below], order[place] = order[place], order[below]
        place = below


@kernel
def _least_loaded(state):
    best = 0
    for i in range(1, len(state.instances)):
        one, other = state.instances[i], state.instances[best]
        if one.waiting_tokens + one.kv_tokens < other.waiting_tokens + other.kv_tokens:
            best = i
    return best


@kernel
def serve(state, tables, trace, times, order, elapsed):
    """Serve the whole request table, sorted by arrival; returns how many iterations that took.

    times, order: (N + 1,) a heap of when iterations end, and whose · elapsed: (N,) how long they take; 0 when idle.
    """
    size = iterations = arrived = 0
    while arrived < len(state.requests) or size > 0:
        if arrived < len(state.requests) and (size == 0 or state.requests[arrived].arrival <= times[0]):
            now = state.requests[arrived].arrival
            i = _least_loaded(state)
            if elapsed[i] == 0.0:
                advance_clock(state, i, now)
            submit(state, i, arrived)
            arrived += 1
        else:
            now, i = times[0], order[0]
            size -= 1
            times[0], order[0] = times[size], order[size]
            _sift_down(times, order, size)
            commit(state, i, elapsed[i])
            elapsed[i] = 0.0
            iterations += 1
        if elapsed[i] == 0.0 and has_work(state, i):
            plan(state, i, CANDIDATES, BUDGET)
            accept_chains(state, i, trace)
            elapsed[i] = batch_time(state, i, tables) + reading_time(state, i, tables)
            times[size], order[size] = now + elapsed[i], i
            _sift_up(times, order, size)
            size += 1
    return iterations


def system(instances: int, requests: int) -> tuple[State, AcceptanceTrace, EngineConfig]:
    """Idle instances, and a table of requests that load each of them moderately."""
    config = EngineConfig(name="vicuna_7b_a100", latency="vicuna_7b_a100")
    limits = config.limits(config.true_latency())
    state = core.allocate(
        instances,
        requests,
        total_blocks=limits.total_blocks,
        block_size=limits.block_size,
        watermark_blocks=limits.watermark_blocks,
        max_num_seqs=limits.max_num_seqs,
        ttft_target=1.0,
    )
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(1.0 / (REQUESTS_PER_INSTANCE_S * instances), requests))
    prompt, output = rng.integers(50, 900, requests), rng.integers(20, OUTPUTS, requests)
    positions = np.arange(requests, dtype=np.int64) % 64
    core.enter(state, 0, arrival, prompt, output, positions, 1.0)
    runs = np.minimum(rng.geometric(0.35, OUTPUTS + 64) - 1, 20).astype(np.uint8)
    return state, AcceptanceTrace(runs, np.zeros(0, np.uint8), np.zeros(0, np.float32)), config


def run(instances: int, requests: int) -> tuple[State, int, float]:
    """The state after all requests were served, the iterations, and the CPU seconds."""
    state, trace, config = system(instances, requests)
    tables = config.true_latency().tables
    room = np.zeros(instances + 1), np.zeros(instances + 1, dtype=np.int64), np.zeros(instances)
    begin = time.process_time()
    iterations = serve(state, tables, trace, *room)
    return state, int(iterations), time.process_time() - begin


def main() -> None:
    """Both sizes, after a small one that compiles."""
    run(2, 10)
    for instances, requests in CASES:
        state, iterations, seconds = run(instances, requests)
        assert state.totals["finished"].sum() == requests
        batch = state.totals["batched_requests"].sum() / iterations
        measure.title(f"{instances:,} instances, {requests:,} requests, mean batch {batch:.1f}")
        measure.rate("iterations", iterations / seconds, None)
        measure.rate("requests", requests / seconds, None)
        megabytes = sum(array.nbytes for array in state) / 1e6
        print(f"  request table {state.requests.nbytes / requests:.0f} bytes a request, all arrays {megabytes:.0f} MB")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
