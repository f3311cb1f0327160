"""The simulator: the shared scheduler under a virtual clock.

A `LatencyModel` says how long each batch takes and the workload's agreements say how many candidates are accepted;
nothing is random here, so a run is a pure function of (engine, workload, actions).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.drafting import CHAINS, accept_chains, accept_shared, grown, new_draws, share_candidates
from engine.backends.timing import batch_time, reading_time
from engine.compiled import kernel
from engine.config import EngineConfig
from engine.core import state as core
from engine.core.scheduler import advance_clock, commit, has_work, plan, release
from engine.core.telemetry import Observation, allocate_observation, observe
from engine.latency.model import LatencyModel
from engine.workload.workload import Workload

ITERATION = np.dtype(
    [
        ("start_s", np.float64),
        ("end_s", np.float64),
        ("candidates", np.int32),
        ("token_budget", np.int32),
        ("num_decodes", np.int32),
        ("num_prefills", np.int32),
        ("prefill_tokens", np.int32),
        ("decode_tokens", np.int32),
        ("emitted_tokens", np.int32),
        ("kv_tokens", np.int32),
        ("waiting", np.int32),
    ]
)
"""One row of `iterations.parquet`; `kv_tokens` are the decoding requests' cached tokens before the iteration."""

CHUNK_ITERATIONS = 200_000
"""Iterations a compiled loop runs before it lets Python show progress or take an interrupt."""


@kernel
def settle(state, e):
    """Release arrivals and, with nothing to do, jump to the next one; returns False when no request is left."""
    engine = state.engines[e]
    release(state, e)
    if has_work(state, e):
        return True
    if engine.released >= engine.num_requests:
        return False
    advance_clock(state, e, state.requests[e, engine.released].arrival)
    release(state, e)
    return True


@kernel
def run_iteration(state, e, tables, draws, candidates, token_budget, decision_s):
    """Decide, plan, run and commit one iteration of an engine that has work, then settle.

    `decision_s` is charged to the clock first, and requests that arrive meanwhile can join the batch. Returns False
    when no request is left.
    """
    if decision_s > 0.0:
        advance_clock(state, e, state.engines[e].now + decision_s)
        release(state, e)
    plan(state, e, candidates, token_budget)
    if draws.kind == CHAINS:
        accept_chains(state, e, draws)
    else:
        share_candidates(state, e, draws, tables)
        accept_shared(state, e, draws)
    commit(state, e, batch_time(state, e, tables) + reading_time(state, e, tables))
    return settle(state, e)


@kernel
def log_iteration(state, e, log, row):
    """Copy the iteration committed last into `log[row]`."""
    engine = state.engines[e]
    line = log[row]
    line.start_s = engine.last_end - engine.last_elapsed
    line.end_s = engine.last_end
    line.candidates = engine.last_candidates
    line.token_budget = engine.last_budget
    line.num_decodes = engine.num_decodes
    line.num_prefills = engine.num_prefills
    line.prefill_tokens = engine.prefill_tokens
    line.decode_tokens = engine.decode_tokens
    line.emitted_tokens = engine.emitted_tokens
    line.kv_tokens = engine.decode_kv_tokens
    line.waiting = engine.num_preempted + engine.released - engine.next_new - engine.cancelled_waiting


@kernel
def run_constant(state, tables, draws, candidates, token_budget, decision_s, max_iterations, log):
    """Run engine 0 with one action for at most `max_iterations`; returns (iterations run, whether any work is left).

    An empty `log` records nothing.
    """
    recording = len(log) > 0
    for row in range(max_iterations):
        more = run_iteration(state, 0, tables, draws, candidates, token_budget, decision_s)
        if recording:
            log_iteration(state, 0, log, row)
        if not more:
            return row + 1, False
    return max_iterations, True


CompiledLoop = Callable[[int, NDArray[np.void]], tuple[int, bool]]
"""Runs at most so many iterations of a simulator, filling the log; returns (iterations run, whether work is left)."""


class Simulator:
    """One or more simulated engines of one configuration, each with its own workload.

    Args:
        config: engine limits and the name of its latency tables.
        workloads: one `Workload` per engine; requests that cannot fit are refused (ValueError naming the request).
        ttft_target: latency requirement on TTFT in s, which telemetry and lateness are counted against.
        queue_rows: M, the requests an observation lists one by one.
    """

    def __init__(
        self,
        config: EngineConfig,
        workloads: Sequence[Workload],
        *,
        ttft_target: float,
        latency: LatencyModel | None = None,
        queue_rows: int = 64,
        max_candidates: int = core.MAX_CANDIDATES,
    ) -> None:
        self.config = config
        self.latency = latency if latency is not None else config.true_latency()
        self.limits = config.limits(self.latency)
        self.queue_rows = queue_rows
        self.max_candidates = max_candidates
        self._ttft_target = ttft_target
        self._allocate(len(workloads), max(len(w.arrival) for w in workloads), max(len(w.rank) for w in workloads))
        self.workloads: list[Workload] = list(workloads)
        for e, workload in enumerate(workloads):
            self.load(e, workload)

    def _allocate(self, engines: int, requests: int, positions: int) -> None:
        self.state = core.allocate(
            engines,
            requests,
            total_blocks=self.limits.total_blocks,
            block_size=self.limits.block_size,
            watermark_blocks=self.limits.watermark_blocks,
            max_num_seqs=self.limits.max_num_seqs,
            ttft_target=self._ttft_target,
            prefill=self.limits.prefill,
        )
        self.draws = new_draws(self.config.speculation, engines, positions, self.limits.max_num_seqs)

    def load(self, e: int, workload: Workload) -> None:
        """Put a fresh workload into engine `e` and settle it at its first arrival."""
        workload.check_fits(self.limits.max_model_len, self.limits.total_blocks * self.limits.block_size)
        self._grow(len(workload.arrival), len(workload.run_length))
        self.workloads[e] = workload
        self.draws.run_lengths[e, : len(workload.run_length)] = workload.run_length
        if self.draws.kind != CHAINS:
            self.draws.rank[e, : len(workload.rank)] = workload.rank
            self.draws.confidence[e, : len(workload.confidence)] = workload.confidence
        core.load(self.state, e, workload.arrival, workload.prompt_tokens, workload.output_tokens, workload.offset[:-1])
        settle(self.state, e)

    def _grow(self, requests: int, positions: int) -> None:
        """Widen the per-engine arrays when a workload needs more room than any before it."""
        have_requests = self.state.requests.shape[1]
        if requests > have_requests:
            extra = requests - have_requests
            self.state = self.state._replace(
                requests=np.pad(self.state.requests, ((0, 0), (0, extra))),
                preempted=np.pad(self.state.preempted, ((0, 0), (0, extra))),
            )
        self.draws = grown(self.draws, positions)

    def new_observation(self) -> Observation:
        """Fresh zeroed observation arrays of this simulator's shapes."""
        return allocate_observation(len(self.workloads), self.queue_rows, self.max_candidates)

    def observe(self, e: int, observation: Observation) -> None:
        """Write engine `e`'s telemetry into `observation` (see `engine.core.telemetry`)."""
        observe(self.state, e, observation)

    def step(self, e: int, candidates: int, token_budget: int, decision_s: float = 0.0) -> bool:
        """Run one iteration of engine `e`; returns False when its last request has finished."""
        return bool(run_iteration(self.state, e, self.latency.tables, self.draws, candidates, token_budget, decision_s))

    def constant_loop(self, candidates: int, token_budget: int, decision_s: float = 0.0) -> CompiledLoop:
        """The fast path for one action: a loop for `run_to_end`."""

        def loop(max_iterations: int, log: NDArray[np.void]) -> tuple[int, bool]:
            return run_constant(
                self.state,
                self.latency.tables,
                self.draws,
                candidates,
                token_budget,
                decision_s,
                max_iterations,
                log,
            )

        return loop

    def run_to_end(
        self,
        loop: CompiledLoop,
        *,
        record_iterations: bool = False,
        on_progress: Callable[[int, int], Any] | None = None,
    ) -> tuple[NDArray[np.void], float]:
        """Drive engine 0 with a compiled loop until its last request has finished.

        Returns the iteration log (empty unless recorded) and the wall-clock seconds spent. `on_progress` is called
        with (requests finished, requests in total) every `CHUNK_ITERATIONS`.
        """
        begin = time.perf_counter()
        parts: list[NDArray[np.void]] = []
        more = True
        while more:
            log = np.zeros(CHUNK_ITERATIONS if record_iterations else 0, dtype=ITERATION)
            count, more = loop(CHUNK_ITERATIONS, log)
            parts.append(log[:count])
            if on_progress is not None:
                engine = self.state.engines[0]
                on_progress(int(engine["num_finished"]), int(engine["num_requests"]))
        return np.concatenate(parts), time.perf_counter() - begin
