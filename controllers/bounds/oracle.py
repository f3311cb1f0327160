"""The clairvoyant bound: chooses by rollouts of the true engine, including its future."""

import logging
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.bounds.clairvoyant import PeekingController, check_unserved
from controllers.bounds.oracle_grid import FixedPair, best_fixed_pair
from controllers.bounds.rollout import (
    FORESEEN,
    UNBOUNDED,
    Outlook,
    Plan,
    Scratch,
    foreseen_candidates,
    new_scratch,
    roll,
)
from controllers.controller import configured
from controllers.fixed import constant
from engine.compiled import kernel
from engine.core.fork import fork
from engine.core.objective import charged
from engine.core.telemetry import look_away
from engine.latency.model import iteration_time, prefill_attention_time
from engine.policy import Policy
from engine.simulator.loop import run_iteration
from engine.simulator.simulator import Loop, Simulator

log = logging.getLogger(__name__)

CHUNK_ITERATIONS = 2_000
"""Iterations planned between two returns to Python, where interrupts are handled."""
WORTH_STEPS = (0.5, 0.7, 0.85, 1.2, 1.45, 2.0)
"""Factors on the value of a token that are tried beside the incumbent's."""
LEAST_WORTH, MOST_WORTH = 0.25, 4.0
TOKEN_MEMORY = 0.1
"""Weight of the latest rollout in the time a token takes."""


class Planning(NamedTuple):
    """Parameters and state of planning.

    scratch: see `Scratch` · horizon_s, every_s: settings · decision_s: charged before every iteration · pair: (2,) c
    and n of the best fixed pair · prices: (3,) per s of TPOT, violation, s of lateness · plan: (4,) the incumbent
    `Plan` · memory: (2,) s per token, and when to choose again (s).
    """

    scratch: Scratch
    horizon_s: float
    every_s: float
    decision_s: float
    pair: NDArray[np.int64]
    prices: NDArray[np.float64]
    plan: NDArray[np.float64]
    memory: NDArray[np.float64]


@kernel
def _drain_time(state, tables, budgets):
    """Seconds per prompt token of the fastest prefill beside today's decodes."""
    instance = state.instances[0]
    least = UNBOUNDED
    for j in range(budgets.shape[0]):
        n = budgets[j]
        attention = prefill_attention_time(tables, n, 0)
        decodes = instance.num_decoding
        seconds = iteration_time(tables, decodes, decodes, 0, instance.kv_tokens, 1, n, attention, decodes + 1)
        least = min(least, seconds / n)
    return least


@kernel
def _choose_plan(system, planning):
    """Search plans around the incumbent and store the cheapest in `planning.plan`."""
    scratch, plan, memory = planning.scratch, planning.plan, planning.memory
    budgets = scratch.budgets
    state, tables, origin = system.state, system.tables, scratch.origin
    now = state.instances[0].now
    until = now + planning.horizon_s
    work = fork(state, 0, system.feed, origin.state, origin.feed, until)
    totals = origin.state.totals[0]
    totals.tpot_cost = 0.0
    totals.lateness = 0.0
    totals.violations = 0
    second, violation, lateness = planning.prices[0], planning.prices[1], planning.prices[2]
    prefill_s = _drain_time(state, tables, budgets)
    useful = 1
    while useful < budgets.shape[0] and budgets[useful - 1] < work:
        useful += 1
    outlook = Outlook(memory[0], prefill_s, 0.0, second, violation, lateness)
    best = UNBOUNDED
    first = tail = b_first = b_tail = int(plan[1])
    worth = b_worth = plan[2]
    fixed = b_fixed = FORESEEN
    held, mixed = useful, 2 * useful
    for trial in range(mixed + len(WORTH_STEPS) + 2):
        # 0 is the incumbent, which sets the estimate of costs after the horizon.
        if 1 <= trial <= held:
            first = tail = budgets[trial - 1]
        elif held < trial <= mixed:
            first, tail = budgets[trial - held - 1], b_tail
        elif mixed < trial <= mixed + len(WORTH_STEPS):
            first, tail, worth = b_first, b_tail, plan[2] * WORTH_STEPS[trial - mixed - 1]
        elif trial > 0:
            first = tail = planning.pair[1]
            fixed = planning.pair[0]
        intended = Plan(first, tail, worth, fixed)
        rolled = roll(scratch, intended, now + planning.every_s, until, planning.decision_s, outlook, best)
        if trial == 0:
            if rolled.tokens > 0.0:
                memory[0] += TOKEN_MEMORY * (rolled.decoding_s / rolled.tokens - memory[0])
                interference = second * prefill_s * rolled.tpot_s / rolled.seconds
                outlook = Outlook(memory[0], prefill_s, interference, second, violation, lateness)
        elif rolled.cost < best:
            best = rolled.cost
            b_first, b_tail, b_worth, b_fixed = first, tail, worth, fixed
    plan[0], plan[1], plan[3] = b_first, b_tail, b_fixed
    if b_fixed == FORESEEN:
        plan[2] = min(max(b_worth, LEAST_WORTH), MOST_WORTH)


@kernel
def plan_run(system, planning, max_iterations, actions):
    """Plan and run at most `max_iterations` of engine 0, writing each (c, n) to `actions`.

    Returns (iterations run, whether any work is left).
    """
    plan, memory = planning.plan, planning.memory
    for row in range(max_iterations):
        now = system.state.instances[0].now
        if now >= memory[1]:
            _choose_plan(system, planning)
            memory[1] = now + planning.every_s
        budget = int(plan[0])
        candidates = int(plan[3])
        if candidates == FORESEEN:
            candidates = foreseen_candidates(system, 0, planning.scratch, budget, plan[2] * memory[0])
        actions[row, 0] = candidates
        actions[row, 1] = budget
        if not run_iteration(system, 0, candidates, budget, planning.decision_s):
            return row + 1, False
    return max_iterations, True


class Actions(NamedTuple):
    """chosen: (I, 2) c and n of every iteration · done: (N,) how many have been played."""

    chosen: NDArray[np.int32]
    done: NDArray[np.int64]


@kernel
def play(observation, i, params, memory):
    """The next of the planned actions."""
    row = memory.done[i]
    memory.done[i] += 1
    return memory.chosen[row, 0], memory.chosen[row, 1]


@configured
class Oracle(PeekingController):
    """A bound: a policy that knows agreements, output lengths and arrivals, and tries its choices on the engine.

    **Candidates.** Before every iteration it knows how many candidates of each request would be accepted. c minimises
    sum(w) T(c, n) - mu sum(w_i tokens_i(c)), where a second costs request i w_i = 1 / (output - 1) of TPOT, and T is
    the simulator's own. mu, the value of a token in s, is `worth` times the recent cost of tokens.

    **Budget.** Every `every` it copies the engine, with its queue and the arrivals of the horizon, and rolls the copy
    forward with the scheduler that serves (`controllers.bounds.rollout`): each budget held over the horizon; each
    budget until the next choice and then the best held one; the best of these with other values of `worth`; and the
    best fixed pair in hindsight. A rollout is charged the objective over the horizon and an estimate for requests
    unfinished then. The cheapest plan is followed until the next choice: rollout over a finite horizon (Bertsekas,
    Rollout, Policy Iteration, and Distributed Reinforcement Learning, 2020, chapter 2).

    **Meaning of the bound.** The run is planned once for each of `horizons`. In hindsight the cheapest of these runs is
    served, or that of `oracle_grid` if none is below it. So no fixed pair of the grid is ever cheaper. The result is
    that of one clairvoyant policy and not a proven bound: the optimum is lower still, and a controller without
    foresight could be lower as well.

    With candidates other than greedy chains the choice of c is a heuristic; rollouts and costs stay exact.

    Args:
        horizons: lengths of the rollouts, each tried for the whole run, in `ttft_target`s.
        every: time between two choices of a budget, in `ttft_target`s; at least one iteration.
    """

    horizons: Annotated[tuple[Annotated[float, Field(gt=0.0, allow_inf_nan=False)], ...], Field(min_length=1)] = (
        1.5,
        3.0,
    )
    every: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.1

    def loop(self, simulator: Simulator, decision_s: float) -> Loop:
        """Plan the whole run, then a loop that replays the cheapest plan. ValueError in mid-run."""
        check_unserved(simulator)
        workload = simulator.workloads[0]
        pair = best_fixed_pair(simulator, self.plant.grid, self.prices, decision_s)
        best, chosen = pair.cost, None
        for horizon in self.horizons:
            actions = self._plan(simulator, pair, horizon, decision_s)
            cost = charged(simulator.state, 0, self.prices)
            simulator.load(0, workload)
            log.info("horizon of %g targets: objective %.4f", horizon, cost / workload.num_requests)
            if cost < best:
                best, chosen = cost, actions
        log.info(
            "best fixed pair in hindsight: c=%d n=%d, objective %.4f%s",
            pair.candidates,
            pair.token_budget,
            pair.cost / workload.num_requests,
            ", which no rollout improves on" if chosen is None else "",
        )
        if chosen is None:
            return simulator.loop(constant(pair.candidates, pair.token_budget), decision_s)
        return simulator.loop(Policy(play, (), Actions(chosen, np.zeros(1, dtype=np.int64)), look_away), decision_s)

    def _plan(self, simulator: Simulator, pair: FixedPair, horizon: float, decision_s: float) -> NDArray[np.int32]:
        """(I, 2) c and n of every iteration; the simulator is left at the end of the run."""
        grid = self.plant.grid
        tables = simulator.latency.tables
        ttft_target = float(simulator.state.limits["ttft_target"][0])
        planning = Planning(
            scratch=new_scratch(simulator, grid.candidates, grid.budgets),
            horizon_s=horizon * ttft_target,
            every_s=self.every * ttft_target,
            decision_s=decision_s,
            pair=np.array([pair.candidates, pair.token_budget]),
            prices=self.prices.per_unit(ttft_target),
            plan=np.array([pair.token_budget, pair.token_budget, 1.0, FORESEEN], dtype=np.float64),
            memory=np.array([tables.fixed_s + tables.linear_s[1], 0.0]),
        )
        parts = []
        more = True
        while more:
            actions = np.zeros((CHUNK_ITERATIONS, 2), dtype=np.int32)
            count, more = plan_run(simulator.system, planning, CHUNK_ITERATIONS, actions)
            parts.append(actions[:count])
        return np.concatenate(parts)

    def label(self) -> str:
        """Label that marks a bound."""
        return "oracle (bound)"
