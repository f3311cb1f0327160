"""How good a policy is while it is trained: paired with `analytic` on workloads that training never draws."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from controllers.analytic import Analytic
from controllers.compiled import KernelController
from controllers.learned import Learned
from controllers.policy import Policy
from engine.simulator.simulator import Simulator
from engine.workload.workload import Workload
from runs.evaluation import Targets
from runs.learning.baseline import served
from runs.learning.scenarios import Scenario, TrainingEnv

FIRST_SEED = 1_000_000
"""Training draws workloads from seeds below `distinct_workloads`, validation from here on."""

MakeController = Callable[[Targets], KernelController]


@dataclass(frozen=True)
class Trial:
    """One workload served: mean TPOT in s, share of requests on time, objective."""

    tpot_s: float
    ttft_attainment: float
    objective: float


class Bench:
    """One engine, its validation workloads, and what `analytic` makes of them.

    Args:
        workloads: how many.
        reference: what a policy is compared with.
        first_seed: draws the first of them, the next number the next.
    """

    def __init__(
        self,
        scenario: Scenario,
        training: TrainingEnv,
        workloads: int,
        reference: MakeController,
        first_seed: int = FIRST_SEED,
    ) -> None:
        self._scenario = scenario
        self._drawn: list[Workload] = [scenario.workload.draw(first_seed + k) for k in range(workloads)]
        self._simulator = Simulator(scenario.engine, self._drawn[:1], ttft_target=scenario.slo.ttft_target)
        self._plant = training.plant(scenario)
        self.reference = self.trials(reference)

    def trials(self, make: MakeController) -> list[Trial]:
        """Serve every workload under a controller."""
        return [self._serve(workload, make(self._scenario.slo)) for workload in self._drawn]

    def _serve(self, workload: Workload, controller: KernelController) -> Trial:
        figures = served(self._simulator, workload, controller, self._plant, self._scenario.slo.prices)
        return Trial(figures["tpot_mean_s"], figures["ttft_attainment"], figures["objective"])


class Validation:
    """All scenarios' benches.

    Args:
        workloads: per scenario.
        reference: what a policy is compared with.
        first_seed: draws the first of them, the next number the next.
    """

    def __init__(
        self, training: TrainingEnv, workloads: int, reference: MakeController, first_seed: int = FIRST_SEED
    ) -> None:
        self._benches = [
            Bench(scenario, training, workloads, reference, first_seed) for scenario in training.scenarios.values()
        ]

    def figures(self, make: MakeController) -> dict[str, float]:
        """Means over all workloads, relative to the reference on the same requests.

        objective: ratio of objectives, lower is better · tpot: ratio of mean TPOT · attainment: difference in the share
        of requests on time, and in the worst scenario.
        """
        scenarios = [list(zip(bench.trials(make), bench.reference, strict=True)) for bench in self._benches]
        pairs = [pair for own in scenarios for pair in own]
        differences = [
            np.mean([ours.ttft_attainment - theirs.ttft_attainment for ours, theirs in own]) for own in scenarios
        ]
        return {
            "objective_ratio": float(np.mean([ours.objective / theirs.objective for ours, theirs in pairs])),
            "tpot_ratio": float(np.nanmean([ours.tpot_s / theirs.tpot_s for ours, theirs in pairs])),
            "attainment_difference": float(np.mean(differences)),
            "attainment_difference_worst": float(np.min(differences)),
            "tpot_s": float(np.nanmean([ours.tpot_s for ours, _ in pairs])),
            "ttft_attainment": float(np.mean([ours.ttft_attainment for ours, _ in pairs])),
        }


def reference(slo: Targets) -> Analytic:
    """`analytic` with a scenario's targets."""
    return Analytic(ttft_target=slo.ttft_target)


def serving(policy: Policy) -> MakeController:
    """The policy as a controller with a scenario's targets."""
    return lambda slo: Learned.of(policy, slo.ttft_target, slo.tpot_target)
