"""Estimates of tokens per iteration: against sums by hand, and against what a law would give."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.acceptance import (
    MEMORY_S,
    PRIOR_COUNT,
    expected_tokens,
    learn_by_choice,
    new_choice_memory,
    tokens_by_marginal_gain,
    tokens_of_requests,
)
from engine.core.telemetry import RATE_BANDS

MIDDLES = (np.arange(RATE_BANDS) + 0.5) / RATE_BANDS
some_rates = st.lists(st.integers(0, 6), min_size=RATE_BANDS, max_size=RATE_BANDS).map(
    lambda counts: np.array(counts, dtype=np.float32)
)


@given(st.floats(0.0, 0.99), st.integers(0, 8))
def test_expected_tokens_are_the_geometric_sum(acceptance: float, candidates: int) -> None:
    assert expected_tokens(acceptance, candidates) == pytest.approx(sum(acceptance**i for i in range(candidates + 1)))
    assert expected_tokens(1.0, candidates) == candidates + 1


@given(some_rates, st.integers(1, 8))
def test_tokens_of_requests_are_the_mean_over_them(rates: np.ndarray, most: int) -> None:
    tokens = np.full(most + 1, 7.0)
    tokens_of_requests(rates, tokens)
    if rates.sum() == 0:
        assert (tokens == 7.0).all()
        return
    each = np.repeat(MIDDLES, rates.astype(int))
    for c in range(most + 1):
        assert tokens[c] == pytest.approx(np.mean([expected_tokens(a, c) for a in each]))


@given(some_rates, st.integers(1, 6))
def test_candidates_by_marginal_gain_are_the_best_prefix_sum_of_all_gains(rates: np.ndarray, most: int) -> None:
    tokens = np.full(most + 1, 7.0)
    tokens_by_marginal_gain(rates, tokens, np.zeros((2, RATE_BANDS)))
    requests = int(rates.sum())
    if requests == 0:
        assert (tokens == 7.0).all()
        return
    each = np.repeat(MIDDLES, rates.astype(int))
    gains = np.sort((each[:, None] ** np.arange(1, most * requests + 1)).ravel())[::-1]
    equally = tokens.copy()
    tokens_of_requests(rates, equally)
    for c in range(most + 1):
        assert tokens[c] == pytest.approx(1.0 + gains[: c * requests].sum() / requests)
        assert tokens[c] >= equally[c] - 1e-9


def test_what_a_choice_gave_replaces_what_was_supposed() -> None:
    """100 requests with c = 2 had 150 tokens accepted where .8 each were supposed; c = 4 was never tried."""
    memory = new_choice_memory(4)
    tokens = np.array([1.0, 1.5, 1.8, 1.9, 2.0])
    learn_by_choice(memory, 2, 100.0, 150.0, 0.0, tokens)
    scale = (150.0 + PRIOR_COUNT) / (80.0 + PRIOR_COUNT)
    assert tokens[0] == 1.0
    assert tokens[4] == pytest.approx(1.0 + scale * 1.0)
    assert tokens[2] == pytest.approx(1.0 + (150.0 + PRIOR_COUNT * scale * 0.8) / (100.0 + PRIOR_COUNT))


def test_choices_are_forgotten_with_time_and_no_speculation_teaches_nothing() -> None:
    memory = new_choice_memory(4)
    learn_by_choice(memory, 2, 100.0, 150.0, 0.0, np.array([1.0, 1.5, 1.8, 1.9, 2.0]))
    before = memory.copy()
    learn_by_choice(memory, 0, 50.0, 0.0, MEMORY_S, np.array([1.0, 1.5, 1.8, 1.9, 2.0]))
    assert memory == pytest.approx(before * np.exp(-1.0))
