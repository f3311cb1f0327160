"""The reported objective: one number per run, used by rewards, oracles and the benchmark suite.

The mean over a run's requests of

    TPOT / tpot_target  +  violation * [TTFT > l]  +  lateness * max(0, TTFT - l) / l.

The scheduler charges every term as it accrues (`tpot_cost`, `violations` and `lateness` of an instance), so that the
objective can be read at any moment of a run.
"""

from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from engine.core.state import State

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Price = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]


class Prices(BaseModel):
    """Prices of the objective's terms.

    Args:
        tpot_target: TPOT in s that costs 1 per request.
        violation: cost of a missed TTFT deadline.
        lateness: cost of being late by one more `ttft_target`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    tpot_target: Positive = 0.05
    violation: Price = 2.0
    lateness: Price = 1.0

    def per_unit(self, ttft_target: float) -> NDArray[np.float64]:
        """(3,) cost of a second of summed TPOT, of a violation, and of a second of lateness against `ttft_target`."""
        return np.array([1.0 / self.tpot_target, self.violation, self.lateness / ttft_target])


def charges(state: State, i: int) -> NDArray[np.float64]:
    """(3,) seconds of TPOT, violations and seconds of lateness that instance `i` has been charged so far."""
    totals = state.totals[i]
    return np.array([totals["tpot_cost"], totals["violations"], totals["lateness"]])


def charged(state: State, i: int, prices: Prices) -> float:
    """Cost charged to instance `i` so far, summed over its requests."""
    return float(charges(state, i) @ prices.per_unit(float(state.limits["ttft_target"][i])))
