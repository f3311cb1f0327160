"""The optimizer exactly as its poster states it: a table of G / T and the queue's deadlines."""

from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.telemetry import (
    DECODE_KV_TOKENS,
    LAST_CANDIDATES,
    NO_DEADLINE_S,
    NUM_DECODES,
    TTFT_TARGET_S,
)
from engine.latency.lookup import LookupGrid, lookup_slice
from engine.plant import Plant
from engine.policy import stacked

G_WEIGHT = 0.02
"""Weight of one iteration in the moving average of measured tokens per iteration."""


class PosterMemory(NamedTuple):
    """Optimizer state between decisions, and scratch space.

    tokens: (N, nC) G, measured tokens per iteration under each candidate choice · seconds: (N, nC, nN + 1) predicted T
    at the current load, scratch · most_seconds: (N, nN + 1) largest T each budget may take, scratch.
    """

    tokens: NDArray[np.float64]
    seconds: NDArray[np.float64]
    most_seconds: NDArray[np.float64]


class Params(NamedTuple):
    """Inputs of a decision: predicted times, and l in s."""

    grid: LookupGrid
    ttft_target: float


@kernel
def _measure_tokens(observation, i, candidates, tokens):
    """Move G of the candidate count used last towards the tokens per request that it yielded."""
    if observation.drafted[i, 0] <= 0.0:
        return
    used = observation.load[i, LAST_CANDIDATES]
    accepted = 0.0
    for depth in range(observation.accepted.shape[1]):
        accepted += observation.accepted[i, depth]
    measured = 1.0 + accepted / observation.drafted[i, 0]
    for c in range(candidates.shape[0]):
        if candidates[c] == used:
            tokens[c] += G_WEIGHT * (measured - tokens[c])


@kernel
def _limit_by_deadlines(queue, extra_slack, budgets, most_seconds):
    """For each budget n the largest T with n / T >= S_i / slack_i for every queued request i with n < S_i.

    A request whose deadline has passed adds no constraint: the poster's right-hand side is negative there.
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
def decide(observation, i, params, memory):
    """(c, n) in tokens: the largest G / T that meets the deadlines, else the fastest prefill."""
    grid = params.grid
    tokens, predicted, most_seconds = memory.tokens[i], memory.seconds[i], memory.most_seconds[i]
    load = observation.load
    _measure_tokens(observation, i, grid.candidates, tokens)
    lookup_slice(grid, load[i, NUM_DECODES], load[i, DECODE_KV_TOKENS], predicted)
    extra_slack = params.ttft_target - load[i, TTFT_TARGET_S]
    _limit_by_deadlines(observation.queue[i], extra_slack, grid.prefill_tokens, most_seconds)
    best = -1.0
    fastest = -1.0
    c_best, n_best, c_fast, n_fast = -1, -1, 0, 1
    for c in range(grid.candidates.shape[0]):
        for j in range(1, grid.prefill_tokens.shape[0]):
            seconds = predicted[c, j]
            if seconds <= most_seconds[j] and tokens[c] / seconds > best:
                best = tokens[c] / seconds
                c_best, n_best = c, j
            if grid.prefill_tokens[j] / seconds > fastest:
                fastest = grid.prefill_tokens[j] / seconds
                c_fast, n_fast = c, j
    if c_best < 0:
        c_best, n_best = c_fast, n_fast
    return grid.candidates[c_best], grid.prefill_tokens[n_best]


@configured
class Poster(KernelController):
    """Maximise G(c) / T(c, n) over the whole table, subject to the queue's TTFT deadlines.

    For every queued request i in order of service, with S_i the prompt tokens up to and including its own:
    n < S_i  =>  n / T(c, n) >= S_i / ((t_i + l) - t).

    G is a table of measured tokens per iteration under each c, updated online; T comes from the lookup table. Where
    the poster does not specify: a request past its deadline adds no constraint, and when no pair keeps every deadline
    the pair with the highest prefill rate n / T is taken. It plans to finish exactly at the deadline; `Analytic` adds
    a margin and the cases that the poster leaves open.

    Args:
        ttft_target: l in s.
        initial_acceptance: chance that a candidate is accepted, from which the first G is made.
    """

    decision_s = 20e-6
    decide = staticmethod(decide)

    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    initial_acceptance: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.6

    def params(self, plant: Plant) -> Params:
        """The table and the target."""
        return Params(plant.lookup.grid, self.ttft_target)

    def memory(self, plant: Plant, instances: int) -> PosterMemory:
        """G computed from `initial_acceptance`."""
        grid = plant.lookup.grid
        powers = self.initial_acceptance ** np.arange(1, int(grid.candidates.max()) + 1)
        tokens = 1.0 + np.concatenate([[0.0], np.cumsum(powers)])
        one = PosterMemory(
            tokens=tokens[grid.candidates],
            seconds=np.zeros((len(grid.candidates), len(grid.prefill_tokens))),
            most_seconds=np.zeros(len(grid.prefill_tokens)),
        )
        return stacked(one, instances)
