"""Rollouts of the true engine from its present state: a small copy, the shared scheduler, and the remaining cost.

For clairvoyant policies only: the copy holds future output lengths, agreements and arrivals.
"""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core import state as core
from engine.core.blocks import blocks_for
from engine.core.feed import new_feed
from engine.core.fork import fork
from engine.core.state import DECODING, NOBODY
from engine.latency.model import iteration_time, prefill_attention_time, unread_time
from engine.simulator.loop import System, run_iteration
from engine.simulator.simulator import Simulator

UNBOUNDED = 1e300
FORESEEN = -1
"""Value in place of a c: chosen before every iteration from the known agreements."""


class Scratch(NamedTuple):
    """Copies of an engine and scratch space.

    origin: the engine now, its unfinished requests and the next arrivals in order of arrival · trial: where rollouts
    run, see `fork` · weights, limits: (C + 2,) by number of candidates that a request can use and can have · choices:
    the c to choose from · budgets: the n to choose from.
    """

    origin: System
    trial: System
    weights: NDArray[np.float64]
    limits: NDArray[np.int64]
    choices: NDArray[np.int64]
    budgets: NDArray[np.int64]


class Plan(NamedTuple):
    """Actions of a rollout: n in its first iterations and after; c by `foreseen_candidates`, or a fixed one.

    `worth` scales the value of a token when c is chosen; `fixed` is the c of every iteration, or FORESEEN.
    """

    first: int
    tail: int
    worth: float
    fixed: int


class Outlook(NamedTuple):
    """Assumptions about the time after the horizon, and the prices.

    token_s: s that a decoding request takes per token · prefill_s: s per prompt token of a queue that is drained ·
    interference: cost of a remaining prompt token, because others decode slower while it is computed · second,
    violation, lateness: costs per s of summed TPOT, per missed deadline and per s of lateness.
    """

    token_s: float
    prefill_s: float
    interference: float
    second: float
    violation: float
    lateness: float


class Rolled(NamedTuple):
    """Results of a rollout.

    cost: see `roll` · decoding_s: s that requests spent decoding · tokens: emitted by these · tpot_s: summed TPOT
    charged · seconds: on the engine's clock.
    """

    cost: float
    decoding_s: float
    tokens: float
    tpot_s: float
    seconds: float


def new_scratch(simulator: Simulator, choices: NDArray[np.int64], budgets: NDArray[np.int64]) -> Scratch:
    """Empty scratch space for a simulator's engine 0."""
    system, limits = simulator.system, simulator.limits

    def room() -> System:
        state = core.allocate(
            1,
            len(simulator.workloads[0].arrival),
            total_blocks=limits.total_blocks,
            block_size=limits.block_size,
            watermark_blocks=limits.watermark_blocks,
            max_num_seqs=limits.max_num_seqs,
            ttft_target=float(system.state.limits["ttft_target"][0]),
            prefill=limits.prefill,
        )
        return system._replace(state=state, feed=new_feed(1))

    widest = int(choices.max()) + 2
    return Scratch(
        origin=room(),
        trial=room(),
        weights=np.zeros(widest),
        limits=np.zeros(widest, dtype=np.int64),
        choices=choices,
        budgets=budgets,
    )


@kernel
def _next_prefill(state, i, tables, token_budget):
    """(requests, tokens, attention in s, prompts completed) of the prefill that a budget would give now."""
    instance = state.instances[i]
    limits = state.limits[i]
    left = token_budget
    requests, completed = 0, 0
    attention = 0.0
    free_blocks = instance.free_blocks
    free_seqs = limits.max_num_seqs - instance.num_running
    reserve = limits.watermark_blocks if instance.num_running > 0 else 0
    position = instance.num_decoding
    queued = instance.head
    while left > 0:
        if position < instance.num_running:
            r = state.running[i, position]
            position += 1
        else:
            if queued == NOBODY:
                break
            r = queued
            queued = state.requests[r].next
            need = blocks_for(state.requests[r].context, limits.block_size)
            if free_seqs <= 0 or need + reserve > free_blocks:
                break
            free_seqs -= 1
            free_blocks -= need
            reserve = limits.watermark_blocks
        request = state.requests[r]
        remaining = request.context - request.computed
        chunk = min(left, remaining)
        attention += prefill_attention_time(tables, chunk, request.computed)
        completed += chunk == remaining
        requests += 1
        left -= chunk
    return requests, token_budget - left, attention, completed


@kernel
def foreseen_candidates(system, i, scratch, token_budget, token_s):
    """The c with the highest value of tokens less time, given the future agreements.

    A second of the iteration costs every decoding request 1 / (output - 1), a token spares its request `token_s`
    of them: c minimises sum(w) T(c) - token_s sum(w_i tokens_i(c)).
    """
    state, tables = system.state, system.tables
    instance = state.instances[i]
    decodes = instance.num_decoding
    choices, weights, limits = scratch.choices, scratch.weights, scratch.limits
    widest = choices[choices.shape[0] - 1]
    if decodes == 0 or widest == 0:
        return choices[0]
    for k in range(widest + 2):
        weights[k] = 0.0
        limits[k] = 0
    for position in range(decodes):
        request = state.requests[state.running[i, position]]
        most = min(request.output - request.generated - 1, widest)
        run = system.trace.run_lengths[request.first_position + request.generated]
        weights[min(most, run)] += 1.0 / (request.output - 1)
        limits[most] += 1
    for k in range(widest - 1, -1, -1):
        weights[k] += weights[k + 1]
        limits[k] += limits[k + 1]
    prefills, prefill_tokens, attention, completed = _next_prefill(state, i, tables, token_budget)
    best = UNBOUNDED
    chosen = choices[0]
    depth = 0
    gained = 0.0
    rows = decodes
    for index in range(choices.shape[0]):
        while depth < choices[index]:
            depth += 1
            gained += weights[depth]
            rows += limits[depth]
        steps = choices[index]
        while steps > 0 and limits[steps] == 0:
            steps -= 1
        seconds = iteration_time(
            tables, decodes, rows, steps, instance.kv_tokens, prefills, prefill_tokens, attention, rows + completed
        )
        if steps > 0:
            seconds += unread_time(tables, min(instance.unread_tokens, instance.kv_tokens))
        cost = weights[0] * seconds - token_s * gained
        if cost < best:
            best = cost
            chosen = choices[index]
    return chosen


@kernel
def remaining_cost(state, feed, outlook):
    """Estimate the future charges of a fork's unfinished requests.

    A decoding request takes `token_s` per token; prompts are computed in order of arrival at `prefill_s` per
    token, each when it has arrived and those before it are done.
    """
    now = state.instances[0].now
    cost = 0.0
    free_at = now
    tokens_left = 0
    for r in range(feed.end[0]):
        request = state.requests[r]
        left = request.output - request.generated
        if left <= 0:
            continue
        weight = 1.0 / (request.output - 1) if request.output > 1 else 0.0
        if request.phase != DECODING:
            prompt = request.context - request.computed
            tokens_left += prompt
            free_at = max(free_at, request.arrival) + prompt * outlook.prefill_s
            if math.isnan(request.first_token):
                left -= 1
                deadline = request.arrival + request.ttft_target
                if free_at > deadline:
                    cost += outlook.lateness * (free_at - max(deadline, now))
                    if request.late == 0:
                        cost += outlook.violation
            else:
                cost += outlook.second * weight * (free_at - now)
        cost += outlook.second * weight * left * outlook.token_s
    return cost + outlook.interference * tokens_left


@kernel
def roll(scratch, plan, switch, until, decision_s, outlook, most):
    """Run a copy of the engine under `plan` until its clock passes `until` (s), and charge it.

    `plan.first` applies to iterations that begin before `switch` (s). A rollout ends once it is charged more than
    `most`, because charges are never refunded; its cost is then only known to be larger.
    """
    origin, trial = scratch.origin, scratch.trial
    fork(origin.state, 0, origin.feed, trial.state, trial.feed, math.inf)
    instance = trial.state.instances[0]
    batch = trial.state.batches[0]
    totals = trial.state.totals[0]
    begin = instance.now
    decoding_s = 0.0
    tokens = 0.0
    cost = 0.0
    more = True
    while more and instance.now < until and cost <= most:
        budget = plan.first if instance.now < switch else plan.tail
        candidates = plan.fixed
        if candidates == FORESEEN:
            candidates = foreseen_candidates(trial, 0, scratch, budget, plan.worth * outlook.token_s)
        more = run_iteration(trial, 0, candidates, budget, decision_s)
        decoding_s += batch.elapsed * batch.num_decodes
        tokens += batch.emitted_tokens - batch.prompts_completed
        cost = (
            outlook.second * totals.tpot_cost
            + outlook.violation * totals.violations
            + outlook.lateness * totals.lateness
        )
    seconds = instance.now - begin
    tpot_s = totals.tpot_cost
    if cost <= most:
        cost += remaining_cost(trial.state, trial.feed, outlook)
    return Rolled(cost, decoding_s, tokens, tpot_s, seconds)
