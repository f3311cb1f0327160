"""The simulator: the shared scheduler under a virtual clock.

A `LatencyModel` says how long each batch takes and the workload's agreements say how many candidates are accepted;
nothing is random here, so a run is a pure function of (engine, workload, actions).
"""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core import state as core
from engine.core.feed import Feed, feed_from, new_feed, settle
from engine.core.state import State
from engine.core.telemetry import Observation, Seen, allocate_observation, forget, new_seen, observe
from engine.latency.model import LatencyModel
from engine.policy import Policy
from engine.simulator.candidates import CHAINS, grown_trace, new_sharing, new_trace
from engine.simulator.loop import ITERATION, System, bind, run_instance, run_iteration
from engine.workload.workload import Workload

CHUNK_ITERATIONS = 200_000
"""Iterations a compiled loop runs before it lets Python show progress or take an interrupt."""

Loop = Callable[[int, NDArray[np.void]], tuple[int, bool]]
"""Runs at most so many iterations of an instance, filling the log; returns (iterations run, whether work is left)."""


class Region:
    """Rows of a table that belong to one instance; it moves to the table's end when it has to grow."""

    def __init__(self) -> None:
        self.first = self.room = 0

    def fit(self, count: int, used: int) -> int:
        """Have room for `count` rows of a table of which `used` are given out; returns how many then are."""
        if count <= self.room:
            return used
        # What follows a larger one is often larger still.
        self.first, self.room = used, count + count // 2 if self.room else count
        return used + self.room


class Simulator:
    """One or more simulated instances of one configuration, each with its own workload.

    Args:
        config: engine limits and the name of its latency tables.
        workloads: one `Workload` per instance; requests that cannot fit are refused (ValueError naming the request).
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
        count = len(workloads)
        sharing = new_sharing(config.speculation, self.limits.max_num_seqs)
        state = core.allocate(
            count,
            sum(len(workload.arrival) for workload in workloads),
            total_blocks=self.limits.total_blocks,
            block_size=self.limits.block_size,
            watermark_blocks=self.limits.watermark_blocks,
            max_num_seqs=self.limits.max_num_seqs,
            ttft_target=ttft_target,
            prefill=self.limits.prefill,
        )
        trace = new_trace(sum(len(workload.run_length) for workload in workloads), sharing.kind != CHAINS)
        self.system = System(state, new_feed(count), self.latency.tables, sharing, trace)
        self.seen = new_seen(count)
        self._regions = ([Region() for _ in workloads], [Region() for _ in workloads])
        """Where each instance's workload stands in the request table, and in the acceptance trace."""
        self._used = [0, 0]
        """Rows of these that are given out."""
        self.workloads: list[Workload] = list(workloads)
        for i, workload in enumerate(workloads):
            self.load(i, workload)

    @property
    def state(self) -> State:
        """The scheduler's state."""
        return self.system.state

    def load(self, i: int, workload: Workload) -> None:
        """Put a fresh workload into instance `i` and settle it at its first arrival."""
        workload.check_fits(self.limits.max_model_len, self.limits.total_blocks * self.limits.block_size)
        requests, positions = len(workload.arrival), len(workload.run_length)
        rows, trace = (regions[i] for regions in self._regions)
        self._used = [rows.fit(requests, self._used[0]), trace.fit(positions, self._used[1])]
        self.system = self.system._replace(
            state=core.grown(self.state, self._used[0]), trace=grown_trace(self.system.trace, self._used[1])
        )
        self.workloads[i] = workload
        self._write_trace(trace.first, workload)
        core.clear(self.state, i)
        forget(self.seen, i)
        core.enter(
            self.state,
            rows.first,
            workload.arrival,
            workload.prompt_tokens,
            workload.output_tokens,
            trace.first + workload.offset[:-1],
            self._ttft_target,
        )
        feed_from(self.system.feed, i, rows.first, requests)
        settle(self.state, i, self.system.feed)

    def snapshot(self) -> dict[str, Any]:
        """Where every instance is, as arrays: a simulator of the same workloads goes on from there with `restore`."""
        return {
            "state": [array.copy() for array in self.state],
            "feed": [array.copy() for array in self.system.feed],
            "seen": [array.copy() for array in self.seen],
            "regions": np.array([(r.first, r.room, p.first, p.room) for r, p in zip(*self._regions, strict=True)]),
            "used": np.array(self._used),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Go on from a `snapshot`, bit for bit; the workloads must have been loaded again."""
        for i, (row, rows, position, positions) in enumerate(snapshot["regions"].tolist()):
            self._regions[0][i].first, self._regions[0][i].room = row, rows
            self._regions[1][i].first, self._regions[1][i].room = position, positions
        self._used = snapshot["used"].tolist()
        trace = grown_trace(self.system.trace, self._used[1])
        # Compiled code takes aligned records; a file gives them back packed.
        state, seen = (
            [array.astype(own.dtype) for own, array in zip(ours, snapshot[name], strict=True)]
            for ours, name in ((self.state, "state"), (self.seen, "seen"))
        )
        feed = Feed(*(array.copy() for array in snapshot["feed"]))
        self.system = self.system._replace(state=State(*state), feed=feed, trace=trace)
        self.seen = Seen(*seen)
        for i, workload in enumerate(self.workloads):
            self._write_trace(self._regions[1][i].first, workload)

    def _write_trace(self, position: int, workload: Workload) -> None:
        """Put a workload's agreements into the trace from `position` on."""
        trace, end = self.system.trace, position + len(workload.run_length)
        trace.run_lengths[position:end] = workload.run_length
        if trace.rank.size:
            trace.rank[position:end] = workload.rank
            trace.confidence[position:end] = workload.confidence

    def requests(self, i: int = 0) -> NDArray[np.void]:
        """The rows of instance `i`'s workload in the request table (a view)."""
        feed = self.system.feed
        return self.state.requests[feed.first[i] : feed.end[i]]

    def arrived(self, i: int = 0) -> NDArray[np.void]:
        """Of these, the rows of the requests that have arrived (a view)."""
        feed = self.system.feed
        return self.state.requests[feed.first[i] : feed.next[i]]

    def new_observation(self) -> Observation:
        """Fresh zeroed observation arrays of this simulator's shapes."""
        return allocate_observation(len(self.workloads), self.queue_rows, self.max_candidates)

    def observe(self, i: int, observation: Observation) -> None:
        """Write instance `i`'s telemetry into `observation` (see `engine.core.telemetry`)."""
        observe(self.state, i, self.seen, observation)

    def step(self, i: int, candidates: int, token_budget: int, decision_s: float = 0.0) -> bool:
        """Run one iteration of instance `i`; returns False when its last request has finished."""
        return bool(run_iteration(self.system, i, candidates, token_budget, decision_s))

    def loop(self, policy: Policy, decision_s: float = 0.0) -> Loop:
        """A loop for `run_to_end`: instance 0 under a policy, each decision charged `decision_s`."""
        observation = self.new_observation()
        run = bind(run_instance, decide=policy.decide, look=policy.look)

        def loop(max_iterations: int, log: NDArray[np.void]) -> tuple[int, bool]:
            more: tuple[int, bool] = run(
                self.system, 0, self.seen, observation, policy.params, policy.memory, decision_s, max_iterations, log
            )
            return more

        return loop

    def run_to_end(
        self,
        loop: Loop,
        *,
        record_iterations: bool = False,
        on_progress: Callable[[int, int], Any] | None = None,
    ) -> tuple[NDArray[np.void], float]:
        """Drive instance 0 with a compiled loop until its last request has finished.

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
                on_progress(int(self.state.totals["finished"][0]), len(self.requests()))
        return np.concatenate(parts), time.perf_counter() - begin
