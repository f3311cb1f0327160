"""Prompt lookup finds the latest earlier occurrence of the longest ending, by index what a scan would find."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.drafter import Batch
from engine.speculation.ngram import NgramDrafter, NgramIndex
from engine.speculation.tree import Drafts


def _scan(tokens: list[int], shortest: int, longest: int) -> int | None:
    """The same by definition: longest n first, then the latest place before the end."""
    for size in range(min(longest, len(tokens)), shortest - 1, -1):
        for end in range(len(tokens) - 1, size - 1, -1):
            if tokens[end - size : end] == tokens[-size:]:
                return end
    return None


@given(st.lists(st.integers(0, 3), min_size=1, max_size=40), st.integers(1, 3), st.integers(0, 2), st.data())
def test_the_index_finds_what_a_scan_finds(tokens: list[int], shortest: int, more: int, data: st.DataObject) -> None:
    """Whatever the portions in which the tokens come."""
    index, row = NgramIndex(shortest, shortest + more), np.array(tokens, dtype=np.int32)
    length = 0
    while length < len(tokens):
        length = data.draw(st.integers(length + 1, len(tokens)))
        index.extend(row[:length])
        assert index.continuation(row[:length]) == _scan(tokens[:length], shortest, shortest + more)


def _drafts(drafter: NgramDrafter, tokens: list[int], wanted: int, speculation: Speculation) -> Drafts:
    table = SimpleNamespace(tokens=np.zeros((1, 64), dtype=np.int32), draft_computed=np.zeros(1, dtype=np.int32))
    table.tokens[0, : len(tokens)] = tokens
    one = np.zeros(1, dtype=np.int64)
    planned = np.array([wanted])
    return drafter.propose(Batch(table, one, [], one, np.array([len(tokens)]), planned, planned, speculation))


def _propose(drafter: NgramDrafter, tokens: list[int], wanted: int) -> list[int]:
    drafts = _drafts(drafter, tokens, wanted, CHAINS)
    return drafts.tokens[0, : drafts.counts[0]].tolist()


def test_a_period_is_continued_beyond_the_known_tokens() -> None:
    assert _propose(NgramDrafter(), [9, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_nothing_is_proposed_without_a_match() -> None:
    assert _propose(NgramDrafter(), [1, 2, 3, 4], 5) == []
    assert _propose(NgramDrafter(shortest=2), [1, 2, 3, 1], 5) == []


def _paths(drafts: Drafts) -> list[list[int]]:
    """Tokens from the root to every node."""
    found: list[list[int]] = []
    for node in range(int(drafts.counts[0])):
        parent = int(drafts.parents[0, node])
        found.append([*(found[parent] if parent >= 0 else []), int(drafts.tokens[0, node])])
    return found


def test_several_continuations_share_their_beginning() -> None:
    """After 1 stood 2 3, 2 4 and 7 8: the latest comes first, and the budget takes from each beginning."""
    drafter = NgramDrafter(shortest=1, longest=1)
    drafts = _drafts(drafter, [1, 7, 8, 9, 1, 2, 4, 9, 1, 2, 3, 9, 1], 5, Speculation("local", branching=3))
    assert _paths(drafts) == [[2], [2, 3], [7], [2, 3, 9], [2, 4]]
    assert drafts.depths[0].tolist() == [1, 2, 1, 3, 2]


def test_the_estimate_learns_how_often_matches_of_a_length_were_right() -> None:
    """(1 + right) / (2 + tried) by length of match; tokens behind the first wrong one were not tried."""
    drafter = NgramDrafter()
    how = Speculation("global")
    assert _drafts(drafter, [5, 6, 7, 5], 2, how).paths[0, :2].tolist() == [1 / 2, 1 / 4]
    assert _drafts(drafter, [5, 6, 7, 5, 6, 9, 9, 5], 2, how).paths[0, :2].tolist() == [1 / 2, 1 / 4]
    assert _drafts(drafter, [5, 6, 7, 5, 6, 9, 9, 5, 6, 9, 2, 5], 1, how).paths[0, :1].tolist() == [4 / 6]


def test_a_forgotten_request_starts_again() -> None:
    drafter = NgramDrafter()
    assert _propose(drafter, [7, 8, 7], 1) == [8]
    drafter.forget(0)
    assert _propose(drafter, [5, 6, 5], 1) == [6]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="shortest=3"):
        NgramDrafter(shortest=3, longest=2)
