"""The simulator under the client of `vllm bench serve`: a request rate, and a limit of requests in flight."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import NDArray

from controllers.total_budget import left_for_prompts
from engine.backends.drafting import accept_chains
from engine.backends.simulator import Simulator, settle
from engine.backends.timing import batch_time, reading_time
from engine.compiled import kernel
from engine.config import EngineConfig
from engine.core.metrics import describe, request_table
from engine.core.scheduler import commit, plan
from engine.latency.model import LatencyModel
from engine.workload.agreement import AgreementModel
from engine.workload.workload import Workload
from runs.from_vllm_bench.results import BenchRun

NEVER_S = 1e15
"""Arrival of a request that the client has not been allowed to send."""


@kernel
def send(state, e, wanted_s, sent, max_in_flight):
    """Send the next requests while fewer than `max_in_flight` are out; returns how many have been sent by now."""
    engine = state.engines[e]
    while sent < engine.num_requests and sent - engine.num_finished < max_in_flight:
        state.requests[e, sent].arrival = max(wanted_s[sent], engine.now)
        sent += 1
    return sent


@kernel
def serve_limited(state, tables, draws, wanted_s, max_in_flight, total_budget, candidates):
    """Serve engine 0 to its end with a fixed c and total budget, for a client with a limit of requests in flight."""
    sent = send(state, 0, wanted_s, 1, max_in_flight)
    more = settle(state, 0)
    while more:
        engine = state.engines[0]
        plan(state, 0, candidates, left_for_prompts(total_budget, engine.num_decoding, candidates))
        accept_chains(state, 0, draws)
        commit(state, 0, batch_time(state, 0, tables) + reading_time(state, 0, tables))
        sent = send(state, 0, wanted_s, sent, max_in_flight)
        more = settle(state, 0)


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
        serve_limited(
            simulator.state,
            latency.tables,
            simulator.draws,
            self._wanted_s,
            self._limit,
            total_budget,
            self.run.candidates,
        )
        table = request_table(simulator.state)
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
