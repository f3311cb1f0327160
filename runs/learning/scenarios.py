"""What a policy is trained on: engines under randomised traffic, the reward, and what it is shown and may choose."""

import hashlib
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from controllers.features import Layout
from controllers.learned import Learned
from controllers.policy import Residual, input_names, spread
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.plant import Plant
from engine.workload.randomized import RandomizedSource
from engine.workload.source import WorkloadSource
from runs.evaluation import LookupFit, Targets, load_lookup, load_truth

Share = Annotated[float, Field(ge=0.0, le=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Scenario(BaseModel):
    """One engine with its traffic and targets; its environments are stepped together.

    Args:
        engine: simulated; `timing_error` makes its true times other than those that policies predict with.
        workload: what episodes draw their requests from.
        slo: targets, and the prices of the objective.
        weight: share of the environments relative to other scenarios.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: EngineConfig
    workload: WorkloadSource
    slo: Targets = Targets()
    weight: Positive = 1.0


class Stage(BaseModel):
    """A stretch of training with its own traffic.

    Args:
        until: share of all steps at which it ends.
        workload: settings of `RandomizedSource` that differ from the scenarios' own, for example `kinds`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    until: Share
    workload: dict[str, Any] = Field(default_factory=dict)


class Curriculum(BaseModel):
    """Stages in order; after the last, and without any, the scenarios' own traffic."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    stages: tuple[Stage, ...] = ()

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        ends = [stage.until for stage in self.stages]
        if ends != sorted(set(ends)):
            raise ValueError(f"stages: their until={ends} must increase")
        return self


class Reward(BaseModel):
    """What a decision earns: minus its cost, relative to what `analytic` pays for the same requests.

    The cost is the objective's, as it is charged (`envs.reward`). Per second of the engine's clock a decision is
    credited with what `analytic` is charged per second on the same workload, and both are divided by what it is charged
    per request. So a whole episode earns `scale` x requests x (relative improvement on `analytic`), whatever the load:
    busy scenarios do not drown idle ones, and long decisions are not punished for taking in more.

    Args:
        relative: credit and divide so; false: minus the plain cost.
        tpot, violation, lateness: factors on the objective's terms, for ablations.
        constraint: `price`: violations cost what the objective says. `lagrangian`: their price is learnt (dual ascent)
            so that no more deadlines are missed than `slack` above what `analytic` misses on the same requests.
        multiplier: the price of a violation that `lagrangian` starts from, as a factor on the objective's.
        multiplier_rate: step of the dual ascent per finished episode and share of requests too late.
        slack: share of requests that may miss their deadline beyond those that do under `analytic`.
        scale: factor on everything.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    relative: bool = True
    tpot: Annotated[float, Field(ge=0.0)] = 1.0
    violation: Annotated[float, Field(ge=0.0)] = 1.0
    lateness: Annotated[float, Field(ge=0.0)] = 1.0
    constraint: Literal["price", "lagrangian"] = "price"
    multiplier: Annotated[float, Field(ge=0.0)] = 1.0
    multiplier_rate: Positive = 0.05
    slack: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    scale: Positive = 0.1


class TrainingEnv(BaseModel):
    """Everything that the environment of a training run depends on.

    Args:
        scenarios: by name.
        num_envs: environments stepped together, shared out over the scenarios by weight.
        decide_every: iterations that a choice holds.
        decision_s: seconds a decision is charged on the engine's clock.
        distinct_workloads: workloads drawn per scenario; episodes draw from these.
        actions: the choices of c and n.
        layout: what the policy is shown.
        residual: whose choice it shifts; None chooses from scratch.
        reward: what a decision earns.
        curriculum: how traffic changes in the course of training.
        lookup: how the iteration times that policies predict with are fitted.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    scenarios: Annotated[dict[str, Scenario], Field(min_length=1)]
    num_envs: Annotated[int, Field(ge=1)] = 256
    decide_every: Annotated[int, Field(ge=1)] = 1
    decision_s: Annotated[float, Field(ge=0.0)] = Learned.decision_s
    distinct_workloads: Annotated[int, Field(ge=1)] = 64
    actions: ActionGrid = ActionGrid()
    layout: Layout = Layout()
    residual: Residual | None = None
    reward: Reward = Reward()
    curriculum: Curriculum = Curriculum()
    lookup: LookupFit = LookupFit()

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.num_envs < len(self.scenarios):
            raise ValueError(f"num_envs={self.num_envs} leaves scenarios without any: there are {len(self.scenarios)}")
        for place, stage in enumerate(self.curriculum.stages):
            for name, scenario in self.scenarios.items():
                try:
                    staged(scenario.workload, stage)
                except ValueError as error:
                    raise ValueError(
                        f"curriculum.stages[{place}].workload does not fit scenario {name}: {error}"
                    ) from error
        return self

    @property
    def inputs(self) -> tuple[str, ...]:
        """Names of the policy's inputs."""
        return input_names(self.layout, self.actions, self.residual)

    @property
    def spread(self) -> tuple[int, int]:
        """How many values the policy picks c and n from."""
        return spread(self.actions, self.residual)

    @property
    def digest(self) -> str:
        """A fingerprint of all of this."""
        return hashlib.sha256(self.model_dump_json(serialize_as_any=True).encode()).hexdigest()[:16]

    def shares(self) -> dict[str, int]:
        """Environments of each scenario, by largest remainder; at least one each."""
        weights = {name: scenario.weight for name, scenario in self.scenarios.items()}
        total = sum(weights.values())
        spare = self.num_envs - len(weights)
        exact = {name: spare * weight / total for name, weight in weights.items()}
        counts = {name: 1 + int(value) for name, value in exact.items()}
        by_rest = sorted(exact, key=lambda name: int(exact[name]) - exact[name])
        for name in by_rest[: self.num_envs - sum(counts.values())]:
            counts[name] += 1
        return counts

    def plant(self, scenario: Scenario) -> Plant:
        """What a controller may know of a scenario's engine."""
        limits = scenario.engine.limits(load_truth(scenario.engine))
        return Plant(self.actions, lambda: load_lookup(scenario.engine, self.actions, limits, self.lookup))

    def stage(self, progress: float) -> int:
        """The stage of the curriculum at this share of the steps; the number of stages after the last."""
        return sum(progress >= stage.until for stage in self.curriculum.stages)

    def source(self, scenario: Scenario, stage: int) -> WorkloadSource:
        """What a scenario draws from in a stage."""
        stages = self.curriculum.stages
        return scenario.workload if stage >= len(stages) else staged(scenario.workload, stages[stage])


def staged(workload: WorkloadSource, stage: Stage) -> WorkloadSource:
    """The workload with a stage's settings. ValueError for settings that it does not have."""
    if not isinstance(workload, RandomizedSource):
        if stage.workload:
            raise ValueError(f"{type(workload).__name__} is not randomised, so it has no stages")
        return workload
    plain = workload.model_dump(serialize_as_any=True)
    plain["agreement"] = workload.agreement
    return RandomizedSource.model_validate(plain | stage.workload)
