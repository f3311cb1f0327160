"""Common base of the bounds: clairvoyant policies, which read the workload and run only on the simulator."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Annotated, NoReturn

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.controller import Controller, configured
from engine.core.objective import Price, Prices
from engine.simulator.simulator import Loop, Simulator


class PeekingError(ValueError):
    """A bound was used to control an engine whose future it does not know."""


@configured
class PeekingController(Controller):
    """A clairvoyant policy: a reference for comparisons, not for serving.

    Its decisions take no time on the simulated clock. It minimises the objective (`engine.core.objective`) with the
    run's own `ttft_target` and these prices, which must be those of the report for the bound to be valid.

    Args:
        tpot_target: TPOT in s that costs 1 per request.
        violation: cost of a missed TTFT deadline.
        lateness: cost of being late by one more `ttft_target`.
    """

    peeks = True

    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = Prices().tpot_target
    violation: Price = Prices().violation
    lateness: Price = Prices().lateness

    @abstractmethod
    def loop(self, simulator: Simulator, decision_s: float) -> Loop:
        """A loop for `Simulator.run_to_end` that serves the loaded workload, each decision charged `decision_s`."""

    @property
    def prices(self) -> Prices:
        """Prices of the objective."""
        return Prices(tpot_target=self.tpot_target, violation=self.violation, lateness=self.lateness)

    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> NoReturn:
        """Raise PeekingError: telemetry does not contain the future."""
        raise PeekingError(
            f"{self.label()} is a bound, not a controller: it reads the whole workload in advance, which an "
            "observation does not contain. Run it with python -m runs.evaluate on a simulated engine; in an "
            "environment or on a real engine use a controller, such as controller=analytic or mpc"
        )

    def act(self, observation: Mapping[str, NDArray[np.float32]]) -> NoReturn:
        """Raise PeekingError, as `choose` does."""
        self.choose(observation)


def check_unserved(simulator: Simulator) -> None:
    """A bound plans a run from its beginning; ValueError when the simulator is in the middle of one."""
    iterations = int(simulator.state.totals["iterations"][0])
    if iterations > 0:
        raise ValueError(
            f"a bound plans a run from its beginning, and this simulator has already run {iterations} iterations: "
            "load the workload again first"
        )
