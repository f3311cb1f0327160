"""P-PAS: a small token budget while several prompts wait beside running decodes, a large one otherwise."""

from typing import Annotated, NamedTuple

from pydantic import Field

from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.total_budget import left_for_prompts
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import NUM_DECODES, NUM_WAITING
from engine.plant import Plant


class Params(NamedTuple):
    """`PPas`'s fields, for the kernel."""

    candidates: int
    contended_budget: int
    free_budget: int


@kernel
def decide(observation, i, params, memory):
    """(c, n), with the total chosen by whether several prompts wait beside running decodes."""
    num_decodes = int(observation.load[i, NUM_DECODES])
    contended = observation.load[i, NUM_WAITING] >= 2.0 and num_decodes > 0
    total = params.contended_budget if contended else params.free_budget
    return params.candidates, left_for_prompts(total, num_decodes, params.candidates)


@configured
class PPas(KernelController):
    """Two totals: one for iterations in which at least two prompts wait while requests decode, one for all others.

    Prefill-Pressure Adaptive Scheduling (T. Saemann, arXiv 2608.15171; vLLM RFC #52906), whose two totals are the
    defaults. A prompt in the middle of its prefill counts as one that waits.

    Args:
        contended_budget: tokens per iteration with at least two prompts and a decode.
        free_budget: tokens per iteration otherwise.
        candidates: c.
    """

    decide = staticmethod(decide)

    contended_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 2048
    free_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 16384
    candidates: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 0

    def params(self, plant: Plant) -> Params:
        """The configured totals and c."""
        return Params(self.candidates, self.contended_budget, self.free_budget)

    def label(self) -> str:
        """Label, for example `p_pas 2048/16384`."""
        return f"p_pas {self.contended_budget}/{self.free_budget}" + (
            f" c={self.candidates}" if self.candidates else ""
        )
