"""What `analytic` is charged on a workload: the yardstick of rewards."""

from dataclasses import dataclass

from controllers.analytic import Analytic
from controllers.compiled import KernelController
from engine.core.objective import Prices
from engine.plant import Plant
from engine.simulator.simulator import Simulator
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


def served(
    simulator: Simulator, workload: Workload, controller: KernelController, plant: Plant, prices: Prices
) -> dict[str, float]:
    """The figures of a workload served to its end under a controller (`envs.reward.episode_summary`)."""
    simulator.load(0, workload)
    controller.reset(plant)
    simulator.run_to_end(simulator.loop(controller.current, controller.decision_s))
    return episode_summary(simulator.state, 0, simulator.arrived(), prices)


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
        summary = served(self._simulator, workload, self._controller, self._plant, self._prices)
        begin_s = float(workload.arrival[0])
        return Charged(
            objective=summary["objective"],
            begin_s=begin_s,
            duration_s=max(summary["duration_s"] - begin_s, 1e-9),
            requests=workload.num_requests,
            missed=(1.0 - summary["ttft_attainment"]) * workload.num_requests,
        )
