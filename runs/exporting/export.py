"""One export: a controller serves a workload, and becomes a schedule that a serving engine loads. No Hydra."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.backends.real_config import RealEngineConfig
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES
from engine.files import write_whole
from engine.workload.agreement import AgreementModel, DrafterAgreement
from engine.workload.markov import FittedDrafter
from engine.workload.source import WorkloadSource
from runs.code import code_digest
from runs.evaluation import Drawing, Evaluation, LookupFit, Result, Targets, draw, load_latency
from runs.exporting.formats import FORMATS, Deployment, DraftKind, Format, command_line
from runs.exporting.playback import Playback
from runs.exporting.schedule import Schedule, ScheduleError, merged
from runs.exporting.search import SAME, Choice, Ranges, Seen, cheapest_by_size, search
from runs.reporting.statistics import PairedDifference, paired_difference
from runs.simulated import Charge

log = logging.getLogger(__name__)

SCHEDULE = "schedule.json"
CONTROLLER = "controller.yaml"
COMMAND = "command.sh"

NO_SPECULATION = Fixed(candidates=0, token_budget=512)
METRICS = ("objective", "tpot_mean_s", "ttft_attainment")
EXPORTED, SOURCE, WITHOUT, PAIR = "exported", "source", "without speculation", "best fixed pair"

LEAST_SHARE = 0.01
"""Share of the decode time below which playing a range back says nothing about its c."""
RISE = 0.005
"""Relative gain in the objective for which c may rise with the batch size."""
ENOUGH = 0.9
"""Share of requests on time below which a workload is more than the engine can serve, as `runs.capacity` has it."""

KINDS: dict[FittedDrafter, DraftKind] = {"draft68m": "draft_model", "eagle1": "eagle", "medusa": "medusa"}
WORDS: dict[DraftKind, str] = {
    "draft_model": "a draft model", "eagle": "an EAGLE head", "medusa": "Medusa heads", "ngram": "prompt lookup",
}  # fmt: skip

Seeds = Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
Size = Annotated[int, Field(ge=1)]
Budget = Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)]


@dataclass(frozen=True)
class Exported:
    """A finished export.

    runs: one row a run and seed of the report, told apart by `who` (`EXPORTED`, ...) · share: of decode time by entry
    of the schedule, while the controller chose · gains: paired differences by who is compared with and by metric ·
    labels: what each of `who` is called · warnings: why the schedule may not do what is reported, a line each.
    """

    schedule: Schedule
    command: str
    runs: pd.DataFrame
    share: tuple[float, ...]
    gains: dict[str, dict[str, PairedDifference]]
    labels: dict[str, str]
    warnings: tuple[str, ...]

    def mean(self, who: str, metric: str) -> float:
        """A metric's mean over the seeds of the report."""
        return float(self.runs.loc[self.runs["who"] == who, metric].mean())


class Export(BaseModel):
    """What is exported, from which controller, for which engine.

    The controller serves the requests of `search_seeds` with its iterations recorded. What it chose for most of the
    time that a batch size decoded is where a coordinate search begins (`runs.exporting.search`), beside the c of the
    least predicted decode time a token, the best constant c, and none at all; the search plays schedules back on the
    same requests, changes c of one range of batch sizes or the budget at a time, and keeps what lowers the objective.
    Ranges that hold less than `LEAST_SHARE` of the decode time get the c of the least predicted decode time a token,
    and no more than smaller ones have; c rises with the batch size only where this lowers the objective by more than
    `RISE`. What is reported is the exported file, read back and played back on the requests of `seeds`,
    which neither the search nor the choice of the best fixed pair has seen.

    Args:
        engine, workload, controller, actions, lookup, slo, charge_decisions: as in `runs.evaluation.Evaluation`. The
            workload's load decides what is best: a schedule holds for traffic like it.
        format: the engine that loads it.
        seeds: requests of the report.
        search_seeds: requests that the schedule, and the best fixed pair, are chosen on.
        batch_sizes: highest size of each range that may get a c of its own; the last range ends at `max_num_seqs`.
        budgets: totals of tokens in an iteration that are tried.
        most_playbacks: schedules tried at most.
        least_attainment: share of requests that must meet the TTFT target under the exported schedule; a workload that
            overloads the engine says nothing of how to serve it well.
        model, drafter, method: what the command line names; method None is the engine's word for the drafter that is
            simulated.
        parallel_drafting: whether vLLM's drafter proposes all candidates at once (`parallel_drafting` of its config).
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: EngineConfig | TorchEngineConfig | VllmEngineConfig
    workload: WorkloadSource
    controller: Controller
    format: Literal["vllm", "sglang", "trtllm", "llamacpp"] = "vllm"
    actions: ActionGrid = ActionGrid()
    lookup: LookupFit = LookupFit()
    slo: Targets = Targets()
    charge_decisions: Charge = "constant"
    seeds: Seeds = (0, 1, 2, 3, 4)
    search_seeds: Seeds = (100, 101)
    batch_sizes: Annotated[tuple[Size, ...], Field(min_length=1)] = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192)
    budgets: Annotated[tuple[Budget, ...], Field(min_length=1)] = (256, 384, 512, 768, 1024, 1536, 2048, 4096, 8192)
    most_playbacks: Annotated[int, Field(ge=1)] = 200
    least_attainment: Annotated[float, Field(ge=0.0, le=1.0)] = 0.5
    model: str = "MODEL"
    drafter: str = "DRAFTER"
    method: str | None = None
    parallel_drafting: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if isinstance(self.engine, RealEngineConfig):
            raise ValueError(
                f"engine={self.engine.name} runs for real, and schedules are played back in the simulator: measure it "
                "with python -m runs.profile, then give engine=PATH of the engine.yaml that it writes"
            )
        if self.controller.peeks:
            raise ValueError(f"controller={self.controller.label()}: it peeks, so no schedule could choose as it does")
        if self.parallel_drafting and self.format != "vllm":
            raise ValueError(f"parallel_drafting is an option of vLLM's, not of format={self.format}")
        for name in ("batch_sizes", "budgets"):
            values = getattr(self, name)
            if list(values) != sorted(set(values)):
                raise ValueError(f"{name}={list(values)} must be strictly increasing")
        shared = sorted(set(self.seeds) & set(self.search_seeds))
        if shared:
            raise ValueError(
                f"search_seeds={list(self.search_seeds)} and seeds={list(self.seeds)} share {shared}: a gain on "
                "requests that the schedule was chosen on would be too high"
            )
        return self

    def run(self, out: Path, progress: Callable[[str], Any]) -> Exported:
        """Search, validate, play back, and write the folder `out`; nothing is written of a schedule that is refused.

        `progress` makes, from a description, a context manager of a function of (done, total), or of None.

        Raises:
            ScheduleError: no schedule that the format can tell its engine was found.
            ValueError: a run is impossible, or the workload overloads the engine; the message names row or key.
        """
        with progress("Searching") as on_progress:
            schedule, share, pair, way = self._search(on_progress)
        deployment = self._deployment
        files = way.files(schedule, deployment)
        words = way.command(schedule, deployment, str(out))
        player = way.controller(words, files)
        controllers = {EXPORTED: player, SOURCE: self.controller, WITHOUT: NO_SPECULATION, PAIR: pair}
        with progress("Playing back") as on_progress:
            runs = self._report(controllers, on_progress)
        on_time = float(runs.loc[runs["who"] == EXPORTED, "ttft_attainment"].mean())
        if on_time < self.least_attainment:
            raise ValueError(
                f"{100 * on_time:.1f} % of the requests meet ttft_target={self.slo.ttft_target:g} s under the best "
                f"schedule, less than least_attainment={self.least_attainment:g}: {self.workload.scenario} overloads "
                f"{self._simulated.name}, and a schedule for it is none for traffic that can be served. Lower "
                "workload.rate_scale, or set least_attainment=0 to export it all the same"
            )
        exported = Exported(
            schedule,
            command_line(words),
            runs,
            share,
            {who: _gains(runs, who) for who in (SOURCE, WITHOUT, PAIR)},
            {who: controller.label() for who, controller in controllers.items()},
            tuple(self._doubts(schedule, share, way, on_time)),
        )
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_whole(out / name, content.encode())
        write_whole(out / CONTROLLER, _controller_yaml(player).encode())
        write_whole(out / COMMAND, f"{exported.command}\n".encode())
        document = json.dumps(self._document(exported), indent=1, allow_nan=False)
        write_whole(out / SCHEDULE, f"{document}\n".encode())
        return exported

    @property
    def _simulated(self) -> EngineConfig:
        assert isinstance(self.engine, EngineConfig)
        return self.engine

    @property
    def _kv_tokens(self) -> int:
        limits = self._simulated.limits(load_latency(self._simulated.latency))
        return limits.total_blocks * limits.block_size

    @property
    def _agreement(self) -> AgreementModel | None:
        """What says where drafter and target agree, of workloads that have such a model."""
        return getattr(self.workload, "agreement", getattr(self.workload, "fill", None))

    @property
    def _simulated_drafter(self) -> DraftKind:
        """The kind of drafter whose acceptance is simulated; the kind that was timed where the workload names none."""
        if isinstance(self._agreement, DrafterAgreement):
            return KINDS[self._agreement.drafter]
        return self._timed_drafter

    @property
    def _timed_drafter(self) -> DraftKind:
        return "ngram" if load_latency(self._simulated.latency).drafter_model == "ngram" else "draft_model"

    @property
    def _deployment(self) -> Deployment:
        return Deployment(
            self.model, self.drafter, self.method, self._kv_tokens, self._simulated_drafter, self.parallel_drafting
        )

    def _doubts(self, schedule: Schedule, share: Sequence[float], way: Format, on_time: float) -> Iterator[str]:
        """Why the schedule may not do in the engine what it does here, a line each."""
        kind, timed = self._simulated_drafter, self._timed_drafter
        drafter = load_latency(self._simulated.latency).drafter_model or "a model"
        method = way.method(self._deployment)
        if schedule.speculates and method != way.methods.get(kind):
            yield (
                f"the command line says {method}, but {WORDS[kind]} was simulated, with the times of {drafter}: the "
                "schedule and its gains are that drafter's"
            )
        if schedule.speculates and kind != timed:
            yield (
                f"the acceptance is that of {WORDS[kind]}, the times are those of {drafter}: choose "
                "workload/agreement and engine of one drafter"
            )
        held_by = dict(zip(schedule.entries, share, strict=True))
        for one, other in schedule.rises:
            yield (
                f"c rises from {one[2]} for batches of {one[0]} to {one[1]} ({100 * held_by[one]:.0f} % of the decode "
                f"time) to {other[2]} for {other[0]} to {other[1]} ({100 * held_by[other]:.0f} %), because without "
                f"rises the objective is more than {100 * RISE:.1f} % higher on the requests of the search; see "
                "whether other search_seeds agree"
            )
        for (low, high, candidates), held in held_by.items():
            if held < LEAST_SHARE:
                yield (
                    f"c = {candidates} for batches of {low} to {high} is predicted, not tried: the workload spends "
                    f"{100 * held:.1f} % of its decode time there"
                )
        if on_time < ENOUGH:
            yield (
                f"only {100 * on_time:.1f} % of the requests meet the TTFT target: the workload is more than the "
                "engine can serve, and a schedule for it is one for overload"
            )

    @property
    def _most_candidates(self) -> int:
        return min(max(self.actions.candidate_choices), MAX_CANDIDATES)

    def _search(self, on_progress: Any) -> tuple[Schedule, tuple[float, ...], Fixed, Format]:
        """The best schedule on the search's requests, the share of decode time by its entries, the best fixed pair."""
        way = FORMATS[self.format]
        engine = self._simulated
        latency = load_latency(engine.latency)
        ranges = Ranges.up_to(() if way.one_length else self.batch_sizes, engine.max_num_seqs)
        iterations = np.concatenate([self._run(self.controller, seed).iterations for seed in self.search_seeds])
        workloads = [
            draw(Drawing(self.workload.model_dump_json(), type(self.workload).__name__, seed, self.workload))
            for seed in self.search_seeds
        ]
        playback = Playback(engine, latency, workloads, self.actions, self.slo, self.charge_decisions)
        pair, _ = playback.best_fixed(self.actions)
        seen = Seen.of(iterations, ranges)
        tokens = playback.tokens_per_iteration(self._most_candidates)
        predicted = cheapest_by_size(latency, ranges, tokens, seen.kv_tokens)
        reached = (seen.candidates >= 0) & (seen.seconds >= LEAST_SHARE * seen.seconds.sum())
        if way.one_length:
            predicted = np.array([pair.candidates])
        budget = min(self.budgets, key=lambda total: abs(math.log(total / seen.total_budget)))
        starts = [
            Choice(tuple(int(c) for c in np.where(reached, chosen, predicted)), budget)
            for chosen in (seen.candidates, predicted, np.full(reached.size, pair.candidates), np.zeros(reached.size))
        ]
        done = 0

        def schedule_of(choice: Choice) -> Schedule:
            return self._schedule(choice, ranges, reached, way)

        def score(choice: Choice) -> float:
            nonlocal done
            done += 1
            if on_progress is not None:
                on_progress(done, self.most_playbacks)
            try:
                schedule = schedule_of(choice)
            except ScheduleError:
                return math.inf
            return playback.objective(self._player(way, schedule))

        order = [int(place) for place in np.argsort(-seen.seconds, kind="stable") if reached[place]]
        choice, found = search(score, starts, self.budgets, self._most_candidates, order, self.most_playbacks)
        level = replace(choice, candidates=tuple(np.minimum.accumulate(choice.candidates).tolist()))
        if level != choice and math.isfinite(found) and score(level) <= found * (1.0 + RISE):
            choice = level
        schedule = schedule_of(choice)
        for other in way.alternatives():
            if playback.objective(self._player(other, schedule)) < found * (1.0 - SAME):
                way = other
        log.info("%d schedules tried: objective %.4f on the requests of the search", done, found)
        return schedule, _share(schedule, iterations), pair, way

    def _schedule(self, choice: Choice, ranges: Ranges, reached: NDArray[np.bool_], way: Format) -> Schedule:
        """The schedule of a choice; sizes never reached keep to budget and smaller sizes. Raises ScheduleError."""
        chosen: list[int] = []
        for candidates, here, end in zip(choice.candidates, reached, ranges.ends, strict=True):
            room = candidates if here else min(candidates, choice.total_budget // end - 1, *chosen[-1:])
            chosen.append(max(0, room))
        if way.first_is_longest:
            chosen[0] = max(chosen)
        return Schedule(
            merged(ranges.ends, chosen),
            choice.total_budget,
            self._most_candidates,
            self._simulated.max_num_seqs,
            way.draft_slots(max(chosen), self._deployment) if max(chosen) > 0 else 0,
        )

    def _player(self, way: Format, schedule: Schedule) -> Controller:
        deployment = self._deployment
        return way.controller(way.command(schedule, deployment, ""), way.files(schedule, deployment))

    def _run(self, controller: Controller, seed: int) -> Result:
        return Evaluation(
            engine=self.engine,
            workload=self.workload,
            controller=controller,
            actions=self.actions,
            lookup=self.lookup,
            slo=self.slo,
            seed=seed,
            charge_decisions=self.charge_decisions,
            record_iterations=True,
        ).run()

    def _report(self, controllers: dict[str, Controller], on_progress: Any) -> pd.DataFrame:
        rows = []
        for who, controller in controllers.items():
            for seed in self.seeds:
                summary = self._run(controller, seed).summary
                run = summary.pop("run")
                rows.append({"who": who, "folder": who, **run, **summary})
                if on_progress is not None:
                    on_progress(len(rows), len(controllers) * len(self.seeds))
        return pd.DataFrame(rows)

    def _document(self, exported: Exported) -> dict[str, Any]:
        schedule = exported.schedule
        return {
            "format": self.format,
            "engine": self._simulated.variant,
            "workload": self.workload.scenario,
            "controller": exported.labels[SOURCE],
            "entries": [list(entry) for entry in schedule.entries],
            "total_budget": schedule.total_budget,
            "share_of_decode_time": [round(share, 4) for share in exported.share],
            "chosen_by": ["playback" if share >= LEAST_SHARE else "prediction" for share in exported.share],
            "warnings": list(exported.warnings),
            "ttft_target_s": self.slo.ttft_target,
            "tpot_target_s": self.slo.tpot_target,
            "seeds": list(self.seeds),
            "search_seeds": list(self.search_seeds),
            "means": {
                who: {"label": label, **{metric: exported.mean(who, metric) for metric in METRICS}}
                for who, label in exported.labels.items()
            },
            "exported_against": {
                who: {metric: _plain(paired) for metric, paired in gains.items()}
                for who, gains in exported.gains.items()
            },
            "code": code_digest(),
        }


def _share(schedule: Schedule, iterations: NDArray[np.void]) -> tuple[float, ...]:
    """Share of the time with decodes that was spent in each entry's batch sizes; zero where nothing decoded."""
    size, seconds = iterations["num_decodes"], iterations["end_s"] - iterations["start_s"]
    spent = np.array([seconds[(size >= low) & (size <= high)].sum() for low, high, _ in schedule.entries])
    return tuple((spent / (spent.sum() or 1.0)).tolist())


def _gains(runs: pd.DataFrame, against: str) -> dict[str, PairedDifference]:
    """The exported schedule minus another, seed by seed, by metric."""
    one, other = (runs[runs["who"] == who] for who in (EXPORTED, against))
    paired = {metric: paired_difference(one, other, metric) for metric in METRICS}
    return {metric: found for metric, found in paired.items() if found is not None}


def _plain(paired: PairedDifference) -> dict[str, Any]:
    return {
        name: None if isinstance(value, float) and math.isnan(value) else value
        for name, value in asdict(paired).items()
    }


def _controller_yaml(controller: Controller) -> str:
    """What `controller=PATH` takes in every app."""
    from pydantic import RootModel

    kind = type(controller)
    settings = RootModel[kind](controller).model_dump(mode="json")  # type: ignore[valid-type]
    return yaml.safe_dump({"_target_": f"{kind.__module__}.{kind.__qualname__}", **settings}, sort_keys=False)
