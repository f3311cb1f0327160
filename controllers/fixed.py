"""The same c and n in every iteration: what every engine does out of the box."""

from collections.abc import Mapping

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from controllers.controller import CompiledController, configured
from engine.backends.simulator import CompiledLoop, Simulator
from engine.core.choices import check_action


@configured
class Fixed(CompiledController):
    """Always the same candidate count and token budget.

    Args:
        candidates: c, candidate tokens per decoding request.
        token_budget: n, prompt tokens per iteration.
    """

    candidates: int = 3
    token_budget: int = 512

    static = True

    @model_validator(mode="after")
    def _runnable(self) -> "Fixed":
        check_action(self.candidates, self.token_budget)
        return self

    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
        """The configured pair, whatever the load."""
        return self.candidates, self.token_budget

    def act(self, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.int64]:
        """The configured pair as indices; ActionError when it is off the environment's grid."""
        return self.plant.grid.action(self.candidates, self.token_budget)

    def loop(self, simulator: Simulator, decision_s: float) -> CompiledLoop:
        """The simulator's constant-action fast path."""
        return simulator.constant_loop(self.candidates, self.token_budget, decision_s)

    def label(self) -> str:
        """For example `fixed c=3 n=512`."""
        return f"fixed c={self.candidates} n={self.token_budget}"
