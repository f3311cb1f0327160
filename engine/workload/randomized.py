"""Domain randomisation: every seed draws another kind of traffic, so that a policy does not overfit to one."""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_validator

from engine.workload.agreement import AgreementModel, DrafterAgreement, MarkovAgreement
from engine.workload.arrivals import (
    Arrivals,
    GammaArrivals,
    OnOffArrivals,
    PoissonArrivals,
    SinusoidArrivals,
    StepArrivals,
)
from engine.workload.lengths import LengthModel, NamedLengths
from engine.workload.source import DOMAIN, Count, SyntheticSource, WorkloadSource, stream
from engine.workload.workload import Workload

LENGTHS_SAMPLED = 4096

Kind = Literal["poisson", "gamma", "sinusoid", "steps", "bursts"]
KINDS: tuple[Kind, ...] = ("poisson", "gamma", "sinusoid", "steps", "bursts")
"""Arrival processes, from steady to bursty."""

Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]


class Range(BaseModel):
    """A number between `low` and `high`, evenly in its logarithm where `log`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    low: Annotated[float, Field(allow_inf_nan=False)]
    high: Annotated[float, Field(allow_inf_nan=False)]
    log: bool = False

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        if self.low > self.high:
            raise ValueError(f"low={self.low:g} must not be above high={self.high:g}")
        if self.log and self.low <= 0.0:
            raise ValueError(f"low={self.low:g} must be above 0 with log=true")
        return self

    def draw(self, rng: np.random.Generator) -> float:
        """One number; always takes one number of the stream."""
        share = float(rng.random())
        if self.log:
            return math.exp(math.log(self.low) + share * (math.log(self.high) - math.log(self.low)))
        return self.low + share * (self.high - self.low)


class RandomizedSource(WorkloadSource):
    """Synthetic traffic whose rate, burstiness, lengths and acceptance are drawn for every seed.

    The rate is `load` times the engine's capacity, which for given lengths is taken as 1 / (mean prompt tokens /
    `prefill_rate` + mean output tokens / `decode_rate`) requests/s.

    Args:
        prefill_rate, decode_rate: tokens/s that the engine serves of prompts alone and of outputs alone.
        load: share of that capacity, averaged over the workload.
        lengths: data sets, one of which is drawn (`NamedLengths`).
        prompt_scale, output_scale: factors on their lengths.
        max_total_tokens: longest prompt and output together; longer ones lose prompt.
        kinds: relative frequency of each arrival process; 0 leaves it out.
        cv: coefficient of variation of gaps, of `gamma`.
        swing: amplitude of `sinusoid`; how far apart in logarithm the levels of `steps` are.
        peak: rate of a burst relative to capacity, of `bursts`; between bursts the rest of the load arrives evenly.
        acceptance: shift of the logit of the drafter's base acceptance.
        agreement: the drafter that is shifted.
        num_requests: requests in a workload.
    """

    name: str = "randomized"
    prefill_rate: Positive
    decode_rate: Positive
    load: Range = Range(low=0.05, high=1.2)
    lengths: Annotated[tuple[str, ...], Field(min_length=1)] = (
        "azure_conv",
        "azure_code",
        "lmsys_chat_1m",
        "arxiv",
        "sharegpt",
    )
    prompt_scale: Range = Range(low=0.7, high=1.4, log=True)
    output_scale: Range = Range(low=0.7, high=1.4, log=True)
    max_total_tokens: Annotated[int, Field(ge=2)] = 8192
    kinds: dict[Kind, Annotated[float, Field(ge=0.0)]] = Field(default_factory=lambda: dict.fromkeys(KINDS, 1.0))
    cv: Range = Range(low=1.2, high=4.0, log=True)
    swing: Range = Range(low=0.3, high=0.9)
    peak: Range = Range(low=1.5, high=3.5)
    acceptance: Range = Range(low=-0.6, high=0.6)
    agreement: SerializeAsAny[AgreementModel] = DrafterAgreement()
    num_requests: Count = 150

    @model_validator(mode="after")
    def _possible(self) -> Self:
        for name in self.lengths:
            NamedLengths.model_validate({"name": name})
        if sum(self.kinds.values()) <= 0.0:
            raise ValueError("kinds are all 0: give at least one arrival process a frequency above 0")
        for name, least in (("load", 0.0), ("prompt_scale", 0.0), ("output_scale", 0.0), ("peak", 1.0)):
            if getattr(self, name).low <= least:
                raise ValueError(f"{name}.low={getattr(self, name).low:g} must be above {least:g}")
        if not 0.0 <= self.swing.low <= self.swing.high < 1.0:
            raise ValueError(f"swing from {self.swing.low:g} to {self.swing.high:g} must lie within [0, 1)")
        return self

    @property
    def scenario(self) -> str:
        return self.name + self._suffix()

    def draw(self, seed: int) -> Workload:
        return self.drawn(seed).draw(seed)

    def drawn(self, seed: int) -> SyntheticSource:
        """Draw the traffic of this seed."""
        rng = stream(seed, DOMAIN)
        # Every quantity draws its number from the stream, used or not, so that changing one range leaves
        # the other draws as they were.
        name = self.lengths[int(rng.random() * len(self.lengths))]
        lengths = NamedLengths.model_validate(
            {
                "name": name,
                "prompt_scale": self.prompt_scale.draw(rng),
                "output_scale": self.output_scale.draw(rng),
                "max_total_tokens": self.max_total_tokens,
            }
        )
        capacity = self._capacity(lengths)
        rate = self.load.draw(rng) * capacity
        arrivals = self._arrivals(rng, rate, capacity)
        return SyntheticSource(
            name=self.name,
            rate_scale=self.rate_scale,
            arrivals=arrivals,
            lengths=lengths,
            agreement=MarkovAgreement.of(self.agreement.chain.shifted(self.acceptance.draw(rng))),
            num_requests=self.num_requests,
        )

    def _capacity(self, lengths: LengthModel) -> float:
        typical = lengths.draw(np.random.default_rng(0), LENGTHS_SAMPLED)
        prompt, output = typical.prompt_tokens.mean(), typical.output_tokens.mean()
        return float(1.0 / (prompt / self.prefill_rate + output / self.decode_rate))

    def _arrivals(self, rng: np.random.Generator, rate: float, capacity: float) -> Arrivals:
        frequency = np.array([self.kinds.get(kind, 0.0) for kind in KINDS])
        place = rng.random() * frequency.sum()
        kind = KINDS[min(int(np.searchsorted(np.cumsum(frequency), place, side="right")), len(KINDS) - 1)]
        cv, swing, peak = self.cv.draw(rng), self.swing.draw(rng), self.peak.draw(rng)
        length, phase = float(rng.random()), float(rng.random())
        levels = rng.uniform(-1.0, 1.0, 8)
        in_total = self.num_requests / rate
        if kind == "gamma":
            return GammaArrivals(rate=rate, cv=cv)
        if kind == "sinusoid":
            period = in_total * (0.25 + 0.75 * length)
            return SinusoidArrivals(mean_rate=rate, amplitude=swing, period_s=period, phase_s=phase * period)
        if kind == "steps":
            rates = np.exp(3.0 * swing * levels)
            rates *= rate / rates.mean()
            return StepArrivals(rates=rates.tolist(), durations_s=in_total / levels.size, repeat=True)
        if kind == "bursts":
            return _bursts(rate, peak * capacity, requests=10.0 + 40.0 * length)
        return PoissonArrivals(rate=rate)


def _bursts(rate: float, peak: float, requests: float) -> Arrivals:
    """Bursts of a given number of requests at `peak`, and between them a fifth of the mean rate."""
    if peak <= 1.2 * rate:
        return PoissonArrivals(rate=rate)
    quiet = 0.2 * rate
    on_s = requests / peak
    # (on peak + off quiet) / (on + off) = rate
    off_s = on_s * (peak - rate) / (rate - quiet)
    return OnOffArrivals(rate_on=peak, rate_off=quiet, on_s=on_s, off_s=off_s)
