"""Claims about the table controllers predict with."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from engine.latency import lookup
from engine.latency.lookup import LookupGrid, LookupTable, lookup_choice, lookup_slice, lookup_time
from engine.latency.model import LatencyModel
from engine.latency.predictors import Forest

CANDIDATES = [0, 1, 2, 3, 4, 5, 6, 8]
BUDGETS = [0, 64, 128, 256, 384, 512, 768, 1024, 1536, 2048]


@pytest.fixture(scope="module")
def table() -> LookupTable:
    model = LatencyModel.load("vicuna_7b_a100")
    return LookupTable.fit(model, CANDIDATES, BUDGETS, 256, model.kv_capacity_tokens(0.9))


def tiny_grid() -> LookupGrid:
    """seconds = 1 + 2 B + 3 KV + 5 c + 7 n, so interpolation and extrapolation are exact."""
    axes = (np.array([0.0, 1.0, 4.0]), np.array([0.0, 10.0]), np.array([0, 3]), np.array([0, 100, 200]))
    b, k, c, n = np.meshgrid(*axes, indexing="ij")
    return LookupGrid(*axes, np.ascontiguousarray(1 + 2 * b + 3 * k + 5 * c + 7 * n))


def test_interpolation_and_extrapolation_are_linear() -> None:
    grid = tiny_grid()
    assert lookup_time(grid, 2, 5, 1, 50) == pytest.approx(1 + 4 + 15 + 5 + 350)
    assert lookup_time(grid, 8, 30, 3, 300) == pytest.approx(1 + 16 + 90 + 15 + 2100)
    assert lookup_time(grid, 0, 0, 0, 0) == pytest.approx(1)


def test_below_the_first_node_the_first_node_answers() -> None:
    axes = (np.array([2.0, 4.0]), np.array([10.0, 20.0]), np.array([1]), np.array([0]))
    grid = LookupGrid(*axes, np.arange(4.0).reshape(2, 2, 1, 1) + 1)
    assert lookup_time(grid, 0, 0, 1, 0) == 1.0
    assert lookup_time(grid, 0, 0, 0, 0) == 1.0


def test_a_slice_is_lookup_time_at_the_nodes(table: LookupTable) -> None:
    grid = table.grid
    out = np.empty(grid.seconds.shape[2:])
    for decodes, kv in ((0, 0), (1, 700), (37, 20000), (256, 110000), (300, 200000)):
        lookup_slice(grid, decodes, kv, out)
        for i, candidates in enumerate(grid.candidates):
            for j, prefill in enumerate(grid.prefill_tokens):
                assert out[i, j] == pytest.approx(lookup_time(grid, decodes, kv, candidates, prefill), rel=1e-12)


def test_a_choice_is_lookup_time_of_its_candidates(table: LookupTable) -> None:
    grid = table.grid
    for decodes, kv, prefill in ((0, 0, 0), (1, 700, 33), (37, 20000, 700), (256, 110000, 2048), (300, 2e5, 3000)):
        for i, candidates in enumerate(grid.candidates):
            expected = lookup_time(grid, decodes, kv, candidates, prefill)
            assert lookup_choice(grid, decodes, kv, i, prefill) == pytest.approx(expected, rel=1e-12)


def test_predictions_of_unseen_iterations_are_within_five_percent(table: LookupTable) -> None:
    for group, error in table.heldout_mape.items():
        assert error <= 0.05, (group, table.heldout_mape)
    assert {"overall", "mixed", "decode only", "1-8 decodes", "129-256 decodes"} <= set(table.heldout_mape)


def test_the_lookup_knows_the_staircase(table: LookupTable) -> None:
    grid = table.grid
    below, above = (lookup_time(grid, decodes, decodes * 300, 3, 0) for decodes in (30, 36))
    assert above / below > 1.2


def test_the_same_seed_bakes_the_same_grid() -> None:
    model = LatencyModel.linear(0.01, 1e-4)
    first, second = (LookupTable.fit(model, [0, 2], [0, 256], 16, 10000, samples=500, seed=3) for _ in range(2))
    assert np.array_equal(first.grid.seconds, second.grid.seconds)
    assert first.heldout_mape == second.heldout_mape


def test_the_cache_answers_the_second_time_and_knows_another_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ([0, 2], [0, 256], 16, 10000)
    model = LatencyModel.linear(0.01, 1e-4)
    first = LookupTable.load_or_fit(model, *arguments, samples=500, cache_dir=tmp_path)
    monkeypatch.setattr(lookup, "_bake", lambda *_: pytest.fail("a cached grid must not be fitted again"))
    again = LookupTable.load_or_fit(model, *arguments, samples=500, cache_dir=tmp_path)
    assert np.array_equal(first.grid.seconds, again.grid.seconds)
    assert first.heldout_mape == again.heldout_mape
    assert [path.suffix for path in tmp_path.iterdir()] == [".npz"]
    with pytest.raises(pytest.fail.Exception):
        LookupTable.load_or_fit(LatencyModel.linear(0.02, 1e-4), *arguments, samples=500, cache_dir=tmp_path)


def test_a_damaged_cache_is_fitted_again(tmp_path: Path) -> None:
    arguments = ([0, 2], [0, 256], 16, 10000)
    model = LatencyModel.linear(0.01, 1e-4)
    first = LookupTable.load_or_fit(model, *arguments, samples=500, cache_dir=tmp_path)
    path = next(tmp_path.iterdir())
    path.write_bytes(path.read_bytes()[:100])
    again = LookupTable.load_or_fit(model, *arguments, samples=500, cache_dir=tmp_path)
    assert np.array_equal(first.grid.seconds, again.grid.seconds)


@pytest.mark.parametrize(
    ("arguments", "key"),
    [
        (([], [0, 256], 16, 1000), "candidate_choices"),
        (([0, 1], [256, 128], 16, 1000), "budget_choices"),
        (([0, 1], [0, 256], 0, 1000), "max_num_seqs"),
        (([0, 1], [0, 256], 16, 0), "kv_capacity_tokens"),
    ],
)
def test_impossible_limits_are_refused_by_name(arguments: tuple, key: str) -> None:
    with pytest.raises(ValueError, match=key):
        LookupTable.fit(LatencyModel.linear(0.01), *arguments)


def test_seats_that_an_engine_does_not_use_change_no_prediction() -> None:
    model = LatencyModel.load("vicuna_7b_a100")
    tables = [
        LookupTable.fit(model, [0, 2], [0, 512], seats, 60_000, samples=1000, forest=Forest(trees=3))
        for seats in (64, 256, 4096)
    ]
    for few, many in pairwise(tables):
        shared = np.isin(many.grid.batch, few.grid.batch).nonzero()[0]
        assert np.array_equal(few.grid.batch, many.grid.batch[shared])
        assert np.array_equal(few.grid.seconds, many.grid.seconds[shared])


def test_batches_above_the_usual_are_predicted_from_their_own_samples() -> None:
    model = LatencyModel.load("vicuna_7b_a100")
    table = LookupTable.fit(model, [0, 2], [0, 512], 4096, 400_000, samples=1000, forest=Forest(trees=3))
    assert table.heldout_mape["257-4096 decodes"] < 0.06
    usual = LookupTable.fit(model, [0, 2], [0, 512], 256, 400_000, samples=1000, forest=Forest(trees=3))
    assert table.heldout_mape["overall"] == usual.heldout_mape["overall"]
