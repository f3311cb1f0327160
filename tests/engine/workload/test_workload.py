"""Claims about the Workload itself: its invariants, its digest and its limits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.workload.agreement import IidAgreement
from engine.workload.workload import Workload, WorkloadError, offsets, run_lengths


def build(arrival, prompt, output, alpha=0.6, seed=0, **more) -> Workload:
    return Workload.build("made", arrival, prompt, output, IidAgreement(alpha=alpha), seed, **more)


def by_hand(rank, output=None) -> Workload:
    rank = np.array(rank, dtype=np.uint8)
    output = np.array([rank.size] if output is None else output)
    offset = offsets(output)
    return Workload(
        name="by hand",
        arrival=np.arange(output.size, dtype=float),
        prompt_tokens=np.ones(output.size, dtype=int),
        output_tokens=output,
        offset=offset,
        run_length=run_lengths(rank, offset),
        rank=rank,
        confidence=np.full(rank.size, 0.5, dtype=np.float32),
    )


def test_run_length_counts_agreements_up_to_the_end_of_the_request():
    workload = by_hand([0, 0, 3, 0, 0, 1, 0], output=[4, 3])
    assert workload.run_length.tolist() == [2, 1, 0, 1, 1, 0, 1]


def test_run_length_is_capped_at_255():
    workload = by_hand([0] * 300)
    assert workload.run_length[0] == 255
    assert workload.run_length[44] == 255
    assert workload.run_length[46] == 254


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=20), st.floats(0, 1), st.integers(0, 2**31))
def test_run_length_is_zero_at_a_disagreement_and_else_one_more_than_the_next(output, alpha, seed):
    workload = build(np.zeros(len(output)), np.ones(len(output)), output, alpha, seed)
    for begin, end in zip(workload.offset[:-1], workload.offset[1:], strict=True):
        following = 0
        for position in range(end - 1, begin - 1, -1):
            following = following + 1 if workload.rank[position] == 0 else 0
            assert workload.run_length[position] == min(following, 255)


def test_arrays_cannot_be_changed_afterwards():
    workload = build([0.0], [5], [7])
    with pytest.raises(ValueError, match="read-only"):
        workload.arrival[0] = 1.0


def test_the_caller_keeps_a_writable_array():
    arrival = np.zeros(1)
    build(arrival, [5], [7])
    arrival[0] = 1.0


def test_digest_is_equal_for_equal_requests_and_differs_for_other_luck():
    assert build([0, 1], [3, 4], [5, 6]).digest == build([0, 1], [3, 4], [5, 6]).digest
    assert build([0, 1], [3, 4], [5, 6]).digest != build([0, 1], [3, 4], [5, 6], seed=1).digest
    assert build([0, 1], [3, 4], [5, 6]).digest != build([0, 2], [3, 4], [5, 6]).digest


def test_a_subset_keeps_each_request_s_luck():
    workload = build([0, 1, 2], [3, 4, 5], [50, 60, 70])
    part = workload.subset([0, 2])
    assert part.output_tokens.tolist() == [50, 70]
    assert part.rank[50:].tolist() == workload.rank[110:].tolist()
    assert part.source_row.tolist() == [1, 3]


@pytest.mark.parametrize(
    ("arrival", "prompt", "output", "message"),
    [
        ([1.0, 0.5], [1, 1], [1, 1], "row 2: arrival 0.5 s is earlier"),
        ([float("nan")], [1], [1], "row 1: arrival nan"),
        ([-1.0], [1], [1], "row 1: arrival -1.0"),
        ([0.0], [0], [1], "row 1: prompt_tokens = 0"),
        ([0.0], [1], [0], "row 1: output_tokens = 0"),
        ([0.0], [1.5], [1], "prompt_tokens"),
        ([0.0, 1.0], [1], [1, 1], "prompt_tokens has 1 entries, not 2"),
        ([], [], [], "no requests"),
    ],
)
def test_bad_requests_are_refused_with_their_row(arrival, prompt, output, message):
    with pytest.raises(WorkloadError, match=message):
        build(arrival, prompt, output)


def test_a_run_length_that_contradicts_the_ranks_is_refused():
    good = by_hand([0, 1, 0])
    with pytest.raises(WorkloadError, match="row 1, output position 2"):
        Workload(
            **{name: getattr(good, name) for name in ("name", "arrival", "prompt_tokens", "output_tokens", "offset")},
            rank=good.rank,
            confidence=good.confidence,
            run_length=[1, 0, 0],
        )


def test_a_request_over_the_limit_is_named_with_the_settings_that_fix_it():
    workload = build([0, 1, 2], [10, 5000, 20], [10, 200, 10])
    workload.check_fits(max_model_len=5200, kv_capacity_tokens=5200)
    with pytest.raises(WorkloadError) as error:
        workload.check_fits(max_model_len=4096)
    for part in ("row 2", "5200 tokens", "workload.too_long=clip", "workload.max_total_tokens=4096", "max_model_len"):
        assert part in str(error.value)
    with pytest.raises(WorkloadError, match="KV cache"):
        workload.check_fits(kv_capacity_tokens=5199)
