"""Common base of episodes on simulated and on real engines: settings, sources of workloads, actions."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from types import NoneType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.real_config import RealEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.choices import ActionError
from engine.core.objective import Prices
from engine.core.state import State
from engine.core.telemetry import Observation
from engine.workload.agreement import DrafterAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.prompts import Prompts
from engine.workload.source import SyntheticSource, WorkloadSource
from engine.workload.workload import Workload
from envs.named import named_workload
from envs.reward import episode_summary

LARGEST_SEED = 2**31 - 1

RENDER_MODES = ["rgb_array"]

Given = Workload | Prompts
"""Requests that are served as given; a simulated engine only takes a workload."""

Origin = tuple[WorkloadSource | Given, int]
"""Origin of an episode's requests: a source and a seed, or the requests themselves."""


def default_workload() -> WorkloadSource:
    """Poisson arrivals at 2 requests/s with ShareGPT lengths, 200 requests an episode.

    The default engine serves them on time under good decisions only; at twice the rate no decisions suffice.
    """
    return SyntheticSource(
        arrivals=PoissonArrivals(rate=2.0),
        lengths=NamedLengths(name="sharegpt"),
        agreement=DrafterAgreement(),
        num_requests=200,
        name="poisson_sharegpt",
    )


def check_whole(**settings: Any) -> None:
    for name, value in settings.items():
        if not isinstance(value, int | np.integer) or value < 1:
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def check_seconds(name: str, value: Any, above_zero: bool) -> None:
    number = isinstance(value, int | float | np.number) and bool(np.isfinite(value))
    if not number or value < 0.0 or (above_zero and value == 0.0):
        raise ValueError(f"{name}={value!r} must be a number of seconds {'above' if above_zero else 'of at least'} 0")


def check_type(name: str, value: Any, *kinds: type) -> None:
    if not isinstance(value, kinds):
        expected = " or ".join(kind.__name__ for kind in kinds if kind is not NoneType)
        raise ValueError(f"{name}={value!r} must be of type {expected}")


def check_render_mode(render_mode: str | None) -> None:
    """Raise ValueError for an unknown render mode."""
    if render_mode not in (None, *RENDER_MODES):
        raise ValueError(f"render_mode={render_mode!r} must be None or one of {', '.join(map(repr, RENDER_MODES))}")


def _prices(prices: Prices | None, tpot_target: float | None) -> Prices:
    """The prices with this TPOT target; ValueError when they set a different one."""
    prices = prices if prices is not None else Prices()
    if tpot_target is None or tpot_target == prices.tpot_target:
        return prices
    if "tpot_target" in prices.model_fields_set:
        raise ValueError(f"tpot_target={tpot_target} and prices.tpot_target={prices.tpot_target} differ: give one")
    return prices.model_copy(update={"tpot_target": float(tpot_target)})


def given_workload(options: Mapping[str, Any] | None) -> Given | None:
    """The workload in a reset's options, if any; ValueError for options that do not exist."""
    unknown = sorted(set(options or {}) - {"workload"})
    if unknown:
        raise ValueError(f"reset(options=...) knows 'workload' only, got {', '.join(map(repr, unknown))}")
    return (options or {}).get("workload")


class Episodes(ABC):
    """N engines with episodes: actions in, telemetry and costs out.

    Args are those of `envs.serving.ServingEnv`.
    """

    takes: tuple[type, ...] = (Workload,)
    """Requests that can be given."""

    def __init__(
        self,
        num_envs: int,
        *,
        engine: str | EngineConfig | RealEngineConfig = "vicuna_7b_a100",
        workload: str | WorkloadSource | Given | None = None,
        ttft_target: float = 1.0,
        tpot_target: float | None = None,
        prices: Prices | None = None,
        grid: ActionGrid | None = None,
        queue_rows: int = 64,
        decide_every: int = 1,
        decision_s: float = 20e-6,
        episode_s: float | None = None,
        episode_decisions: int | None = None,
        distinct_workloads: int | None = 64,
    ) -> None:
        check_whole(num_envs=num_envs, queue_rows=queue_rows, decide_every=decide_every)
        if episode_s is not None:
            check_seconds("episode_s", episode_s, above_zero=True)
        if episode_decisions is not None:
            check_whole(episode_decisions=episode_decisions)
        if distinct_workloads is not None:
            check_whole(distinct_workloads=distinct_workloads)
        check_seconds("ttft_target", ttft_target, above_zero=True)
        if tpot_target is not None:
            check_seconds("tpot_target", tpot_target, above_zero=True)
        check_seconds("decision_s", decision_s, above_zero=False)
        check_type("engine", engine, str, EngineConfig, RealEngineConfig)
        check_type("workload", workload, str, WorkloadSource, *self.takes, NoneType)
        check_type("prices", prices, Prices, NoneType)
        check_type("grid", grid, ActionGrid, NoneType)
        self.num_envs = num_envs
        if isinstance(workload, str):
            workload = named_workload(workload)
        self.source = workload if workload is not None else default_workload()
        self.prices = _prices(prices, tpot_target)
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
        self._drawn: dict[int, Any] = {}

    def draws_from(self, source: WorkloadSource) -> None:
        """Draw the workloads of coming episodes from another source; running episodes continue."""
        self.source = source
        self._drawn.clear()

    def _draw(self, rng: np.random.Generator) -> Origin:
        if not isinstance(self.source, WorkloadSource):
            return self.source, 0
        return self.source, int(
            rng.integers(LARGEST_SEED if self.distinct_workloads is None else self.distinct_workloads)
        )

    def _made(self, origin: Origin) -> Any:
        """The requests of an origin, in the engine's form."""
        source, seed = origin
        if not isinstance(source, WorkloadSource) or self.distinct_workloads is None or source != self.source:
            return self._make(source, seed)
        if seed not in self._drawn:
            self._drawn[seed] = self._make(source, seed)
        return self._drawn[seed]

    @abstractmethod
    def _make(self, source: WorkloadSource | Given, seed: int) -> Any:
        """The requests that a source draws with this seed, or those given, in the engine's form."""

    def _origins_of(self, rngs: Sequence[np.random.Generator], given: Sequence[Given] | None) -> list[Origin]:
        if given is None:
            return [self._draw(rng) for rng in rngs]
        for workload in given:
            check_type("options['workload']", workload, *self.takes)
        return [(workload, 0) for workload in given]

    def _check_actions(self, actions: NDArray[np.int64]) -> None:
        if actions.shape != (self.num_envs, 2) or actions.dtype.kind not in "iu":
            raise ActionError(
                f"actions must be integers of shape ({self.num_envs}, 2): the indices of c and n, got "
                f"{actions.dtype} of shape {actions.shape}"
            )
        if (actions < 0).any() or (actions >= self._choices).any():
            row = int(((actions < 0) | (actions >= self._choices)).any(axis=1).argmax())
            self.grid.values(actions[row])

    @property
    @abstractmethod
    def state(self) -> State:
        """The engines' state; RuntimeError before the first reset."""

    @abstractmethod
    def arrived(self, e: int) -> NDArray[np.void]:
        """The rows of the request table that have arrived at engine `e` in this episode."""

    @abstractmethod
    def reset(
        self, envs: Sequence[int], rngs: Sequence[np.random.Generator], workloads: Sequence[Given] | None = None
    ) -> None:
        """Begin a new episode in each of `envs`, with requests drawn from its generator or given."""

    @abstractmethod
    def new_observation(self) -> Observation:
        """Fresh zeroed observation arrays."""

    @abstractmethod
    def observe(self, envs: Sequence[int], observation: Observation) -> None:
        """Write the telemetry of `envs` into their rows of `observation`."""

    @abstractmethod
    def step(self, actions: NDArray[np.int64]) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_]]:
        """One decision in every engine.

        Args:
            actions: (N, 2) indices of c and n.

        Returns fresh telemetry arrays, the costs of this decision (N, len(TERMS)), and which episodes are over (N,).
        """

    def summary(self, e: int) -> dict[str, Any]:
        """The reported figures of engine `e`'s episode."""
        return episode_summary(self.state, e, self.arrived(e), self.prices)

    def close(self) -> None:  # noqa: B027 - simulated engines hold no resources
        """Release the engines."""
