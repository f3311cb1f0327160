"""Claims about what is made of an engine's measured iterations."""

from __future__ import annotations

from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest

from engine.latency.lookup import LookupTable, lookup_time
from engine.latency.measured import MeasuredError, MeasuredIterations, read_provenance
from engine.latency.measured_card import heldout_errors, observed, table_times
from engine.latency.measured_fit import MemoryFigures, fit_table
from engine.latency.predictors import ALL_FEATURES, Forest, Predictor
from tests.engine.latency.made_iterations import LIMITS, PADDING, VERIFY, made_iterations

MEMORY = MemoryFigures(1e9, 2e7, 1e6, 1000)
FOREST = Forest(trees=20, min_samples_leaf=5, features=ALL_FEATURES, guess="curves")


@pytest.fixture(scope="module")
def measured() -> MeasuredIterations:
    return made_iterations(300, seed=0)


def test_the_table_of_a_known_composition_is_found_again(measured: MeasuredIterations) -> None:
    document = fit_table(measured, "made", MEMORY, {})
    assert document["attention"] == pytest.approx({"padding": PADDING, "verify_row_fraction": VERIFY})
    unseen = made_iterations(200, seed=1)
    assert table_times(document, unseen) == pytest.approx(unseen.seconds, rel=0.01)


def test_noise_does_not_pass_into_the_table() -> None:
    document = fit_table(made_iterations(300, seed=0, noise=0.05), "made", MEMORY, {})
    unseen = made_iterations(200, seed=1)
    assert np.abs(table_times(document, unseen) / unseen.seconds - 1.0).mean() < 0.025


def test_an_engine_that_never_drafts_has_a_free_drafter(measured: MeasuredIterations) -> None:
    plain = measured.subset(measured.candidates == 0)
    document = fit_table(plain, "made", MEMORY, {})
    assert document["drafter"]["step_seconds"] == [0.0, 0.0]
    assert np.abs(table_times(document, plain) / plain.seconds - 1.0).max() < 0.02


def test_what_is_held_out_is_never_learnt_from_and_everything_is_held_out(measured: MeasuredIterations) -> None:
    # Two iterations of a design may be alike: these are told apart by their times.
    measured = replace(measured, seconds=measured.seconds + 1e-9 * np.arange(len(measured)))
    calls: list[tuple[set[float], set[float]]] = []

    def fit(seen):
        def predict(unseen):
            calls.append((set(seen.seconds.tolist()), set(unseen.seconds.tolist())))
            return unseen.seconds

        return predict

    assert set(heldout_errors(measured, fit).values()) == {0.0}
    for seen, unseen in calls:
        assert not seen & unseen
        assert seen | unseen == set(measured.seconds.tolist())
    assert set.union(*(unseen for _, unseen in calls)) == set(measured.seconds.tolist())


def test_every_fold_has_its_share_of_every_kind_and_load(measured: MeasuredIterations) -> None:
    fold = measured.folds(5, seed=3)
    for rows in measured.groups.values():
        counts = np.bincount(fold[rows], minlength=5)
        assert counts.max() - counts.min() <= 6


def test_curves_predict_better_than_a_straight_line(measured: MeasuredIterations) -> None:
    unseen = made_iterations(200, seed=1)
    errors = {}
    for guess in ("line", "curves"):
        forest = Forest(trees=20, features=ALL_FEATURES, guess=guess)
        predicted = Predictor.fit(observed(measured), measured.seconds, forest, 0, "none")(observed(unseen))
        errors[guess] = np.abs(predicted / unseen.seconds - 1.0).mean()
    assert errors["curves"] < 0.7 * errors["line"]


def test_a_lookup_table_of_measured_iterations_predicts_them_and_is_cached(
    measured: MeasuredIterations, tmp_path: Path
) -> None:
    room = LIMITS.total_blocks * LIMITS.block_size
    arguments = ([0, 1, 4, 8], [32, 256, 2048], 64, room)
    table = LookupTable.of_measured(measured, *arguments, FOREST, cache_dir=tmp_path)
    rows = measured.subset((measured.num_decodes > 0) & (measured.unread_tokens == 0))
    predicted = [
        lookup_time(table.grid, *row)
        for row in zip(rows.num_decodes, rows.decode_kv_tokens, rows.candidates, rows.prefill_tokens, strict=True)
    ]
    assert np.abs(np.array(predicted) / rows.seconds - 1.0).mean() < 0.15
    assert table.heldout_mape["overall"] < 0.15
    (stored,) = tmp_path.iterdir()
    stamp = stored.stat().st_mtime_ns
    again = LookupTable.of_measured(measured, *arguments, FOREST, cache_dir=tmp_path)
    assert np.array_equal(again.grid.seconds, table.grid.seconds)
    assert stored.stat().st_mtime_ns == stamp
    LookupTable.of_measured(measured.subset(np.arange(200)), *arguments, FOREST, cache_dir=tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_a_file_gives_back_what_was_written(measured: MeasuredIterations, tmp_path: Path) -> None:
    path = tmp_path / "iterations.parquet"
    origin = {"device": "NVIDIA H200", "sensors": {"sm_mhz": {"median": 1980.0}}}
    measured.write(path, origin)
    read = MeasuredIterations.read(path)
    assert read_provenance(path) == origin
    for field in fields(MeasuredIterations):
        assert np.array_equal(
            np.array(getattr(read, field.name), dtype=object), np.array(getattr(measured, field.name), dtype=object)
        )


def test_equal_iterations_of_equal_origin_give_equal_bytes(measured: MeasuredIterations, tmp_path: Path) -> None:
    files = [tmp_path / name for name in ("one", "same", "other")]
    for file, seed in zip(files, (1, 1, 2), strict=True):
        measured.write(file, {"seed": seed})
    one, same, other = (file.read_bytes() for file in files)
    assert one == same != other


def test_a_file_that_says_no_origin_has_none(measured: MeasuredIterations, tmp_path: Path) -> None:
    measured.write(tmp_path / "plain.parquet")
    assert read_provenance(tmp_path / "plain.parquet") == {}
    with pytest.raises(MeasuredError, match=r"none\.parquet: no such file"):
        read_provenance(tmp_path / "none.parquet")


def test_a_file_that_cannot_be_used_is_refused_by_name(measured: MeasuredIterations, tmp_path: Path) -> None:
    with pytest.raises(MeasuredError, match=r"none\.parquet: no such file"):
        MeasuredIterations.read(tmp_path / "none.parquet")
    measured.subset(np.arange(0)).write(tmp_path / "empty.parquet")
    with pytest.raises(MeasuredError, match="no rows"):
        MeasuredIterations.read(tmp_path / "empty.parquet")


def test_an_unknown_feature_is_refused() -> None:
    with pytest.raises(ValueError, match=r"features=.*weather"):
        Forest(features=("decodes", "weather"))
