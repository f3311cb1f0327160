"""Scores over scenarios and the suite's table: every aggregate against values computed by hand."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from fake_runs import write_constant
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.integrate import trapezoid

from runs import bench, report
from runs.code import code_digest
from runs.reporting import across, claims, scores
from runs.reporting.aggregate import interval, iqm, performance_profile, probability_of_improvement, resamples
from runs.reporting.collate import ReportError, collate
from runs.reporting.scores import ONE, ZERO
from runs.reporting.statistics import best_static, over_seeds

PEEKS = {"peeks": True}
SCORES = arrays(np.float64, st.integers(4, 30), elements=st.floats(-5, 5))


def write_scenarios(root: Path, objectives: Mapping[str, Mapping[str, list[float]]], **more: Any) -> pd.DataFrame:
    """Runs with these objectives, by label, scenario and seed; labels that begin with `oracle` peek."""
    for label, by_scenario in objectives.items():
        for scenario, values in by_scenario.items():
            for seed, objective in enumerate(values):
                write_constant(
                    root / label.replace(" ", "_") / scenario.replace("/", "_") / str(seed),
                    label,
                    objective * 0.05,
                    scenario=scenario,
                    seed=seed,
                    identity={"peeks": label.startswith("oracle"), "code": code_digest()},
                    **more,
                )
    return collate([root]).runs


# Aggregates


def test_the_interquartile_mean_leaves_out_both_outer_quarters() -> None:
    assert iqm(np.array([100.0, 0.0, 3.0, 1.0, 2.0, 0.0, 5.0, 4.0])) == pytest.approx((1 + 2 + 3 + 4) / 4)
    assert iqm(np.array([[1.0, 2.0, 3.0, 9.0], [4.0, 4.0, 6.0, 0.0]])) == pytest.approx([2.5, 4.0])


def test_improvement_counts_pairs_within_each_scenario_and_ties_by_half() -> None:
    strata = np.array([0, 0, 1, 1])
    one, other = np.array([1.0, 2.0, 5.0, 5.0]), np.array([0.0, 2.0, 7.0, 7.0])
    # First scenario: 1 > 0, 1 < 2, 2 > 0, 2 = 2; in the second every pair is lost.
    assert probability_of_improvement(one, other, strata) == pytest.approx((2.5 / 4 + 0) / 2)


@given(SCORES, st.integers(0, 99))
def test_improvement_over_another_and_the_others_over_it_make_one(one: np.ndarray, seed: int) -> None:
    rng = np.random.default_rng(seed)
    other = rng.permutation(one)
    strata = rng.integers(0, 3, one.size)
    back = probability_of_improvement(other, one, strata)
    assert probability_of_improvement(one, other, strata) + back == pytest.approx(1.0)
    assert probability_of_improvement(one, one, strata) == pytest.approx(0.5)


def test_a_profile_is_the_share_of_runs_that_reach_a_score() -> None:
    profile = performance_profile(np.array([0.1, 0.5, 0.5, 0.9]), np.array([0.0, 0.5, 0.6, 1.0]))
    assert profile.tolist() == [1.0, 0.75, 0.25, 0.0]


@settings(max_examples=30)
@given(SCORES)
def test_a_profile_falls_from_all_runs_to_none_and_its_area_is_the_mean(values: np.ndarray) -> None:
    thresholds = np.linspace(-5.001, 5.001, 1001)
    profile = performance_profile(values, thresholds)
    assert (profile[0], profile[-1]) == (1.0, 0.0)
    assert (np.diff(profile) <= 0).all()
    assert thresholds[0] + trapezoid(profile, thresholds) == pytest.approx(values.mean(), abs=0.03)


def test_seeds_are_resampled_within_their_scenario() -> None:
    strata = np.array([7, 3, 7, 3, 7])
    drawn = resamples(tuple(strata.tolist()))
    assert (strata[drawn] == strata).all()
    assert set(drawn[:, 0]) == {0, 2, 4}
    # Scenarios differ a lot and seeds not at all: nothing is uncertain.
    values = np.where(strata == 7, 10.0, 0.0)
    assert interval(lambda scores: scores.mean(axis=-1), strata, values) == (6.0, 6.0)


def test_the_stratified_interval_of_one_scenario_has_the_quantiles_of_its_binomial() -> None:
    # The mean of ten draws from five zeros and five ones is Binomial(10, 1/2) / 10, with 2.5 and 97.5 % points 2 and 8.
    strata = np.zeros(10, np.int64)
    bounds = interval(lambda scores: scores.mean(axis=-1), strata, np.array([0.0, 1.0] * 5))
    assert bounds == pytest.approx((0.2, 0.8))


def test_a_scenario_with_a_single_seed_gives_no_interval() -> None:
    low, high = interval(iqm, np.array([0, 0, 1]), np.array([1.0, 2.0, 3.0]))
    assert math.isnan(low)
    assert math.isnan(high)


# Scores


def test_a_score_is_the_part_of_the_way_from_doing_nothing_to_the_oracle(tmp_path: Path) -> None:
    runs = write_scenarios(
        tmp_path,
        {ZERO: {"a": [1.0, 2.0]}, "oracle": {"a": [0.5, 1.0]}, "analytic": {"a": [0.6, 2.5]}, "poster": {"a": [0.4]}},
    )
    scored = scores.score(runs)
    assert scored is not None
    assert scored.one == ONE
    assert not scored.notes
    by_label = {label: group["score"].tolist() for label, group in scored.frame.groupby("label")}
    assert by_label[ZERO] == [0.0, 0.0]
    assert by_label[ONE] == [1.0, 1.0]
    assert by_label["analytic"] == pytest.approx([0.8, -0.5])
    # Better than the bound is more than 1: a heuristic bound may be beaten, and that must show.
    assert by_label["poster"] == pytest.approx([1.2])


def test_without_the_oracle_on_all_requests_the_best_static_setting_is_one_and_a_controller_may_exceed_it(
    tmp_path: Path,
) -> None:
    objectives = {
        ZERO: [1.0, 1.0],
        "oracle": [0.5],
        "analytic": [0.6, 0.8],
        # The best of its scenario over both seeds, though not at each of them.
        "sarathi 768 c=2": [0.8, 0.8],
        "sarathi 2048": [1.1, 0.7],
        "poster": [0.9, 0.9],
    }
    runs = write_scenarios(tmp_path, {label: {"a": values} for label, values in objectives.items()})
    scored = scores.score(runs)
    assert scored is not None
    assert scored.one == scores.BEST_STATIC
    by_label = {label: group["score"].tolist() for label, group in scored.frame.groupby("label")}
    assert by_label["sarathi 768 c=2"] == pytest.approx([1.0, 1.0])
    assert by_label["analytic"] == pytest.approx([2.0, 1.0])
    assert by_label["poster"] == pytest.approx([0.5, 0.5])
    assert scores.BEST_STATIC in scored.rule


def test_where_the_bound_is_no_better_than_doing_nothing_there_is_no_score_and_it_is_said(tmp_path: Path) -> None:
    runs = write_scenarios(
        tmp_path,
        {ZERO: {"a": [1.0, 1.0], "b": [1.0, 1.0]}, "oracle": {"a": [1.0, 1.1], "b": [0.995, 0.5]}},
    )
    scored = scores.score(runs)
    assert scored is not None
    missing = scored.frame[scored.frame["score"].isna()]
    assert sorted(zip(missing["scenario"], missing["seed"], strict=True)) == sorted([("a", 0), ("a", 1), ("b", 0)] * 2)
    assert [note.split(": ")[0] for note in scored.notes] == ["vicuna_7b_a100, a", "vicuna_7b_a100, b"]
    assert "seed 0, 1" in scored.notes[0]


def test_runs_without_a_zero_have_no_score(tmp_path: Path) -> None:
    assert scores.score(write_scenarios(tmp_path, {"analytic": {"a": [1.0]}})) is None


def test_aggregates_rank_controllers_and_put_bounds_last(tmp_path: Path) -> None:
    runs = write_scenarios(
        tmp_path,
        {
            ZERO: {"a": [1.0, 1.0], "b": [2.0, 2.0]},
            "oracle": {"a": [0.0, 0.0], "b": [0.0, 0.0]},
            "oracle_grid": {"a": [0.1, 0.1], "b": [0.2, 0.2]},
            "analytic": {"a": [0.2, 0.4], "b": [0.4, 0.8]},
            "sarathi 768 c=2": {"a": [0.2, 0.4], "b": [0.4, 0.8]},
            "poster": {"a": [0.3, 0.9], "b": [0.2, 0.2]},
            "sarathi 512": {"a": [0.1, 0.1]},
        },
    )
    scored = scores.score(runs)
    assert scored is not None
    table, short = scores.aggregates(scored)
    assert table["label"].tolist() == ["poster", "analytic", "sarathi 768 c=2", ZERO, ONE, "oracle_grid (bound)"]
    assert short == ["Not aggregated, for want of runs in every scored scenario: sarathi 512."]
    row = table.set_index("label")
    # Scores of sarathi 768 are 0.8, 0.6, 0.8 and 0.6; of poster 0.7, 0.1, 0.9 and 0.9: the middle two.
    assert row.loc["analytic", "iqm"] == pytest.approx(0.7)
    assert row.loc["poster", "iqm"] == pytest.approx(0.8)
    assert row.loc["poster", "mean"] == pytest.approx(0.65)
    # Poster's 0.7 beats 0.6, its 0.1 none, its 0.9s all: (1/4 + 4/4) / 2.
    assert row.loc["poster", "better"] == pytest.approx(0.625)
    assert math.isnan(row.loc["sarathi 768 c=2", "better"])
    assert row.loc["analytic", "iqm_low"] == pytest.approx(0.6)
    assert row.loc["analytic", "iqm_high"] == pytest.approx(0.8)
    told = scores.told(table)
    assert told["label"].tolist() == table["label"].tolist()


def test_of_the_fixed_settings_only_the_best_and_the_named_are_told(tmp_path: Path) -> None:
    pairs = {f"fixed c={c} n=256": 0.9 - 0.1 * c for c in range(4)}
    objectives = {ZERO: 1.0, **pairs, "oracle": 0.1}
    runs = write_scenarios(
        tmp_path, {label: {"a": [value] * 2, "b": [value] * 2} for label, value in objectives.items()}
    )
    scored = scores.score(runs)
    assert scored is not None
    table, _ = scores.aggregates(scored)
    assert scores.told(table)["label"].tolist() == ["fixed c=3 n=256", ZERO, ONE]
    assert "fixed c=1 n=256" in scores.told(table, (ZERO, "fixed c=1 n=256"))["label"].tolist()


def test_load_levels_follow_what_doing_nothing_and_the_best_attain(tmp_path: Path) -> None:
    attained = {"light": (1.0, 1.0), "busy": (0.9, 0.96), "over": (0.3, 0.9)}
    for scenario, (zero, best) in attained.items():
        for label, share in ((ZERO, zero), ("analytic", best), ("oracle", 1.0)):
            write_constant(
                tmp_path / scenario / label,
                label,
                0.05,
                share,
                scenario=scenario,
                identity={"peeks": label == "oracle"},
            )
    found = scores.levels(collate([tmp_path]).runs)
    # What only a bound attains makes no load bearable.
    assert {scenario: level for (_, scenario), level in found.items()} == {
        "light": "light", "busy": "contended", "over": "overload"
    }  # fmt: skip


def test_results_by_load_level_hold_the_scenarios_of_that_level_only(tmp_path: Path) -> None:
    for scenario, zero, analytic in (("light", 1.0, 0.5), ("over", 0.5, 0.6)):
        for seed in range(2):
            for label, tpot, share in ((ZERO, 0.05, zero), ("analytic", 0.04, analytic), ("oracle", 0.025, 1.0)):
                identity = {"peeks": label == "oracle"}
                folder = tmp_path / scenario / f"{label}-{seed}"
                write_constant(folder, label, tpot, share, scenario=scenario, seed=seed, identity=identity)
    scored = scores.score(collate([tmp_path]).runs)
    assert scored is not None
    found = scores.by_level(scored).set_index(["label", "level"])
    # Late by one target costs 2 + 1. Light: J0 = 1, J1 = 0.5, J = 0.8 + 1.5; over: J0 = 2.5, J1 = 0.5, J = 0.8 + 1.2.
    assert found.loc[("analytic", "light"), "iqm"] == pytest.approx((1 - 2.3) / 0.5)
    assert found.loc[("analytic", "overload"), "iqm"] == pytest.approx((2.5 - 2.0) / 2.0)
    assert found["scenarios"].tolist() == [1] * len(found)


def test_regret_is_paired_with_each_bound_that_was_run(tmp_path: Path) -> None:
    runs = write_scenarios(
        tmp_path,
        {
            "analytic": {"a": [0.6, 0.9, 1.2]},
            "oracle_grid": {"a": [0.5, 0.8, 1.0]},
            "oracle": {"a": [0.4, 0.6, 0.8]},
        },
    )
    found = scores.regrets(runs).set_index("label")
    row = found.loc["analytic"]
    assert row["regret_oracle_grid"] == pytest.approx((0.1 + 0.1 + 0.2) / 3)
    assert (row["regret_oracle_low"], row["regret_oracle_high"]) == pytest.approx(
        (0.3 - 0.248414, 0.3 + 0.248414), abs=1e-5
    )
    assert row["regret_oracle"] == pytest.approx(0.3)
    assert row["relative_oracle"] == pytest.approx(0.5)
    assert row["relative_oracle_grid"] == pytest.approx((0.2 + 0.125 + 0.2) / 3)
    # Bounds have no regret: neither is a controller.
    assert math.isnan(found.loc[ONE, "regret_oracle_grid"])
    assert scores.regrets(runs[runs["role"] != "bound"]).empty


# Bounds in reports


def test_a_bound_is_labelled_and_takes_no_part_in_any_claim(tmp_path: Path) -> None:
    for seed in range(2):
        write_constant(tmp_path / f"f{seed}", "fixed c=3 n=512", 0.012, seed=seed)
        write_constant(tmp_path / f"o{seed}", "oracle", 0.006, seed=seed, identity=PEEKS)
        write_constant(tmp_path / f"a{seed}", "analytic", 0.011, seed=seed)
    # A bound whose class is called `fixed` would be one all the same.
    runs = collate([tmp_path]).runs
    assert dict(zip(runs["label"], runs["role"], strict=True)) == {
        "analytic": "optimizer", "fixed c=3 n=512": "static", ONE: "bound"
    }  # fmt: skip
    assert set(claims.load_claim(runs)["label"]) == {"analytic"}
    assert set(claims.budget_claim(runs)["label"]) == {"analytic"}
    chosen = best_static(over_seeds(runs))
    assert chosen is not None
    assert chosen["label"] == "fixed c=3 n=512"
    built = report.build(collate([tmp_path]))
    (table,) = built.comparison_tables
    assert table.frame["label"].tolist()[-1] == ONE
    assert table.frame.set_index("label").loc[ONE, "verdict"] == "bound"


def test_what_peeks_must_be_said_with_true_or_false(tmp_path: Path) -> None:
    write_constant(tmp_path / "run", "oracle", 0.01, identity={"peeks": "yes"})
    with pytest.raises(ReportError, match=r"key 'run\.peeks' should be true or false, found 'yes'"):
        collate([tmp_path])


def test_run_folders_from_before_there_were_bounds_still_report(tmp_path: Path) -> None:
    folder = write_constant(tmp_path / "old", "analytic", 0.01)
    assert "peeks" not in json.loads((folder / "summary.json").read_text())["run"]
    assert collate([tmp_path]).runs["role"].tolist() == ["optimizer"]


SUITE = {
    ZERO: {"7b/idle": [1.0, 1.1], "7b/code": [2.0, 2.2]},
    "fixed c=3 n=256": {"7b/idle": [0.8, 0.8], "7b/code": [2.1, 2.3]},
    "analytic": {"7b/idle": [0.7, 0.7], "7b/code": [1.2, 1.4]},
    "poster": {"7b/idle": [0.9, 0.6], "7b/code": [1.5, 1.7]},
    "oracle_grid": {"7b/idle": [0.8, 0.8], "7b/code": [1.3, 1.3]},
    "oracle": {"7b/idle": [0.5, 0.5], "7b/code": [1.0, 1.1]},
}


def test_a_report_over_scenarios_has_their_scores_their_profiles_and_regrets(tmp_path: Path) -> None:
    write_scenarios(tmp_path / "runs", SUITE)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "<h2 id='across'>All scenarios</h2>" in page
    assert "Regret to the bounds" in page
    assert (tmp_path / "out" / "profiles.png").is_file()
    ranked = pd.read_csv(tmp_path / "out" / "scores.csv")
    assert ranked["label"].tolist()[-2:] == [ONE, "oracle_grid (bound)"]
    assert len(pd.read_csv(tmp_path / "out" / "regrets.csv")) == 2 * len(SUITE)


def test_a_single_scenario_has_no_section_over_scenarios(tmp_path: Path) -> None:
    runs = write_scenarios(tmp_path, {ZERO: {"a": [1.0]}, "analytic": {"a": [0.5]}})
    assert across.across(runs) is None


def test_figures_are_written_without_a_sign_on_zero() -> None:
    assert across.interval_text(-0.001, math.nan, math.nan) == "0.00"
    assert across.interval_text(0.5, 0.4, 0.613) == "0.50 [0.40, 0.61]"
    assert across.interval_text(math.nan, 0.0, 1.0) == "–"


# The suite's table


def written(folder: Path, name: str = "bench.md") -> tuple[str, str]:
    out = folder / name
    assert bench.main([str(folder / "runs"), "--out", str(out)]) == 0
    return out.read_text(), out.with_suffix(".csv").read_text()


def test_the_suites_table_says_who_scores_what_where(tmp_path: Path) -> None:
    write_scenarios(tmp_path / "runs", SUITE)
    page, rows = written(tmp_path)
    lines = page.splitlines()
    # Scores of analytic: 0.6, 0.4 / 0.6, 0.8, 0.8 / 1.1; the middle two of four are 2/3 and 0.727.
    assert any(line.startswith("| analytic | 0.70 [") for line in lines)
    assert any(line.startswith("| analytic | 0.76 [0.30, 1.23] | 0.63 [0.21, 1.06] |") for line in lines)
    heads = [line.split(" | ")[0].removeprefix("| ") for line in lines if line.startswith("| ")]
    ranking = heads[1 : heads.index("Vicuna-7B · A100")]
    assert ranking[0] == "---"
    assert ranking[-2:] == [ONE, "oracle_grid (bound)"]
    frame = pd.read_csv(pd.io.common.StringIO(rows))
    assert len(frame) == 2 * len(SUITE)
    analytic = frame[(frame["label"] == "analytic") & (frame["scenario"] == "7b/idle")].iloc[0]
    assert analytic["score"] == pytest.approx((0.6 + 0.4 / 0.6) / 2, rel=1e-4)
    assert analytic["regret_oracle"] == pytest.approx(0.2)
    assert analytic["relative_oracle_grid"] == pytest.approx(-0.125)
    # Idle: all requests meet both targets, and fixed c=3 n=256 has the lower TPOT; code: none does, and the zero has.
    plain = page.replace("\N{NO-BREAK SPACE}", " ")
    assert "| 7b/idle | better | 100.0 % | fixed c=3 n=256 | 100.0 % | +0.0 [+0.0, +0.0] | 0.875 [" in plain
    assert "| 7b/code | better" in plain
    assert "better at 2, level at 0, worse at 0 of 2 loads" in page


def test_all_but_the_costs_depends_on_the_runs_alone(tmp_path: Path) -> None:
    for place, wall in (("one", 0.5), ("two", 0.9)):
        figures = {"decision_time_p50_s": wall * 1e-5, "decision_time_p99_s": 2e-5, "sim_wall_s": wall}
        write_scenarios(tmp_path / place / "runs", SUITE, figures=figures)
    (one, one_rows), (two, two_rows) = (written(tmp_path / place) for place in ("one", "two"))
    last = "## What deciding cost"
    assert one.split(last)[0] == two.split(last)[0]
    assert one != two
    assert one_rows == two_rows
    assert "| analytic | 5.0 | 20.0 | 0.500 |" in one.split(last)[1]


def test_runs_of_another_version_of_the_code_are_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenarios(tmp_path / "runs", SUITE)
    before = written(tmp_path)
    capsys.readouterr()
    write_constant(tmp_path / "runs" / "left", "feedback pi", 0.02, scenario="7b/idle", identity={"code": "older"})
    assert written(tmp_path) == before
    assert "1 runs of another version" in capsys.readouterr().err


def test_runs_that_give_no_score_give_no_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_scenarios(tmp_path / "runs", {"analytic": {"a": [1.0]}})
    assert bench.main([str(tmp_path / "runs"), "--out", str(tmp_path / "bench.md")]) == 2
    assert ZERO in capsys.readouterr().err
    assert not (tmp_path / "bench.md").exists()
