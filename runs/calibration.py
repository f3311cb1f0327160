"""A calibration: real runs at several load levels, the same runs predicted from the engine's profile, and the card.

The simulator predicts: it has the profile's iteration times, an agreement model fitted to what the profile logged on
other prompts, and of the runs themselves only the workload (arrivals, prompt lengths, output lengths). No Hydra here.
"""

import hashlib
import itertools
import json
import logging
import os
import platform
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.backends.torch.config import TorchEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.metrics import request_table
from engine.files import read_arrays, read_json, write_whole
from engine.latency.table_file import LatencyTables
from engine.plant import Plant
from engine.workload.acceptance_log import AcceptanceLog, LoggedTurn
from engine.workload.agreement import AgreementModel, MarkovAgreement
from engine.workload.fit_agreement import fit_agreement
from engine.workload.markov import Agreement
from engine.workload.prompts import Prompts, PromptSource
from engine.workload.workload import Workload
from runs import calibration_cells as cells
from runs import live, simulated
from runs.calibration_cells import Cell, RealRun
from runs.evaluation import LookupFit, Targets, load_latency, load_lookup, load_profile
from runs.inputs import file_digests, kept
from runs.measured_folder import AGREEMENT, CARD
from runs.reporting.calibration import OWN_AGREEMENTS, PREDICTED, pair
from runs.reporting.calibration_page import Card
from runs.serving import Progress
from runs.simulated import Charge

log = logging.getLogger(__name__)

SETTINGS = "settings.json"
RUNS = "runs"
ARRIVALS_FOR_RATE = 20_000
CAPACITY_BATCHES = 6
AGREEMENT_DRAWS = 5
"""Simulations that a prediction is the mean of, each with its own draw of agreements."""


class CalibrationError(ValueError):
    """The calibration cannot be run as configured; the message names the key or folder and the fix."""


@dataclass(frozen=True)
class Level:
    """A load: its request rate as a share of the engine's capacity, in requests/s, and how many requests are served."""

    name: str
    share: float
    request_rate_rps: float
    num_requests: int


class Calibration(BaseModel):
    """What is run, and how it is predicted.

    Args:
        engine: run for real; its `profile` is what the simulator predicts with.
        workload: the prompts; rate and number are set by the levels.
        controllers: by the name of their runs' folders.
        levels: request rate of each load, relative to the engine's capacity.
        capacity_candidates, capacity_budget: c and n at which capacity is simulated.
        run_s: how long requests arrive in one run, s.
        fewest_requests, most_requests: bounds of what `run_s` comes to.
        repeats: runs of every level and controller, each with other prompts and arrivals.
        actions, lookup, slo, charge_decisions: as in `runs.evaluate`.
        seed: draws the workloads, the order of the runs, and the predicted agreements.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: TorchEngineConfig
    workload: PromptSource
    controllers: dict[str, Controller]
    levels: dict[str, Annotated[float, Field(gt=0.0, allow_inf_nan=False)]]
    capacity_candidates: Annotated[int, Field(ge=0)] = 0
    capacity_budget: Annotated[int, Field(ge=1)] = 512
    run_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 15.0
    fewest_requests: Annotated[int, Field(ge=2)] = 20
    most_requests: Annotated[int, Field(ge=2)] = 2000
    repeats: Annotated[int, Field(ge=1)] = 3
    actions: ActionGrid = ActionGrid()
    lookup: LookupFit = LookupFit()
    slo: Targets = Targets()
    charge_decisions: Charge = "constant"
    seed: Annotated[int, Field(ge=0)] = 0

    @model_validator(mode="after")
    def _complete(self) -> "Calibration":
        if self.engine.profile is None:
            raise ValueError(
                "engine.profile must be given: the engine yaml that python -m runs.profile wrote for this engine"
            )
        if not self.controllers or not self.levels:
            raise ValueError("controllers and levels must each name at least one")
        if self.workload.stop or self.workload.sampling.temperature > 0.0:
            raise ValueError("workload.stop and workload.sampling must be left alone: output lengths are given, greedy")
        return self

    def run(self, out: Path, on_progress: Progress | None = None) -> Card:
        """Serve what is not yet served in `out`, predict everything, and return the card.

        Raises:
            CalibrationError: `out` holds another calibration.
            ValueError: engine, profile or workload are impossible; the message names the key.
        """
        assert self.engine.profile is not None
        profiled = load_profile(self.engine.profile).model_copy(update={"prefill": self.engine.prefill})
        learned = agreement_model(self.engine.profile.parent / AGREEMENT)
        tokenizer = self.engine.tokenizer()
        levels = self._levels(profiled, tokenizer, learned)
        self._claim(out, profiled, levels)
        planned = self._order()
        self._serve(out, planned, levels, profiled, tokenizer, on_progress)
        return self._card(out, planned, levels, profiled, learned)

    def _order(self) -> list[Cell]:
        """Every cell in a random order, so that a spell of other work on the machine meets no setting in particular."""
        grid = [Cell(*entry) for entry in itertools.product(self.levels, self.controllers, range(self.repeats))]
        return [grid[place] for place in np.random.default_rng(self.seed).permutation(len(grid))]

    def _levels(self, profiled: EngineConfig, tokenizer: Any, agreement: AgreementModel) -> list[Level]:
        capacity = self._capacity(profiled, tokenizer, agreement)
        log.info("simulated capacity at c = %d: %.2f requests/s", self.capacity_candidates, capacity)
        levels = []
        for name, share in self.levels.items():
            count = int(np.clip(round(share * capacity * self.run_s), self.fewest_requests, self.most_requests))
            levels.append(Level(name, share, share * capacity, count))
        return levels

    def _capacity(self, profiled: EngineConfig, tokenizer: Any, agreement: AgreementModel) -> float:
        """Requests/s that the simulator finishes while it has all it can batch, at fixed c and n."""
        count = CAPACITY_BATCHES * self.engine.max_num_seqs
        prompts = self.workload.model_copy(update={"num_requests": count, "duration_s": None}).draw_prompts(
            self.seed, tokenizer, self.engine.limits
        )
        workload = lengths_of(prompts, agreement, self.seed)
        simulator = simulated.Simulator(
            profiled, [workload], latency=load_latency(profiled.latency), ttft_target=self.slo.ttft_target
        )
        controller = Fixed(candidates=self.capacity_candidates, token_budget=self.capacity_budget)
        served = simulated.serve(simulator, workload, controller, self._plant(profiled), "off")
        # While the batch fills and empties the engine is slower than it can be.
        finish = np.sort(request_table(served.requests)["finish_s"])
        first, last = count // 4, 3 * count // 4
        return float((last - first) / (finish[last] - finish[first]))

    def _prompts(self, cell: Cell, levels: list[Level], tokenizer: Any) -> Prompts:
        level = next(level for level in levels if level.name == cell.level)
        scale = level.request_rate_rps / self._natural_rate()
        source = self.workload.model_copy(
            update={"rate_scale": scale, "num_requests": level.num_requests, "duration_s": None, "name": cell.level}
        )
        return source.draw_prompts(self.seed + 1 + cell.repeat, tokenizer, self.engine.limits)

    def _natural_rate(self) -> float:
        times = self.workload.arrivals.draw(np.random.default_rng(self.seed), ARRIVALS_FOR_RATE)
        return float((ARRIVALS_FOR_RATE - 1) / (times[-1] - times[0]))

    def _plant(self, profiled: EngineConfig, grid: ActionGrid | None = None) -> Plant:
        chosen = grid or self.actions
        return Plant(chosen, lambda: load_lookup(profiled, chosen, self.engine.limits, self.lookup))

    def _claim(self, out: Path, profiled: EngineConfig, levels: list[Level]) -> None:
        """Make `out` this calibration's, or refuse one that is another's: its runs would be mixed with these."""
        # Names of the files only: a profile that moved is still the same profile.
        settings = {
            "calibration": self.model_dump(mode="json", exclude={"repeats", "controllers", "engine"}),
            "controllers": {name: [type(one).__name__, one.label()] for name, one in self.controllers.items()},
            "engine": self.engine.model_dump(mode="json", exclude={"profile"}),
            "tables": _digest(load_latency(profiled.latency).tables),
            "levels": [level.__dict__ for level in levels],
            "files": file_digests([self.workload, list(self.controllers.values())]),
        }
        path = out / SETTINGS
        text = json.dumps(settings, indent=1) + "\n"
        if path.is_file() and path.read_text(encoding="utf-8") != text:
            raise CalibrationError(
                f"{out} holds runs of a calibration with other settings or another profile; choose another folder with "
                "hydra.run.dir=DIR, or remove it"
            )
        out.mkdir(parents=True, exist_ok=True)
        write_whole(path, text.encode())

    def _serve(
        self,
        out: Path,
        planned: list[Cell],
        levels: list[Level],
        profiled: EngineConfig,
        tokenizer: Any,
        on_progress: Progress | None,
    ) -> None:
        missing = [cell for cell in planned if not cells.is_finished(out / RUNS / cell.folder)]
        if len(missing) < len(planned):
            log.info("%d of %d real runs are there already", len(planned) - len(missing), len(planned))
        if not missing:
            return
        engine = self.engine.build(ttft_target=self.slo.ttft_target, record=True)
        plant = self._plant(profiled, live.grid_within(self.actions, engine))
        prompts = {cell: self._prompts(cell, levels, tokenizer) for cell in missing}
        total = sum(one.num_requests for one in prompts.values())
        done = 0
        for cell in missing:
            identity = {**cell.__dict__, "order": planned.index(cell), "engine": self.engine.variant}
            cells.serve(
                engine,
                prompts[cell],
                tokenizer,
                self.controllers[cell.name],
                plant,
                self.slo,
                identity,
                (out / SETTINGS).read_text(encoding="utf-8"),
                out / RUNS / cell.folder,
                _offset(on_progress, done, total),
            )
            done += prompts[cell].num_requests

    def _card(
        self, out: Path, planned: list[Cell], levels: list[Level], profiled: EngineConfig, learned: AgreementModel
    ) -> Card:
        tables = load_latency(profiled.latency).tables
        pairs, times, ran = [], [], []
        for cell in planned:
            run = cells.read(out / RUNS / cell.folder)
            again = cells.replayed(run, self.engine.limits, self.slo.ttft_target, tables)
            controller, label = self.controllers[cell.name], run.summary["run"]["label"]
            for way, drawn in self._agreements(cell, run, learned).items():
                found = [
                    cells.simulate(
                        profiled,
                        cells.simulated_workload(run, agreement),
                        controller,
                        self._plant(profiled),
                        self.slo,
                        self.charge_decisions,
                    )
                    for agreement in drawn
                ]
                pairs += pair(cell.level, label, cell.repeat, way, run.summary, cells.mean_of(found))
            times.append(again.iterations)
            ran.append(_ran(cell, run, again))
        frame = pd.DataFrame(ran).sort_values("order").reset_index(drop=True)
        ordered = pd.DataFrame(pairs)
        ordered["level"] = pd.Categorical(ordered["level"], list(self.levels))
        ordered = ordered.sort_values(["level", "label", "repeat"], kind="stable").astype({"level": str})
        return Card(
            facts=self._facts(learned, frame),
            levels=pd.DataFrame([level.__dict__ | {"repeats": self.repeats} for level in levels]).rename(
                columns={"name": "level", "num_requests": "requests"}
            ),
            pairs=ordered.reset_index(drop=True),
            iterations=pd.concat(times, ignore_index=True),
            held_out=_held_out(self.engine.profile),
            parity={"runs": len(ran), "identical": int((frame["identical"] == "yes").sum())},
            cells=frame,
            notes=_notes(frame),
        )

    def _agreements(self, cell: Cell, run: RealRun, learned: AgreementModel) -> dict[str, list[Agreement]]:
        """By way of simulating: draws from the profile's model, and what drafter and target did in the run itself."""
        output = run.requests["output_tokens"].astype(np.int32)
        numbers = np.arange(1, output.size + 1)
        seeds = np.random.default_rng([self.seed, cell.repeat]).integers(2**63, size=AGREEMENT_DRAWS).tolist()
        drawn = [learned.draw(seed, numbers, output) for seed in seeds]
        return {PREDICTED: drawn, OWN_AGREEMENTS: [run.agreement]}

    def _facts(self, learned: AgreementModel, ran: pd.DataFrame) -> dict[str, Any]:
        return {
            "engine": self.engine.variant,
            "profile": str(self.engine.profile),
            "machine": platform.processor() or platform.machine(),
            "cores": os.cpu_count(),
            "load average": f"{ran['load_average'].min():.2f} to {ran['load_average'].max():.2f}",
            "agreement": learned.describe(),
        }


@kept(4)
def agreement_model(path: Path) -> AgreementModel:
    """What predicts where drafter and target agree: the model fitted to the agreement that a profile measured; kept.

    Raises ValueError when there is no such file.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; python -m runs.profile writes it beside the engine yaml")
    measured = read_arrays(path, ("rank", "offset"))
    return MarkovAgreement.of(fit_agreement(as_log(path, measured["rank"], measured["offset"])))


def as_log(path: Path, rank: NDArray[np.uint8], offset: NDArray[np.int64]) -> AcceptanceLog:
    """Per-position agreement, rank (P,) and offset (R+1,), as the acceptance log of a drafter that is always asked on.

    A step drafts one token more than it gets accepted, so that every position after the first is observed.
    """
    turns = []
    for request, (begin, end) in enumerate(pairwise(offset.tolist())):
        missed = [*(np.flatnonzero(rank[begin + 1 : end]) + 1).tolist(), end - begin]
        accepted = np.diff([0, *missed]) - 1
        if end - begin > 1:
            drafted = accepted + (np.array(missed) < end - begin)
            turns.append(LoggedTurn(request + 1, request, "", 0, end - begin, accepted, drafted))
    return AcceptanceLog(path, turns)


def lengths_of(prompts: Prompts, agreement: AgreementModel, seed: int) -> Workload:
    """The prompts as lengths that all arrive at once, with drawn agreements: what capacity is simulated on."""
    return Workload.build(
        prompts.name,
        np.zeros(prompts.num_requests),
        [len(tokens) for tokens in prompts.tokens],
        prompts.max_tokens,
        agreement,
        seed,
    )


def _digest(tables: LatencyTables) -> str:
    sha = hashlib.sha256()
    for part in tables:
        sha.update(np.asarray(part).tobytes())
    return sha.hexdigest()


def _held_out(profile: Path | None) -> dict[str, dict[str, float]]:
    path = Path(profile or "").parent / CARD
    if not path.is_file():
        return {}
    held_out: dict[str, dict[str, float]] = read_json(path)
    return held_out


def _offset(on_progress: Progress | None, done: int, total: int) -> Progress | None:
    """One bar over all runs."""
    if on_progress is None:
        return None
    return lambda finished, _: on_progress(done + finished, total)


def _ran(cell: Cell, run: RealRun, again: cells.Replayed) -> dict[str, Any]:
    about = run.summary["run"]
    return {
        "order": about["order"],
        "level": cell.level,
        "label": about["label"],
        "repeat": cell.repeat,
        "load_average": about["load_average_after"],
        "duration_s": run.summary["duration_s"],
        "between_share": again.between_share,
        "identical": "yes" if again.identical else "no",
        "folder": f"{RUNS}/{cell.folder}",
    }


def _notes(ran: pd.DataFrame) -> list[str]:
    notes = []
    differing = ran.loc[ran["identical"] != "yes", "folder"]
    if len(differing):
        notes.append(f"Replayed with another timeline than the real one: {', '.join(differing)}.")
    return notes
