"""What another choice now would have cost: an engine in the middle of an episode, rolled on once for each choice.

All rollouts from one moment meet the same requests and the same luck, so that only the choice makes the difference.
Only training may do this: the simulator holds the time to come.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.bounds.rollout import Outlook, remaining_cost
from controllers.learned import LearnedMemory, Params, choose, notice, shifted
from engine.compiled import outlined
from engine.core import state as core
from engine.core.feed import new_feed
from engine.core.fork import fork, fork_telemetry
from engine.core.telemetry import Observation, Seen, allocate_observation, new_seen, observe
from engine.policy import Policy
from engine.simulator.loop import System, run_iteration
from engine.simulator.simulator import Simulator


class Trial(NamedTuple):
    """One engine to roll on, its telemetry, and the policy that goes on with it.

    figures: (4,) what a rollout came to, see `_roll`.
    """

    system: System
    seen: Seen
    observation: Observation
    params: Params
    memory: LearnedMemory
    figures: NDArray[np.float64]


def new_trial(simulator: Simulator, policy: Policy) -> Trial:
    """Room for copies of one engine of a simulator; `policy` goes on after the first choice."""
    limits = simulator.limits
    state = core.allocate(
        1,
        len(simulator.state.requests),
        total_blocks=limits.total_blocks,
        block_size=limits.block_size,
        watermark_blocks=limits.watermark_blocks,
        max_num_seqs=limits.max_num_seqs,
        ttft_target=float(simulator.state.limits["ttft_target"][0]),
        prefill=limits.prefill,
    )
    system = simulator.system._replace(state=state, feed=new_feed(1))
    observation = allocate_observation(1, simulator.queue_rows, simulator.max_candidates)
    return Trial(system, new_seen(1), observation, policy.params, policy.memory, np.zeros(4))


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
def _copy_memory(memory, m, copy):
    """Copy what is remembered of engine m into the only row of `copy`."""
    ours, theirs = memory.features, copy.features
    _copy_table(ours.acceptance, m, theirs.acceptance)
    _copy_list(ours.tokens, m, theirs.tokens)
    _copy_list(ours.arriving, m, theirs.arriving)
    _copy_list(ours.finished, m, theirs.finished)
    theirs.timing[0] = ours.timing[m]
    theirs.preempted[0] = ours.preempted[m]
    ours_base, theirs_base = memory.base, copy.base
    _copy_table(ours_base.acceptance, m, theirs_base.acceptance)
    _copy_table(ours_base.choices, m, theirs_base.choices)
    _copy_list(ours_base.tokens, m, theirs_base.tokens)
    _copy_list(ours_base.arriving, m, theirs_base.arriving)
    _copy_list(ours_base.finished, m, theirs_base.finished)


@outlined
def _roll(trial, candidates, budget, horizon_s, decision_s):
    """Run the copied engine with (c, n) for one decision and under the policy until the horizon.

    Writes to the trial's figures: (4,) s of decoding summed over requests, tokens that these got, s of TPOT charged, s
    on the clock.
    """
    system, params, memory, figures = trial.system, trial.params, trial.memory, trial.figures
    state = system.state
    instance, batch, totals = state.instances[0], state.batches[0], state.totals[0]
    begin = instance.now
    tpot = totals.tpot_cost
    until = begin + horizon_s
    decoding_s = 0.0
    tokens = 0.0
    more = True
    while more and instance.now < until:
        for iteration in range(params.decide_every):
            charge = decision_s if iteration == 0 else 0.0
            more = run_iteration(system, 0, candidates, budget, charge)
            decoding_s += batch.elapsed * batch.num_decodes
            tokens += batch.emitted_tokens - batch.prompts_completed
            if not more:
                break
        if more:
            observe(state, 0, trial.seen, trial.observation)
            base_c, base_n = notice(trial.observation, 0, params.sight, memory.sight, 0)
            c, n = choose(trial.observation, 0, params, memory, 0, base_c, base_n)
            candidates = params.sight.candidates[c]
            budget = params.sight.budgets[n]
    figures[0] = decoding_s
    figures[1] = tokens
    figures[2] = totals.tpot_cost - tpot
    figures[3] = instance.now - begin


@outlined
def foresee(system, seen, e, memory, base, trial, pairs, horizon_s, decision_s, prices, token_s, costs):
    """Charge every one of `pairs` for engine e: what it and what comes after it cost up to the horizon and beyond.

    Args:
        memory, base: what the policy remembers of the engines, and its base's choice for this one now.
        pairs: (K, 2) the policy's own indices; the first is the one that others are compared with: what is left at the
            horizon is valued at the time that a token took in its rollout.
        prices: (3,) per s of TPOT, per violation, per s of lateness.
        token_s: s per token where the first rollout decoded nothing.
        costs: (K,) is written.
    """
    sight = trial.params.sight
    state, copy = system.state, trial.system.state
    figures = trial.figures
    grid = sight.shown.grid
    widest = grid.prefill_tokens.shape[0] - 1
    prefill_s = grid.seconds[0, 0, 0, widest] / grid.prefill_tokens[widest]
    outlook = Outlook(token_s, prefill_s, 0.0, prices[0], prices[1], prices[2])
    totals = copy.totals[0]
    until = state.instances[e].now + horizon_s
    for k in range(pairs.shape[0]):
        fork(state, e, system.feed, copy, trial.system.feed, until)
        fork_telemetry(state, e, seen, copy, trial.seen)
        _copy_memory(memory, e, trial.memory.sight)
        c, n = shifted(sight, base[0], base[1], pairs[k, 0], pairs[k, 1])
        tpot, violations, lateness = totals.tpot_cost, totals.violations, totals.lateness
        _roll(trial, sight.candidates[c], sight.budgets[n], horizon_s, decision_s)
        if k == 0:
            if figures[1] > 0.0:
                token_s = figures[0] / figures[1]
            interference = prices[0] * prefill_s * figures[2] / max(figures[3], 1e-9)
            outlook = Outlook(token_s, prefill_s, interference, prices[0], prices[1], prices[2])
        charged = (
            prices[0] * (totals.tpot_cost - tpot)
            + prices[1] * (totals.violations - violations)
            + prices[2] * (totals.lateness - lateness)
        )
        costs[k] = charged + remaining_cost(copy, trial.system.feed, outlook)
