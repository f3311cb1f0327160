"""The best fixed pair in hindsight: every (c, n) of the grid serves the workload, and the cheapest serves it again."""

import logging
from dataclasses import dataclass, field

import numpy as np

from controllers.bounds.clairvoyant import PeekingController, check_unserved
from controllers.controller import configured
from controllers.fixed import constant
from engine.core.action import ActionGrid
from engine.core.objective import Prices, charged
from engine.plant import Plant
from engine.simulator.loop import ITERATION
from engine.simulator.simulator import Loop, Simulator

log = logging.getLogger(__name__)

CHUNK_ITERATIONS = 2_000
"""Iterations between two checks of a pair's cost."""


@dataclass(frozen=True)
class FixedPair:
    """A pair (c, n) and the cost of a whole run with it, summed over requests."""

    candidates: int
    token_budget: int
    cost: float


def best_fixed_pair(simulator: Simulator, grid: ActionGrid, prices: Prices, decision_s: float = 0.0) -> FixedPair:
    """The pair of the grid whose run of the loaded workload costs least; reloads the workload afterwards.

    A run is stopped as soon as it has been charged more than the best so far, because charges are never refunded. Ties
    go to fewer candidates, then to the larger budget.
    """
    nothing = np.zeros(0, dtype=ITERATION)
    workload = simulator.workloads[0]
    best: FixedPair | None = None
    for candidates in grid.candidate_choices:
        for token_budget in reversed(grid.budget_choices):
            simulator.load(0, workload)
            loop = simulator.loop(constant(candidates, token_budget), decision_s)
            more, cost = True, 0.0
            while more and (best is None or cost <= best.cost):
                _, more = loop(CHUNK_ITERATIONS, nothing)
                cost = charged(simulator.state, 0, prices)
            if not more and (best is None or cost < best.cost):
                best = FixedPair(candidates, token_budget, cost)
    simulator.load(0, workload)
    assert best is not None
    return best


@configured
class OracleGrid(PeekingController):
    """A bound: the cheapest fixed (c, n) for this workload, found in hindsight.

    Every pair of the grid serves the requests of the run, agreements included, and the pair with the lowest objective
    serves them again. This is the result of tuning a fixed setting on exactly the traffic to come; a controller below
    it gains from adapting. Only the objective counts: it already prices missed deadlines, and an additional attainment
    constraint would be a second, arbitrary price.

    The pair that was chosen is in the log and, as `candidates` and `token_budget`, in the run's summary.
    """

    _best: FixedPair | None = field(default=None, init=False, repr=False)

    @property
    def candidates(self) -> int | None:
        """c of the chosen pair; None before a run."""
        return self._best.candidates if self._best else None

    @property
    def token_budget(self) -> int | None:
        """n of the chosen pair; None before a run."""
        return self._best.token_budget if self._best else None

    def reset(self, plant: Plant) -> None:
        """Forget the chosen pair."""
        super().reset(plant)
        self._best = None

    def loop(self, simulator: Simulator, decision_s: float) -> Loop:
        """Try every pair on the loaded workload, then return the constant loop of the best. ValueError in mid-run."""
        check_unserved(simulator)
        grid = self.plant.grid
        self._best = best = best_fixed_pair(simulator, grid, self.prices, decision_s)
        log.info(
            "best fixed pair in hindsight: c=%d n=%d, objective %.4f, of %d pairs",
            best.candidates,
            best.token_budget,
            best.cost / simulator.workloads[0].num_requests,
            len(grid.candidate_choices) * len(grid.budget_choices),
        )
        return simulator.loop(constant(best.candidates, best.token_budget), decision_s)

    def label(self) -> str:
        """A label that does not depend on the chosen pair."""
        return "oracle grid (bound)"
