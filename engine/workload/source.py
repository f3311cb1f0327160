"""Workload sources: validated configurations that turn a seed into a `Workload`."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from engine.workload.acceptance_log import read_acceptance_log, replay
from engine.workload.agreement import AgreementModel, DrafterAgreement
from engine.workload.arrivals import Arrivals
from engine.workload.formats import TimeUnit
from engine.workload.lengths import LengthModel
from engine.workload.records import content_digest, scenario_of, stem
from engine.workload.trace import RateMode, TooLong, ZeroOutput, prepare_trace, read_trace
from engine.workload.workload import Workload, WorkloadError

Scale = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]

# Streams of one seed. The numbers must not change: that would change all requests.
ARRIVALS, LENGTHS, AGREEMENT, PROMPTS, SAMPLING, DOMAIN = range(6)


class WorkloadSource(BaseModel, ABC):
    """One kind of workload with its settings; an unknown key, a wrong type or range is refused with the key's name.

    A request's agreements depend only on the seed and its number in the source, not on `rate_scale`: they are the same
    at every load.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    rate_scale: Scale = 1.0
    """Request rate relative to the source's own: 0.5 is half the rate."""

    @abstractmethod
    def draw(self, seed: int) -> Workload:
        """The workload for this seed: the same settings and seed always give the same arrays."""

    @property
    @abstractmethod
    def scenario(self) -> str:
        """A short name of the workload without its seed, for tables: runs with equal names are comparable."""

    @property
    def contents(self) -> dict[str, str]:
        """sha256 of each file that the settings name, by path: an edited file is another workload."""
        return {str(path): content_digest(path) for path in _paths(self)}

    def _provenance(self, seed: int) -> dict[str, Any]:
        return {"source": type(self).__name__, "seed": seed, "settings": self.model_dump(mode="json")}

    def _suffix(self) -> str:
        return "" if self.rate_scale == 1.0 else f" x{self.rate_scale:g}"


class TraceSource(WorkloadSource):
    """Requests of a trace file (`trace.read_trace`, `trace.prepare_trace`): the seed draws their agreement only."""

    path: Path
    rate_mode: RateMode = "stretch"
    start_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 0.0
    duration_s: Seconds | None = None
    max_requests: Count | None = None
    too_long: TooLong = "error"
    max_prompt_tokens: Count | None = None
    max_output_tokens: Count | None = None
    max_total_tokens: Annotated[int, Field(ge=2)] | None = None
    zero_output: ZeroOutput = "error"
    time_unit: TimeUnit | None = None
    """Of the file's times; None: the format's, or inferred from the numbers (`formats`)."""
    spread_ticks: bool | None = None
    """Spreads arrivals that a coarse clock logged over its ticks (`trace.read_trace`)."""
    thin_seed: Annotated[int, Field(ge=0)] = 0
    agreement: SerializeAsAny[AgreementModel] = DrafterAgreement()

    @model_validator(mode="after")
    def _thinnable(self) -> Self:
        if self.rate_mode == "thin" and self.rate_scale > 1.0:
            raise ValueError(
                f"rate_scale={self.rate_scale:g} with rate_mode=thin: thinning can only remove requests; "
                "set rate_mode=stretch to compress time instead"
            )
        return self

    @property
    def scenario(self) -> str:
        settings = {
            name: getattr(self, name)
            for name in type(self).model_fields
            if name not in {"path", "rate_scale", "agreement"}
            and getattr(self, name) != type(self).model_fields[name].default
        }
        options = "".join(f" {name}={value}" for name, value in settings.items())
        return f"{scenario_of(self.path)}{options}{self._suffix()}"

    def draw(self, seed: int) -> Workload:
        """The recorded requests; `seed` draws their agreements, which are not recorded."""
        trace = prepare_trace(
            read_trace(self.path, self.zero_output, self.time_unit, self.spread_ticks),
            start_s=self.start_s,
            duration_s=self.duration_s,
            rate_scale=self.rate_scale,
            rate_mode=self.rate_mode,
            max_requests=self.max_requests,
            too_long=self.too_long,
            max_prompt_tokens=self.max_prompt_tokens,
            max_output_tokens=self.max_output_tokens,
            max_total_tokens=self.max_total_tokens,
            thin_seed=self.thin_seed,
        )
        return Workload.build(
            stem(self.path),
            trace.arrival,
            trace.prompt_tokens,
            trace.output_tokens,
            self.agreement,
            stream(seed, AGREEMENT),
            self._provenance(seed),
            source_row=trace.row,
        )


class SyntheticSource(WorkloadSource):
    """Arrivals x lengths x agreement, each from its own stream of the seed: changing one keeps the others' draws.

    `num_requests` or `duration_s` bounds the workload (both: whichever ends first). `rate_scale` stretches time, the
    schedule of a time-varying rate included, so the requests are the same at every scale; `duration_s` counts before
    scaling.
    """

    name: str = "synthetic"
    arrivals: SerializeAsAny[Arrivals]
    lengths: SerializeAsAny[LengthModel]
    agreement: SerializeAsAny[AgreementModel] = DrafterAgreement()
    num_requests: Count | None = None
    duration_s: Seconds | None = None

    @model_validator(mode="after")
    def _bounded(self) -> Self:
        if self.num_requests is None and self.duration_s is None:
            raise ValueError("set num_requests or duration_s: how long should requests arrive?")
        return self

    @property
    def scenario(self) -> str:
        rate = getattr(self.arrivals, "rate", None)
        called = " of ".join([self.name, *(scenario_of(path) for path in _paths(self))])
        if rate is None:
            return called + self._suffix()
        return f"{called} {rate * self.rate_scale:g}/s"

    def draw(self, seed: int) -> Workload:
        arrival = self.arrivals.draw(stream(seed, ARRIVALS), self.num_requests, self.duration_s)
        lengths = self.lengths.draw(stream(seed, LENGTHS), arrival.size)
        return Workload.build(
            self.name,
            arrival / self.rate_scale,
            lengths.prompt_tokens,
            lengths.output_tokens,
            self.agreement,
            stream(seed, AGREEMENT),
            self._provenance(seed),
        )


class AcceptanceLogSource(WorkloadSource):
    """Logged turns as requests: agreement and output lengths as recorded, arrivals (and prompts) drawn.

    `order` cycles through the turns in file order or draws them with replacement from the seed. See
    `acceptance_log.replay` for how a log becomes agreement, position by position.
    """

    path: Path
    arrivals: SerializeAsAny[Arrivals]
    lengths: SerializeAsAny[LengthModel]
    """Gives the prompt lengths; the output lengths are the log's."""
    order: Annotated[str, Field(pattern="^(cyclic|random)$")] = "cyclic"
    depth: Count | None = None
    """Deepest draft of a log without `k_drafted` (None: the deepest acceptance in it)."""
    fill: SerializeAsAny[AgreementModel] = DrafterAgreement()
    """Draws ranks, confidence and the agreement of positions the log did not observe."""
    num_requests: Count | None = None
    duration_s: Seconds | None = None

    @property
    def scenario(self) -> str:
        return f"{scenario_of(self.path)} replay{self._suffix()}"

    def draw(self, seed: int) -> Workload:
        log = read_acceptance_log(self.path, self.depth)
        bound = len(log.turns) if self.num_requests is None and self.duration_s is None else self.num_requests
        arrival = self.arrivals.draw(stream(seed, ARRIVALS), bound, self.duration_s)
        if self.order == "cyclic":
            turn = np.arange(arrival.size) % len(log.turns)
        else:
            turn = stream(seed, LENGTHS, 1).integers(len(log.turns), size=arrival.size)
        prompt = self.lengths.draw(stream(seed, LENGTHS), arrival.size).prompt_tokens
        return replay(
            log, turn, arrival / self.rate_scale, prompt, self.fill, stream(seed, AGREEMENT), self._provenance(seed)
        )


def stream(seed: int, *key: int) -> np.random.Generator:
    """The random stream of this seed for one purpose (`ARRIVALS`, ...)."""
    if seed < 0 or not math.isfinite(seed):
        raise WorkloadError(f"seed={seed} must be a non-negative whole number")
    return np.random.default_rng(np.random.SeedSequence(seed, spawn_key=key))


def _paths(settings: BaseModel) -> Iterator[Path]:
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, Path):
            yield value
        elif isinstance(value, BaseModel):
            yield from _paths(value)
