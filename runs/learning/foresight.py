"""What another choice now would have cost: an engine in the middle of an episode, rolled on once for each choice.

All rollouts from one moment meet the same requests and the same luck, so that only the choice makes the difference.
Only training may do this: the simulator holds the time to come.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.learned import Rules, choose, notice, shifted
from controllers.rollout import Outlook, remaining_cost
from engine.backends.simulator import run_iteration
from engine.compiled import outlined
from engine.core import state as core
from engine.core.state import State
from engine.core.telemetry import Observation, allocate_observation, observe


class Trial(NamedTuple):
    """One engine to roll on, its telemetry, and the policy that goes on with it.

    figures: (4,) what a rollout came to, see `_roll`.
    """

    state: State
    observation: Observation
    rules: Rules
    figures: NDArray[np.float64]


def new_trial(state: State, queue_rows: int, max_candidates: int, rules: Rules) -> Trial:
    """Room for copies of one engine of `state`; `rules` are those of the policy that goes on after the first choice."""
    limits = state.engines[0]
    room = core.allocate(
        1,
        state.requests.shape[1],
        total_blocks=int(limits["total_blocks"]),
        block_size=int(limits["block_size"]),
        watermark_blocks=int(limits["watermark_blocks"]),
        max_num_seqs=int(limits["max_num_seqs"]),
        ttft_target=float(limits["ttft_target"]),
    )
    return Trial(room, allocate_observation(1, queue_rows, max_candidates), rules, np.zeros(4))


@outlined
def _copy_engine(state, e, trial):
    """Copy engine e, without finished bookkeeping that nothing reads."""
    trial.engines[0] = state.engines[e]
    engine = state.engines[e]
    for r in range(engine.num_requests):
        trial.requests[0, r] = state.requests[e, r]
    for i in range(engine.num_running):
        trial.running[0, i] = state.running[e, i]
    for i in range(engine.num_preempted):
        trial.preempted[0, i] = state.preempted[e, i]
    for i in range(state.stopped.shape[1]):
        trial.stopped[0, i] = state.stopped[e, i]
        trial.exhausted[0, i] = state.exhausted[e, i]


@outlined
def _copy_table(source, m, target):
    """Row m of a three-dimensional array."""
    for i in range(source.shape[1]):
        for j in range(source.shape[2]):
            target[0, i, j] = source[m, i, j]


@outlined
def _copy_list(source, m, target):
    """Row m of a two-dimensional array."""
    for i in range(source.shape[1]):
        target[0, i] = source[m, i]


@outlined
def _copy_memory(sight, m, other):
    """Copy what is remembered of engine m into the only row of `other`."""
    ours, theirs = sight.memory, other.memory
    _copy_table(ours.acceptance, m, theirs.acceptance)
    _copy_list(ours.tokens, m, theirs.tokens)
    _copy_list(ours.arriving, m, theirs.arriving)
    _copy_list(ours.finished, m, theirs.finished)
    theirs.timing[0] = ours.timing[m]
    theirs.preempted[0] = ours.preempted[m]
    base, copy = sight.base.memory, other.base.memory
    _copy_table(base.acceptance, m, copy.acceptance)
    _copy_table(base.choices, m, copy.choices)
    _copy_list(base.tokens, m, copy.tokens)
    _copy_list(base.arriving, m, copy.arriving)
    _copy_list(base.finished, m, copy.finished)


@outlined
def _roll(trial, tables, draws, candidates, budget, horizon_s, decision_s, figures):
    """Run the copied engine with (c, n) for one decision and under the policy until the horizon.

    figures: (4,) s of decoding summed over requests, tokens that these got, s of TPOT charged, s on the clock.
    """
    state, rules = trial.state, trial.rules
    engine = state.engines[0]
    begin = engine.now
    tpot = engine.tpot_cost
    until = begin + horizon_s
    requests = engine.released
    while requests < engine.num_requests and state.requests[0, requests].arrival <= until:
        requests += 1
    engine.num_requests = requests
    decoding_s = 0.0
    tokens = 0.0
    more = True
    while more and engine.now < until:
        for iteration in range(rules.decide_every):
            charge = decision_s if iteration == 0 else 0.0
            more = run_iteration(state, 0, tables, draws, candidates, budget, charge)
            decoding_s += engine.last_elapsed * engine.num_decodes
            tokens += engine.emitted_tokens - engine.prompts_completed
            if not more:
                break
        if more:
            observe(state, 0, trial.observation)
            base_c, base_n = notice(trial.observation, 0, rules.sight, 0)
            c, n = choose(trial.observation, 0, rules, base_c, base_n)
            candidates = rules.sight.candidates[c]
            budget = rules.sight.budgets[n]
    figures[0] = decoding_s
    figures[1] = tokens
    figures[2] = engine.tpot_cost - tpot
    figures[3] = engine.now - begin


@outlined
def foresee(state, e, sight, m, base, tables, draws, trial, pairs, horizon_s, decision_s, prices, token_s, costs):
    """Charge every one of `pairs` for engine e: what it and what comes after it cost up to the horizon and beyond.

    Args:
        sight, m, base: what the policy remembers of the engine, and its base's choice now.
        pairs: (K, 2) the policy's own indices; the first is the one that others are compared with: what is left at the
            horizon is valued at the time that a token took in its rollout.
        prices: (3,) per s of TPOT, per violation, per s of lateness.
        token_s: s per token where the first rollout decoded nothing.
        costs: (K,) is written.
    """
    rules = trial.rules
    figures = trial.figures
    grid = rules.sight.shown.grid
    widest = grid.prefill_tokens.shape[0] - 1
    prefill_s = grid.seconds[0, 0, 0, widest] / grid.prefill_tokens[widest]
    outlook = Outlook(token_s, prefill_s, 0.0, prices[0], prices[1], prices[2])
    engine = trial.state.engines[0]
    for k in range(pairs.shape[0]):
        _copy_engine(state, e, trial.state)
        _copy_memory(sight, m, rules.sight)
        c, n = shifted(sight, base[0], base[1], pairs[k, 0], pairs[k, 1])
        tpot, violations, lateness = engine.tpot_cost, engine.violations, engine.lateness
        _roll(trial, tables, draws, rules.sight.candidates[c], rules.sight.budgets[n], horizon_s, decision_s, figures)
        if k == 0:
            if figures[1] > 0.0:
                token_s = figures[0] / figures[1]
            interference = prices[0] * prefill_s * figures[2] / max(figures[3], 1e-9)
            outlook = Outlook(token_s, prefill_s, interference, prices[0], prices[1], prices[2])
        charged = (
            prices[0] * (engine.tpot_cost - tpot)
            + prices[1] * (engine.violations - violations)
            + prices[2] * (engine.lateness - lateness)
        )
        costs[k] = charged + remaining_cost(trial.state, outlook)
