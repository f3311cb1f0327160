"""The simulator under the client of `vllm bench serve`: a request rate, and a limit of requests in flight."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from controllers.total_budget import left_for_prompts
from engine.compiled import kernel
from engine.config import EngineConfig
from engine.core.feed import settle
from engine.core.metrics import describe, request_table
from engine.core.scheduler import commit, plan
from engine.latency.model import LatencyModel
from engine.simulator.candidates import accept_chains
from engine.simulator.simulator import Simulator
from engine.simulator.timing import batch_time, reading_time
from engine.workload.agreement import AgreementModel
from engine.workload.workload import Workload
from runs.from_vllm_bench.results import BenchRun

NEVER_S = 1e15
"""Arrival of a request that the client has not been allowed to send."""


@kernel
def send(system, wanted_s, sent, max_in_flight):
    """Send the next requests while fewer than `max_in_flight` are out; returns how many have been sent by now."""
    state, feed = system.state, system.feed
    while sent < feed.end[0] and sent - state.totals[0].finished < max_in_flight:
        state.requests[sent].arrival = max(wanted_s[sent], state.instances[0].now)
        sent += 1
    return sent


@kernel
def serve_limited(system, wanted_s, max_in_flight, total_budget, candidates):
    """Serve instance 0 to its end with a fixed c and total budget, for a client with a limit of requests in flight."""
    state, tables = system.state, system.tables
    sent = send(system, wanted_s, 1, max_in_flight)
    more = settle(state, 0, system.feed)
    while more:
        plan(state, 0, candidates, left_for_prompts(total_budget, state.instances[0].num_decoding, candidates))
        accept_chains(state, 0, system.trace)
        commit(state, 0, batch_time(state, 0, tables) + reading_time(state, 0, tables))
        sent = send(system, wanted_s, sent, max_in_flight)
        more = settle(state, 0, system.feed)


class Replay:
    """One run of the benchmark's client, to be served by engines of different speed.

    Requests are sent when the file says they were, else at its rate or ramp (gamma gaps of its burstiness, from
    `seed`), and
    never more than its limit at once. A file whose runs had a limit says when requests were sent as its server was
    done with others; here they wait for the simulated one.
    """

    def __init__(self, run: BenchRun, config: EngineConfig, agreement: AgreementModel, seed: int) -> None:
        self.run = run
        self._config = config
        self._wanted_s = wanted_s(run, seed)
        self._limit = run.max_concurrency or run.output_tokens.size
        self._workload = Workload.build(
            run.name,
            np.append(self._wanted_s[:1], np.full(run.output_tokens.size - 1, NEVER_S)),
            run.prompt_tokens,
            run.output_tokens,
            agreement,
            seed,
        )

    def serve(self, latency: LatencyModel, total_budget: int) -> dict[str, float]:
        """What the client would have measured: keys as in `BenchRun.observed`, times in s."""
        simulator = Simulator(self._config, [self._workload], latency=latency, ttft_target=1.0)
        serve_limited(simulator.system, self._wanted_s, self._limit, total_budget, self.run.candidates)
        table = request_table(simulator.requests())
        return describe("ttft", table["ttft_s"]) | describe("tpot", table["tpot_s"])


def wanted_s(run: BenchRun, seed: int) -> NDArray[np.float64]:
    """(R,) when the client wants to send each request, s."""
    requests = run.output_tokens.size
    if run.sent_s is not None and run.max_concurrency is None:
        return run.sent_s
    if run.ramp is None and math.isinf(run.rate):
        return np.zeros(requests)
    rate = run.rate if run.ramp is None else run.ramp.rates(requests)
    gaps = np.random.default_rng(seed).gamma(run.burstiness, 1.0 / (rate * run.burstiness), requests)
    sent = np.cumsum(gaps)
    if run.ramp is not None:
        return sent
    # The client scales its gaps so that all together take as long as the rate says.
    return sent * (requests / run.rate / sent[-1])
