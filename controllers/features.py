"""Features of learned policies: telemetry as about a hundred numbers of order one, with memory of the recent past.

Times are relative to the targets and to predicted iteration times, counts and tokens in logarithms, so that a policy
transfers to another model, GPU or target. The same kernels prepare a policy's input in training and in service.
"""

import math
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from controllers.acceptance import learn_acceptance
from controllers.cheapest import cheapest_candidates
from engine.compiled import kernel
from engine.core.action import ActionGrid
from engine.core.telemetry import (
    ARRIVALS,
    ARRIVED_TOKENS,
    DECODE_KV_TOKENS,
    FINISHED_REQUESTS,
    FINISHED_TOKENS,
    FREE_KV_TOKENS,
    FREE_SEQS,
    INTERVAL_S,
    LAST_CANDIDATES,
    LAST_DECODE_KV_TOKENS,
    LAST_ITERATION_S,
    LAST_NUM_DECODES,
    LAST_PREFILL_TOKENS,
    NO_DEADLINE_S,
    NUM_DECODES,
    NUM_WAITING,
    OVERDUE,
    PREEMPTIONS,
    PREFILLING_TOKENS,
    RATE_BANDS,
    TTFT_TARGET_S,
    WAITING_TOKENS,
)
from engine.latency.lookup import LookupGrid, lookup_slice, lookup_time

FAST_S, SLOW_S = 2.0, 20.0
"""Time constants of the two moving averages of arrivals, s."""
LENGTH_MEMORY_S = 60.0
PRIOR_OUTPUT_TOKENS = 200.0
TIMING_WEIGHT = 0.05
"""Weight of the latest iteration in the average error of predicted times."""
FARTHEST = 8.0
"""Bound of every feature's absolute value."""

LOAD = (
    "decodes",
    "kv_tokens",
    "waiting",
    "waiting_tokens",
    "prefilling_tokens",
    "free_kv_tokens",
    "free_seqs",
    "overdue",
    "preempted",
    "last_iteration",
    "last_candidates",
    "last_prefill",
    "requests_fast",
    "requests_slow",
    "tokens_fast",
    "tokens_slow",
    "output_length",
    "coming_batch",
    "least_slack",
    "due",
)
PREDICTED = ("token_time", "drain_time", "required_rate", "timing_error")


class Layout(BaseModel):
    """Choice of a policy's features.

    Args:
        queue_rows: waiting requests shown one by one (prompt tokens and slack); the rest are one row. 0 shows none.
        predictions: show predicted iteration times, relative to one another; needs an engine whose times are known.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    queue_rows: Annotated[int, Field(ge=0, le=64)] = 8
    predictions: bool = True

    def names(self, grid: ActionGrid) -> tuple[str, ...]:
        """The features in order. A policy fits only the list that it was trained with."""
        names = list(LOAD)
        names += [f"accepted_{depth + 1}" for depth in range(max(1, grid.candidate_choices[-1]))]
        names += [f"rate_{band}" for band in range(RATE_BANDS)]
        if self.queue_rows > 0:
            rows = [*(str(row) for row in range(self.queue_rows)), "rest"]
            names += [f"queue_{what}_{row}" for row in rows for what in ("tokens", "slack")]
        if self.predictions:
            names += PREDICTED
            names += [f"excess_c_{c}" for c in grid.candidate_choices]
            names += [f"slower_n_{n}" for n in grid.budget_choices]
        return tuple(names)


class FeatureMemory(NamedTuple):
    """Memory of the recent past of N engines, and scratch space.

    acceptance: (N, 2, C) and tokens: (N, C + 1), see `controllers.acceptance` · arriving: (N, 4) moving averages of
    requests/s, fast and slow, and of prompt tokens/s · finished: (N, 2) fading sums of finished requests and their
    output tokens · timing: (N,) moving average of log(measured / predicted) · preempted: (N,) fading count · seconds:
    (N, nC, nN + 1) predicted T.
    """

    acceptance: NDArray[np.float64]
    tokens: NDArray[np.float64]
    arriving: NDArray[np.float64]
    finished: NDArray[np.float64]
    timing: NDArray[np.float64]
    preempted: NDArray[np.float64]
    seconds: NDArray[np.float64]


class View(NamedTuple):
    """Parameters of the features: predicted times, targets in s, and `Layout` as numbers."""

    grid: LookupGrid
    ttft_target: float
    tpot_target: float
    queue_rows: int
    predictions: bool


def unpredicted(grid: ActionGrid) -> LookupGrid:
    """A table of ones, for layouts without predictions."""
    budgets = np.array([0, *grid.budget_choices], dtype=np.int64)
    return LookupGrid(
        batch=np.zeros(1),
        kv_tokens=np.zeros(1),
        candidates=grid.candidates,
        prefill_tokens=budgets,
        seconds=np.ones((1, 1, len(grid.candidate_choices), len(budgets))),
    )


def new_feature_memory(instances: int, grid: ActionGrid) -> FeatureMemory:
    """Empty memory of N engines."""
    depths = max(1, grid.candidate_choices[-1])
    return FeatureMemory(
        acceptance=np.zeros((instances, 2, depths)),
        tokens=np.ones((instances, depths + 1)),
        arriving=np.zeros((instances, 4)),
        finished=np.zeros((instances, 2)),
        timing=np.zeros(instances),
        preempted=np.zeros(instances),
        seconds=np.zeros((instances, len(grid.candidate_choices), len(grid.budget_choices) + 1)),
    )


@kernel
def forget(memory, m):
    """Clear the memory of engine m."""
    memory.acceptance[m] = 0.0
    memory.tokens[m] = 1.0
    memory.arriving[m] = 0.0
    memory.finished[m] = 0.0
    memory.timing[m] = 0.0
    memory.preempted[m] = 0.0


@kernel
def remember(observation, e, view, memory, m):
    """Update row m of the memory with the latest telemetry of engine `e`; call once per observation."""
    load = observation.load
    elapsed = load[e, INTERVAL_S]
    learn_acceptance(memory.acceptance[m], observation.drafted[e], observation.accepted[e], elapsed, memory.tokens[m])
    if elapsed > 0.0:
        for pace in range(2):
            weight = -math.expm1(-elapsed / (FAST_S if pace == 0 else SLOW_S))
            gain = weight / elapsed
            memory.arriving[m, pace] += gain * load[e, ARRIVALS] - weight * memory.arriving[m, pace]
            memory.arriving[m, 2 + pace] += gain * load[e, ARRIVED_TOKENS] - weight * memory.arriving[m, 2 + pace]
    keep = math.exp(-elapsed / LENGTH_MEMORY_S)
    memory.finished[m, 0] = memory.finished[m, 0] * keep + load[e, FINISHED_REQUESTS]
    memory.finished[m, 1] = memory.finished[m, 1] * keep + load[e, FINISHED_TOKENS]
    memory.preempted[m] = memory.preempted[m] * math.exp(-elapsed / SLOW_S) + load[e, PREEMPTIONS]
    last = load[e, LAST_ITERATION_S]
    if view.predictions and last > 0.0:
        expected = lookup_time(
            view.grid,
            load[e, LAST_NUM_DECODES],
            load[e, LAST_DECODE_KV_TOKENS],
            load[e, LAST_CANDIDATES],
            load[e, LAST_PREFILL_TOKENS],
        )
        if expected > 0.0:
            memory.timing[m] += TIMING_WEIGHT * (math.log(last / expected) - memory.timing[m])


@kernel
def _log(value, unit):
    return math.log1p(max(value, 0.0) / unit)


@kernel
def _slack(slack, target):
    return 1.0 if slack >= 0.5 * NO_DEADLINE_S else math.tanh(slack / target)


@kernel
def show(observation, e, view, memory, m, out):
    """Write the features of engine `e`, with memory row m, to `out` (float32); returns their number."""
    load = observation.load
    queue = observation.queue
    target = view.ttft_target
    extra = target - load[e, TTFT_TARGET_S]
    decodes = load[e, NUM_DECODES]
    kv_tokens = load[e, DECODE_KV_TOKENS]
    tokens = memory.tokens[m]
    seconds = memory.seconds[m]
    length = (memory.finished[m, 1] + PRIOR_OUTPUT_TOKENS) / (memory.finished[m, 0] + 1.0)
    token_s = view.tpot_target
    prompt_token_s = 0.0
    if view.predictions:
        lookup_slice(view.grid, decodes, kv_tokens, seconds)
        token_s = math.inf
        for c in range(view.grid.candidates.shape[0]):
            token_s = min(token_s, seconds[c, 0] / tokens[view.grid.candidates[c]])
        widest = view.grid.prefill_tokens.shape[0] - 1
        prompt_token_s = view.grid.seconds[0, 0, 0, widest] / view.grid.prefill_tokens[widest]
    least = NO_DEADLINE_S
    required = 0.0
    cumulative = 0.0
    due = 0.0
    for row in range(queue.shape[1]):
        if queue[e, row, 0] <= 0.0:
            continue
        cumulative += queue[e, row, 0]
        slack = queue[e, row, 1]
        if slack >= 0.5 * NO_DEADLINE_S:
            continue
        slack += extra
        least = min(least, slack)
        if slack > 0.0:
            required = max(required, cumulative * prompt_token_s / slack)
            if slack < 0.5 * target:
                due = cumulative
    out[0] = _log(decodes, 1.0)
    out[1] = _log(kv_tokens, 1000.0)
    out[2] = _log(load[e, NUM_WAITING], 1.0)
    out[3] = _log(load[e, WAITING_TOKENS], 500.0)
    out[4] = _log(load[e, PREFILLING_TOKENS], 500.0)
    out[5] = _log(load[e, FREE_KV_TOKENS], 4000.0)
    out[6] = _log(load[e, FREE_SEQS], 16.0)
    out[7] = _log(load[e, OVERDUE], 1.0)
    out[8] = _log(memory.preempted[m], 1.0)
    out[9] = _log(load[e, LAST_ITERATION_S], 0.25 * view.tpot_target)
    out[10] = 0.25 * load[e, LAST_CANDIDATES]
    out[11] = _log(load[e, LAST_PREFILL_TOKENS], 100.0)
    for pace in range(2):
        out[12 + pace] = _log(memory.arriving[m, pace] * target, 1.0)
        out[14 + pace] = _log(memory.arriving[m, 2 + pace] * target, 1000.0)
    out[16] = math.log(length / PRIOR_OUTPUT_TOKENS)
    out[17] = _log(memory.arriving[m, 0] * length * token_s, 1.0)
    out[18] = _slack(least, target)
    out[19] = _log(due, 500.0)
    f = len(LOAD)
    chance = 0.0
    for depth in range(memory.acceptance.shape[2]):
        gained = tokens[depth + 1] - tokens[depth]
        before = 1.0 if depth == 0 else tokens[depth] - tokens[depth - 1]
        chance = gained / before if before > 0.0 else 0.0
        out[f] = 2.0 * chance - 1.0
        f += 1
    for band in range(RATE_BANDS):
        out[f] = observation.rates[e, band] / max(decodes, 1.0)
        f += 1
    if view.queue_rows > 0:
        rows = queue.shape[1] - 1
        rest = queue[e, rows, 0]
        rest_slack = queue[e, rows, 1] if rest > 0.0 else NO_DEADLINE_S
        for row in range(view.queue_rows, rows):
            rest += queue[e, row, 0]
            if queue[e, row, 0] > 0.0:
                rest_slack = min(rest_slack, queue[e, row, 1])
        for row in range(view.queue_rows + 1):
            listed = row < view.queue_rows and row < rows
            held = queue[e, row, 0] if listed else (rest if row == view.queue_rows else 0.0)
            slack = queue[e, row, 1] if listed else rest_slack
            out[f] = _log(held, 500.0)
            out[f + 1] = _slack(slack + extra, target) if held > 0.0 else 1.0
            f += 2
    if view.predictions:
        out[f] = math.log(token_s / view.tpot_target)
        out[f + 1] = _log(load[e, WAITING_TOKENS] * prompt_token_s, 0.25 * target)
        out[f + 2] = _log(required, 0.25)
        out[f + 3] = 4.0 * memory.timing[m]
        f += len(PREDICTED)
        for c in range(seconds.shape[0]):
            out[f] = math.log(seconds[c, 0] / (tokens[view.grid.candidates[c]] * token_s))
            f += 1
        best = cheapest_candidates(seconds, tokens, view.grid.candidates, 0, token_s)
        for j in range(1, seconds.shape[1]):
            out[f] = math.log(max(seconds[best, j], 1e-9) / seconds[best, 0])
            f += 1
    for i in range(f):
        out[i] = min(max(out[i], -FARTHEST), FARTHEST)
    return f
