"""Claims about the iterations that a profile measures."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.latency.design import Point, Space, design, digest, edges
from engine.limits import EngineLimits


@st.composite
def spaces(draw: st.DrawFn) -> Space:
    block_size = draw(st.sampled_from([1, 4, 16, 32]))
    length = draw(st.integers(40, 4096))
    blocks = -(-length // block_size) + draw(st.integers(16, 5000)) + 64
    watermark = draw(st.integers(0, blocks // 50))
    limits = EngineLimits(blocks, block_size, watermark, draw(st.integers(1, 128)), length)
    return Space(limits, (0, *draw(st.sets(st.integers(1, 8), max_size=3))), draw(st.integers(1, 4096)))


@settings(max_examples=30, deadline=None)
@given(spaces(), st.integers(0, 100))
def test_every_point_fits_the_engine(space: Space, seed: int) -> None:
    limits = space.limits
    for point in design(space, 60, seed):
        held = (*point.kv_tokens, *point.prompts)
        assert 1 <= len(held) <= limits.max_num_seqs
        assert min(held) >= 1
        assert max(held) + max(space.candidates) < limits.max_model_len
        assert all(chunk >= 1 for chunk in point.chunks)
        assert sum(point.chunks) <= space.most_prefill
        blocks = sum(-(-(tokens + 1 + point.candidates) // limits.block_size) for tokens in point.kv_tokens)
        blocks += sum(-(-tokens // limits.block_size) for tokens in point.prompts)
        assert blocks + limits.watermark_blocks <= limits.total_blocks
        assert point.candidates in space.candidates
        assert point.fresh <= len(point.kv_tokens)


def test_the_corners_come_first() -> None:
    space = Space(EngineLimits(4096, 16, 40, 64, 2048), tuple(range(9)), 4096)
    corners = edges(space)
    assert design(space, 100, 0)[: len(corners)] == corners
    assert {(len(p.kv_tokens), p.candidates) for p in corners} >= {(1, 0), (1, 8), (64, 0), (64, 8), (0, 0)}
    assert max(max(p.kv_tokens, default=0) for p in corners) == space.longest
    assert max(sum(p.chunks) for p in corners) == space.most_prefill


def test_every_corner_of_the_range_is_measured() -> None:
    space = Space(EngineLimits(4096, 16, 40, 64, 2048), tuple(range(9)), 4096)
    held = {(len(p.kv_tokens), p.candidates, sum(p.chunks), max(p.kv_tokens)) for p in edges(space) if p.kv_tokens}
    for candidates in (0, 8):
        for shortest in (16, space.longest):
            assert (1, candidates, 0, shortest) in held
            assert (1, candidates, 4096, shortest) in held
        assert (64, candidates, 0, 16) in held
        assert (61, candidates, 4096, 16) in held
        # 4,096 prompt tokens are three prompts, which take three places. All requests at their longest are more than
        # the cache holds: it is full to a token for each.
        full = {B: max(p[3] for p in held if p[:3] == (B, candidates, n)) for B, n in ((64, 0), (61, 4096))}
        assert 0 <= space.room - space.reserve(64) - 64 * full[64] < 64
        assert 0 <= space.room - space.reserve(61) - 61 * full[61] - 4096 - 3 * 16 < 61


def test_a_design_depends_on_its_seed_alone() -> None:
    space = Space(EngineLimits(4096, 16, 40, 64, 2048), tuple(range(9)), 4096)
    assert digest(design(space, 100, 3)) == digest(design(space, 100, 3))
    assert digest(design(space, 100, 3)) != digest(design(space, 100, 4))


def test_all_kinds_of_batches_and_all_choices_of_c_are_measured() -> None:
    space = Space(EngineLimits(4096, 16, 40, 64, 2048), tuple(range(9)), 4096)
    points = design(space, 300, 0)

    kinds = [(bool(point.kv_tokens), bool(point.chunks)) for point in points]
    assert kinds.count((False, True)) > 30
    assert kinds.count((True, False)) > 90
    assert kinds.count((True, True)) > 60
    assert sum(point.fresh for point in points) > 30
    assert {p.candidates for p in points if p.kv_tokens and p.chunks} == set(range(9))


def test_prompts_are_chunks_with_what_came_before_and_what_is_left() -> None:
    assert Point((), 0, chunks=(10, 20), context=5, left=3).prompts == [15, 23]


def test_an_engine_without_room_is_refused() -> None:
    with pytest.raises(ValueError, match="max_model_len=16 tokens"):
        design(Space(EngineLimits(64, 16, 0, 4, 16), (0, 8), 64), 50, 0)
