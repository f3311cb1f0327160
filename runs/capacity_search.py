"""The highest request rate that a controller serves as promised, by bisection on `rate_scale`. No Hydra."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, model_validator

from controllers.controller import Controller
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.files import reading, write_whole
from engine.workload.source import WorkloadSource
from runs.code import code_digest
from runs.evaluation import Evaluation, LookupFit, Targets
from runs.inputs import file_digests
from runs.reporting.statistics import mean_interval
from runs.simulated import Charge

log = logging.getLogger(__name__)

PROBES = "probes.jsonl"
CAPACITY = "capacity.json"

Scale = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Share = Annotated[float, Field(gt=0.0, le=1.0)]


class CapacityError(ValueError):
    """The rate sought is not between the bounds; the message names the bound and the fix."""


@dataclass(frozen=True)
class Probe:
    """One run: how many requests of one seed's workload met the targets at one rate."""

    seed: int
    rate_scale: float
    request_rate_rps: float
    slo_attainment: float
    ttft_attainment: float
    tpot_attainment: float


@dataclass(frozen=True)
class Bracket:
    """A rate at which enough requests meet the targets, and a higher one at which they do not."""

    passes: Probe
    fails: Probe


@dataclass(frozen=True)
class Found:
    """A finished search: one bracket a seed, and the mean over seeds of the rates that pass, with its interval.

    `rps` and `rate_scale` are (mean, low, high); the bounds, a 95 % t interval over seeds, are NaN with one.
    """

    label: str
    brackets: tuple[Bracket, ...]
    rps: tuple[float, float, float]
    rate_scale: tuple[float, float, float]


class Capacity(BaseModel):
    """What is searched: the highest rate at which `share` of the requests meet both targets.

    Args:
        engine, workload, controller, actions, lookup, slo, charge_decisions: of every run, as in
            `runs.evaluation.Evaluation`; `workload.rate_scale` is what is searched.
        seeds: each draws a workload of its own, whose capacity is searched on its own.
        share: of requests that must meet both targets.
        lowest, highest: `rate_scale` between which the capacity is searched.
        tolerance: relative distance at which a rate that passes and one that fails are close enough.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: EngineConfig | TorchEngineConfig | VllmEngineConfig
    workload: WorkloadSource
    controller: Controller
    actions: ActionGrid = ActionGrid()
    lookup: LookupFit = LookupFit()
    slo: Targets = Targets()
    charge_decisions: Charge = "constant"
    seeds: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)] = (0, 1, 2, 3, 4)
    share: Share = 0.9
    lowest: Scale = 0.02
    highest: Scale = 50.0
    tolerance: Annotated[float, Field(ge=1e-4, le=0.5)] = 0.01

    @model_validator(mode="after")
    def _searchable(self) -> Self:
        if self.workload.rate_scale != 1.0:
            raise ValueError(
                f"workload.rate_scale={self.workload.rate_scale:g} is what is searched: leave it at 1, and set lowest "
                "and highest"
            )
        if not self.lowest < self.highest:
            raise ValueError(f"lowest={self.lowest:g} must be below highest={self.highest:g}")
        if len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds={list(self.seeds)} names a seed twice")
        return self

    def run(self, out: Path, progress: Callable[[str], Any]) -> Found:
        """Search every seed; runs that the folder `out` already holds are not made again.

        `progress` makes, from a description, a context manager of a function of (done, total), or of None.

        Raises:
            CapacityError: even `lowest` fails, or even `highest` passes.
            ValueError: a run is impossible; the message names row or key.
        """
        brackets: list[Bracket] = []
        with _probes(out / PROBES, self.identity) as (known, keep), progress("Probing") as on_progress:
            for seed in self.seeds:
                probed: list[Probe] = []

                def probe(scale: float, seed: int = seed, probed: list[Probe] = probed) -> Probe:
                    if (seed, scale) not in known:
                        known[seed, scale] = self._probe(seed, scale)
                        keep(known[seed, scale])
                    probed.append(known[seed, scale])
                    if on_progress is not None:
                        on_progress(len(brackets) * self.most_probes + len(probed), len(self.seeds) * self.most_probes)
                    return known[seed, scale]

                brackets.append(self._search(probe, seed))
                log.info("seed %d: %.3f requests/s", seed, brackets[-1].passes.request_rate_rps)
        over_seeds = (_over_seeds(brackets, key) for key in ("request_rate_rps", "rate_scale"))
        found = Found(self.controller.label(), tuple(brackets), *over_seeds)
        write_whole(out / CAPACITY, (json.dumps(self._document(found), indent=1, allow_nan=False) + "\n").encode())
        return found

    @property
    def most_probes(self) -> int:
        """Runs that one seed needs: both bounds, then halves of what is between them on a logarithmic scale."""
        return 2 + math.ceil(math.log2(math.log(self.highest / self.lowest) / math.log1p(self.tolerance)))

    @property
    def identity(self) -> str:
        """What a probe depends on beside its seed and rate; the share and the bounds do not change it."""
        settings = self.model_dump(mode="json", include={"engine", "actions", "lookup", "slo", "charge_decisions"})
        settings |= {"workload": [type(self.workload).__name__, self.workload.model_dump(mode="json")]}
        settings |= {"controller": repr(self.controller), "files": file_digests(self), "code": code_digest()}
        return json.dumps(settings, sort_keys=True)

    def _evaluation(self, seed: int, scale: float) -> Evaluation:
        return Evaluation(
            engine=self.engine,
            workload=self.workload.model_copy(update={"rate_scale": scale}),
            controller=self.controller,
            actions=self.actions,
            lookup=self.lookup,
            slo=self.slo,
            seed=seed,
            charge_decisions=self.charge_decisions,
        )

    def _probe(self, seed: int, scale: float) -> Probe:
        summary = self._evaluation(seed, scale).run().summary
        names = ("request_rate_rps", "slo_attainment", "ttft_attainment", "tpot_attainment")
        return Probe(seed, scale, **{name: float(summary[name]) for name in names})

    def _search(self, probe: Callable[[float], Probe], seed: int) -> Bracket:
        low, high = probe(self.lowest), probe(self.highest)
        if not self._passes(low):
            raise CapacityError(
                f"lowest={self.lowest:g}: at {low.request_rate_rps:.3g} requests/s (seed {seed}) {_attained(low)}, and "
                f"share={self.share:g} is wanted: set a lower one, or longer targets (slo.ttft_target, slo.tpot_target)"
            )
        if self._passes(high):
            raise CapacityError(
                f"highest={self.highest:g}: at {high.request_rate_rps:.3g} requests/s (seed {seed}) {_attained(high)}, "
                f"and share={self.share:g} is enough: set a higher one, or more requests (workload.num_requests)"
            )
        while high.rate_scale / low.rate_scale > 1.0 + self.tolerance:
            middle = probe(math.sqrt(low.rate_scale * high.rate_scale))
            low, high = (middle, high) if self._passes(middle) else (low, middle)
        return Bracket(low, high)

    def _passes(self, probe: Probe) -> bool:
        return probe.slo_attainment >= self.share - 1e-12

    def _document(self, found: Found) -> dict[str, Any]:
        return {
            "engine": self.engine.name,
            "workload": self.workload.scenario,
            "controller": found.label,
            "ttft_target_s": self.slo.ttft_target,
            "tpot_target_s": self.slo.tpot_target,
            "share": self.share,
            "tolerance": self.tolerance,
            **{
                f"{name}{part}": None if math.isnan(value) else value
                for name, values in (("capacity_rps", found.rps), ("rate_scale", found.rate_scale))
                for part, value in zip(("", "_low", "_high"), values, strict=True)
            },
            "seeds": [asdict(bracket) for bracket in found.brackets],
        }


def _attained(probe: Probe) -> str:
    return (
        f"{100 * probe.slo_attainment:.1f} % of requests meet both targets (TTFT {100 * probe.ttft_attainment:.1f} %, "
        f"TPOT {100 * probe.tpot_attainment:.1f} %)"
    )


def _over_seeds(brackets: list[Bracket], key: str) -> tuple[float, float, float]:
    values = [float(getattr(bracket.passes, key)) for bracket in brackets]
    return float(np.mean(values)), *mean_interval(values)


@contextmanager
def _probes(path: Path, identity: str) -> Iterator[tuple[dict[tuple[int, float], Probe], Callable[[Probe], None]]]:
    """Yields the probes that the file holds, by seed and rate, and a function that adds one to it.

    A last line that was cut off by a kill is dropped, and so are the probes of other settings or other code.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    known: dict[tuple[int, float], Probe] = {}
    title = json.dumps({"identity": identity})
    if path.is_file():
        with reading(path):
            lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
        if lines and lines[0] == title + "\n":
            with reading(path, "remove it to begin anew"):
                kept = [Probe(**json.loads(line)) for line in lines[1:] if line.endswith("\n")]
            known = {(probe.seed, probe.rate_scale): probe for probe in kept}
        else:
            log.warning("%s holds runs of other settings or other code: beginning anew", path)
    written = "".join(f"{line}\n" for line in (title, *(json.dumps(asdict(probe)) for probe in known.values())))
    write_whole(path, written.encode())
    with path.open("a", encoding="utf-8") as file:

        def keep(probe: Probe) -> None:
            file.write(json.dumps(asdict(probe)) + "\n")
            file.flush()
            os.fsync(file.fileno())

        yield known, keep
