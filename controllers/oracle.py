"""The clairvoyant bound: before its choices it rolls the true engine forward, future included."""

import logging
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.controller import configured
from controllers.oracle_grid import best_fixed_pair
from controllers.peeking import PeekingController, check_unserved
from controllers.rollout import (
    UNBOUNDED,
    Outlook,
    Plan,
    Scratch,
    copy_unfinished,
    foreseen_candidates,
    new_scratch,
    roll,
)
from engine.backends.simulator import CompiledLoop, Simulator, log_iteration, run_iteration
from engine.compiled import kernel
from engine.core.objective import charged
from engine.latency.model import iteration_time, prefill_attention_time

log = logging.getLogger(__name__)

CHUNK_ITERATIONS = 2_000
"""Iterations planned between two returns to Python, where an interrupt is taken."""
WORTH_STEPS = (0.5, 0.7, 0.85, 1.2, 1.45, 2.0)
"""Factors on what a token is worth that are tried beside the incumbent's."""
TOKEN_MEMORY = 0.1
"""Weight of the latest rollout in the time a token takes."""


class Rules(NamedTuple):
    """What planning reads and keeps.

    scratch: see `Scratch` · horizon_s, every: settings · pair: (2,) c and n of the best fixed pair · prices: (3,) per
    s of TPOT, violation, s of lateness · plan: (4,) the incumbent `Plan` · memory: (2,) s per token, and
    when to choose again (s).
    """

    scratch: Scratch
    horizon_s: float
    every_s: float
    pair: NDArray[np.int64]
    prices: NDArray[np.float64]
    plan: NDArray[np.float64]
    memory: NDArray[np.float64]


@kernel
def _drain_time(state, tables, budgets):
    """Seconds per prompt token of the fastest prefill beside today's decodes."""
    engine = state.engines[0]
    least = UNBOUNDED
    for j in range(budgets.shape[0]):
        n = budgets[j]
        attention = prefill_attention_time(tables, n, 0)
        decodes = engine.num_decoding
        seconds = iteration_time(tables, decodes, decodes, 0, engine.kv_tokens, 1, n, attention, decodes + 1)
        least = min(least, seconds / n)
    return least


@kernel
def _choose_plan(state, tables, draws, rules):
    """Search the plans around the incumbent and keep the cheapest in `rules.plan`."""
    scratch, plan, memory = rules.scratch, rules.plan, rules.memory
    budgets = scratch.budgets
    now = state.engines[0].now
    until = now + rules.horizon_s
    work = copy_unfinished(state, scratch.origin, until)
    second, violation, lateness = rules.prices[0], rules.prices[1], rules.prices[2]
    prefill_s = _drain_time(state, tables, budgets)
    useful = 1
    while useful < budgets.shape[0] and budgets[useful - 1] < work:
        useful += 1
    # 0: the incumbent, from which the outlook is taken · then every n held · every n first · every worth · the pair.
    n, w = useful, len(WORTH_STEPS)
    outlook = Outlook(memory[0], prefill_s, 0.0, second, violation, lateness)
    best = UNBOUNDED
    tail, worth = int(plan[1]), plan[2]
    first, fixed = tail, -1
    b_first, b_tail, b_worth, b_fixed = tail, tail, worth, -1
    for trial in range(2 + 2 * n + w):
        if trial == 0:
            first = tail
        elif trial <= n:
            first = tail = budgets[trial - 1]
        elif trial <= 2 * n:
            first, tail = budgets[trial - n - 1], b_tail
        elif trial <= 2 * n + w:
            if trial == 2 * n + 1:
                first, tail = b_first, b_tail
            worth = plan[2] * WORTH_STEPS[trial - 2 * n - 1]
        else:
            fixed = rules.pair[0]
            first = tail = rules.pair[1]
        rolled = roll(
            scratch, tables, draws, Plan(first, tail, worth, fixed), now + rules.every_s, until, outlook, best
        )
        if trial == 0 and rolled.tokens > 0.0 and rolled.seconds > 0.0:
            memory[0] += TOKEN_MEMORY * (rolled.decoding_s / rolled.tokens - memory[0])
            interference = second * prefill_s * rolled.weight_s / rolled.seconds
            outlook = Outlook(memory[0], prefill_s, interference, second, violation, lateness)
            continue
        if rolled.cost < best:
            best = rolled.cost
            b_first, b_tail, b_worth, b_fixed = first, tail, worth, fixed
    plan[0], plan[1], plan[3] = b_first, b_tail, b_fixed
    if b_fixed < 0:
        plan[2] = min(max(b_worth, 0.25), 4.0)


@kernel
def plan_run(state, tables, draws, rules, max_iterations, actions):
    """Plan and run at most `max_iterations` of engine 0, writing each (c, n) to `actions`.

    Returns (iterations run, whether any work is left).
    """
    plan, memory = rules.plan, rules.memory
    for row in range(max_iterations):
        now = state.engines[0].now
        if now >= memory[1]:
            _choose_plan(state, tables, draws, rules)
            memory[1] = now + rules.every_s
        budget = int(plan[0])
        candidates = int(plan[3])
        if candidates < 0:
            candidates = foreseen_candidates(state, 0, tables, draws, rules.scratch, budget, plan[2] * memory[0])
        actions[row, 0] = candidates
        actions[row, 1] = budget
        if not run_iteration(state, 0, tables, draws, candidates, budget, 0.0):
            return row + 1, False
    return max_iterations, True


@kernel
def replay_actions(state, tables, draws, actions, begin, max_iterations, log):
    """Run engine 0 with the actions from row `begin` on; returns (iterations run, whether any work is left)."""
    recording = len(log) > 0
    for row in range(max_iterations):
        candidates, token_budget = actions[begin + row, 0], actions[begin + row, 1]
        more = run_iteration(state, 0, tables, draws, candidates, token_budget, 0.0)
        if recording:
            log_iteration(state, 0, log, row)
        if not more:
            return row + 1, False
    return max_iterations, True


@configured
class Oracle(PeekingController):
    """TODO"""

    horizon_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.5
    every_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.05

    def loop(self, simulator: Simulator, decision_s: float) -> CompiledLoop:
        """Plan the whole run, then a loop that replays the plan. ValueError in mid-run."""
        check_unserved(simulator)
        best = best_fixed_pair(simulator, self.plant.grid, self.prices)
        actions = self._plan(simulator, (best.candidates, best.token_budget))
        cost = charged(simulator.state, 0, self.prices)
        workload = simulator.workloads[0]
        log.info(
            "objective %.4f by rollouts, %.4f by the best fixed pair in hindsight, c=%d n=%d",
            cost / workload.num_requests,
            best.cost / workload.num_requests,
            best.candidates,
            best.token_budget,
        )
        simulator.load(0, workload)
        if best.cost < cost:
            return simulator.constant_loop(best.candidates, best.token_budget)
        done = 0

        def loop(max_iterations: int, log: NDArray[np.void]) -> tuple[int, bool]:
            nonlocal done
            count, more = replay_actions(
                simulator.state, simulator.latency.tables, simulator.run_lengths, actions, done, max_iterations, log
            )
            done += count
            return count, more

        return loop

    def _plan(self, simulator: Simulator, pair: tuple[int, int]) -> NDArray[np.int32]:
        """(I, 2) c and n of every iteration; the simulator is left at the end of the run."""
        grid = self.plant.grid
        state, tables = simulator.state, simulator.latency.tables
        rules = Rules(
            scratch=new_scratch(simulator, grid.candidates, grid.budgets),
            horizon_s=self.horizon_s,
            every_s=self.every_s,
            pair=np.array(pair, dtype=np.int64),
            prices=self.prices.per_unit(float(state.engines[0]["ttft_target"])),
            plan=np.array([pair[1], pair[1], 1.0, -1.0]),
            memory=np.array([tables.fixed_s + tables.linear_s[1], 0.0]),
        )
        parts = []
        more = True
        while more:
            actions = np.zeros((CHUNK_ITERATIONS, 2), dtype=np.int32)
            count, more = plan_run(state, tables, simulator.run_lengths, rules, CHUNK_ITERATIONS, actions)
            parts.append(actions[:count])
        return np.concatenate(parts)

    def label(self) -> str:
        """Says that this is a bound."""
        return "oracle (bound)"
