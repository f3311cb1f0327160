"""A batch's candidates go where they are most probably accepted, and what is kept is a tree."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from engine.speculation.allocation import Speculation, best_nodes, keep_best
from engine.speculation.tree import Drafts, fixed_shape

LOCAL, GLOBAL = Speculation("local", branching=2), Speculation("global", branching=2)


@st.composite
def grown(draw: st.DrawFn, most_requests: int, most_nodes: int) -> Drafts:
    """Random trees whose path probabilities are products of their nodes' own, ties and certainties among them."""
    counts = draw(st.lists(st.integers(0, most_nodes), min_size=1, max_size=most_requests))
    size, width = len(counts), max(counts)
    parents = np.full((size, width), -1, dtype=np.int32)
    depths, paths = np.ones((size, width), dtype=np.int32), np.zeros((size, width))
    for i, count in enumerate(counts):
        for node in range(count):
            parent = parents[i, node] = draw(st.integers(-1, node - 1))
            own = draw(st.sampled_from([1.0, 0.5, 0.25]) | st.floats(0.01, 1.0))
            depths[i, node] = 1 + (depths[i, parent] if parent >= 0 else 0)
            paths[i, node] = own * (paths[i, parent] if parent >= 0 else 1.0)
    tokens = np.arange(size * width, dtype=np.int32).reshape(size, width)
    return Drafts(tokens, parents, depths, np.array(counts, dtype=np.int64), [None] * size, paths)


def _sum(drafts: Drafts) -> float:
    assert drafts.paths is not None
    return sum(float(drafts.paths[i, :count].sum()) for i, count in enumerate(drafts.counts))


def _closed_sets(parents: NDArray[np.int32]) -> list[tuple[int, ...]]:
    """All sets of nodes that hold the parent of each of theirs."""
    nodes = range(len(parents))
    sets = itertools.chain.from_iterable(itertools.combinations(nodes, k) for k in range(len(parents) + 1))
    return [chosen for chosen in sets if all(parents[node] < 0 or parents[node] in chosen for node in chosen)]


def _best_by_trying(drafts: Drafts, budget: int, limits: list[int]) -> float:
    """The greatest sum of path probabilities over prefix-closed sets, by looking at all of them."""
    assert drafts.paths is not None
    best_of: list[dict[int, float]] = []
    for i, count in enumerate(drafts.counts.tolist()):
        best: dict[int, float] = {}
        for chosen in _closed_sets(drafts.parents[i, :count]):
            if len(chosen) <= limits[i]:
                best[len(chosen)] = max(best.get(len(chosen), 0.0), float(drafts.paths[i, list(chosen)].sum()))
        best_of.append(best)
    sums = [0.0]
    for shares in itertools.product(*(best.items() for best in best_of)):
        if sum(size for size, _ in shares) <= budget:
            sums.append(sum(value for _, value in shares))
    return max(sums)


@settings(max_examples=60, deadline=None)
@given(grown(3, 5), st.data())
def test_global_is_the_best_prefix_closed_choice(drafts: Drafts, data: st.DataObject) -> None:
    wanted = np.array(data.draw(st.lists(st.integers(0, 4), min_size=len(drafts.counts), max_size=len(drafts.counts))))
    limits = wanted + np.array(data.draw(st.lists(st.integers(0, 3), min_size=len(wanted), max_size=len(wanted))))
    kept = keep_best(GLOBAL, drafts, wanted, limits)
    assert kept.counts.sum() <= wanted.sum()
    assert (kept.counts <= limits).all()
    assert _sum(kept) == pytest.approx(_best_by_trying(drafts, int(wanted.sum()), limits.tolist()))


@settings(max_examples=100, deadline=None)
@given(grown(12, 20), st.integers(0, 8))
def test_global_is_never_below_local_at_the_same_budget(drafts: Drafts, candidates: int) -> None:
    wanted = np.full(len(drafts.counts), candidates)
    most = np.full(len(drafts.counts), 100)
    local, everywhere = (keep_best(how, drafts, wanted, most) for how in (LOCAL, GLOBAL))
    assert _sum(everywhere) >= _sum(local) - 1e-12
    assert everywhere.counts.sum() == min(wanted.sum(), drafts.counts.sum())


@settings(max_examples=100, deadline=None)
@given(grown(6, 12), st.integers(0, 6), st.sampled_from([LOCAL, GLOBAL]))
def test_what_is_kept_is_the_same_tree_with_other_numbers(drafts: Drafts, candidates: int, how: Speculation) -> None:
    """Every node keeps its token, depth, probability and parent, which stands before it."""
    wanted = np.full(len(drafts.counts), candidates)
    kept = keep_best(how, drafts, wanted, np.full_like(wanted, 50))
    assert drafts.paths is not None
    assert kept.paths is not None
    for i, count in enumerate(kept.counts.tolist()):
        before = {int(token): node for node, token in enumerate(drafts.tokens[i])}
        for node in range(count):
            old = before[int(kept.tokens[i, node])]
            assert kept.depths[i, node] == drafts.depths[i, old]
            assert kept.paths[i, node] == drafts.paths[i, old]
            parent, old_parent = int(kept.parents[i, node]), int(drafts.parents[i, old])
            assert -1 <= parent < node
            assert (parent == -1) == (old_parent == -1)
            if parent >= 0:
                assert kept.tokens[i, parent] == drafts.tokens[i, old_parent]


def test_a_request_whose_tokens_are_certain_takes_what_another_cannot_use() -> None:
    """Two chains, 0.9 and 0.2 a token, and four candidates: .9 .81 .73 .66 against .2."""
    paths = np.stack([0.9 ** np.arange(1, 9), 0.2 ** np.arange(1, 9)])
    counts, wanted = np.array([8, 8]), np.array([2, 2])
    assert best_nodes(GLOBAL, paths, counts, wanted, np.array([8, 8]))[1].tolist() == [4, 0]
    assert best_nodes(GLOBAL, paths, counts, wanted, np.array([3, 8]))[1].tolist() == [3, 1]
    assert best_nodes(LOCAL, paths, counts, wanted, np.array([8, 8]))[1].tolist() == [2, 2]


def test_the_fixed_shape_is_a_chain_for_one_branch_and_grows_by_assumed_probability() -> None:
    """At 2/3 a rank: 2/3, 4/9, 8/27, then the second child of the root with 2/9, then 16/81."""
    chain, tree = fixed_shape(1, 6), fixed_shape(2, 6)
    assert chain.parents.tolist() == [-1, 0, 1, 2, 3, 4]
    assert tree.parents[:5].tolist() == [-1, 0, 1, -1, 2]
    assert tree.depths[:5].tolist() == [1, 2, 3, 1, 4]
    assert tree.ranks[:5].tolist() == [0, 0, 0, 1, 0]
    assert tree.first_child[:5].tolist() == [0, 1, 2, 4, 6]
    assert fixed_shape(3, 2).depths.max() == 2


@pytest.mark.parametrize(
    ("setting", "key"),
    [({"allocation": "fair"}, "fair"), ({"branching": 0}, "branching=0"), ({"draft_depth": 0}, "draft_depth=0")],
)
def test_settings_out_of_range_are_refused_by_name(setting: dict, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        Speculation(**setting)
