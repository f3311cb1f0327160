"""Sarathi-Serve: stall-free batches under one fixed budget that decodes and prompt chunks share."""

from typing import Annotated, NamedTuple

from pydantic import Field

from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.total_budget import left_for_prompts
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import NUM_DECODES
from engine.plant import Plant
from engine.policy import Policy


class Params(NamedTuple):
    """`Sarathi`'s fields, for the kernel."""

    candidates: int
    total_budget: int


@kernel
def decide(observation, i, params, memory):
    """(c, the total less the tokens of the decoding requests)."""
    num_decodes = int(observation.load[i, NUM_DECODES])
    return params.candidates, left_for_prompts(params.total_budget, num_decodes, params.candidates)


def total(total_budget: int, candidates: int = 0) -> Policy:
    """The policy of one total of tokens per iteration, and one c."""
    return Policy(decide, Params(candidates, total_budget))


@configured
class Sarathi(KernelController):
    """A fixed total of tokens per iteration; prompts get the rest after the decodes.

    Sarathi-Serve (Agrawal et al., OSDI 2024, section 4.3) uses 512 for a strict and 2,048 for a relaxed TBT target.
    Its budget counts decode tokens, so n = total - B (1 + c).

    Args:
        total_budget: tokens per iteration over decodes, candidates and prompt chunks.
        candidates: c; Sarathi-Serve itself does not speculate.
    """

    total_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 512
    candidates: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 0

    static = True
    decide = staticmethod(decide)

    def params(self, plant: Plant) -> Params:
        """The configured total and c."""
        return Params(self.candidates, self.total_budget)

    def label(self) -> str:
        """Label, for example `sarathi 512`."""
        return f"sarathi {self.total_budget}" + (f" c={self.candidates}" if self.candidates else "")
