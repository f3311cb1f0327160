"""Verification is lossless: whatever is proposed, what is emitted is distributed as the target alone would have it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy import stats

from engine.speculation.sampling import draw
from engine.speculation.verify import accept_greedy, accept_sampled

VOCABULARY = 10
SAMPLES = 20_000
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


class Grower:
    """Trees of a fixed shape over tokens whose q depends on the token before: what a drafter would propose."""

    def __init__(self, q: NDArray[np.float64], shape: list[int], *, drawn: bool) -> None:
        self._q, self._parents, self._drawn = q, np.array(shape), drawn

    def grow(self, last: int, random: np.random.Generator) -> tuple[NDArray[np.int64], NDArray[np.int64], Any]:
        """(tokens, parents, q by 1 + node); determined children are the most probable ones."""
        tokens = np.zeros(len(self._parents), dtype=np.int64)
        noted: list[NDArray[np.float64] | None] = [None] * (len(tokens) + 1)
        for node in range(-1, len(tokens)):
            children = np.flatnonzero(self._parents == node)
            weights = noted[1 + node] = self._q[last if node < 0 else tokens[node]]
            left = weights.copy()
            for child in children:
                if left.any():
                    tokens[child] = draw(left, random) if self._drawn else int(left.argmax())
                    left[tokens[child]] = 0.0
        return tokens, self._parents, noted if self._drawn else None


CHAIN = [-1, 0, 1]
TREES = {"chain": CHAIN, "bush": [-1, -1, -1], "tree": [-1, 0, -1, 0, 1, 2, 2, -1]}


def _emit(p: NDArray, grower: Grower, random: np.random.Generator, length: int) -> list[int]:
    """Tokens from verification rounds until `length` are out, beginning after token 0."""
    emitted = [0]
    while len(emitted) <= length:
        tokens, parents, drawn_from = grower.grow(emitted[-1], random)
        target = p[[emitted[-1], *tokens]]
        path, token, reach = accept_sampled(target, tokens, parents, drawn_from, random)
        assert reach == len(path) + bool((parents == (path[-1] if path else -1)).any())
        emitted += [*tokens[path].tolist(), token]
    return emitted[1 : length + 1]


def _pairs(p: NDArray, grower: Grower) -> NDArray[np.int64]:
    """How often every pair of first tokens came out."""
    random = np.random.default_rng(7)
    pairs = np.zeros((VOCABULARY, VOCABULARY), dtype=np.int64)
    for _ in range(SAMPLES // 2):
        first, second = _emit(p, grower, random, 2)
        pairs[first, second] += 1
    return pairs


@pytest.mark.parametrize(
    ("shape", "drafter"),
    [("chain", "close"), ("chain", "far"), ("bush", "far"), *(("tree", q) for q in ("close", "far", "same", "narrow"))],
)
def test_drawn_candidates_leave_the_targets_joint_distribution(shape: str, drafter: str) -> None:
    """Chi-square over pairs of consecutive tokens, which a wrong residual or a wrong bonus token would shift.

    The narrow drafter knows two tokens only, fewer than some nodes have children.
    """
    p = _conditionals(1, 2.0)
    narrow = _conditionals(5, 1.0)
    narrow[:, :8] = 0.0
    q = {"close": 0.7 * p + 0.3 * _conditionals(3, 1.0), "far": _conditionals(4, 3.0), "same": p}.get(
        drafter, narrow / narrow.sum(axis=1, keepdims=True)
    )
    pairs = _pairs(p, Grower(q, TREES[shape], drawn=True))
    assert _fits(pairs, p[0][:, None] * p) > LEAST_P_VALUE
    assert _fits(pairs.sum(axis=1), p[0]) > LEAST_P_VALUE


@pytest.mark.parametrize("shape", ["chain", "tree"])
def test_determined_candidates_leave_the_targets_joint_distribution(shape: str) -> None:
    p = _conditionals(1, 2.0)
    pairs = _pairs(p, Grower(0.7 * p + 0.3 * _conditionals(3, 1.0), TREES[shape], drawn=False))
    assert _fits(pairs, p[0][:, None] * p) > LEAST_P_VALUE
    assert _fits(pairs.sum(axis=1), p[0]) > LEAST_P_VALUE


def test_the_acceptance_rate_of_one_child_is_the_overlap_of_the_distributions() -> None:
    """E[min(1, p / q)] under q is the sum of min(p, q) (Leviathan et al., corollary 3.6)."""
    p, q = _conditionals(1, 2.0)[0], _conditionals(4, 1.0)[0]
    random = np.random.default_rng(3)
    target, parents = np.stack([p, p]), np.array([-1])
    hits = sum(
        len(accept_sampled(target, np.array([draw(q, random)]), parents, [q, None], random)[0]) for _ in range(SAMPLES)
    )
    overlap = np.minimum(p, q).sum()
    assert hits / SAMPLES == pytest.approx(overlap, abs=4 * np.sqrt(overlap * (1 - overlap) / SAMPLES))


def test_determined_children_are_accepted_as_often_as_the_target_emits_them() -> None:
    p = _conditionals(1, 2.0)[0]
    random = np.random.default_rng(3)
    tokens, parents = np.array([2, 5, 7]), np.array([-1, -1, -1])
    target = np.stack([p] * 4)
    hits = sum(len(accept_sampled(target, tokens, parents, None, random)[0]) for _ in range(SAMPLES))
    share = p[tokens].sum()
    assert hits / SAMPLES == pytest.approx(share, abs=4 * np.sqrt(share * (1 - share) / SAMPLES))


def test_wrong_rules_would_be_noticed() -> None:
    """The test has the power to see: the plain target in place of the residual; a second child tried with the q of the
    first, as if it had been drawn with replacement; drawn nodes kept by how probable they are, not by a fixed shape."""
    p, q = _conditionals(1, 2.0)[0], _conditionals(4, 3.0)[0]
    random = np.random.default_rng(3)
    plain, with_replacement, by_value = (np.zeros(VOCABULARY, dtype=np.int64) for _ in range(3))
    pair = np.array([-1, -1])
    for _ in range(SAMPLES):
        first = draw(q, random)
        plain[first if random.random() * q[first] < p[first] else draw(p, random)] += 1
        second = draw(np.where(np.arange(VOCABULARY) == first, 0.0, q), random)
        left = p
        for token in (first, second):
            if random.random() * q[token] < left[token]:
                break
            left = np.maximum(left - q, 0.0) / np.maximum(left - q, 0.0).sum()
        else:
            token = draw(left, random)
        with_replacement[token] += 1
        best = np.array(sorted((first, second), key=lambda node: -q[node]))
        path, token, _ = accept_sampled(np.stack([p] * 3), best, pair, [q, None, None], random)
        by_value[best[path[0]] if path else token] += 1
    for counts in (plain, with_replacement, by_value):
        assert _fits(counts, p) < 1e-6


def _by_walking(choices: list[int], tokens: list[int], parents: list[int]) -> tuple[list[int], int]:
    """(accepted nodes, reach) by definition."""
    path: list[int] = []
    while True:
        at = path[-1] if path else -1
        children = [node for node, parent in enumerate(parents) if parent == at]
        right = [node for node in children if tokens[node] == choices[1 + at]]
        if not right:
            return path, len(path) + bool(children)
        path.append(right[0])


@settings(deadline=None)
@given(st.data())
def test_greedy_acceptance_walks_where_the_target_goes(data: st.DataObject) -> None:
    """Any trees, with different tokens for the children of a node."""
    trees = []
    for _ in range(data.draw(st.integers(1, 4))):
        tokens: list[int] = []
        parents: list[int] = []
        for node in range(data.draw(st.integers(0, 9))):
            parent = data.draw(st.integers(-1, node - 1))
            taken = {tokens[other] for other in range(node) if parents[other] == parent}
            tokens.append(data.draw(st.sampled_from([token for token in range(10) if token not in taken])))
            parents.append(parent)
        # Mostly a child's token, so that paths get long.
        choices = [
            data.draw(st.sampled_from([*[t for t, above in zip(tokens, parents, strict=True) if above == at] * 3, 0]))
            for at in range(-1, len(tokens))
        ]
        trees.append((choices, tokens, parents))
    size, width = len(trees), max(len(tokens) for _, tokens, _ in trees)
    tokens_of, parents_of = np.zeros((size, width), dtype=np.int32), np.full((size, width), -1, dtype=np.int32)
    for i, (_, tokens, parents) in enumerate(trees):
        tokens_of[i, : len(tokens)], parents_of[i, : len(parents)] = tokens, parents
    first_row = np.concatenate(([0], np.cumsum([len(choices) for choices, _, _ in trees])))
    accepted, reach = np.zeros(size, dtype=np.int32), np.zeros(size, dtype=np.int32)
    paths = np.zeros((size, width), dtype=np.int32)
    rows = np.concatenate([choices for choices, _, _ in trees])
    accept_greedy(rows, first_row, tokens_of, parents_of, paths, accepted, reach)
    for i, tree in enumerate(trees):
        path, far = _by_walking(*tree)
        assert paths[i, : accepted[i]].tolist() == path
        assert reach[i] == far


def test_a_greedy_chain_ends_at_the_first_difference() -> None:
    choices = np.array([5, 6, 7, 8, 1, 2, 3])
    first_row = np.array([0, 4, 6, 7])
    candidates = np.array([[5, 6, 9], [1, 0, 0], [0, 0, 0]], dtype=np.int32)
    parents = np.broadcast_to(np.arange(-1, 2, dtype=np.int32), (3, 3))
    paths = np.zeros((3, 3), dtype=np.int32)
    accepted, reach = np.zeros(3, dtype=np.int32), np.zeros(3, dtype=np.int32)
    accept_greedy(choices, first_row, candidates, parents, paths, accepted, reach)
    assert accepted.tolist() == [2, 1, 0]
    assert reach.tolist() == [3, 1, 0]
    emitted = [choices[first_row[i] + accepted[i]] for i in range(3)]
    assert emitted == [7, 2, 3]
