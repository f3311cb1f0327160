"""Serves the same requests under one controller after another, to be compared by the objective."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NoReturn

import numpy as np
from numpy.typing import NDArray

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.objective import charged
from engine.latency.model import LatencyModel
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.workload import Workload
from runs import simulated
from runs.evaluation import Targets
from runs.simulated import Charge


class Playback:
    """The simulated engine with the requests of several seeds.

    `runs` counts the workloads served so far.
    """

    def __init__(
        self,
        engine: EngineConfig,
        latency: LatencyModel,
        workloads: Sequence[Workload],
        grid: ActionGrid,
        slo: Targets,
        charge: Charge,
    ) -> None:
        self.engine = engine
        self.latency = latency
        self.workloads = list(workloads)
        self.runs = 0
        self._plant = Plant(grid, _no_lookup)
        self._prices = slo.prices
        self._charge = charge
        self._simulators = [
            Simulator(engine, [workload], latency=latency, ttft_target=slo.ttft_target) for workload in workloads
        ]

    def objective(self, controller: Controller, at_most: float = np.inf) -> float:
        """Mean objective over the seeds; infinite as soon as it is sure to exceed `at_most`."""
        total = 0.0
        for simulator, workload in zip(self._simulators, self.workloads, strict=True):
            simulator.load(0, workload)
            served = simulated.serve(simulator, workload, controller, self._plant, self._charge)
            self.runs += 1
            total += charged(served.state, 0, self._prices) / workload.num_requests / len(self.workloads)
            if total > at_most:
                return np.inf
        return total

    def best_fixed(self, grid: ActionGrid) -> tuple[Fixed, float]:
        """The constant pair of the grid with the lowest objective over these seeds, and that objective."""
        best, lowest = Fixed(), np.inf
        for candidates in grid.candidate_choices:
            for token_budget in reversed(grid.budget_choices):
                pair = Fixed(candidates=candidates, token_budget=token_budget)
                found = self.objective(pair, lowest)
                if found < lowest:
                    best, lowest = pair, found
        return best, lowest

    def tokens_per_iteration(self, most: int) -> NDArray[np.float64]:
        """(most + 1,) G(c): tokens that c candidates give on average over the output positions of these requests."""
        run_length = np.concatenate([workload.run_length for workload in self.workloads])
        return np.array([1.0 + np.minimum(run_length, c).mean() for c in range(most + 1)])


def _no_lookup() -> NoReturn:
    raise RuntimeError("a schedule predicts nothing")
