"""Prompt lookup finds the latest earlier occurrence of the longest ending, by index what a scan would find."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.speculation.drafter import Batch
from engine.speculation.ngram import NgramDrafter, NgramIndex


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


def _propose(drafter: NgramDrafter, tokens: list[int], wanted: int) -> list[int]:
    table = SimpleNamespace(tokens=np.zeros((1, 64), dtype=np.int32), draft_computed=np.zeros(1, dtype=np.int32))
    table.tokens[0, : len(tokens)] = tokens
    one = np.zeros(1, dtype=np.int64)
    batch = Batch(table, one, [], one, np.array([len(tokens)]), np.array([wanted]))
    drafts = drafter.propose(batch)
    return drafts.tokens[0, : drafts.counts[0]].tolist()


def test_a_period_is_continued_beyond_the_known_tokens() -> None:
    assert _propose(NgramDrafter(), [9, 1, 2, 1, 2], 5) == [1, 2, 1, 2, 1]


def test_nothing_is_proposed_without_a_match() -> None:
    assert _propose(NgramDrafter(), [1, 2, 3, 4], 5) == []
    assert _propose(NgramDrafter(shortest=2), [1, 2, 3, 1], 5) == []


def test_a_forgotten_request_starts_again() -> None:
    drafter = NgramDrafter()
    assert _propose(drafter, [7, 8, 7], 1) == [8]
    drafter.forget(0)
    assert _propose(drafter, [5, 6, 5], 1) == [6]


def test_impossible_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="shortest=3"):
        NgramDrafter(shortest=3, longest=2)
