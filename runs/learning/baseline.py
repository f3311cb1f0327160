"""What `analytic` is charged on a workload: the yardstick of rewards."""

from dataclasses import dataclass

from controllers.analytic import Analytic
from engine.backends.simulator import Simulator
from engine.core.objective import Prices
from engine.plant import Plant
from engine.workload.workload import Workload
from envs.reward import episode_summary


@dataclass(frozen=True)
class Charged:
    """A served workload: mean objective per request, s of its first arrival and from there, requests, how many late."""

    objective: float
    begin_s: float
    duration_s: float
    requests: int
    missed: float

    @property
    def per_second(self) -> float:
        """What is charged per s on the engine's clock."""
        return self.objective * self.requests / self.duration_s


class Baseline:
    """Serves workloads under `analytic`, each once.

    Args:
        simulator: one engine, whose workload is replaced.
    """

    def __init__(self, simulator: Simulator, plant: Plant, prices: Prices, ttft_target: float) -> None:
        self._simulator = simulator
        self._plant = plant
        self._prices = prices
        self._controller = Analytic(ttft_target=ttft_target)
        self._known: dict[str, Charged] = {}

    def of(self, workload: Workload) -> Charged:
        """What `analytic` is charged for it."""
        if workload.digest not in self._known:
            self._known[workload.digest] = self._serve(workload)
        return self._known[workload.digest]

    def _serve(self, workload: Workload) -> Charged:
        self._simulator.load(0, workload)
        self._controller.reset(self._plant)
        loop = self._controller.loop(self._simulator, self._controller.decision_s)
        self._simulator.run_to_end(loop)
        begin_s = float(workload.arrival[0])
        summary = episode_summary(self._simulator.state, 0, self._prices)
        return Charged(
            objective=summary["objective"],
            begin_s=begin_s,
            duration_s=max(summary["duration_s"] - begin_s, 1e-9),
            requests=workload.num_requests,
            missed=(1.0 - summary["ttft_attainment"]) * workload.num_requests,
        )
