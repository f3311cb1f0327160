"""Domain randomisation: every draw lies in its ranges, is repeatable, and bad ranges are refused by name."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.workload.arrivals import OnOffArrivals, PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.randomized import KINDS, RandomizedSource, Range


def source(**settings: Any) -> RandomizedSource:
    return RandomizedSource(**({"prefill_rate": 5000.0, "decode_rate": 2500.0, "num_requests": 60} | settings))


@given(seed=st.integers(0, 10_000))
@settings(max_examples=50)
def test_a_draw_is_repeatable_and_fits_a_context(seed: int) -> None:
    workload = source(max_total_tokens=4096).draw(seed)
    again = source(max_total_tokens=4096).draw(seed)
    assert workload.digest == again.digest
    assert workload.num_requests == 60
    assert int(workload.total_tokens.max()) <= 4096
    assert (np.diff(workload.arrival) >= 0.0).all()


@pytest.mark.parametrize("kind", KINDS)
def test_the_mean_rate_is_the_drawn_share_of_capacity(kind: str) -> None:
    made = source(
        kinds={kind: 1.0}, load={"low": 0.5, "high": 0.5}, lengths=("azure_code",), num_requests=4000,
        prompt_scale={"low": 1, "high": 1}, output_scale={"low": 1, "high": 1}, cv={"low": 2, "high": 2},
    )  # fmt: skip
    lengths = NamedLengths(name="azure_code").draw(np.random.default_rng(0), 20_000)
    capacity = 1.0 / (lengths.prompt_tokens.mean() / 5000.0 + lengths.output_tokens.mean() / 2500.0)
    rates = [4000 / float(made.draw(seed).arrival[-1]) for seed in range(6)]
    assert np.mean(rates) == pytest.approx(0.5 * capacity, rel=0.08)


def test_bursts_are_above_capacity_and_an_overloaded_mean_has_none() -> None:
    bursts = source(kinds={"bursts": 1.0}, load={"low": 0.4, "high": 0.4}).drawn(1).arrivals
    assert isinstance(bursts, OnOffArrivals)
    assert bursts.rate_on > 2.0 * bursts.rate_off
    flat = source(kinds={"bursts": 1.0}, load={"low": 3.4, "high": 3.4}).drawn(1).arrivals
    assert isinstance(flat, PoissonArrivals)


def test_changing_one_range_leaves_the_other_draws_alone() -> None:
    one, other = source().drawn(7), source(acceptance={"low": 1.0, "high": 1.0}).drawn(7)
    assert one.arrivals == other.arrivals
    assert one.lengths == other.lengths
    assert one.agreement != other.agreement


def test_a_logarithmic_range_is_even_in_its_logarithm() -> None:
    rng = np.random.default_rng(0)
    drawn = [Range(low=0.1, high=10.0, log=True).draw(rng) for _ in range(4000)]
    assert np.mean(np.array(drawn) < 1.0) == pytest.approx(0.5, abs=0.03)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"load": {"low": 1.0, "high": 0.5}}, "low=1 must not be above high=0.5"),
        ({"load": {"low": 0.0, "high": 0.5}}, "load.low=0 must be above 0"),
        ({"cv": {"low": 0.0, "high": 2.0, "log": True}}, "must be above 0 with log=true"),
        ({"kinds": {"poisson": 0.0}}, "kinds are all 0"),
        ({"lengths": ("nobody",)}, "name"),
        ({"swing": {"low": 0.3, "high": 1.0}}, r"within \[0, 1\)"),
        ({"peak": {"low": 0.9, "high": 2.0}}, "peak.low=0.9 must be above 1"),
    ],
)
def test_impossible_ranges_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        source(**settings)
