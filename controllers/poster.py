"""The optimizer as its poster states it, to the letter: a table of G / T and the queue's deadlines."""

from collections.abc import Mapping
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.controller import CompiledController, Plant, batched, configured
from engine.backends.simulator import CompiledLoop, Simulator, log_iteration, run_iteration
from engine.compiled import kernel
from engine.core.telemetry import (
    DECODE_KV_TOKENS,
    LAST_CANDIDATES,
    NO_DEADLINE_S,
    NUM_DECODES,
    TTFT_TARGET_S,
    observe,
)
from engine.latency.lookup import lookup_slice

G_WEIGHT = 0.02
"""Weight of one iteration in the moving average of measured tokens per iteration."""


class PosterMemory(NamedTuple):
    """What the optimizer keeps between decisions.

    tokens: (nC,) G, measured tokens per iteration under each candidate choice · seconds: (nC, nN + 1) predicted T at
    the current load, scratch · most_seconds: (nN + 1,) largest T each budget may take, scratch.
    """

    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]
    most_seconds: NDArray[np.float64]


@kernel
def _measure_tokens(observation, e, candidates, tokens):
    """Move G of the candidate count used last towards the tokens per request that it yielded."""
    if observation.drafted[e, 0] <= 0.0:
        return
    used = observation.load[e, LAST_CANDIDATES]
    accepted = 0.0
    for depth in range(observation.accepted.shape[1]):
        accepted += observation.accepted[e, depth]
    measured = 1.0 + accepted / observation.drafted[e, 0]
    for c in range(candidates.shape[0]):
        if candidates[c] == used:
            tokens[c] += G_WEIGHT * (measured - tokens[c])


@kernel
def _limit_by_deadlines(queue, extra_slack, budgets, most_seconds):
    """For each budget n the largest T with n / T >= S_i / slack_i for every queued request i with n < S_i.

    A request whose deadline has passed constrains nothing: the poster's right-hand side is negative there.
    """
    for j in range(budgets.shape[0]):
        most_seconds[j] = np.inf
    cumulative = 0.0
    for row in range(queue.shape[0]):
        if queue[row, 0] <= 0.0:
            continue
        cumulative += queue[row, 0]
        slack = queue[row, 1] + extra_slack
        if slack <= 0.0 or slack >= 0.5 * NO_DEADLINE_S:
            continue
        for j in range(1, budgets.shape[0]):
            if budgets[j] < cumulative:
                most_seconds[j] = min(most_seconds[j], budgets[j] * slack / cumulative)


@kernel
def decide(observation, e, grid, ttft_target, memory):
    """Indices (c, n) of the action: the largest G / T that keeps the deadlines, else the fastest prefill."""
    load = observation.load
    _measure_tokens(observation, e, grid.candidates, memory.tokens)
    lookup_slice(grid, load[e, NUM_DECODES], load[e, DECODE_KV_TOKENS], memory.seconds)
    extra_slack = ttft_target - load[e, TTFT_TARGET_S]
    _limit_by_deadlines(observation.queue[e], extra_slack, grid.prefill_tokens, memory.most_seconds)
    best = -1.0
    fastest = -1.0
    c_best, n_best, c_fast, n_fast = -1, -1, 0, 1
    for c in range(grid.candidates.shape[0]):
        for j in range(1, grid.prefill_tokens.shape[0]):
            seconds = memory.seconds[c, j]
            if seconds <= memory.most_seconds[j] and memory.tokens[c] / seconds > best:
                best = memory.tokens[c] / seconds
                c_best, n_best = c, j
            if grid.prefill_tokens[j] / seconds > fastest:
                fastest = grid.prefill_tokens[j] / seconds
                c_fast, n_fast = c, j
    if c_best < 0:
        return c_fast, n_fast - 1
    return c_best, n_best - 1


@kernel
def _run(state, tables, run_lengths, observation, grid, ttft_target, memory, decision_s, max_iterations, log):
    recording = len(log) > 0
    for row in range(max_iterations):
        observe(state, 0, observation)
        c, n = decide(observation, 0, grid, ttft_target, memory)
        more = run_iteration(state, 0, tables, run_lengths, grid.candidates[c], grid.prefill_tokens[n + 1], decision_s)
        if recording:
            log_iteration(state, 0, log, row)
        if not more:
            return row + 1, False
    return max_iterations, True


@configured
class Poster(CompiledController):
    """Maximise G(c) / T(c, n) over the whole table, subject to the queue's TTFT deadlines.

    For every queued request i in order of service, with S_i the prompt tokens up to and including its own:
    n < S_i  =>  n / T(c, n) >= S_i / ((t_i + l) - t).

    G is a table of measured tokens per iteration under each c, updated online; T comes from the lookup table. Where
    the poster is silent: a request past its deadline constrains nothing, and when no pair keeps every deadline the
    pair with the highest prefill rate n / T is taken. It plans to finish exactly at the deadline; `Analytic` is the
    same idea with what that leaves open.

    Args:
        ttft_target: l in s.
        initial_acceptance: chance that a candidate is accepted, from which the first G is made.
    """

    decision_s = 20e-6

    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    initial_acceptance: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.6

    def reset(self, plant: Plant) -> None:
        """Forget the measured G and begin on `plant`."""
        super().reset(plant)
        grid = plant.lookup.grid
        powers = self.initial_acceptance ** np.arange(1, int(grid.candidates.max()) + 1)
        tokens = 1.0 + np.concatenate([[0.0], np.cumsum(powers)])
        self._memory = PosterMemory(
            tokens=tokens[grid.candidates],
            seconds=np.zeros((len(grid.candidates), len(grid.prefill_tokens))),
            most_seconds=np.zeros(len(grid.prefill_tokens)),
        )

    def act(self, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.int64]:
        """Indices of the optimizer's pair."""
        c, n = decide(batched(observation), 0, self.plant.lookup.grid, self.ttft_target, self._memory)
        return np.array([c, n], dtype=np.int64)

    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
        """The optimizer's pair in tokens."""
        return self.plant.grid.values(self.act(observation))

    def loop(self, simulator: Simulator, decision_s: float) -> CompiledLoop:
        """The optimizer inside the compiled loop."""
        observation = simulator.new_observation()

        def loop(max_iterations: int, log: NDArray[np.void]) -> tuple[int, bool]:
            return _run(
                simulator.state,
                simulator.latency.tables,
                simulator.run_lengths,
                observation,
                self.plant.lookup.grid,
                self.ttft_target,
                self._memory,
                decision_s,
                max_iterations,
                log,
            )

        return loop
