"""N simulated engines stepped together: the one implementation behind the single and the vector environment."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.config import EngineConfig
from engine.core.state import State
from engine.core.telemetry import Observation, observe
from engine.simulator.loop import run_iteration
from engine.simulator.simulator import Simulator
from engine.workload.source import WorkloadSource
from engine.workload.workload import Workload
from envs.episodes import Episodes, Given, Origin
from envs.real import runs_for_real
from envs.reward import TERMS, unfinished_cost


@kernel
def _step_all(system, seen, candidates, budgets, decision_s, decide_every, prices, observation, costs, drained):
    """One decision in every engine: up to `decide_every` iterations, their costs, then the telemetry."""
    state = system.state
    for e in range(candidates.shape[0]):
        totals = state.totals[e]
        tpot_cost = totals.tpot_cost
        violations = totals.violations
        lateness = totals.lateness
        more = True
        for iteration in range(decide_every):
            charge = decision_s if iteration == 0 else 0.0
            more = run_iteration(system, e, candidates[e], budgets[e], charge)
            if not more:
                break
        costs[e, 0] = (totals.tpot_cost - tpot_cost) * prices[0]
        costs[e, 1] = (totals.violations - violations) * prices[1]
        costs[e, 2] = (totals.lateness - lateness) * prices[2]
        drained[e] = not more
        observe(state, e, seen, observation)


class ServingBatch(Episodes):
    """N simulated engines with episodes.

    Args are those of `envs.serving.ServingEnv`.
    """

    def __init__(self, num_envs: int, *, engine: str | EngineConfig = "vicuna_7b_a100", **settings: Any) -> None:
        super().__init__(num_envs, engine=engine, **settings)
        if runs_for_real(engine):
            raise ValueError(
                f"engine={engine if isinstance(engine, str) else engine.name} runs for real and cannot be "
                "batched: step it with gymnasium.make('governor/Serving-v0', engine=...); make_vec takes simulated ones"
            )
        if isinstance(engine, str):
            engine = EngineConfig(name=engine, latency=engine, tpot_target=self.prices.tpot_target)
        self.config = engine
        self._origins: dict[int, Origin] = {}
        self._latency = self.config.true_latency()
        self._simulator: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The engines; RuntimeError before the first reset."""
        if self._simulator is None:
            raise RuntimeError("call reset() before anything else")
        return self._simulator

    @property
    def state(self) -> State:
        return self.simulator.state

    def arrived(self, e: int) -> NDArray[np.void]:
        return self.simulator.arrived(e)

    def new_observation(self) -> Observation:
        return self.simulator.new_observation()

    def _make(self, source: WorkloadSource | Given, seed: int) -> Workload:
        if isinstance(source, WorkloadSource):
            return source.draw(seed)
        assert isinstance(source, Workload)
        return source

    def reset(
        self, envs: Sequence[int], rngs: Sequence[np.random.Generator], workloads: Sequence[Given] | None = None
    ) -> None:
        self._load(envs, self._origins_of(rngs, workloads))
        self.decisions[list(envs)] = 0

    def _load(self, envs: Sequence[int], origins: Sequence[Origin]) -> None:
        drawn = [self._made(origin) for origin in origins]
        if self._simulator is None:
            if len(drawn) != self.num_envs:
                raise RuntimeError("the first reset must be of all environments")
            self._simulator = Simulator(
                self.config,
                drawn,
                ttft_target=self.ttft_target,
                latency=self._latency,
                queue_rows=self.queue_rows,
                max_candidates=self.max_candidates,
            )
        else:
            for e, workload in zip(envs, drawn, strict=True):
                self._simulator.load(e, workload)
        for e, origin in zip(envs, origins, strict=True):
            self._origins[e] = origin

    def snapshot(self) -> dict[str, Any]:
        """Picklable state of every episode, from which a batch of the same settings continues with `restore`.

        Drawn workloads are stored as their source and seed.
        """
        return {
            "origins": dict(self._origins),
            "decisions": self.decisions.copy(),
            "simulator": self.simulator.snapshot(),
        }

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continue from a `snapshot` of a batch of the same settings, bit for bit."""
        self._load(range(self.num_envs), [snapshot["origins"][e] for e in range(self.num_envs)])
        self.decisions[:] = snapshot["decisions"]
        self.simulator.restore(snapshot["simulator"])

    def observe(self, envs: Sequence[int], observation: Observation) -> None:
        for e in envs:
            self.simulator.observe(e, observation)

    def step(self, actions: NDArray[np.int64]) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_]]:
        """See `Episodes.step`: every environment's next iteration, all at once."""
        simulator = self.simulator
        self._check_actions(actions)
        observation = simulator.new_observation()
        over = np.zeros(self.num_envs, dtype=np.bool_)
        costs = np.zeros((self.num_envs, len(TERMS)))
        _step_all(
            simulator.system,
            simulator.seen,
            self._values[0][actions[:, 0]],
            self._values[1][actions[:, 1]],
            self.decision_s,
            self.decide_every,
            self._unit_prices,
            observation,
            costs,
            over,
        )
        self.decisions += 1
        if self._may_cut:
            cut = (simulator.state.instances["now"] >= self.episode_s) | (self.decisions >= self.episode_decisions)
            for e in np.flatnonzero(cut & ~over):
                costs[e, 3] = unfinished_cost(simulator.state, int(e), simulator.arrived(int(e)), self.prices)
                over[e] = True
        return observation, costs, over
