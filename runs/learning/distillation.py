"""Distilling: a controller's decisions over many workloads, as a lookup table, and what is lost by it."""

from dataclasses import fields
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field

from controllers.controller import Controller
from controllers.tabulated import Table, TableHeader, Tabulated, save_table, tabulate
from engine.core.telemetry import DECODE_KV_TOKENS, NUM_DECODES, WAITING_TOKENS, as_dict
from engine.simulator.simulator import Simulator
from runs.code import code_digest
from runs.evaluation import Targets
from runs.learning.scenarios import Scenario, TrainingEnv
from runs.learning.validation import Validation
from runs.serving import Progress

TABLE = "table.npz"
DISTILLED_SEED = 3_000_000
"""First seed of the workloads whose decisions are tabulated; those of validation are others."""
CHOSEN_SEED = 4_000_000
"""First seed of the workloads that choose between tables."""


class Distillation(BaseModel):
    """Turns a controller into a table over the batch, its cached tokens and the queue.

    Args:
        env: the engines and their traffic; `timing_error` and targets as they are there.
        controller: what is distilled. One with targets of its own is given each scenario's.
        workloads: per scenario.
        budget_quantiles: a table does not see deadlines, so the median n of a cell may be late for those that are near:
            of these quantiles the one with the lowest objective on as many other workloads is kept.
        validation_workloads: per scenario, for what is lost.
        name: how tables call the result; None: the controller's name and "table".
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    env: TrainingEnv
    controller: Controller
    workloads: Annotated[int, Field(ge=1)] = 6
    budget_quantiles: Annotated[tuple[Annotated[float, Field(ge=0.0, le=1.0)], ...], Field(min_length=1)] = (
        0.5,
        0.7,
        0.8,
        0.9,
        0.95,
    )
    validation_workloads: Annotated[int, Field(ge=1)] = 4
    name: Annotated[str, Field(min_length=1)] | None = None

    def run(self, folder: Path, on_progress: Progress | None = None) -> dict[str, Any]:
        """Write `TABLE` into the folder; returns the objective of controller and table relative to `analytic`'s."""
        places, chosen = [], []
        total = len(self.env.scenarios) * self.workloads
        for scenario in self.env.scenarios.values():
            for k in range(self.workloads):
                where, what = self._decisions(scenario, DISTILLED_SEED + k)
                places.append(where)
                chosen.append(what)
                if on_progress is not None:
                    on_progress(len(places), total)
        where, what = np.concatenate(places), np.concatenate(chosen)
        tables = {q: tabulate(where, what, self.env.actions, budget_quantile=q) for q in self.budget_quantiles}
        name = self.name or f"{self.controller.label()} table"
        engines = sorted({scenario.engine.name for scenario in self.env.scenarios.values()})
        decisions = sum(map(len, places))
        made_of = {
            "controller": self.controller.label(),
            "engines": engines,
            "decisions": decisions,
            "code": code_digest(),
        }
        header = TableHeader(name=name, actions=self.env.actions, made_of=made_of)
        trial = Validation(self.env, self.workloads, self._for, CHOSEN_SEED)
        objectives = {
            q: trial.figures(lambda slo, q=q: _tabulated(header, tables[q]))["objective_ratio"]  # type: ignore[misc]
            for q in tables
        }
        quantile = min(objectives, key=lambda q: objectives[q])
        table = tables[quantile]
        save_table(folder / TABLE, header, table)
        validation = Validation(self.env, self.validation_workloads, self._for)
        lost = validation.figures(lambda slo: _tabulated(header, table))
        return {"name": name, "decisions": decisions, "budget_quantile": quantile} | {
            f"table_to_controller/{key}": value for key, value in lost.items()
        }

    def _for(self, slo: Targets) -> Any:
        return with_targets(self.controller, slo)

    def _decisions(self, scenario: Scenario, seed: int) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
        simulator = Simulator(scenario.engine, [scenario.workload.draw(seed)], ttft_target=scenario.slo.ttft_target)
        controller = self._for(scenario.slo)
        controller.reset(self.env.plant(scenario))
        observation = simulator.new_observation()
        view = as_dict(observation)
        where: list[tuple[float, float, float]] = []
        what = []
        more = True
        while more:
            simulator.observe(0, observation)
            action = controller.act(view)
            load = view["load"]
            where.append((load[NUM_DECODES], load[DECODE_KV_TOKENS], load[WAITING_TOKENS]))
            what.append(action)
            more = simulator.step(0, *self.env.actions.values(action), controller.decision_s)
        return np.array(where, dtype=np.float64), np.array(what)


def _tabulated(header: TableHeader, table: Table) -> Tabulated:
    made = Tabulated(path=header.name)
    made.__dict__["content"] = (header, table)
    return made


def with_targets(controller: Controller, slo: Targets) -> Controller:
    """The controller made anew, with a scenario's targets where it has its own."""
    settings = {field.name: getattr(controller, field.name) for field in fields(controller) if field.init}  # type: ignore[arg-type]
    for name in ("ttft_target", "tpot_target", "violation", "lateness"):
        if name in settings:
            settings[name] = getattr(slo, name)
    return type(controller)(**settings)
