"""The cache table gives every counted block one name and never one to two requests."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings

from engine.backends.torch.table import CacheTable
from engine.limits import EngineLimits
from tests.engine.core.cases import Case, batch, cases, iterate


@settings(max_examples=100, deadline=None)
@given(cases())
def test_seats_and_blocks_follow_the_scheduler(case: Case) -> None:
    """Through preemptions, a full pool and every seat taken; a request keeps its blocks while it runs."""
    state, feed = case.system()
    table = CacheTable(EngineLimits(**case.limits, max_model_len=case.block_size * case.total_blocks))
    before: dict[int, list[int]] = {}
    for moment, _, _ in iterate(state, feed, case):
        if moment != "planned":
            continue
        entered = table.follow(state)
        named: list[int] = []
        now: dict[int, list[int]] = {}
        for seat, r in enumerate(table.owner.tolist()):
            if r >= 0:
                now[r] = table.blocks[seat, : table.held[seat]].tolist()
                assert table.seat_of[r] == seat
                assert len(now[r]) == state.requests["blocks"][r]
                named += now[r]
        assert len(set(named)) == len(named)
        assert not set(named) & set(table.blocks[table.scratch_seat, : table.num_blocks - case.total_blocks].tolist())
        assert table.free_blocks + len(named) == case.total_blocks
        assert table.free_blocks == state.instances["free_blocks"][0]
        for r, _ in batch(state):
            assert (r in entered) == (r not in before)
            if r in before:
                assert now[r][: len(before[r])] == before[r]
        before = now
    assert np.all(table.tokens == 0), "only the engine writes tokens"


def test_borrowed_blocks_are_free_ones_lent_once_and_stay_free() -> None:
    table = CacheTable(EngineLimits(6, 4, 0, 3, 20))
    table.held[:2] = 1, 2
    table.blocks[0, :1], table.blocks[1, :2] = 0, (1, 2)
    table._free_counts[0] = 3
    reached = table.borrow(np.array([0, 1]), np.array([12, 16]))
    assert reached.tolist() == [12, 12], "one of the two blocks that the second asks for is left"
    lent = [*table.blocks[0, 1:3].tolist(), int(table.blocks[1, 2])]
    assert sorted(lent) == [3, 4, 5]
    assert table.free_blocks == 3
    assert table.held.tolist() == [1, 2, 0]
