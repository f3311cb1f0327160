"""One evaluation: an engine serves a workload under a controller, and is measured. No Hydra, no files."""

import logging
import time
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from controllers.controller import Controller
from engine.backends.real_config import RealEngineConfig
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.metrics import request_table, summarize
from engine.core.objective import Price, Prices
from engine.latency.lookup import LookupTable
from engine.latency.measured import MeasuredIterations
from engine.latency.measured_card import MEASURED_FOREST
from engine.latency.model import LatencyModel
from engine.latency.predictors import DEFAULT_FOREST, Feature, Forest
from engine.limits import EngineLimits
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.prompts import Prompts, PromptSource, prompts_for
from engine.workload.source import WorkloadSource
from engine.workload.workload import Workload
from runs import live, simulated
from runs.code import code_digest
from runs.inputs import kept
from runs.serving import Progress, Served, decision_times, overload
from runs.simulated import Charge
from runs.tracking import Tracking

log = logging.getLogger(__name__)


class Targets(BaseModel):
    """What a request should get, and the prices of the reported objective (`engine.core.objective`).

    Args:
        ttft_target: s.
        tpot_target: s per token; also the TPOT that costs 1.
        violation: cost of a missed TTFT target.
        lateness: cost of being late by one more `ttft_target`.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.05
    violation: Price = Prices().violation
    lateness: Price = Prices().lateness

    @property
    def prices(self) -> Prices:
        """What the objective charges."""
        return Prices(tpot_target=self.tpot_target, violation=self.violation, lateness=self.lateness)


class LookupFit(BaseModel):
    """How the controllers' table of iteration times is fitted.

    Args:
        samples, noise: iterations drawn from the engine's latency table, and their relative noise. An engine that was
            measured is learnt from its measured iterations instead.
        seed: draws the samples and grows the trees.
        trees, min_samples_leaf, features: see `engine.latency.predictors.Forest`; None: what suits thousands of sampled
            iterations (`DEFAULT_FOREST`), or hundreds of measured ones (`MEASURED_FOREST`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: Annotated[int, Field(ge=100)] = 16000
    noise: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    seed: Annotated[int, Field(ge=0)] = 0
    trees: Annotated[int, Field(ge=1)] | None = None
    min_samples_leaf: Annotated[int, Field(ge=1)] | None = None
    features: tuple[Feature, ...] | None = None

    def forest(self, usual: Forest) -> Forest:
        """`usual` with what is set here."""
        own = {name: getattr(self, name) for name in ("trees", "min_samples_leaf", "features")}
        return replace(usual, **{name: value for name, value in own.items() if value is not None})


class Evaluation(BaseModel):
    """Everything one run depends on; a key that is unknown, mistyped or out of range is refused with its name.

    Args:
        engine: the model, its drafter and its GPU, simulated or run for real.
        workload: where the requests come from.
        controller: who chooses c and n.
        actions: the choices of c and n for controllers that choose from a grid.
        lookup: how the iteration times that such controllers predict with are fitted.
        slo: the targets that attainment and goodput are counted against.
        seed: draws the workload; nothing else is random.
        charge_decisions: what a decision costs on the simulated clock: the controller's own bound (`constant`), the
            time it took (`measured`), or nothing (`off`). A real clock runs while the controller decides, whatever
            this says.
        record_iterations: keep one row per engine iteration.
        label: how tables and figures call the controller; None: as it calls itself.
        scenario: how they call the workload; None: as it calls itself. Runs are paired by it.
        resume: keep a finished run that the folder already holds, if whatever decides its result is the same:
            configuration, contents of the files it names, code. None: in sweeps only.
        optimized_metric: key of the summary that a run returns to Hydra's sweeper, for one that optimizes.
        logger: Weights & Biases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: EngineConfig | TorchEngineConfig | VllmEngineConfig
    workload: WorkloadSource
    controller: Controller
    actions: ActionGrid = ActionGrid()
    lookup: LookupFit = LookupFit()
    slo: Targets = Targets()
    seed: Annotated[int, Field(ge=0)] = 0
    charge_decisions: Charge = "constant"
    record_iterations: bool = False
    label: Annotated[str, Field(min_length=1)] | None = None
    scenario: Annotated[str, Field(min_length=1)] | None = None
    resume: bool | None = None
    optimized_metric: Annotated[str, Field(min_length=1)] = "objective"
    logger: Tracking = Tracking()

    def run(self, on_progress: Progress | None = None) -> "Result":
        """Draw the workload, serve it, measure.

        Raises:
            ValueError: the workload, the engine or an action is impossible; the message names row or key.
        """
        if isinstance(self.engine, RealEngineConfig):
            return self._run_live(self.engine, on_progress)
        return self._run_simulated(self.engine, on_progress)

    def _run_simulated(self, config: EngineConfig, on_progress: Progress | None) -> "Result":
        workload = self._draw()
        config = config.governed_by(self.controller.speculation)
        simulator = Simulator(config, [workload], latency=load_truth(config), ttft_target=self.slo.ttft_target)
        plant = plant_of(config, simulator.limits, self.actions, self.lookup)
        served = simulated.serve(
            simulator, workload, self.controller, plant, self.charge_decisions, self._recording, on_progress
        )
        result = self._result(served, workload, config.variant, self.actions)
        return replace(result, summary=result.summary | {"sim_wall_s": served.wall_s})

    def _run_live(self, config: RealEngineConfig, on_progress: Progress | None) -> "Result":
        predicted = profile_of(config, self.controller, self.actions)
        config = config.governed_by(self.controller.speculation)
        tokenizer = config.tokenizer()
        prompts = self._prompts(tokenizer, config.limits)
        engine = config.build(ttft_target=self.slo.ttft_target)
        with closing(engine):
            grid = live.grid_within(self.actions, engine)
            plant = plant_of(predicted, config.limits, grid, self.lookup)
            served = live.serve(engine, prompts, self.controller, plant, self._recording, on_progress)
            result = self._result(served, prompts, config.variant, grid)
            result.summary["run"]["backend"] = live.describe(config, engine)
            return replace(result, outputs=live.outputs(engine, prompts, tokenizer))

    @property
    def _recording(self) -> bool:
        return self.record_iterations or self.logger.enabled

    def _draw(self) -> Workload:
        settings = f"{self.workload.model_dump_json()} {self.workload.contents}"
        return draw(Drawing(settings, type(self.workload).__name__, self.seed, self.workload))

    def _prompts(self, tokenizer: Any, limits: EngineLimits) -> Prompts:
        if isinstance(self.workload, PromptSource):
            return self.workload.draw_prompts(self.seed, tokenizer, limits)
        return prompts_for(self._draw(), self.seed, tokenizer, limits)

    def _result(self, served: Served, workload: Workload | Prompts, engine: str, grid: ActionGrid) -> "Result":
        summary: dict[str, Any] = summarize(
            served.state, served.requests, ttft_target=self.slo.ttft_target, prices=self.slo.prices
        )
        summary |= decision_times(served.decision_s)
        requests = request_table(served.requests)
        summary["overloaded"] = overload(requests, self.slo.ttft_target) is not None
        summary["run"] = self._identity(workload, engine, grid, summary["request_rate_rps"])
        return Result(requests, served.iterations, summary)

    def _identity(
        self, workload: Workload | Prompts, engine: str, grid: ActionGrid, request_rate: float
    ) -> dict[str, Any]:
        """What was run: reports pair runs by engine, scenario, seed and digest, and tell them apart by the label."""
        candidates, token_budget, total_budget = (
            getattr(self.controller, name, None) for name in ("candidates", "token_budget", "total_budget")
        )
        label = self.controller.label()
        chooses = (candidates, token_budget, total_budget) == (None, None, None)
        if token_budget is None and total_budget is None:
            candidates = None
        if chooses:
            # It chooses from the grid: where that leaves no choice, the run belongs with the fixed ones of that value.
            if len(grid.candidate_choices) == 1:
                candidates = grid.candidate_choices[0]
                label += f" c={candidates}"
            if len(grid.budget_choices) == 1:
                token_budget = grid.budget_choices[0]
                label += f" n={token_budget}"
        sharing = (self.controller.speculation or self.engine.speculation).variant
        if isinstance(self.engine, EngineConfig) and self.controller.speculation is None:
            label = f"{label} {sharing}".rstrip()
        return {
            "engine": engine,
            "workload": workload.name,
            "scenario": self.scenario or self.workload.scenario,
            "workload_digest": workload.digest,
            "controller": type(self.controller).__name__.lower(),
            "label": self.label or label,
            "peeks": self.controller.peeks,
            "static": self.controller.static,
            "speculation": sharing or "chains",
            "candidates": candidates,
            "token_budget": token_budget,
            "total_budget": total_budget,
            "seed": self.seed,
            "request_rate_rps": request_rate,
            "rate_scale": self.workload.rate_scale,
            "ttft_target_s": self.slo.ttft_target,
            "tpot_target_s": self.slo.tpot_target,
            "code": code_digest(),
        }


@dataclass(frozen=True)
class Result:
    """A finished run: request columns, iteration rows (empty unless kept) and the summary with its `run` section.

    `outputs` is what a real engine generated; None of a simulated one.
    """

    requests: dict[str, NDArray[Any]]
    iterations: NDArray[np.void]
    summary: dict[str, Any]
    outputs: list[live.Output] | None = None


@dataclass(frozen=True)
class Drawing:
    """A workload still to be drawn; two are the same when settings, contents of files and seed are."""

    settings: str
    kind: str
    seed: int
    source: WorkloadSource = field(compare=False)


@kept(4)
def draw(drawing: Drawing) -> Workload:
    """The workload; the latest few are kept, because the jobs of a sweep share them."""
    return drawing.source.draw(drawing.seed)


@kept(8)
def load_latency(name: str) -> LatencyModel:
    """`LatencyModel.load`, kept."""
    return LatencyModel.load(name)


@kept(8)
def load_truth(config: EngineConfig) -> LatencyModel:
    """`EngineConfig.true_latency`, kept."""
    return config.true_latency()


@kept(8)
def load_lookup(engine: EngineConfig, grid: ActionGrid, limits: EngineLimits, fit: LookupFit) -> LookupTable:
    """The table for an engine, kept; the first fit of a configuration takes seconds and is then on disk."""
    begin = time.perf_counter()
    room = (limits.max_num_seqs, limits.total_blocks * limits.block_size)
    choices = (grid.candidate_choices, grid.budget_choices)
    if engine.measured is not None:
        measured = MeasuredIterations.read(engine.measured)
        table = LookupTable.of_measured(measured, *choices, *room, fit.forest(MEASURED_FOREST), fit.seed)
    else:
        table = LookupTable.load_or_fit(
            load_latency(engine.latency),
            *choices,
            *room,
            fit.samples,
            fit.noise,
            fit.seed,
            forest=fit.forest(DEFAULT_FOREST),
        )
    seconds = time.perf_counter() - begin
    log.info(
        "lookup table of %s: held-out MAPE %.1f %% (%.1f s)",
        engine.latency,
        100 * table.heldout_mape["overall"],
        seconds,
    )
    return table


def plant_of(engine: EngineConfig | None, limits: EngineLimits, grid: ActionGrid, fit: LookupFit) -> Plant:
    """What a controller may know of an engine with these limits; None: of one that nobody has measured."""
    return Plant(grid, _no_profile if engine is None else lambda: load_lookup(engine, grid, limits, fit))


def profile_of(config: RealEngineConfig, controller: Controller, actions: ActionGrid) -> EngineConfig | None:
    """The measured iteration times of a real engine; a controller that needs them is refused without, and soon."""
    if config.profile is not None:
        return load_profile(config.profile)
    controller.reset(Plant(actions, _no_profile))
    return None


def load_profile(path: Path) -> EngineConfig:
    """The engine yaml that `runs.profile` wrote. Raises ValueError naming the key when there is none."""
    if not path.is_file():
        raise ValueError(f"engine.profile={path}: no such file; python -m runs.profile writes one")
    try:
        settings = yaml.safe_load(path.read_text(encoding="utf-8"))
        return EngineConfig.model_validate({key: value for key, value in settings.items() if key != "_target_"})
    except (yaml.YAMLError, AttributeError, ValueError) as error:
        raise ValueError(f"engine.profile={path} is no engine that python -m runs.profile wrote: {error}") from error


def _no_profile() -> LookupTable:
    raise ValueError(
        "this controller predicts iteration times, which nobody has measured for this engine: run "
        "python -m runs.profile engine=torch_tiny (with this engine's settings), then set engine.profile to the engine "
        "yaml it writes"
    )
