"""N simulated engines stepped together: the one implementation behind the single and the vector environment."""

from collections.abc import Sequence
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.simulator import Simulator, run_iteration
from engine.compiled import kernel
from engine.config import EngineConfig
from engine.core.action import ActionError, ActionGrid
from engine.core.objective import Prices
from engine.core.state import State
from engine.core.telemetry import Observation, observe
from engine.workload.agreement import DrafterAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.source import SyntheticSource, WorkloadSource
from engine.workload.workload import Workload
from envs.reward import TERMS, episode_summary, unfinished_cost

LARGEST_SEED = 2**31 - 1

Origin = tuple[WorkloadSource | Workload, int]
"""Where an episode's workload comes from: a source and the seed it was drawn with, or the workload itself."""


def default_workload() -> WorkloadSource:
    """Poisson arrivals at 4 requests/s with ShareGPT lengths, 200 requests an episode."""
    return SyntheticSource(
        arrivals=PoissonArrivals(rate=4.0),
        lengths=NamedLengths(name="sharegpt"),
        agreement=DrafterAgreement(),
        num_requests=200,
        name="poisson_sharegpt",
    )


@kernel
def _step_all(state, tables, draws, candidates, budgets, decision_s, decide_every, prices, observation, costs, drained):
    """One decision in every engine: up to `decide_every` iterations, what they cost, then the telemetry."""
    for e in range(candidates.shape[0]):
        engine = state.engines[e]
        tpot_cost = engine.tpot_cost
        violations = engine.violations
        lateness = engine.lateness
        more = True
        for iteration in range(decide_every):
            charge = decision_s if iteration == 0 else 0.0
            more = run_iteration(state, e, tables, draws, candidates[e], budgets[e], charge)
            if not more:
                break
        costs[e, 0] = (engine.tpot_cost - tpot_cost) * prices[0]
        costs[e, 1] = (engine.violations - violations) * prices[1]
        costs[e, 2] = (engine.lateness - lateness) * prices[2]
        drained[e] = not more
        observe(state, e, observation)


def _check_whole(**settings: Any) -> None:
    for name, value in settings.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def _check_seconds(name: str, value: Any, above_zero: bool) -> None:
    number = isinstance(value, int | float | np.number) and bool(np.isfinite(value))
    if not number or value < 0.0 or (above_zero and value == 0.0):
        raise ValueError(f"{name}={value!r} must be a number of seconds {'above' if above_zero else 'of at least'} 0")


def _check_type(name: str, value: Any, *kinds: type) -> None:
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
        raise ValueError(f"{name}={value!r} must be of type {expected}")


def refuse_rendering(render_mode: str | None) -> None:
    """ValueError for any render mode but None."""
    if render_mode is not None:
        raise ValueError(f"render_mode={render_mode!r}: this environment has nothing to render, leave it None")


def given_workload(options: dict[str, Any] | None) -> Workload | None:
    """The workload in a reset's options, if any; ValueError for options that do not exist."""
    unknown = sorted(set(options or {}) - {"workload"})
    if unknown:
        raise ValueError(f"reset(options=...) knows 'workload' only, got {', '.join(map(repr, unknown))}")
    return (options or {}).get("workload")


class ServingBatch:
    """N engines with episodes: actions in, telemetry and costs out.

    Args are those of `envs.serving.ServingEnv`.
    """

    def __init__(
        self,
        num_envs: int,
        *,
        engine: str | EngineConfig = "vicuna_7b_a100",
        workload: WorkloadSource | Workload | None = None,
        ttft_target: float = 1.0,
        prices: Prices | None = None,
        grid: ActionGrid | None = None,
        queue_rows: int = 64,
        decide_every: int = 1,
        decision_s: float = 20e-6,
        episode_s: float | None = None,
        episode_decisions: int | None = None,
        distinct_workloads: int | None = 64,
    ) -> None:
        _check_whole(num_envs=num_envs, queue_rows=queue_rows, decide_every=decide_every)
        if episode_s is not None:
            _check_seconds("episode_s", episode_s, above_zero=True)
        if episode_decisions is not None:
            _check_whole(episode_decisions=episode_decisions)
        if distinct_workloads is not None:
            _check_whole(distinct_workloads=distinct_workloads)
        _check_seconds("ttft_target", ttft_target, above_zero=True)
        _check_seconds("decision_s", decision_s, above_zero=False)
        _check_type("engine", engine, str, EngineConfig)
        _check_type("workload", workload, WorkloadSource, Workload, NoneType)
        _check_type("prices", prices, Prices, NoneType)
        _check_type("grid", grid, ActionGrid, NoneType)
        self.num_envs = num_envs
        self.config = EngineConfig(name=engine, latency=engine) if isinstance(engine, str) else engine
        self.source = workload if workload is not None else default_workload()
        self.prices = prices if prices is not None else Prices()
        self.grid = grid if grid is not None else ActionGrid()
        self.queue_rows = queue_rows
        self.max_candidates = max(self.grid.candidate_choices)
        self.decide_every = decide_every
        self.decision_s = decision_s
        self.episode_s = np.inf if episode_s is None else episode_s
        self.episode_decisions = np.inf if episode_decisions is None else episode_decisions
        self.ttft_target = ttft_target
        self.distinct_workloads = distinct_workloads
        self.decisions = np.zeros(num_envs, dtype=np.int64)
        self._choices = np.array([len(self.grid.candidate_choices), len(self.grid.budget_choices)])
        self._values = (self.grid.candidates, self.grid.budgets)
        self._may_cut = bool(np.isfinite(self.episode_s) or np.isfinite(self.episode_decisions))
        self._unit_prices = self.prices.per_unit(ttft_target)
        self._drawn: dict[int, Workload] = {}
        self._origins: dict[int, Origin] = {}
        self._latency = self.config.true_latency()
        self._simulator: Simulator | None = None

    @property
    def simulator(self) -> Simulator:
        """The engines; RuntimeError before the first reset."""
        if self._simulator is None:
            raise RuntimeError("call reset() before anything else")
        return self._simulator

    def draws_from(self, source: WorkloadSource) -> None:
        """Draw the workloads of coming episodes from another source; episodes that have begun go on."""
        self.source = source
        self._drawn.clear()

    def _draw(self, rng: np.random.Generator) -> Origin:
        if isinstance(self.source, Workload):
            return self.source, 0
        return self.source, int(
            rng.integers(LARGEST_SEED if self.distinct_workloads is None else self.distinct_workloads)
        )

    def _workload(self, origin: Origin) -> Workload:
        source, seed = origin
        if isinstance(source, Workload):
            return source
        if self.distinct_workloads is None or source != self.source:
            return source.draw(seed)
        if seed not in self._drawn:
            self._drawn[seed] = source.draw(seed)
        return self._drawn[seed]

    def reset(
        self, envs: Sequence[int], rngs: Sequence[np.random.Generator], workloads: Sequence[Workload] | None = None
    ) -> None:
        """Begin a new episode in each of `envs`, with a workload drawn from its generator or given."""
        if workloads is not None:
            for workload in workloads:
                _check_type("options['workload']", workload, Workload)
            origins: list[Origin] = [(workload, 0) for workload in workloads]
        else:
            origins = [self._draw(rng) for rng in rngs]
        self._load(envs, origins)
        self.decisions[list(envs)] = 0

    def _load(self, envs: Sequence[int], origins: Sequence[Origin]) -> None:
        drawn = [self._workload(origin) for origin in origins]
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
        """Where every episode is, to be pickled: a batch of the same settings goes on from there with `restore`.

        Workloads that were drawn are kept as their source and seed.
        """
        state = State(*(array.copy() for array in self.simulator.state))  # type: ignore[arg-type]  # as they are
        return {"origins": dict(self._origins), "decisions": self.decisions.copy(), "state": state}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take up a `snapshot` of a batch of the same settings, bit for bit."""
        self._load(range(self.num_envs), [snapshot["origins"][e] for e in range(self.num_envs)])
        self.decisions[:] = snapshot["decisions"]
        self.simulator.state = snapshot["state"]

    def observe(self, envs: Sequence[int], observation: Observation) -> None:
        """Write the telemetry of `envs` into their rows of `observation`."""
        for e in envs:
            self.simulator.observe(e, observation)

    def step(self, actions: NDArray[np.int64]) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_]]:
        """One decision in every engine.

        Args:
            actions: (N, 2) indices of c and n.

        Returns fresh telemetry arrays, the costs of this decision (N, len(TERMS)), and which episodes are over (N,).
        """
        simulator = self.simulator
        if actions.shape != (self.num_envs, 2) or actions.dtype.kind not in "iu":
            raise ActionError(
                f"actions must be integers of shape ({self.num_envs}, 2): the indices of c and n, got "
                f"{actions.dtype} of shape {actions.shape}"
            )
        if (actions < 0).any() or (actions >= self._choices).any():
            row = int(((actions < 0) | (actions >= self._choices)).any(axis=1).argmax())
            self.grid.values(actions[row])
        observation = simulator.new_observation()
        over = np.zeros(self.num_envs, dtype=np.bool_)
        costs = np.zeros((self.num_envs, len(TERMS)))
        _step_all(
            simulator.state,
            simulator.latency.tables,
            simulator.draws,
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
            cut = (simulator.state.engines["now"] >= self.episode_s) | (self.decisions >= self.episode_decisions)
            for e in np.flatnonzero(cut & ~over):
                costs[e, 3] = unfinished_cost(simulator.state, int(e), self.prices)
                over[e] = True
        return observation, costs, over

    def summary(self, e: int) -> dict[str, Any]:
        """The reported figures of engine `e`'s episode."""
        return episode_summary(self.simulator.state, e, self.prices)
