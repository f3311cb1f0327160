"""Sarathi-Serve: stall-free batches under one fixed budget that decodes and prompt chunks share."""

from collections.abc import Mapping
from typing import Annotated

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.controller import CompiledController, configured
from engine.backends.simulator import CompiledLoop, Simulator, log_iteration, run_iteration
from engine.compiled import kernel
from engine.core.action import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import NUM_DECODES


@kernel
def _run(state, tables, run_lengths, candidates, total, decision_s, max_iterations, log):
    recording = len(log) > 0
    for row in range(max_iterations):
        num_decodes = state.engines[0].num_decoding
        budget = max(total - num_decodes * (1 + candidates), 0 if num_decodes > 0 else 1)
        more = run_iteration(state, 0, tables, run_lengths, candidates, budget, decision_s)
        if recording:
            log_iteration(state, 0, log, row)
        if not more:
            return row + 1, False
    return max_iterations, True


@configured
class Sarathi(CompiledController):
    """A fixed total of tokens per iteration; prompts get what the decodes leave.

    Sarathi-Serve (Agrawal et al., OSDI 2024, section 4.3) uses 512 for a strict and 2,048 for a relaxed TBT target.
    Its budget counts decode tokens, so n = total - B (1 + c).

    Args:
        total_budget: tokens per iteration over decodes, candidates and prompt chunks.
        candidates: c; Sarathi-Serve itself does not speculate.
    """

    total_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 512
    candidates: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 0

    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
        """(c, what the decoding requests leave of the total)."""
        num_decodes = int(observation["load"][NUM_DECODES])
        left = self.total_budget - num_decodes * (1 + self.candidates)
        return self.candidates, max(left, 0 if num_decodes > 0 else 1)

    def loop(self, simulator: Simulator, decision_s: float) -> CompiledLoop:
        """The compiled loop with the exact leftover budget, on or off any grid."""

        def loop(max_iterations: int, log: NDArray[np.void]) -> tuple[int, bool]:
            return _run(
                simulator.state,
                simulator.latency.tables,
                simulator.run_lengths,
                self.candidates,
                self.total_budget,
                decision_s,
                max_iterations,
                log,
            )

        return loop

    def label(self) -> str:
        """For example `sarathi 512`."""
        return f"sarathi {self.total_budget}" + (f" c={self.candidates}" if self.candidates else "")
