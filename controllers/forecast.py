"""Engine model of `controllers.mpc`: a fluid of decodes, a queue of prompts, and the cost of a plan."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.latency.lookup import lookup_choice

FADE = 0.25
"""Most of the batch that may finish in one step of the model, as a share."""


class Settings(NamedTuple):
    """`Mpc`'s fields as plain floats, for the kernels."""

    ttft_target: float
    tpot_target: float
    violation: float
    lateness: float
    horizon_s: float
    switch_s: float
    guard: float
    prefill_price: float
    batch_memory_s: float
    rate_memory_s: float


class Line(NamedTuple):
    """Prompts in order of service, waiting ones and then predicted ones.

    tokens, slack (s), arrival (s from now), requests (that the row stands for), each (Q,).
    """

    tokens: NDArray[np.float64]
    slack: NDArray[np.float64]
    arrival: NDArray[np.float64]
    requests: NDArray[np.float64]


class Memory(NamedTuple):
    """Learned state and scratch space, for N instances.

    acceptance: (N, 2, C) counts · tokens: (N, C + 1) G · finished: (N, 2) fading sums of finished requests and their
    tokens · arrived: (N, 2) of arrivals and their tokens · rate: (N, 2) of arrivals and seconds, fading faster ·
    usual_batch: (N, 1) moving average of B over time · seconds: (N, nC, nN + 1) predicted T · cheapest: (N, nN + 1)
    index of c by budget, 0 for an iteration without prefill · line: (N, 4, Q) the arrays of a `Line`.
    """

    acceptance: NDArray[np.float64]
    tokens: NDArray[np.float64]
    finished: NDArray[np.float64]
    arrived: NDArray[np.float64]
    rate: NDArray[np.float64]
    usual_batch: NDArray[np.float64]
    seconds: NDArray[np.float64]
    cheapest: NDArray[np.int64]
    line: NDArray[np.float64]


class Kept(NamedTuple):
    """A row of `Memory`, for one instance."""

    acceptance: NDArray[np.float64]
    tokens: NDArray[np.float64]
    finished: NDArray[np.float64]
    arrived: NDArray[np.float64]
    rate: NDArray[np.float64]
    usual_batch: NDArray[np.float64]
    seconds: NDArray[np.float64]
    cheapest: NDArray[np.int64]
    line: Line


@kernel
def row_of(memory, i):
    """Return the memory of instance `i`."""
    line = memory.line[i]
    return Kept(
        memory.acceptance[i],
        memory.tokens[i],
        memory.finished[i],
        memory.arrived[i],
        memory.rate[i],
        memory.usual_batch[i],
        memory.seconds[i],
        memory.cheapest[i],
        Line(line[0], line[1], line[2], line[3]),
    )


class Now(NamedTuple):
    """The predicted engine when a rollout begins, and the prices after the horizon.

    decodes, kv_tokens, free_kv, free_seqs: as observed · in_progress: 1 if the first row has been admitted · rows:
    of the line · length: mean output tokens · decode_cost: of a request decoding for a second · request_cost: of a
    request that has emitted no tokens yet · token_cost: of a prompt token · drain_s: s per prompt token.
    """

    decodes: float
    kv_tokens: float
    free_kv: float
    free_seqs: float
    in_progress: bool
    rows: int
    length: float
    decode_cost: float
    request_cost: float
    token_cost: float
    drain_s: float


@kernel
def _late_cost(line, row, end, settings):
    """Cost of the first token of a row coming `end` s from now."""
    slack = line.slack[row]
    cost = 0.0
    if slack > 0.0:
        risk = (end - settings.guard * slack) / ((1.0 - settings.guard) * slack + 1e-9)
        cost = settings.violation * min(max(risk, 0.0), 1.0)
    if end > slack:
        cost += settings.lateness * (end - max(slack, 0.0)) / settings.ttft_target
    return cost * line.requests[row]


@kernel
def predicted_cost(grid, settings, memory, now, first, tail, switch_s, most):
    """Objective of the next `horizon_s` seconds and an estimate for the work left then, under an action sequence.

    Budget `first` (an index) in iterations that begin before `switch_s`, then `tail`; c as in `memory.cheapest` for the
    budget. Stops early past `most`, with a cost that is only known to be larger.
    """
    line = memory.line
    candidates = grid.candidates
    time = 0.0
    cost = 0.0
    decodes, kv_tokens, free_kv, free_seqs = now.decodes, now.kv_tokens, now.free_kv, now.free_seqs
    row = 0
    rest = line.tokens[0] if now.in_progress else 0.0
    horizon_s = settings.horizon_s
    while time < horizon_s and cost <= most:
        j = first if time < switch_s else tail
        budget = float(grid.prefill_tokens[j])
        left = budget
        begun = row
        while left > 0.0:
            if rest <= 0.0:
                if row >= now.rows or line.arrival[row] > time or free_seqs < 1.0:
                    break
                if line.tokens[row] > free_kv and (decodes > 0.5 or left < budget):
                    break
                rest = line.tokens[row]
                free_kv -= rest
                free_seqs -= line.requests[row]
            chunk = min(left, rest)
            rest -= chunk
            left -= chunk
            if rest <= 0.0:
                row += 1
        prompt_tokens = budget - left
        if prompt_tokens <= 0.0:
            j = 0
        if decodes < 1e-3 and prompt_tokens <= 0.0:
            if row >= now.rows or line.arrival[row] <= time:
                break
            time = line.arrival[row]
            continue
        c = memory.cheapest[j]
        gain = memory.tokens[candidates[c]]
        seconds = lookup_choice(grid, decodes, kv_tokens, c, prompt_tokens)
        times = 1.0
        if row == begun:
            # Only time passes, so several iterations are one step.
            until = switch_s if time < switch_s else horizon_s
            if prompt_tokens > 0.0:
                times = math.ceil(rest / budget)
            else:
                if row < now.rows and line.arrival[row] > time:
                    until = min(until, line.arrival[row])
                times = FADE * now.length / gain
            times = max(1.0, min(math.floor(times), math.ceil((until - time) / seconds)))
            if prompt_tokens > 0.0:
                rest -= (times - 1.0) * budget
        stay = 1.0
        if decodes > 0.0:
            stay = math.exp(-times * gain / now.length)
            mean = 0.5 * (1.0 + stay) * decodes
            cost += now.decode_cost * mean * times * seconds
            each = kv_tokens / decodes
            free_kv += (1.0 - stay) * kv_tokens - mean * gain * times
            free_seqs += (1.0 - stay) * decodes
            decodes *= stay
            kv_tokens = (each + gain * times) * decodes
        time += times * seconds
        for done in range(begun, row):
            cost += _late_cost(line, done, time, settings)
            decodes += line.requests[done]
            kv_tokens += line.tokens[done]
    if cost > most:
        return cost
    tokens_left = 0.0
    free_at = time
    requests_left = decodes
    for waiting in range(row, now.rows):
        tokens = rest if waiting == row and rest > 0.0 else line.tokens[waiting]
        tokens_left += tokens
        free_at += tokens * now.drain_s
        requests_left += line.requests[waiting]
        cost += _late_cost(line, waiting, free_at, settings)
    return cost + requests_left * now.request_cost + tokens_left * now.token_cost
