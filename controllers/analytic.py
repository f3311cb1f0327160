"""The analytic optimizer for production use: guarded deadlines, a price for prefill, and an overload mode."""

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.acceptance import (
    learn_acceptance,
    learn_by_choice,
    new_choice_memory,
    new_memory,
    tokens_of_requests,
)
from controllers.admission import admissible_tokens
from controllers.cheapest import cheapest_candidates
from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.telemetry import (
    ARRIVALS,
    DECODE_KV_TOKENS,
    FINISHED_REQUESTS,
    FINISHED_TOKENS,
    INTERVAL_S,
    ITERATIONS,
    LAST_CANDIDATES,
    LAST_NUM_DECODES,
    NO_DEADLINE_S,
    NUM_DECODES,
    TTFT_TARGET_S,
)
from engine.latency.lookup import LookupGrid, lookup_slice
from engine.plant import Plant
from engine.policy import stacked

UNBOUNDED_S = 1e9
ESTIMATES = ("depths", "requests", "choices")
LENGTH_MEMORY_S = 60.0
"""Time constant in s of the mean output length of finished requests."""
PRIOR_OUTPUT_TOKENS = 200.0
"""Output length assumed before the first request finishes; it counts as one finished request."""


class Settings(NamedTuple):
    """`Analytic`'s fields as plain floats, for the kernels."""

    ttft_target: float
    guard: float
    longest_iteration: float
    prefill_price: float
    arrival_memory_s: float
    drain_rate: float
    estimate: float
    look_ahead: float


class Memory(NamedTuple):
    """Optimizer state between decisions, and scratch space.

    acceptance: (N, 2, C) counts · choices: (N, 2, C + 2) tokens accepted by c chosen · tokens: (N, C + 1) G by
    candidate count · arriving: (N, 1) moving average of requests that arrive per second · finished: (N, 2) fading sums
    of finished requests and their output tokens · seconds, later: (N, nC, nN + 1) predicted T of the next iteration and
    of the one after · most_seconds: (N, nN + 1) longest T that keeps the deadlines, by budget.
    """

    acceptance: NDArray[np.float64]
    choices: NDArray[np.float64]
    tokens: NDArray[np.float64]
    arriving: NDArray[np.float64]
    finished: NDArray[np.float64]
    seconds: NDArray[np.float64]
    later: NDArray[np.float64]
    most_seconds: NDArray[np.float64]


def new_analytic_memory(grid: LookupGrid, instances: int) -> Memory:
    """Empty memory of `instances` instances, sized for a table."""
    acceptance = new_memory(int(grid.candidates.max()))
    one = Memory(
        acceptance=acceptance,
        choices=new_choice_memory(acceptance.shape[1]),
        tokens=np.ones(acceptance.shape[1] + 1),
        arriving=np.zeros(1),
        finished=np.zeros(2),
        seconds=np.zeros((len(grid.candidates), len(grid.prefill_tokens))),
        later=np.zeros((len(grid.candidates), len(grid.prefill_tokens))),
        most_seconds=np.zeros(len(grid.prefill_tokens)),
    )
    return stacked(one, instances)


class Params(NamedTuple):
    """Inputs of a decision: predicted times and settings."""

    grid: LookupGrid
    settings: Settings


@kernel
def row_of(memory, i):
    """Return the memory of instance `i`."""
    return Memory(
        memory.acceptance[i],
        memory.choices[i],
        memory.tokens[i],
        memory.arriving[i],
        memory.finished[i],
        memory.seconds[i],
        memory.later[i],
        memory.most_seconds[i],
    )


@kernel
def _limit_by_deadlines(queue, extra_slack, work, grid, last, settings, memory):
    """Fill `most_seconds` for budgets 1..last; returns whether a queued request cannot meet its deadline any more.

    Request i needs ceil(S_i / n) iterations of T(c, n) before its first token. It can be saved if some budget makes
    that fit its slack without speculation; a request that cannot be saved adds no constraint. For the others only the
    share `guard` of the slack is used: batches grow while a prompt waits, and predictions err.
    """
    seconds = memory.seconds
    most_seconds = memory.most_seconds
    for j in range(1, last + 1):
        most_seconds[j] = UNBOUNDED_S
    cumulative = 0.0
    lost = False
    for row in range(queue.shape[0]):
        if queue[row, 0] <= 0.0:
            continue
        cumulative += queue[row, 0]
        slack = queue[row, 1] + extra_slack
        if slack >= 0.5 * NO_DEADLINE_S:
            continue
        can_be_saved = False
        for j in range(last, 0, -1):
            if math.ceil(cumulative / min(float(grid.prefill_tokens[j]), work)) * seconds[0, j] <= slack:
                can_be_saved = True
                break
        if not can_be_saved:
            lost = True
            continue
        for j in range(1, last + 1):
            iterations = math.ceil(cumulative / min(float(grid.prefill_tokens[j]), work))
            most_seconds[j] = min(most_seconds[j], settings.guard * slack / iterations)
    return lost


@kernel
def _shorten(seconds, prefill_tokens, j, work):
    """Set column j of `seconds` to the time of `work` prompt tokens, between the previous budget and its own."""
    low = prefill_tokens[j - 1]
    share = (work - low) / (prefill_tokens[j] - low)
    for c in range(seconds.shape[0]):
        seconds[c, j] = seconds[c, j - 1] + share * (seconds[c, j] - seconds[c, j - 1])


@kernel
def _remember_load(observation, e, settings, memory):
    """Update the request rate and the mean output length of finished requests."""
    load = observation.load
    elapsed = load[e, INTERVAL_S]
    if elapsed > 0.0:
        # weight / elapsed stays finite however short the interval was.
        weight = -math.expm1(-elapsed / settings.arrival_memory_s)
        memory.arriving[0] += weight / elapsed * load[e, ARRIVALS] - weight * memory.arriving[0]
    keep = math.exp(-elapsed / LENGTH_MEMORY_S)
    memory.finished[0] = memory.finished[0] * keep + load[e, FINISHED_REQUESTS]
    memory.finished[1] = memory.finished[1] * keep + load[e, FINISHED_TOKENS]


@kernel
def _prefill_price(num_decodes, token_value, settings, memory):
    """Price of a prompt token relative to its cost in bulk: decodes that a deferred prompt will meet, per decode now.

    Of the requests that decode now, a share exp(-l guard / (output length x mu)) still decodes when the slack is used
    up. The others are replaced by the batch that the present arrival rate leads to.
    """
    length = (memory.finished[1] + PRIOR_OUTPUT_TOKENS) / (memory.finished[0] + 1.0)
    stay = math.exp(-settings.guard * settings.ttft_target / (length * token_value))
    coming = memory.arriving[0] * length * token_value
    return settings.prefill_price * (stay + (1.0 - stay) * coming / num_decodes)


@kernel
def _least_prefill_rate(work, last, longest, token_value, grid, settings, memory):
    """Slowest prefill, in prompt tokens per second, that still drains a late queue."""
    fastest = 0.0
    for j in range(1, last + 1):
        c = cheapest_candidates(memory.seconds, memory.tokens, grid.candidates, j, token_value)
        if memory.seconds[c, j] <= longest or j == 1:
            fastest = max(fastest, min(float(grid.prefill_tokens[j]), work) / memory.seconds[c, j])
    return settings.drain_rate * fastest


@kernel
def _cost_after(num_decodes, kv_tokens, queue, work, prefilled, emitted, price, token_value, grid, memory):
    """Least cost of the iteration after one that prefilled `prefilled` tokens, in s per request that decodes now.

    Completed prompts then decode, and no request finishes. Each decode costs the iteration's time beyond the value of
    its tokens, less the price of the prompt tokens prefilled.
    """
    decodes = num_decodes
    kv_tokens += num_decodes * emitted
    left = prefilled
    for row in range(queue.shape[0] - 1):
        prompt = queue[row, 0]
        if prompt <= 0.0 or prompt > left:
            break
        left -= prompt
        decodes += 1.0
        kv_tokens += prompt
    lookup_slice(grid, decodes, kv_tokens, memory.later)
    remaining = work - prefilled
    best = UNBOUNDED_S
    for j in range(grid.prefill_tokens.shape[0]):
        if grid.prefill_tokens[j] > remaining:
            _shorten(memory.later, grid.prefill_tokens, j, remaining)
        prompt_tokens = min(float(grid.prefill_tokens[j]), remaining)
        c = cheapest_candidates(memory.later, memory.tokens, grid.candidates, j, token_value)
        cost = memory.later[c, j] - token_value * memory.tokens[grid.candidates[c]] - price * prompt_tokens
        best = min(best, cost)
        if prompt_tokens >= remaining:
            break
    return best * decodes / num_decodes


@kernel
def _choose_budget(num_decodes, kv_tokens, queue, work, last, lost, token_value, grid, settings, memory):
    """Indices of (c, n) among budgets 1..last; the rules are in `Analytic`'s docstring."""
    seconds = memory.seconds
    widest = grid.prefill_tokens.shape[0] - 1
    longest = settings.longest_iteration * settings.ttft_target
    least_rate = 0.0
    price = 0.0
    if lost:
        least_rate = _least_prefill_rate(work, last, longest, token_value, grid, settings, memory)
    elif num_decodes > 0.0:
        price = _prefill_price(num_decodes, token_value, settings, memory)
        price *= grid.seconds[0, 0, 0, widest] / grid.prefill_tokens[widest]
    best = UNBOUNDED_S
    c_best, j_best = -1, 1
    least_late = UNBOUNDED_S
    c_late, j_late = 0, 1
    for j in range(1, last + 1):
        prompt_tokens = min(float(grid.prefill_tokens[j]), work)
        c = cheapest_candidates(seconds, memory.tokens, grid.candidates, j, token_value)
        spent = seconds[c, j]
        if spent > longest and j > 1:
            continue
        late = spent / max(memory.most_seconds[j], 1e-9)
        if late < least_late:
            least_late = late
            c_late, j_late = c, j
        if late > 1.0 or prompt_tokens < least_rate * spent:
            continue
        cost = -prompt_tokens
        if num_decodes > 0.0:
            emitted = memory.tokens[grid.candidates[c]]
            cost = spent - token_value * emitted - price * prompt_tokens
            if settings.look_ahead == 1.0 and not lost:
                cost += _cost_after(
                    num_decodes, kv_tokens, queue, work, prompt_tokens, emitted, price, token_value, grid, memory
                )
        if cost < best:
            best = cost
            c_best, j_best = c, j
    if c_best < 0:
        return c_late, j_late
    return c_best, j_best


@kernel
def decide(observation, i, params, memory):
    """(c, n) in tokens of the next action for instance `i`."""
    c, n = choose_pair(observation, i, params.grid, params.settings, row_of(memory, i))
    return params.grid.candidates[c], params.grid.prefill_tokens[n]


@kernel
def choose_pair(observation, e, grid, settings, memory):
    """Indices (c, n) into the table's axes.

    Index 0 of the budget axis means no prefill and is never chosen.
    """
    load = observation.load
    num_decodes = load[e, NUM_DECODES]
    learn_acceptance(
        memory.acceptance, observation.drafted[e], observation.accepted[e], load[e, INTERVAL_S], memory.tokens
    )
    if settings.estimate == 1.0:
        tokens_of_requests(observation.rates[e], memory.tokens)
    elif settings.estimate == 2.0:
        accepted = 0.0
        for depth in range(observation.accepted.shape[1]):
            accepted += observation.accepted[e, depth]
        decodes = load[e, LAST_NUM_DECODES] * load[e, ITERATIONS]
        learn_by_choice(
            memory.choices, int(load[e, LAST_CANDIDATES]), decodes, accepted, load[e, INTERVAL_S], memory.tokens
        )
    seconds = memory.seconds
    lookup_slice(grid, num_decodes, load[e, DECODE_KV_TOKENS], seconds)
    token_value = UNBOUNDED_S
    alone = 0
    for c in range(grid.candidates.shape[0]):
        ratio = seconds[c, 0] / memory.tokens[grid.candidates[c]]
        if ratio < token_value:
            token_value = ratio
            alone = c
    work = admissible_tokens(observation, e)
    _remember_load(observation, e, settings, memory)
    last = grid.prefill_tokens.shape[0] - 1
    if work <= 0.0:
        while last > 1 and seconds[alone, last] > settings.longest_iteration * settings.ttft_target:
            last -= 1
        return alone, last
    while last > 1 and grid.prefill_tokens[last - 1] >= work:
        last -= 1
    if work < grid.prefill_tokens[last]:
        _shorten(seconds, grid.prefill_tokens, last, work)
    extra_slack = settings.ttft_target - load[e, TTFT_TARGET_S]
    lost = _limit_by_deadlines(observation.queue[e], extra_slack, work, grid, last, settings, memory)
    kv_tokens = load[e, DECODE_KV_TOKENS]
    prompts = observation.queue[e]
    return _choose_budget(num_decodes, kv_tokens, prompts, work, last, lost, token_value, grid, settings, memory)


@configured
class Analytic(KernelController):
    """Chooses c for the decodes and n for the prompts, from predicted times and measured acceptance.

    Symbols:

    - T(c, n): predicted iteration time at the current batch and cache (lookup table).
    - G(c): tokens per iteration (measured online).
    - mu = min_c T(c, 0) / G(c): cost of a token to a decoding request without prefill.
    - tau = T / n of the largest budget alone: cost of a prompt token prefilled in bulk.
    - l: TTFT target.

    **Candidates.** For every n, c minimises T(c, n) - mu G(c): the time of an iteration beyond the value of its tokens.
    Deadlines do not affect c: fewer candidates for the sake of one prompt would slow every decode, the batch would
    grow, and more prompts would be late.

    **Deadlines, guarded.** Queued request i needs ceil(S_i / n) whole iterations, because tokens are emitted at an
    iteration's end. Pairs with ceil(S_i / n) T > guard x slack_i are excluded, for every i that can still be saved. The
    rest of the slack covers prediction error and growth of the batch. Iterations longer than `longest_iteration` x l
    are always excluded: a prompt that arrives just after one began waits for all of it.

    **Price of prefill.** Among the remaining pairs, n minimises T - mu G - p tau n. With p = 0 this is the poster: as
    little prefill as the deadlines allow. But prompt tokens must be computed at some time, and their cost is the delay
    of every decoding request. p is the number of decoding requests later per one now: p = s + (1 - s) B_coming / B.
    s = exp(-guard l / (mean output length x mu)) is the share of the present batch that still decodes when the slack is
    used up. B_coming = (request rate) x (mean output length) x mu is the batch that the present arrivals lead to
    (Little's law). Where outputs are long or the load is steady, p is near 1. A prompt token is then taken whenever it
    costs no more than in bulk, above all in a memory-bound decode batch that reads the weights anyway. Where the batch
    is about to shrink, prompts wait; where it is about to grow, they go first. With no request decoding, all prefill
    that the deadlines allow is done at once, because it delays no request.

    **Overload.** A request that no budget can save adds no constraint, but it blocks later requests: service is first
    come, first served. While there is one, the queue is drained at no less than `drain_rate` of the highest prefill
    rate n / T, by the smallest such n. The last few per cent of rate take budgets several times as large, and decodes
    get one step per iteration. Later requests that can still be saved keep their guarded deadlines meanwhile.

    Only prompts that can be admitted count as work. Prompts kept out by the KV cache or the batch limit must not lead
    to a large n or to a c for mixed batches.

    Source: the optimizer minimises PerIterExecTime / PerIterGenTokens subject to TTFT <= l (`controllers.poster`); mu
    as the value of a token is Dinkelbach's method for that ratio (Management Science 13(7), 1967).

    Args:
        ttft_target: l in s.
        guard: share of a request's slack that may be used.
        longest_iteration: longest iteration, as a share of `ttft_target`.
        prefill_price: factor on p; 0 prefills as late as the deadlines allow.
        arrival_memory_s: time constant in s of the request rate.
        drain_rate: share of the highest prefill rate kept while a request cannot be saved; 0 turns the rule off.
        estimate: data behind G(c). `depths`: acceptance at each draft depth, over all requests. `requests`: the
            acceptance rates of the requests that decode now. `choices`: the tokens of each chosen c, which is also
            valid for global allocation and for trees.
        look_ahead: add the cost of the best iteration after next to each choice of n, at the batch and the queue that
            the choice leaves.
    """

    decision_s = 20e-6
    decide = staticmethod(decide)

    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    guard: Annotated[float, Field(gt=0.0, le=1.0)] = 0.8
    longest_iteration: Annotated[float, Field(gt=0.0)] = 0.5
    prefill_price: Annotated[float, Field(ge=0.0)] = 1.0
    arrival_memory_s: Annotated[float, Field(gt=0.0)] = 2.0
    drain_rate: Annotated[float, Field(ge=0.0, le=1.0)] = 0.9
    estimate: Literal["depths", "requests", "choices"] = "depths"
    look_ahead: bool = False

    @property
    def settings(self) -> Settings:
        """The configuration as the kernels read it."""
        plain = {name: float(getattr(self, name)) for name in Settings._fields if name != "estimate"}
        return Settings(estimate=float(ESTIMATES.index(self.estimate)), **plain)

    def params(self, plant: Plant) -> Params:
        """The table and the settings."""
        return Params(plant.lookup.grid, self.settings)

    def memory(self, plant: Plant, instances: int) -> Memory:
        """Empty memory."""
        return new_analytic_memory(plant.lookup.grid, instances)
