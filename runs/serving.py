"""What simulated and real runs have in common: how a controller is asked, and what serving leaves."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controllers.controller import Controller
from engine.backends.guard import check_decision
from engine.backends.simulator import ITERATION
from engine.core.choices import ActionError
from engine.core.state import State

Progress = Callable[[int, int], Any]
"""Called now and then with (requests finished, requests in total)."""

NO_ITERATIONS = np.zeros(0, dtype=ITERATION)


@dataclass(frozen=True)
class Served:
    """A workload served to its end."""

    state: State
    iterations: NDArray[np.void]
    """ITERATION rows; empty unless they were recorded."""
    wall_s: float
    """Seconds it took."""
    decision_s: NDArray[np.float64]
    """Seconds of each decision, or of a sample of them."""


def decision_times(seconds: NDArray[np.float64]) -> dict[str, float]:
    """Mean, p50 and p99 of decisions' seconds, as a summary has them."""
    return {
        "decision_time_mean_s": float(seconds.mean()) if seconds.size else float("nan"),
        "decision_time_p50_s": float(np.percentile(seconds, 50)) if seconds.size else float("nan"),
        "decision_time_p99_s": float(np.percentile(seconds, 99)) if seconds.size else float("nan"),
    }


def decide(controller: Controller, view: dict[str, Any], decoding: int) -> tuple[int, int, float]:
    """(c, n, seconds it took) that the controller chooses for an engine with so many decoding requests.

    Raises:
        ActionError: no engine can run this choice, or would stand still with it.
    """
    begin = time.perf_counter()
    chosen = controller.choose(view)
    seconds = time.perf_counter() - begin
    try:
        candidates, token_budget = check_decision(chosen, decoding)
    except ActionError as error:
        raise ActionError(f"{controller.label()} answered nonsense: {error}") from error
    return candidates, token_budget, seconds
