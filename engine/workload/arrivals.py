"""Arrival processes: renewal processes under a constant or a time-varying rate, drawn exactly by time change."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Annotated, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.workload.workload import WorkloadError

Rate = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
RateOrZero = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
Seconds = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Times = NDArray[np.float64]


class Arrivals(BaseModel, ABC):
    """Draws arrival times in seconds, increasing from 0."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    def draw(self, rng: np.random.Generator, num_requests: int | None = None, duration_s: float | None = None) -> Times:
        """Arrival times of the first `num_requests`, or of all in [0, duration_s); both given: whichever ends first.

        With one seed, a longer draw begins with the shorter one. Raises `WorkloadError` if neither is given, or if
        so many requests never arrive.
        """
        if num_requests is None and duration_s is None:
            raise WorkloadError("set workload.num_requests or workload.duration_s: how long should requests arrive?")
        if num_requests is not None and num_requests < 1:
            raise WorkloadError(f"workload.num_requests={num_requests} must be at least 1")
        if duration_s is not None and not (math.isfinite(duration_s) and duration_s > 0):
            raise WorkloadError(f"workload.duration_s={duration_s} must be a positive number of seconds")
        return self._draw(rng, num_requests, duration_s)

    @abstractmethod
    def _draw(self, rng: np.random.Generator, num_requests: int | None, duration_s: float | None) -> Times: ...


class RateArrivals(Arrivals):
    """A stationary renewal process of unit rate, seen through the clock `expected(t)` = the integral of the rate.

    `cv` is the coefficient of variation of the gaps in that clock: 1 gives the (inhomogeneous) Poisson process, above
    1 Gamma-distributed bursts, below 1 more regular traffic. The first gap is drawn from the equilibrium law, so that
    the mean number of arrivals by t is exactly `expected(t)`.
    """

    cv: Annotated[float, Field(gt=0.0, le=100.0)] = 1.0

    @abstractmethod
    def expected(self, time_s: Times) -> Times:
        """Expected number of arrivals by each time; non-decreasing from 0."""

    @abstractmethod
    def time_of(self, expected: Times) -> Times:
        """The earliest time by which this number of arrivals is expected: the inverse of `expected`."""

    @property
    def expected_in_total(self) -> float:
        """Arrivals ever expected: infinite unless the rate ends at zero for good."""
        return math.inf

    def _draw(self, rng: np.random.Generator, num_requests: int | None, duration_s: float | None) -> Times:
        end = self.expected_in_total
        if duration_s is not None:
            end = min(end, float(self.expected(np.array([duration_s]))[0]))
        shape = self.cv**-2
        pieces = [np.array([rng.random() * rng.standard_gamma(shape + 1.0) / shape])]
        last, drawn = float(pieces[0][0]), 1
        while last < end and (num_requests is None or drawn < num_requests):
            # A constant piece length makes rounding independent of the length of the draw.
            pieces.append(last + np.cumsum(rng.standard_gamma(shape, 1024)) / shape)
            last, drawn = float(pieces[-1][-1]), drawn + 1024
        clock = np.concatenate(pieces)
        clock = clock[clock < end]
        if num_requests is not None:
            if clock.size < num_requests and duration_s is None:
                raise WorkloadError(
                    f"workload.num_requests={num_requests}: only {clock.size} requests arrive before the rate of "
                    f"{type(self).__name__} falls to 0 for good; repeat the schedule or set workload.duration_s"
                )
            clock = clock[:num_requests]
        if clock.size == 0:
            raise WorkloadError(
                f"{type(self).__name__}: no request arrives within workload.duration_s={duration_s} "
                f"({end:.3g} expected); lengthen it or raise the rate"
            )
        return self.time_of(clock)


class PoissonArrivals(RateArrivals):
    """Independent arrivals at `rate` requests/s."""

    rate: Rate

    def expected(self, time_s: Times) -> Times:
        return self.rate * time_s

    def time_of(self, expected: Times) -> Times:
        return expected / self.rate


class GammaArrivals(PoissonArrivals):
    """Gamma-distributed gaps at `rate` requests/s: the bursty arrivals of production traces (`cv` > 1)."""

    cv: Annotated[float, Field(gt=0.0, le=100.0)]


class StepArrivals(RateArrivals):
    """Piecewise constant rate: `rates[i]` requests/s for `durations_s[i]` seconds, then over again if `repeat`.

    Without `repeat` the last rate stays. A rate of 0 is a pause.
    """

    rates: Annotated[list[RateOrZero], Field(min_length=1)]
    durations_s: Annotated[list[Seconds], Field(min_length=1)] | Seconds
    repeat: bool = False

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if isinstance(self.durations_s, list) and len(self.durations_s) != len(self.rates):
            raise ValueError(f"durations_s has {len(self.durations_s)} entries for {len(self.rates)} rates")
        if max(self.rates) <= 0.0:
            raise ValueError("rates are all 0: no request would ever arrive")
        return self

    @property
    def expected_in_total(self) -> float:
        if self.repeat or self.rates[-1] > 0.0:
            return math.inf
        return float(self._knots()[1][-1])

    def expected(self, time_s: Times) -> Times:
        times, counts = self._knots()
        if self.repeat:
            cycles, rest = np.divmod(time_s, times[-1])
            return cycles * counts[-1] + np.interp(rest, times, counts)
        after = np.maximum(time_s - times[-1], 0.0) * self.rates[-1]
        return np.interp(time_s, times, counts) + after

    def time_of(self, expected: Times) -> Times:
        times, counts = self._knots()
        if self.repeat:
            cycles, rest = np.divmod(expected, counts[-1])
            return cycles * times[-1] + _inverse(rest, times, counts)
        beyond = np.maximum(expected - counts[-1], 0.0)
        return _inverse(expected, times, counts) + (beyond / self.rates[-1] if self.rates[-1] > 0.0 else 0.0)

    def _knots(self) -> tuple[Times, Times]:
        durations = np.broadcast_to(np.asarray(self.durations_s, dtype=np.float64), len(self.rates))
        steps = np.stack((durations, durations * np.array(self.rates)), axis=1)
        times, counts = np.concatenate((np.zeros((1, 2)), np.cumsum(steps, axis=0))).T
        return times, counts


class OnOffArrivals(RateArrivals):
    """`rate_on` requests/s for `on_s` seconds, then `rate_off` for `off_s`, over and over."""

    rate_on: Rate
    rate_off: RateOrZero = 0.0
    on_s: Seconds
    off_s: Seconds

    def expected(self, time_s: Times) -> Times:
        return self._schedule().expected(time_s)

    def time_of(self, expected: Times) -> Times:
        return self._schedule().time_of(expected)

    def _schedule(self) -> StepArrivals:
        return StepArrivals(
            rates=[self.rate_on, self.rate_off], durations_s=[self.on_s, self.off_s], repeat=True, cv=self.cv
        )


class RampArrivals(RateArrivals):
    """The rate moves in a straight line from `start_rate` to `end_rate` requests/s in `ramp_s`, then stays."""

    start_rate: RateOrZero
    end_rate: Rate
    ramp_s: Seconds

    def expected(self, time_s: Times) -> Times:
        ramp = np.minimum(time_s, self.ramp_s)
        slope = (self.end_rate - self.start_rate) / self.ramp_s
        return self.start_rate * ramp + 0.5 * slope * ramp**2 + self.end_rate * (time_s - ramp)

    def time_of(self, expected: Times) -> Times:
        top = 0.5 * (self.start_rate + self.end_rate) * self.ramp_s
        inside = np.minimum(expected, top)
        slope = (self.end_rate - self.start_rate) / self.ramp_s
        # The stable form of the quadratic's root; it also covers slope 0.
        root = np.sqrt(np.maximum(self.start_rate**2 + 2.0 * slope * inside, 0.0))
        denominator = np.where(inside > 0.0, self.start_rate + root, 1.0)
        return 2.0 * inside / denominator + (expected - inside) / self.end_rate


class SinusoidArrivals(RateArrivals):
    """mean_rate * (1 + amplitude * sin(2 pi (t + phase_s) / period_s)) requests/s: a day, made as short as you like."""

    mean_rate: Rate
    amplitude: Annotated[float, Field(ge=0.0, le=1.0)]
    period_s: Seconds
    phase_s: Annotated[float, Field(allow_inf_nan=False)] = 0.0

    def expected(self, time_s: Times) -> Times:
        omega = 2.0 * math.pi / self.period_s
        wave = np.cos(omega * self.phase_s) - np.cos(omega * (time_s + self.phase_s))
        return self.mean_rate * (time_s + self.amplitude / omega * wave)

    def time_of(self, expected: Times) -> Times:
        # expected(t) is within amplitude * mean_rate * period / pi of mean_rate * t: bisect that bracket.
        reach = self.amplitude * self.period_s / math.pi
        low = np.maximum(expected / self.mean_rate - reach, 0.0)
        high = expected / self.mean_rate + reach
        for _ in range(60):
            middle = 0.5 * (low + high)
            before = self.expected(middle) < expected
            low, high = np.where(before, middle, low), np.where(before, high, middle)
        return high


class ProbabilityArrivals(Arrivals):
    """The poster's "synthetic request probability per second": each slot holds one request with the given probability.

    `probability` is a number, or one number per level, each lasting `level_s` seconds, the last one staying unless
    `repeat`. A slot lasts `slot_s` (1 s; shorten it for rates above 1/s) and its request comes uniformly within it.
    """

    probability: Annotated[list[Probability], Field(min_length=1)] | Probability
    level_s: Seconds = 60.0
    slot_s: Seconds = 1.0
    repeat: bool = False

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if max(self._levels()) <= 0.0:
            raise ValueError("probability is 0 throughout: no request would ever arrive")
        return self

    def _draw(self, rng: np.random.Generator, num_requests: int | None, duration_s: float | None) -> Times:
        levels = np.array(self._levels())
        slots = math.inf if duration_s is None else math.ceil(duration_s / self.slot_s)
        if not self.repeat and levels[-1] == 0.0:
            slots = min(slots, math.ceil(levels.size * self.level_s / self.slot_s))
        found: list[Times] = []
        count, begin = 0, 0
        while begin < slots and (num_requests is None or count < num_requests):
            slot = np.arange(begin, min(begin + 4096, slots))
            luck = rng.random((slot.size, 2))
            level = (slot * self.slot_s // self.level_s).astype(np.int64)
            level = level % levels.size if self.repeat else np.minimum(level, levels.size - 1)
            hit = luck[:, 0] < levels[level]
            found.append((slot[hit] + luck[hit, 1]) * self.slot_s)
            count += found[-1].size
            begin += slot.size
        times = np.concatenate(found)
        if duration_s is not None:
            times = times[times < duration_s]
        if num_requests is not None and times.size < num_requests and duration_s is None:
            raise WorkloadError(
                f"workload.num_requests={num_requests}: only {times.size} requests arrive before the probability falls "
                "to 0 for good; set repeat=true or workload.duration_s"
            )
        if times.size == 0:
            raise WorkloadError(
                f"no request arrives within workload.duration_s={duration_s}; lengthen it or raise the probability"
            )
        return times[:num_requests]

    def _levels(self) -> list[float]:
        return self.probability if isinstance(self.probability, list) else [self.probability]


def _inverse(expected: Times, times: Times, counts: Times) -> Times:
    """The earliest time at which the piecewise linear count reaches `expected`."""
    piece = np.clip(np.searchsorted(counts, expected, side="left"), 1, counts.size - 1)
    rise = counts[piece] - counts[piece - 1]
    part = np.where(
        rise > 0.0, (np.minimum(expected, counts[piece]) - counts[piece - 1]) / np.where(rise > 0, rise, 1), 0
    )
    return times[piece - 1] + part * (times[piece] - times[piece - 1])
