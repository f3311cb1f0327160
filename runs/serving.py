"""What simulated and real runs have in common: how a controller is asked, and what serving leaves."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from controllers.controller import Controller
from engine.backends.guard import check_decision
from engine.core.choices import ActionError
from engine.core.state import State
from engine.simulator.loop import ITERATION

Progress = Callable[[int, int], Any]
"""Called now and then with (requests finished, requests in total)."""

NO_ITERATIONS = np.zeros(0, dtype=ITERATION)


@dataclass(frozen=True)
class Served:
    """A workload served to its end."""

    state: State
    requests: NDArray[np.void]
    """REQUEST rows, in order of arrival."""
    iterations: NDArray[np.void]
    """ITERATION rows; empty unless they were recorded."""
    wall_s: float
    """Seconds it took."""
    decision_s: NDArray[np.float64]
    """Seconds of each decision, or of a sample of them."""


@dataclass(frozen=True)
class Overload:
    """Arrivals beyond what was served: requests/s of both, and seconds that requests waited to be admitted."""

    arrived_rps: float
    served_rps: float
    wait_s: float
    last_wait_s: float
    """Of the last tenth of the requests."""

    def __str__(self) -> str:
        return (
            f"overloaded: {self.arrived_rps:.3g} requests/s arrived and {self.served_rps:.3g} were served; they waited "
            f"{self.wait_s:.3g} s on average to be admitted, the last tenth {self.last_wait_s:.3g} s"
        )


def overload(requests: Mapping[str, NDArray[Any]], ttft_target: float) -> Overload | None:
    """The overload in a finished run's request columns (`request_table`); None where there is none.

    A run is overloaded when its last requests wait longer for admission than a request then takes, or when fewer than
    half meet `ttft_target` (s) and waiting is why.
    """
    arrival, admitted = requests["arrival_s"], requests["admitted_s"]
    wait = admitted - arrival
    service = float(np.nanmean(requests["finish_s"] - admitted))
    mean, last = float(wait.mean()), float(wait[-max(1, len(wait) // 10) :].mean())
    attained = float(np.mean(requests["ttft_s"] <= ttft_target))
    growing = last > max(service, ttft_target)
    starved = attained < 0.5 and mean > max(0.1 * service, ttft_target)
    if not growing and not starved:
        return None
    arriving, serving = float(arrival[-1] - arrival[0]), float(np.nanmax(requests["finish_s"]) - arrival[0])
    return Overload((len(wait) - 1) / arriving if arriving > 0 else float("inf"), len(wait) / serving, mean, last)


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
