"""The same c and n in every iteration, the default of every engine."""

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import model_validator

from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.choices import check_action
from engine.core.telemetry import look_away
from engine.plant import Plant
from engine.policy import Policy


class Params(NamedTuple):
    """`Fixed`'s fields, for the kernel."""

    candidates: int
    token_budget: int


@kernel
def decide(observation, i, params, memory):
    """Return the configured pair, whatever the load."""
    return params.candidates, params.token_budget


def constant(candidates: int, token_budget: int) -> Policy:
    """The policy of one pair (c, n)."""
    return Policy(decide, Params(candidates, token_budget), look=look_away)


@configured
class Fixed(KernelController):
    """A constant candidate count and token budget.

    Args:
        candidates: c, candidate tokens per decoding request.
        token_budget: n, prompt tokens per iteration.
    """

    decide = staticmethod(decide)
    look = staticmethod(look_away)

    candidates: int = 3
    token_budget: int = 512

    static = True

    @model_validator(mode="after")
    def _runnable(self) -> "Fixed":
        check_action(self.candidates, self.token_budget)
        return self

    def params(self, plant: Plant) -> Params:
        """The configured pair."""
        return Params(self.candidates, self.token_budget)

    def act(self, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.int64]:
        """The configured pair as indices; ActionError when it is off the environment's grid."""
        return self.plant.grid.action(self.candidates, self.token_budget)

    def label(self) -> str:
        """Label, for example `fixed c=3 n=512`."""
        return f"fixed c={self.candidates} n={self.token_budget}"
