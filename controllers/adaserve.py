"""AdaServe: as many candidates as the hardware verifies at little cost, given first to the neediest requests."""

from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.telemetry import NUM_DECODES
from engine.latency.lookup import LookupGrid
from engine.plant import Plant
from engine.speculation.allocation import Speculation


class Params(NamedTuple):
    """candidates: (K,) choices of c, rising · verified_tokens, token_budget: as in `AdaServe`."""

    candidates: NDArray[np.int64]
    verified_tokens: float
    token_budget: int


@kernel
def decide(observation, i, params, memory):
    """(the largest c whose tokens fit the verification budget, n as configured)."""
    num_decodes = max(float(observation.load[i, NUM_DECODES]), 1.0)
    chosen = params.candidates[0]
    for k in range(params.candidates.shape[0]):
        if num_decodes * (1 + params.candidates[k]) <= params.verified_tokens:
            chosen = params.candidates[k]
    return chosen, params.token_budget


def cheap_tokens(grid: LookupGrid, slowdown: float) -> float:
    """Tokens of a forward without decodes at which it is predicted to take `slowdown` times as long as its shortest.

    Interpolated between the table's budgets; the last of them when none takes so long.
    """
    tokens, seconds = grid.prefill_tokens[1:].astype(np.float64), np.maximum.accumulate(grid.seconds[0, 0, 0, 1:])
    longest = slowdown * seconds[0]
    if longest >= seconds[-1]:
        return float(tokens[-1])
    return float(np.interp(longest, seconds, tokens))


@configured
class AdaServe(KernelController):
    """c = budget / B - 1 candidates a request, allocated by the need of each request's TPOT target.

    The engine selects: first, neediest requests first, as many candidates as are expected to bring each back to its
    TPOT target, A = (l + t) / tpot_target - o; then the most probable ones of the whole batch (`Speculation` with
    `allocation=slo`). Z. Li et al., "AdaServe: Accelerating Multi-SLO LLM Serving with SLO-Customized Speculative
    Decoding" (arXiv 2501.12162, sections 4 and 5). Its budget comes from profiling the hardware; here it comes from
    the predicted times.

    Args:
        tpot_target: target of every request, s per token.
        verified_tokens: most tokens verified in an iteration over all requests; None: those at which a forward is
            predicted to take `slowdown` times as long as its shortest.
        slowdown: see there.
        token_budget: n; AdaServe does not choose it.
    """

    decide = staticmethod(decide)

    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.05
    verified_tokens: Annotated[int, Field(ge=1)] | None = None
    slowdown: Annotated[float, Field(gt=1.0, allow_inf_nan=False)] = 1.5
    token_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 512

    def params(self, plant: Plant) -> Params:
        """The choices and the budgets."""
        tokens = self.verified_tokens
        return Params(
            candidates=np.sort(plant.grid.candidates),
            verified_tokens=float(tokens) if tokens is not None else cheap_tokens(plant.lookup.grid, self.slowdown),
            token_budget=self.token_budget,
        )

    @property
    def speculation(self) -> Speculation:
        """Candidates by need, then by probability."""
        return Speculation("slo", tpot_target=self.tpot_target)

    def label(self) -> str:
        """Label, for example `adaserve n=512`."""
        return f"adaserve n={self.token_budget}"
