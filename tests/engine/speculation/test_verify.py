"""Verification is lossless: whatever is proposed, what is emitted is distributed as the target alone would have it."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy import stats

from engine.speculation.sampling import draw
from engine.speculation.verify import accept_greedy, accept_sampled

VOCABULARY = 10
CHAIN = 3
SAMPLES = 30_000
LEAST_P_VALUE = 1e-3


def _conditionals(seed: int, sharpness: float) -> NDArray[np.float64]:
    """Distributions of the next token after each token, (V, V); one token can never be next."""
    weights = np.random.default_rng(seed).random((VOCABULARY, VOCABULARY)) ** sharpness
    weights[:, seed % VOCABULARY] = 0.0
    return weights / weights.sum(axis=1, keepdims=True)


def _fits(counts: NDArray[np.int64], probabilities: NDArray[np.float64]) -> float:
    """p-value of a chi-square test; cells that expect fewer than 5 samples are taken together."""
    expected = probabilities.ravel() * counts.sum()
    assert not counts.ravel()[expected == 0].any(), "a token that the target never emits"
    large = expected >= 5
    observed = np.append(counts.ravel()[large], counts.ravel()[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    keep = expected > 0
    return float(stats.chisquare(observed[keep], expected[keep] * observed[keep].sum() / expected[keep].sum()).pvalue)


def _emit(p: NDArray, q: NDArray | None, random: np.random.Generator, length: int) -> list[int]:
    """Tokens from verification rounds until `length` are out, beginning after token 0."""
    tokens = [0]
    while len(tokens) <= length:
        chain, rows = [], []
        last = tokens[-1]
        for _ in range(CHAIN):
            if q is not None:
                rows.append(q[last])
                last = draw(q[last], random)
            else:
                last = (3 * last + 1) % VOCABULARY
            chain.append(last)
        target = np.stack([p[token] for token in [tokens[-1], *chain]])
        accepted, token = accept_sampled(target, np.stack(rows) if rows else None, np.array(chain), random)
        tokens += [*chain[:accepted], token]
    return tokens[1 : length + 1]


@pytest.mark.parametrize("drafter", ["close", "far", "same", "certain"])
def test_sampled_chains_have_the_targets_joint_distribution(drafter: str) -> None:
    """Chi-square over pairs of consecutive tokens, which a wrong residual or a wrong bonus token would shift."""
    p = _conditionals(1, 2.0)
    q = {"close": 0.7 * p + 0.3 * _conditionals(3, 1.0), "far": _conditionals(4, 3.0), "same": p, "certain": None}[
        drafter
    ]
    random = np.random.default_rng(7)
    pairs = np.zeros((VOCABULARY, VOCABULARY), dtype=np.int64)
    for _ in range(SAMPLES // 2):
        first, second = _emit(p, q, random, 2)
        pairs[first, second] += 1
    assert _fits(pairs, p[0][:, None] * p) > LEAST_P_VALUE
    assert _fits(pairs.sum(axis=1), p[0]) > LEAST_P_VALUE


def test_the_acceptance_rate_is_the_overlap_of_the_distributions() -> None:
    """E[min(1, p / q)] under q is the sum of min(p, q) (Leviathan et al., corollary 3.6)."""
    p, q = _conditionals(1, 2.0)[0], _conditionals(4, 1.0)[0]
    random = np.random.default_rng(3)
    target = np.stack([p, p])
    hits = sum(accept_sampled(target, q[None], np.array([draw(q, random)]), random)[0] for _ in range(SAMPLES))
    overlap = np.minimum(p, q).sum()
    assert hits / SAMPLES == pytest.approx(overlap, abs=4 * np.sqrt(overlap * (1 - overlap) / SAMPLES))


def test_a_wrong_rule_would_be_noticed() -> None:
    """The chi-square test has the power to tell the residual from the plain target."""
    p, q = _conditionals(1, 2.0)[0], _conditionals(4, 1.0)[0]
    random = np.random.default_rng(3)
    counts = np.zeros(VOCABULARY, dtype=np.int64)
    for _ in range(SAMPLES):
        token = draw(q, random)
        counts[token if random.random() * q[token] < p[token] else draw(p, random)] += 1
    assert _fits(counts, p) < 1e-6


def test_greedy_acceptance_ends_at_the_first_difference() -> None:
    choices = np.array([5, 6, 7, 8, 1, 2, 3])
    first_row = np.array([0, 4, 6, 7])
    candidates = np.array([[5, 6, 9], [1, 0, 0], [0, 0, 0]], dtype=np.int32)
    accepted = np.zeros(3, dtype=np.int32)
    accept_greedy(choices, first_row, candidates, accepted)
    assert accepted.tolist() == [2, 1, 0]
    emitted = [choices[first_row[i] + accepted[i]] for i in range(3)]
    assert emitted == [7, 2, 3]
