"""Model predictive control: rolls a predicted engine forward under action sequences and takes the best one's first."""

import math
from typing import Annotated, NamedTuple

import numpy as np
from pydantic import Field, model_validator

from controllers.acceptance import learn_acceptance, new_memory
from controllers.cheapest import cheapest_candidates
from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.forecast import Memory, Now, Settings, predicted_cost, row_of
from engine.compiled import kernel
from engine.core.objective import Price, Prices
from engine.core.telemetry import (
    ARRIVALS,
    ARRIVED_TOKENS,
    DECODE_KV_TOKENS,
    FINISHED_REQUESTS,
    FINISHED_TOKENS,
    FREE_KV_TOKENS,
    FREE_SEQS,
    INTERVAL_S,
    NO_DEADLINE_S,
    NUM_DECODES,
    NUM_WAITING,
    PREFILLING_TOKENS,
    TTFT_TARGET_S,
)
from engine.latency.lookup import LookupGrid, lookup_slice
from engine.plant import Plant
from engine.policy import stacked

UNBOUNDED = 1e30
LENGTH_MEMORY_S = 60.0
"""Time constant in s of the mean prompt and output lengths."""
PRIOR_OUTPUT_TOKENS = 200.0
"""Output length assumed before the first request finishes; it counts as one finished request."""
PRIOR_PROMPT_TOKENS = 500.0
"""Prompt length assumed before the first arrival; it counts as one."""
PRIOR_SECONDS = 1.0
"""Seconds without an arrival assumed before the first observation."""
MOST_ARRIVALS = 16
"""Arrivals predicted at most."""
MOST_ROWS = 4096
"""Rows of the line; an observation that lists more requests is read up to there."""
NEAR = 1
COARSE = 2
"""First budgets tried before a tail: those within NEAR choices of it, and every COARSE-th beyond."""


class Params(NamedTuple):
    """Inputs of a decision: predicted times and settings."""

    grid: LookupGrid
    settings: Settings


@kernel
def _learn(observation, e, settings, memory):
    """Update lengths, rate and usual batch."""
    load = observation.load
    elapsed = load[e, INTERVAL_S]
    keep = math.exp(-elapsed / LENGTH_MEMORY_S)
    memory.finished[0] = memory.finished[0] * keep + load[e, FINISHED_REQUESTS]
    memory.finished[1] = memory.finished[1] * keep + load[e, FINISHED_TOKENS]
    memory.arrived[0] = memory.arrived[0] * keep + load[e, ARRIVALS]
    memory.arrived[1] = memory.arrived[1] * keep + load[e, ARRIVED_TOKENS]
    keep = math.exp(-elapsed / settings.rate_memory_s)
    memory.rate[0] = memory.rate[0] * keep + load[e, ARRIVALS]
    memory.rate[1] = memory.rate[1] * keep + elapsed
    weight = 1.0 - math.exp(-elapsed / settings.batch_memory_s)
    memory.usual_batch[0] += weight * (load[e, NUM_DECODES] - memory.usual_batch[0])


@kernel
def _line_up(observation, e, settings, memory):
    """Fill the line with waiting requests and those expected within the horizon; returns its number of rows.

    The requests behind the listed ones are one row. Arrivals are expected evenly, with the mean prompt.
    """
    load, queue, line = observation.load, observation.queue, memory.line
    extra = settings.ttft_target - load[e, TTFT_TARGET_S]
    rows = 0
    listed = queue.shape[1] - 1
    for row in range(listed + 1):
        if queue[e, row, 0] <= 0.0:
            continue
        if rows + MOST_ARRIVALS >= line.tokens.shape[0]:
            break
        line.tokens[rows] = queue[e, row, 0]
        line.slack[rows] = queue[e, row, 1] + extra if queue[e, row, 1] < 0.5 * NO_DEADLINE_S else UNBOUNDED
        line.arrival[rows] = 0.0
        line.requests[rows] = 1.0 if row < listed else max(1.0, load[e, NUM_WAITING] - listed)
        rows += 1
    gap = (memory.rate[1] + PRIOR_SECONDS) / max(memory.rate[0], 1e-9)
    prompt = (memory.arrived[1] + PRIOR_PROMPT_TOKENS) / (memory.arrived[0] + 1.0)
    for k in range(MOST_ARRIVALS):
        arrival = gap * (k + 1)
        if arrival > settings.horizon_s:
            break
        line.tokens[rows] = prompt
        line.slack[rows] = arrival + settings.ttft_target
        line.arrival[rows] = arrival
        line.requests[rows] = 1.0
        rows += 1
    return rows


@kernel
def _look_ahead(observation, e, grid, settings, memory):
    """Price tokens and prompts after the horizon; fill `cheapest`; returns `Now`."""
    load, seconds = observation.load, memory.seconds
    decodes, kv_tokens = load[e, NUM_DECODES], load[e, DECODE_KV_TOKENS]
    length = max(2.0, (memory.finished[1] + PRIOR_OUTPUT_TOKENS) / (memory.finished[0] + 1.0))
    lookup_slice(grid, max(decodes, 1.0), kv_tokens if decodes > 0.0 else PRIOR_PROMPT_TOKENS, seconds)
    token_s = UNBOUNDED
    for c in range(grid.candidates.shape[0]):
        token_s = min(token_s, seconds[c, 0] / memory.tokens[grid.candidates[c]])
    widest = grid.prefill_tokens.shape[0] - 1
    drain_s = UNBOUNDED
    for j in range(1, widest + 1):
        drain_s = min(drain_s, seconds[0, j] / grid.prefill_tokens[j])
    for j in range(widest + 1):
        memory.cheapest[j] = cheapest_candidates(seconds, memory.tokens, grid.candidates, j, token_s)
    decode_cost = 1.0 / ((length - 1.0) * settings.tpot_target)
    rows = _line_up(observation, e, settings, memory)
    bulk_s = grid.seconds[0, 0, 0, widest] / grid.prefill_tokens[widest]
    return Now(
        float(decodes),
        float(kv_tokens),
        float(load[e, FREE_KV_TOKENS]),
        float(load[e, FREE_SEQS]),
        load[e, PREFILLING_TOKENS] > 0.0,
        rows,
        length,
        decode_cost,
        decode_cost * length * token_s,
        settings.prefill_price * decode_cost * memory.usual_batch[0] * bulk_s,
        drain_s,
    )


@kernel
def decide(observation, e, params, memories):
    """(c, n) in tokens: the first action of the sequence with the least predicted cost."""
    grid, settings, memory = params.grid, params.settings, row_of(memories, e)
    load = observation.load
    learn_acceptance(
        memory.acceptance, observation.drafted[e], observation.accepted[e], load[e, INTERVAL_S], memory.tokens
    )
    _learn(observation, e, settings, memory)
    now = _look_ahead(observation, e, grid, settings, memory)
    waiting, expected = 0.0, 0.0
    for row in range(now.rows):
        expected += memory.line.tokens[row]
        if memory.line.arrival[row] <= 0.0:
            waiting += memory.line.tokens[row]
    widest = grid.prefill_tokens.shape[0] - 1
    if waiting <= 0.0:
        return grid.candidates[memory.cheapest[0]], grid.prefill_tokens[widest]
    best = UNBOUNDED
    chosen, held = widest, widest
    for sequence in range(2 * widest):
        if sequence < widest:
            first = tail = sequence + 1
            tokens = expected
        else:
            first, tail = sequence - widest + 1, held
            tokens = waiting
        # A budget equals a smaller one that already covers all prompt tokens.
        if first > 1 and grid.prefill_tokens[first - 1] >= tokens:
            continue
        apart = abs(first - tail)
        if sequence >= widest and (apart == 0 or (first > 1 and apart > NEAR and apart % COARSE > 0)):
            continue
        cost = predicted_cost(grid, settings, memory, now, first, tail, settings.switch_s, best)
        if cost < best:
            best = cost
            chosen, held = first, tail
    return grid.candidates[memory.cheapest[chosen]], grid.prefill_tokens[chosen]


@configured
class Mpc(KernelController):
    """Chooses (c, n) by rolling a model of the engine forward under several action sequences, without future knowledge.

    **What is predicted**, from telemetry alone: iteration times by the lookup table; G(c) from measured acceptance
    (`controllers.acceptance`); mean prompt, mean output and arrival rate from fading counts; arrivals evenly spaced.

    **The model** (`controllers.forecast`) is a fluid approximation. Decoding requests are a number B that
    share their cached tokens evenly; their remaining outputs are exponential with the mean output length L, so an
    iteration leaves B exp(-G / L) of them. Prompts are rows in order of service, admitted whole while cache and batch
    have room, and prefilled in whole iterations as the scheduler does. Iterations without new requests are one step.
    Not in the model: the rest of a block, preemption, the watermark, growth of the cache within a step, differences
    between requests in acceptance and length; requests behind the listed ones are one row that is served last.

    **Sequences.** For every n, c minimises T(c, n) - mu G(c), mu = min_c T(c, 0) / G(c), as in `controllers.analytic`.
    Each n is held over the horizon; then others, the smallest, the best one's neighbours and every second beyond, are
    held for `switch_s` before it. The first action of the cheapest sequence is taken, and the search restarts before
    the next iteration (receding horizon control; Rawlings, Mayne, Diehl, Model Predictive Control, 2nd ed. 2017,
    section 1.2). With an empty queue all n are equal and the largest is taken, for prompts that arrive meanwhile.

    **Cost** is the objective (`engine.core.objective`) over the horizon: a decoding request pays 1 / ((L - 1)
    tpot_target) per second. A deadline costs nothing up to `guard` of its slack and rises linearly to `violation` at
    all of it, because predictions err and batches grow. Requests unfinished at the horizon are charged L mu of decoding
    each, and lateness in a queue drained at the highest rate. The remaining prompt tokens are charged `prefill_price`
    times the delay that they will cause to the usual batch.

    Args:
        ttft_target: l in s.
        tpot_target: TPOT in s that costs 1 per request.
        violation: cost of a missed TTFT deadline.
        lateness: cost of being late by one more `ttft_target`.
        horizon_s: length of a rollout, in s.
        switch_s: time for which the first of two budgets is held, in s; below `horizon_s`. 0 tries no second one.
        guard: share of a request's slack that carries no cost.
        prefill_price: factor on the price of prompt tokens left; above 1, as they also delay prompts behind them.
        batch_memory_s: time constant in s of the usual batch.
        rate_memory_s: time constant in s of the arrival rate.
    """

    decision_s = 50e-6
    decide = staticmethod(decide)

    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Prices().tpot_target
    violation: Price = Prices().violation
    lateness: Price = Prices().lateness
    horizon_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    switch_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.1
    guard: Annotated[float, Field(gt=0.0, le=1.0)] = 0.7
    prefill_price: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 1.5
    batch_memory_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 2.0
    rate_memory_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 20.0

    @model_validator(mode="after")
    def _switch_within_horizon(self) -> "Mpc":
        if self.switch_s >= self.horizon_s:
            raise ValueError(f"switch_s={self.switch_s} must be below horizon_s={self.horizon_s} s")
        return self

    def params(self, plant: Plant) -> Params:
        """The table and the settings."""
        return Params(plant.lookup.grid, Settings(**{name: float(getattr(self, name)) for name in Settings._fields}))

    def memory(self, plant: Plant, instances: int) -> Memory:
        """Empty memory."""
        grid = plant.lookup.grid
        acceptance = new_memory(int(grid.candidates.max()))
        one = Memory(
            acceptance=acceptance,
            tokens=np.ones(acceptance.shape[1] + 1),
            finished=np.zeros(2),
            arrived=np.zeros(2),
            rate=np.zeros(2),
            usual_batch=np.zeros(1),
            seconds=np.zeros((len(grid.candidates), len(grid.prefill_tokens))),
            cheapest=np.zeros(len(grid.prefill_tokens), dtype=np.int64),
            line=np.zeros((4, MOST_ROWS)),
        )
        return stacked(one, instances)
