"""Claims about arrival processes: exact rates, burstiness, and prefixes that do not depend on the length of a draw."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import kstest

from engine.workload.arrivals import (
    GammaArrivals,
    OnOffArrivals,
    PoissonArrivals,
    ProbabilityArrivals,
    RampArrivals,
    SinusoidArrivals,
    StepArrivals,
)
from engine.workload.workload import WorkloadError

RATES = [
    PoissonArrivals(rate=3.0),
    GammaArrivals(rate=3.0, cv=2.5),
    StepArrivals(rates=[2.0, 0.0, 5.0], durations_s=[20.0, 10.0, 30.0]),
    StepArrivals(rates=[2.0, 6.0, 0.0], durations_s=15.0, repeat=True),
    OnOffArrivals(rate_on=6.0, rate_off=0.5, on_s=10.0, off_s=20.0),
    RampArrivals(start_rate=0.0, end_rate=5.0, ramp_s=60.0),
    RampArrivals(start_rate=5.0, end_rate=1.0, ramp_s=60.0),
    SinusoidArrivals(mean_rate=3.0, amplitude=1.0, period_s=50.0, phase_s=7.0),
]
ALL = [*RATES, ProbabilityArrivals(probability=[0.9, 0.2, 0.7], level_s=30.0, slot_s=0.5)]


def rng(seed=0):
    return np.random.default_rng(seed)


@pytest.mark.parametrize("arrivals", RATES, ids=str)
def test_the_time_change_is_inverted_exactly(arrivals):
    count = np.linspace(0.01, 400.0, 997)
    time = arrivals.time_of(count)
    assert arrivals.expected(time) == pytest.approx(count, rel=1e-9, abs=1e-9)
    assert (np.diff(time) >= 0).all()


@pytest.mark.parametrize("arrivals", RATES, ids=str)
def test_as_many_requests_arrive_as_expected(arrivals):
    counts = [arrivals.draw(rng(seed), duration_s=90.0).size for seed in range(300)]
    expected = arrivals.expected(np.array([90.0]))[0]
    # 4 standard errors of the mean of 300 draws, with the variance estimated from them.
    assert np.mean(counts) == pytest.approx(expected, abs=4 * np.std(counts) / np.sqrt(300))


@pytest.mark.parametrize("arrivals", ALL, ids=str)
def test_a_longer_draw_begins_with_the_shorter_one(arrivals):
    long = arrivals.draw(rng(), num_requests=3000)
    assert (np.diff(long) >= 0).all()
    assert long[0] >= 0
    assert arrivals.draw(rng(), num_requests=100).tolist() == long[:100].tolist()
    assert arrivals.draw(rng(), duration_s=60.0).tolist() == long[long < 60.0].tolist()
    assert arrivals.draw(rng(), num_requests=50, duration_s=60.0).tolist() == long[:50][long[:50] < 60.0].tolist()


def test_poisson_gaps_are_exponential():
    gaps = np.diff(PoissonArrivals(rate=4.0).draw(rng(1), num_requests=5000))
    assert kstest(gaps, "expon", args=(0, 0.25)).pvalue > 0.01


@settings(max_examples=10, deadline=None)
@given(st.floats(0.3, 3.0), st.integers(0, 1000))
def test_gamma_gaps_have_the_variation_asked_for(cv, seed):
    gaps = np.diff(GammaArrivals(rate=2.0, cv=cv).draw(rng(seed), num_requests=40_000))
    assert gaps.std() / gaps.mean() == pytest.approx(cv, rel=0.12)


def test_no_request_arrives_while_the_rate_is_zero():
    times = OnOffArrivals(rate_on=5.0, on_s=10.0, off_s=20.0).draw(rng(), num_requests=2000)
    assert (times % 30.0 <= 10.0 + 1e-9).all()


def test_a_second_holds_at_most_one_request_with_its_probability():
    times = ProbabilityArrivals(probability=[0.8, 0.3], level_s=2000.0).draw(rng(), duration_s=4000.0)
    seconds = times.astype(int)
    assert np.unique(seconds).size == seconds.size
    assert (seconds < 2000).sum() == pytest.approx(1600, abs=4 * np.sqrt(2000 * 0.8 * 0.2))
    assert (seconds >= 2000).sum() == pytest.approx(600, abs=4 * np.sqrt(2000 * 0.3 * 0.7))


def test_requests_that_would_never_arrive_are_refused():
    for arrivals in (
        StepArrivals(rates=[1.0, 0.0], durations_s=10.0),
        ProbabilityArrivals(probability=[0.5, 0.0], level_s=10.0),
    ):
        with pytest.raises(WorkloadError, match=r"workload.num_requests=1000: only \d+"):
            arrivals.draw(rng(), num_requests=1000)
    with pytest.raises(WorkloadError, match=r"no request arrives within workload.duration_s=1e-06"):
        PoissonArrivals(rate=1.0).draw(rng(), duration_s=1e-6)
    with pytest.raises(WorkloadError, match=r"workload.num_requests or workload.duration_s"):
        PoissonArrivals(rate=1.0).draw(rng())


@pytest.mark.parametrize(
    ("make", "key"),
    [
        (lambda: PoissonArrivals(rate=0.0), "rate"),
        (lambda: PoissonArrivals(rate=float("nan")), "rate"),
        (lambda: PoissonArrivals(rat=1.0), "rat"),
        (lambda: GammaArrivals(rate=1.0, cv=0.0), "cv"),
        (lambda: StepArrivals(rates=[1.0, 2.0], durations_s=[1.0]), "durations_s has 1 entries for 2 rates"),
        (lambda: StepArrivals(rates=[0.0], durations_s=1.0), "all 0"),
        (lambda: SinusoidArrivals(mean_rate=1.0, amplitude=1.5, period_s=1.0), "amplitude"),
        (lambda: ProbabilityArrivals(probability=1.5), "probability"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(make, key):
    with pytest.raises(ValidationError, match=key):
        make()
