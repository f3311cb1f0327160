"""One evaluation: an engine serves a workload under a controller, and is measured. No Hydra, no files."""

import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from controllers.controller import CompiledController, Controller, Plant, as_dict
from engine.backends.simulator import ITERATION, Simulator, log_iteration
from engine.config import EngineConfig
from engine.core.action import ActionError, ActionGrid, check_action
from engine.core.metrics import request_table, summarize
from engine.latency.lookup import LookupTable
from engine.latency.model import LatencyModel
from engine.workload.source import WorkloadSource
from engine.workload.workload import Workload
from runs.tracking import Tracking

log = logging.getLogger(__name__)

WARMUP_DECISIONS = 20
TIMED_DECISIONS = 200
STEPS_PER_PROGRESS = 2_000
NO_LOG = np.zeros(0, dtype=ITERATION)

Progress = Callable[[int, int], Any]
"""Called now and then with (requests finished, requests in total)."""


class Targets(BaseModel):
    """What a request should get: TTFT in s, TPOT in s per token."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.05


class LookupFit(BaseModel):
    """How the controllers' table of iteration times is fitted: sampled iterations, relative noise, seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    samples: Annotated[int, Field(ge=100)] = 16000
    noise: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.03
    seed: Annotated[int, Field(ge=0)] = 0


class Evaluation(BaseModel):
    """Everything one run depends on; a key that is unknown, mistyped or out of range is refused with its name.

    Args:
        engine: the model, its drafter and its GPU.
        workload: where the requests come from.
        controller: who chooses c and n.
        actions: the choices of c and n for controllers that choose from a grid.
        lookup: how the iteration times that such controllers predict with are fitted.
        slo: the targets that attainment and goodput are counted against.
        seed: draws the workload; nothing else is random.
        charge_decisions: what a decision costs on the engine's clock: the controller's own bound (`constant`), the
            time it took (`measured`), or nothing (`off`).
        record_iterations: keep one row per engine iteration.
        label: how tables and figures call the controller; None: as it calls itself.
        logger: Weights & Biases.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: EngineConfig
    workload: WorkloadSource
    controller: Controller
    actions: ActionGrid = ActionGrid()
    lookup: LookupFit = LookupFit()
    slo: Targets = Targets()
    seed: Annotated[int, Field(ge=0)] = 0
    charge_decisions: Literal["constant", "measured", "off"] = "constant"
    record_iterations: bool = False
    label: Annotated[str, Field(min_length=1)] | None = None
    logger: Tracking = Tracking()

    def run(self, on_progress: Progress | None = None) -> "Result":
        """Draw the workload, serve it, measure.

        Raises:
            ValueError: the workload, the engine or an action is impossible; the message names row or key.
        """
        workload = draw(
            Drawing(self.workload.model_dump_json(), type(self.workload).__name__, self.seed, self.workload)
        )
        latency = load_latency(self.engine.latency)
        simulator = Simulator(self.engine, [workload], latency=latency, ttft_target=self.slo.ttft_target)
        plant = Plant(self.actions, lambda: self._fit_lookup(simulator))
        self.controller.reset(plant)
        recording = self.record_iterations or self.logger.enabled
        compiled = isinstance(self.controller, CompiledController) and self.charge_decisions != "measured"
        serve = _serve_compiled if compiled else _serve_stepwise
        served = serve(self, simulator, recording, on_progress)
        requests = request_table(simulator.state)
        summary: dict[str, Any] = summarize(
            simulator.state, ttft_target=self.slo.ttft_target, tpot_target=self.slo.tpot_target
        )
        decisions = served.decision_s
        if decisions is None:
            simulator.load(0, workload)
            self.controller.reset(plant)
            decisions = _time_decisions(self, simulator)
        summary |= {
            "decision_time_mean_s": float(decisions.mean()) if decisions.size else float("nan"),
            "decision_time_p99_s": float(np.percentile(decisions, 99)) if decisions.size else float("nan"),
            "sim_wall_s": served.wall_s,
            "run": self._identity(workload, summary["request_rate_rps"]),
        }
        return Result(requests, served.iterations, summary)

    @property
    def charged_s(self) -> float:
        """Seconds charged for a decision when they are not measured."""
        return self.controller.decision_s if self.charge_decisions == "constant" else 0.0

    def _fit_lookup(self, simulator: Simulator) -> LookupTable:
        limits = simulator.limits
        return load_lookup(
            self.engine.latency,
            self.actions.candidate_choices,
            self.actions.budget_choices,
            limits.max_num_seqs,
            limits.total_blocks * limits.block_size,
            self.lookup,
        )

    def _identity(self, workload: Workload, request_rate: float) -> dict[str, Any]:
        """What was run: reports pair runs by engine, scenario, seed and digest, and tell them apart by the label."""
        own = [getattr(self.controller, name, None) for name in ("candidates", "token_budget")]
        candidates, token_budget = own if own[1] is not None else (None, None)
        label = self.controller.label()
        if own == [None, None]:
            # It chooses from the grid: where that leaves no choice, the run belongs with the fixed ones of that value.
            if len(self.actions.candidate_choices) == 1:
                candidates = self.actions.candidate_choices[0]
                label += f" c={candidates}"
            if len(self.actions.budget_choices) == 1:
                token_budget = self.actions.budget_choices[0]
                label += f" n={token_budget}"
        return {
            "engine": self.engine.name,
            "workload": workload.name,
            "scenario": self.workload.scenario,
            "workload_digest": workload.digest,
            "controller": type(self.controller).__name__.lower(),
            "label": self.label or label,
            "candidates": candidates,
            "token_budget": token_budget,
            "seed": self.seed,
            "request_rate_rps": request_rate,
            "rate_scale": self.workload.rate_scale,
            "ttft_target_s": self.slo.ttft_target,
            "tpot_target_s": self.slo.tpot_target,
        }


@dataclass(frozen=True)
class Result:
    """A finished run: request columns, iteration rows (empty unless kept) and the summary with its `run` section."""

    requests: dict[str, NDArray[Any]]
    iterations: NDArray[np.void]
    summary: dict[str, Any]


@dataclass(frozen=True)
class Drawing:
    """A workload still to be drawn; two are the same when settings and seed are."""

    settings: str
    kind: str
    seed: int
    source: WorkloadSource = field(compare=False)


@lru_cache(maxsize=4)
def draw(drawing: Drawing) -> Workload:
    """The workload; the latest few are kept, because the jobs of a sweep share them."""
    return drawing.source.draw(drawing.seed)


@lru_cache(maxsize=8)
def load_latency(name: str) -> LatencyModel:
    """`LatencyModel.load`, kept."""
    return LatencyModel.load(name)


@lru_cache(maxsize=8)
def load_lookup(
    latency: str,
    candidate_choices: tuple[int, ...],
    budget_choices: tuple[int, ...],
    max_num_seqs: int,
    kv_capacity_tokens: int,
    fit: LookupFit,
) -> LookupTable:
    """`LookupTable.load_or_fit`, kept; the first fit of a configuration takes seconds and is then on disk."""
    begin = time.perf_counter()
    table = LookupTable.load_or_fit(
        load_latency(latency),
        candidate_choices,
        budget_choices,
        max_num_seqs,
        kv_capacity_tokens,
        fit.samples,
        fit.noise,
        fit.seed,
    )
    seconds = time.perf_counter() - begin
    log.info(
        "lookup table of %s: held-out MAPE %.1f %% (%.1f s)", latency, 100 * table.heldout_mape["overall"], seconds
    )
    return table


@dataclass(frozen=True)
class _Served:
    iterations: NDArray[np.void]
    wall_s: float
    decision_s: NDArray[np.float64] | None
    """Seconds of each decision; None when they ran inside compiled code."""


def _serve_compiled(
    evaluation: Evaluation, simulator: Simulator, recording: bool, on_progress: Progress | None
) -> _Served:
    assert isinstance(evaluation.controller, CompiledController)
    loop = evaluation.controller.loop(simulator, evaluation.charged_s)
    # Running no iteration compiles the loop, which is not the simulator's speed.
    loop(0, NO_LOG)
    iterations, wall_s = simulator.run_to_end(loop, record_iterations=recording, on_progress=on_progress)
    return _Served(iterations, wall_s, None)


def _serve_stepwise(
    evaluation: Evaluation, simulator: Simulator, recording: bool, on_progress: Progress | None
) -> _Served:
    """Decide in Python before every iteration, as an engine would call a controller."""
    begin = time.perf_counter()
    rows: list[NDArray[np.void]] = []
    row = np.zeros(1, dtype=ITERATION)
    spent: list[float] = []
    engine = simulator.state.engines[0]

    def after(seconds: float) -> None:
        spent.append(seconds)
        if recording:
            log_iteration(simulator.state, 0, row, 0)
            rows.append(row.copy())
        if on_progress is not None and len(spent) % STEPS_PER_PROGRESS == 0:
            on_progress(int(engine["num_finished"]), int(engine["num_requests"]))

    _step(evaluation, simulator, after, most=None)
    wall_s = time.perf_counter() - begin
    return _Served(np.concatenate(rows) if rows else NO_LOG, wall_s, np.array(spent))


def _time_decisions(evaluation: Evaluation, simulator: Simulator) -> NDArray[np.float64]:
    """Seconds of each of the first decisions of the run, taken once more step by step.

    Inside compiled code a decision cannot be timed, so `choose` is, from Python, on the observations that the run's
    beginning makes; the call from Python is part of the figure, the first `WARMUP_DECISIONS` are not.
    """
    spent: list[float] = []
    _step(evaluation, simulator, spent.append, most=WARMUP_DECISIONS + TIMED_DECISIONS)
    return np.array(spent[WARMUP_DECISIONS:] or spent)


def _step(evaluation: Evaluation, simulator: Simulator, after: Callable[[float], None], most: int | None) -> None:
    """Observe, choose, step, until no request is left or `most` iterations ran; `after` gets each decision's time."""
    observation = simulator.new_observation()
    view = as_dict(observation)
    controller = evaluation.controller
    measured = evaluation.charge_decisions == "measured"
    charged_s = evaluation.charged_s
    engine = simulator.state.engines[0]
    more = True
    count = 0
    while more and (most is None or count < most):
        simulator.observe(0, observation)
        begin = time.perf_counter()
        candidates, token_budget = controller.choose(view)
        seconds = time.perf_counter() - begin
        check_action(candidates, max(token_budget, 1))
        if token_budget < 1 and (token_budget < 0 or engine["num_decoding"] == 0):
            raise ActionError(
                f"{controller.label()} chose token_budget={token_budget} with nothing to decode: the engine would "
                "stand still; choose at least 1 when no request is decoding"
            )
        more = simulator.step(0, candidates, token_budget, seconds if measured else charged_s)
        after(seconds)
        count += 1
