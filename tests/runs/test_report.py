"""The report: what it accepts, what it counts, and that its page stands alone. Every number is made up by hand."""

import io
import itertools
import json
import math
import os
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from fake_runs import write_constant, write_run, write_sweep
from matplotlib import image
from matplotlib.backends.backend_agg import FigureCanvasAgg

from runs import folder as run_folder
from runs import report
from runs.reporting import chunked, claims, figures, palette
from runs.reporting.collate import ReportError, collate, family_of
from runs.reporting.names import engine_name
from runs.reporting.statistics import best_static, mark_best_static, mean_interval, over_seeds, paired_difference


def _labelled(runs: pd.DataFrame, label: str) -> pd.DataFrame:
    return runs[runs["label"] == label]


def _write_seeds(root: Path, label: str, tpots: list[float], **more: object) -> None:
    for seed, tpot in enumerate(tpots):
        write_constant(root / f"{label}-{seed}", label, tpot, seed=seed, **more)  # type: ignore[arg-type]


# Collating


def test_runs_are_found_at_any_depth_and_read_into_one_row_each(tmp_path: Path) -> None:
    write_constant(tmp_path / "a" / "deep" / "0", "fixed c=3 n=512", 0.010)
    write_constant(tmp_path / "b", "analytic", 0.009)
    runs = collate([tmp_path]).runs
    assert list(runs["label"]) == ["analytic", "fixed c=3 n=512"]
    assert list(runs["role"]) == ["optimizer", "static"]
    assert runs["candidates"].isna().tolist() == [True, False]
    assert runs["tpot_mean_s"].tolist() == pytest.approx([0.009, 0.010])


@pytest.mark.parametrize(
    ("scenario", "family"),
    [
        ("azure2023_conv x0.5", "azure2023_conv"),
        ("azure_conv_like x0.5", "azure_conv_like"),
        ("poisson_lmsys 8/s", "poisson_lmsys"),
        ("azure_code_like cv=2.5 x1.25", "azure_code_like cv=2.5"),
        ("lmsys @2.5 rps", "lmsys"),
        ("azure2023_code", "azure2023_code"),
    ],
)
def test_a_family_is_the_scenario_without_its_load(scenario: str, family: str) -> None:
    assert family_of(scenario) == family


def test_an_empty_folder_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ReportError, match=rf"{re.escape(str(tmp_path))}: no run folders"):
        collate([tmp_path])
    with pytest.raises(ReportError, match="no such folder"):
        collate([tmp_path / "absent"])


def test_a_summary_that_lacks_a_key_is_refused_with_file_and_key(tmp_path: Path) -> None:
    folder = write_constant(tmp_path / "run", "analytic", 0.01)
    summary = json.loads((folder / "summary.json").read_text())
    del summary["tpot_p90_s"]
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match=r"run/summary\.json: key 'tpot_p90_s' is missing(.|\n)*--skip-broken"):
        collate([tmp_path])


@pytest.mark.parametrize(
    ("key", "value"), [("seed", "zero"), ("engine", None), ("workload_digest", 3), ("ttft_target_s", True)]
)
def test_a_wrong_type_in_the_identity_is_refused_with_its_key(tmp_path: Path, key: str, value: object) -> None:
    folder = write_constant(tmp_path / "run", "analytic", 0.01)
    summary = json.loads((folder / "summary.json").read_text())
    summary["run"][key] = value
    (folder / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match=rf"key 'run\.{key}' should be a"):
        collate([tmp_path])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda folder: (folder / "summary.json").unlink(), r"summary\.json is missing"),
        (lambda folder: (folder / "requests.parquet").unlink(), r"requests\.parquet is missing"),
        (lambda folder: (folder / "summary.json").write_text('{"tpot'), "not readable as JSON"),
        (lambda folder: (folder / "requests.parquet").write_bytes(b"PAR1 half"), "not readable as parquet"),
    ],
)
def test_a_half_written_run_is_refused_or_left_out_on_request(tmp_path: Path, damage, reason: str) -> None:  # type: ignore[no-untyped-def]
    write_constant(tmp_path / "good", "analytic", 0.01)
    damage(write_constant(tmp_path / "bad", "poster", 0.01))
    with pytest.raises(ReportError, match=rf"bad(.|\n)*{reason}"):
        collate([tmp_path])
    left = collate([tmp_path], skip_broken=True)
    assert list(left.runs["label"]) == ["analytic"]
    assert len(left.skipped) == 1
    assert "bad" in left.skipped[0]


def test_damage_to_the_footer_of_a_runs_requests_is_refused(tmp_path: Path) -> None:
    made = write_constant(tmp_path / "made", "analytic", 0.01)
    columns = {name: column.to_numpy() for name, column in pd.read_parquet(made / "requests.parquet").items()}
    summary = json.loads((made / "summary.json").read_text())
    run_folder.write_run(tmp_path / "run", "seed: 0\n", summary, columns, None)
    assert len(collate([tmp_path / "run"]).runs) == 1
    path = tmp_path / "run" / "requests.parquet"
    content = bytearray(path.read_bytes())
    # The file ends with the name of the library that wrote it, the footer's length and PAR1.
    content[-40] ^= 1
    path.write_bytes(content)
    with pytest.raises(ReportError, match=r"run/requests\.parquet: damaged or edited"):
        collate([tmp_path / "run"])


def test_fewer_rows_than_the_summary_says_is_a_half_written_run(tmp_path: Path) -> None:
    folder = write_constant(tmp_path / "run", "analytic", 0.01)
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps(summary | {"requests_total": 101}))
    with pytest.raises(ReportError, match=r"100 rows where summary\.json says requests_total = 101"):
        collate([tmp_path])


def test_the_same_run_twice_is_refused_naming_both_or_the_newer_is_kept(tmp_path: Path) -> None:
    old = write_constant(tmp_path / "old", "analytic", 0.01)
    new = write_constant(tmp_path / "new", "analytic", 0.02)
    os.utime(old / "summary.json", (1, 1))
    with pytest.raises(ReportError, match=rf"{old.resolve()} and {new.resolve()} are the same run"):
        collate([tmp_path])
    assert collate([tmp_path], latest=True).runs["tpot_mean_s"].tolist() == pytest.approx([0.02])


def test_runs_of_one_seed_on_different_requests_are_refused(tmp_path: Path) -> None:
    write_constant(tmp_path / "a", "analytic", 0.01, digest="aaaa")
    write_constant(tmp_path / "b", "fixed c=3 n=512", 0.01, digest="bbbb")
    with pytest.raises(ReportError, match=r"different requests \(workload_digest aaaa and bbbb\)"):
        collate([tmp_path])


def test_mixed_targets_are_refused_until_recounted(tmp_path: Path) -> None:
    write_constant(tmp_path / "a", "analytic", 0.01, attainment=0.9)
    write_constant(tmp_path / "b", "fixed c=3 n=512", 0.01, attainment=0.8, ttft_target_s=0.4)
    with pytest.raises(ReportError, match="different TTFT targets"):
        collate([tmp_path])
    recounted = collate([tmp_path], ttft_target_s=1.5).runs
    assert recounted["ttft_attainment"].tolist() == [0.9, 0.8]
    assert (recounted["ttft_target_s"] == 1.5).all()
    assert recounted["goodput_rps"].tolist() == pytest.approx((np.array([90, 80]) / recounted["duration_s"]).tolist())


def test_windows_hold_the_requests_that_arrive_in_them(tmp_path: Path) -> None:
    arrival = np.array([0.0, 1.0, 9.0, 10.0, 12.0, 18.0, 21.0])
    tpot = np.array([0.01, 0.02, np.nan, 0.03, 0.03, 0.06, 0.50])
    write_run(
        tmp_path / "a", arrival_s=arrival, tpot_s=tpot, ttft_s=np.array([0.1, 2, 0.1, 2, 2, 0.1, 1]), label="analytic"
    )
    windows = collate([tmp_path], window_s=10.0).windows
    # The third window is only 1 s long and is left out.
    assert windows["window"].tolist() == [0, 1]
    assert windows["arrivals"].tolist() == [3, 3]
    assert windows["measured"].tolist() == [2, 3]
    assert windows["request_rate_rps"].tolist() == [0.3, 0.3]
    assert windows["tpot_s"].tolist() == pytest.approx([0.015, 0.04])
    assert windows["ttft_attainment"].tolist() == pytest.approx([2 / 3, 1 / 3])


# Statistics


def test_a_paired_difference_is_the_mean_of_the_differences_by_seed(tmp_path: Path) -> None:
    _write_seeds(tmp_path, "analytic", [0.010, 0.012, 0.014])
    _write_seeds(tmp_path, "fixed c=3 n=512", [0.011, 0.014, 0.017])
    runs = collate([tmp_path]).runs
    paired = paired_difference(_labelled(runs, "analytic"), _labelled(runs, "fixed c=3 n=512"), "tpot_mean_s")
    assert paired is not None
    assert paired.seeds == (0, 1, 2)
    assert paired.difference == pytest.approx(-0.002)
    # The ratio is the mean of the seeds' own, as its interval is.
    assert paired.ratios == pytest.approx((10 / 11, 12 / 14, 14 / 17))
    assert paired.ratio == pytest.approx((10 / 11 + 12 / 14 + 14 / 17) / 3)
    # Differences of -1, -2 and -3 ms: standard error 1 / sqrt(3) ms, and t at 97.5 % with two degrees of freedom 4.303.
    half = 4.302653 * 0.001 / math.sqrt(3)
    assert (paired.low, paired.high) == pytest.approx((-0.002 - half, -0.002 + half))
    assert paired.verdict == "not separable"


def test_an_interval_over_seeds_is_students_t_and_wider_than_the_seeds_seen() -> None:
    # Mean 2, standard deviation 1: 2 +- 4.303 / sqrt(3), where resampling three values can give no more than [1, 3].
    assert mean_interval([1.0, 2.0, 3.0]) == pytest.approx((-0.48414, 4.48414), abs=1e-5)
    assert mean_interval([3.0, 3.0, 3.0]) == (3.0, 3.0)
    assert all(math.isnan(bound) for bound in mean_interval([3.0]))


def test_one_seed_has_no_interval_and_no_verdict(tmp_path: Path) -> None:
    _write_seeds(tmp_path, "analytic", [0.010])
    _write_seeds(tmp_path, "poster", [0.020])
    runs = collate([tmp_path]).runs
    paired = paired_difference(_labelled(runs, "analytic"), _labelled(runs, "poster"), "tpot_mean_s")
    assert paired is not None
    assert paired.difference == pytest.approx(-0.010)
    assert math.isnan(paired.low)
    assert math.isnan(paired.ratio_high)
    assert paired.verdict == "one seed: no interval"


def test_only_equal_seeds_and_equal_requests_are_paired(tmp_path: Path) -> None:
    _write_seeds(tmp_path, "analytic", [0.010, 0.020])
    _write_seeds(tmp_path, "poster", [0.020])
    runs = collate([tmp_path]).runs
    mine, other = _labelled(runs, "analytic"), _labelled(runs, "poster")
    paired = paired_difference(mine, other, "tpot_mean_s")
    assert paired is not None
    assert paired.seeds == (0,)
    assert paired_difference(mine[mine["seed"] == 1], other, "tpot_mean_s") is None
    with pytest.raises(ReportError, match="cannot be paired: seed 0"):
        paired_difference(mine, other.assign(workload_digest="else"), "tpot_mean_s")


def test_the_best_static_setting_is_the_quickest_of_those_that_let_as_many_meet_both_targets(tmp_path: Path) -> None:
    write_constant(tmp_path / "0", "sarathi 384 c=3", 0.008, attainment=0.70, count=1000)
    write_constant(tmp_path / "1", "sarathi 768 c=2", 0.010, attainment=0.896, count=1000)
    write_constant(tmp_path / "2", "fixed c=3 n=512", 0.012, attainment=0.90, count=1000)
    # All in time, and all above the TPOT target.
    write_constant(tmp_path / "3", "sarathi 2048", 0.060, attainment=1.0, count=1000)
    settings = over_seeds(collate([tmp_path]).runs)
    chosen = best_static(settings)
    assert chosen is not None
    assert chosen["label"] == "sarathi 768 c=2"
    for wanted, label in ((0.705, "sarathi 384 c=3"), (0.71, "sarathi 768 c=2"), (1.0, "sarathi 2048")):
        least = best_static(settings, ttft_attainment=wanted)
        assert least is not None
        assert least["label"] == label


def test_where_all_attain_little_a_setting_that_attains_half_is_not_the_best(tmp_path: Path) -> None:
    write_constant(tmp_path / "half", "fixed c=3 n=64", 0.008, attainment=0.002, count=1000)
    write_constant(tmp_path / "most", "fixed c=3 n=256", 0.040, attainment=0.004, count=1000)
    chosen = best_static(over_seeds(collate([tmp_path]).runs))
    assert chosen is not None
    assert chosen["label"] == "fixed c=3 n=256"


def test_a_setting_with_fewer_seeds_is_never_the_best_static(tmp_path: Path) -> None:
    _write_seeds(tmp_path, "fixed c=1 n=512", [0.012, 0.012])
    _write_seeds(tmp_path, "fixed c=3 n=512", [0.008])
    settings = mark_best_static(collate([tmp_path]).runs)
    assert settings.loc[settings["best_static"], "label"].tolist() == ["fixed c=1 n=512"]


# Claims


def _stepped(levels: list[float]) -> tuple[np.ndarray, np.ndarray]:
    """Thirty requests in each 10 s window, with the window's TPOT."""
    arrival = np.concatenate([10 * place + np.linspace(0.1, 9.9, 30) for place in range(len(levels))])
    return arrival, np.repeat(levels, 30)


def test_window_wins_are_counted_against_the_best_c_of_each_window(tmp_path: Path) -> None:
    tpots = {
        "fixed c=1 n=512": [0.010, 0.020, 0.020, 0.040],
        "fixed c=3 n=512": [0.020, 0.010, 0.020, 0.030],
        # Quicker, but at another budget: no rival to the c's at n = 512.
        "fixed c=3 n=64": [0.001, 0.001, 0.001, 0.001],
        "analytic": [0.0101, 0.0102, 0.019, 0.030],
    }
    for place, (label, levels) in enumerate(tpots.items()):
        arrival, tpot = _stepped(levels)
        write_run(tmp_path / str(place), arrival_s=arrival, tpot_s=tpot, ttft_s=np.full(120, 0.1), label=label)
    collation = collate([tmp_path], window_s=10.0)
    claim = claims.window_claim(collation.windows, {("vicuna_7b_a100", "azure2023_conv x0.5"): "n=512"})
    counted = claim.set_index("label")
    assert set(counted["budget"]) == {"n=512"}
    assert counted["windows"].tolist() == [4, 4, 4]
    # Ratios to the best c are 1.01, 1.02, 0.95 and 1.
    assert counted.loc["analytic", "within"] == 3
    assert counted.loc["analytic", "ratio_worst"] == pytest.approx(1.02)
    assert counted.loc["fixed c=1 n=512", "within"] == 2
    assert counted.loc["fixed c=3 n=512", "within"] == 3
    pooled = claims.pool_windows(claim).set_index("label")
    assert pooled.loc["analytic", "share"] == 0.75
    assert pooled.loc["static c=3", "share"] == 0.75


def test_windows_with_too_few_requests_are_not_counted(tmp_path: Path) -> None:
    for place, label in enumerate(("fixed c=1 n=512", "fixed c=3 n=512", "analytic")):
        arrival = np.concatenate([np.linspace(0.1, 9.9, 19), np.linspace(10.1, 19.9, 20)])
        write_run(
            tmp_path / str(place), arrival_s=arrival, tpot_s=np.full(39, 0.01), ttft_s=np.full(39, 0.1), label=label
        )
    claim = claims.window_claim(collate([tmp_path], window_s=10.0).windows, {})
    assert claim["windows"].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("attainment", "tpot_s", "verdict"),
    [
        (0.920, 0.0120, "level"),
        # As many requests meet both targets: TPOT decides, by more than 2 % either way.
        (0.916, 0.0122, "level"),
        (0.920, 0.0123, "worse"),
        (0.924, 0.0123, "worse"),
        (0.920, 0.0117, "better"),
        (0.916, 0.0117, "better"),
        # More or fewer do, by more than half a point: these decide, whatever the TPOT.
        (0.926, 0.0300, "better"),
        (0.914, 0.0100, "worse"),
        # In time, and above the TPOT target of 50 ms.
        (1.0, 0.0600, "worse"),
    ],
)
def test_the_verdict_at_a_load_is_symmetric_about_the_best_static_setting(
    tmp_path: Path, attainment: float, tpot_s: float, verdict: str
) -> None:
    write_constant(tmp_path / "most", "sarathi 768 c=2", 0.012, attainment=0.92, count=1000)
    write_constant(tmp_path / "quick", "sarathi 384 c=2", 0.008, attainment=0.80, count=1000)
    write_constant(tmp_path / "own", "analytic", tpot_s, attainment=attainment, count=1000)
    (row,) = claims.load_claim(collate([tmp_path]).runs).to_dict("records")
    assert row["against"] == "sarathi 768 c=2"
    assert row["tpot_ratio"] == pytest.approx(tpot_s / 0.012)
    assert row["slo_difference"] == pytest.approx((attainment if tpot_s <= 0.05 else 0.0) - 0.92)
    assert row["verdict"] == verdict


def test_a_static_setting_compared_as_if_it_decided_is_worse_where_the_other_is_better(tmp_path: Path) -> None:
    for place, (own, rival) in enumerate((("analytic", "sarathi 512"), ("sarathi 512", "analytic"))):
        root = tmp_path / str(place)
        for name, label, tpot_s in (("a", own, 0.010), ("b", rival, 0.013)):
            write_constant(root / name, label, tpot_s, attainment=0.9)
        (row,) = claims.load_claim(collate([root]).runs).to_dict("records")
        assert row["verdict"] == ("better", "worse")[place]


@pytest.mark.parametrize(
    ("tpots", "verdict", "decided"),
    [
        ([0.0099, 0.0100, 0.0101], "level", False),
        ([0.00999, 0.0100, 0.01001], "level", True),
        ([0.0103, 0.0104, 0.0105], "worse", False),
        ([0.01039, 0.0104, 0.01041], "worse", True),
        ([0.0096], "better", False),
    ],
)
def test_a_verdict_is_decided_where_the_whole_interval_over_seeds_gives_it(
    tmp_path: Path, tpots: list[float], verdict: str, decided: bool
) -> None:
    _write_seeds(tmp_path, "analytic", tpots)
    _write_seeds(tmp_path, "fixed c=3 n=512", [0.010] * len(tpots))
    loads = claims.load_claim(collate([tmp_path]).runs)
    (row,) = loads.to_dict("records")
    assert (row["verdict"], row["decided"]) == (verdict, decided)
    assert row["tpot_ratio_by_seed"] == pytest.approx({str(seed): tpot / 0.010 for seed, tpot in enumerate(tpots)})
    (sentence,) = claims.sentences(pd.DataFrame(), pd.DataFrame(), loads)
    assert f"{verdict} at 1" in sentence
    assert ("no finding" in sentence) == (len(tpots) == 1)
    assert ("leaves 1 of these open" in sentence) == (len(tpots) > 1 and not decided)


def test_at_equal_ttft_attainment_tpot_is_compared_with_the_lowest_of_a_static_setting(tmp_path: Path) -> None:
    write_constant(tmp_path / "starved", "fixed c=3 n=64", 0.008, attainment=0.5)
    write_constant(tmp_path / "meets", "sarathi 512 c=3", 0.010, attainment=0.96)
    write_constant(tmp_path / "own", "analytic", 0.0099, attainment=0.96)
    write_constant(tmp_path / "late", "poster", 0.0090, attainment=0.50)
    # It attains more than any static setting does: the ratio is to the one that attains the most, and counts.
    write_constant(tmp_path / "most", "mpc", 0.0200, attainment=0.99)
    claim = claims.budget_claim(collate([tmp_path]).runs).set_index("label")
    assert claim["against"].to_dict() == {
        "analytic": "sarathi 512 c=3", "poster": "fixed c=3 n=64", "mpc": "sarathi 512 c=3"
    }  # fmt: skip
    assert claim.loc["analytic", "tpot_ratio"] == pytest.approx(0.99)
    assert claim["verdict"].to_dict() == {"analytic": "level", "poster": "higher", "mpc": "higher"}
    said = " ".join(claims.sentences(pd.DataFrame(), claim.reset_index(), pd.DataFrame()))
    assert "mpc's mean TPOT is 2.000 times the lowest of a static setting; more than 2 % higher at 1 of 1 loads" in said
    assert "at 1 no static setting attains as much" in said


def test_an_optimizer_held_to_one_c_is_compared_with_that_c_only(tmp_path: Path) -> None:
    write_constant(tmp_path / "other", "fixed c=3 n=256", 0.008)
    write_constant(tmp_path / "same", "fixed c=0 n=256", 0.020)
    write_constant(tmp_path / "own", "analytic c=0", 0.019)
    (row,) = claims.budget_claim(collate([tmp_path]).runs).to_dict("records")
    assert row["against"] == "fixed c=0 n=256"
    assert row["verdict"] == "lower"


# The page and its figures


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sweep")
    write_sweep(root, scales=(0.25, 1.0), candidates=(0, 3), budgets=(128, 512), seeds=(0, 1))
    return root


def test_the_command_writes_a_page_that_stands_alone(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(swept), "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert not re.search(r"https?://", page)
    assert not re.search(r"<(script|link|img|iframe)[^>]+(src|href)=['\"](?!data:)", page)
    assert page.count("src='data:image/png;base64,") == 4
    assert "azure2023_conv x0.25" in page
    printed = capsys.readouterr().out
    assert "Load windows: analytic is within 1 %" in printed
    written = json.loads((tmp_path / "out" / "claims.json").read_text())
    assert {row["label"] for row in written["loads"]} == {"analytic", "poster"}
    assert all(row["tpot_ratio_low"] <= row["tpot_ratio"] <= row["tpot_ratio_high"] for row in written["loads"])
    assert len(pd.read_csv(tmp_path / "out" / "runs.csv")) == 2 * 2 * 7
    comparison = pd.read_csv(tmp_path / "out" / "comparison.csv")
    assert comparison.groupby("scenario")["is_baseline"].sum().tolist() == [1, 1]


def test_the_terminal_shows_one_narrow_table_a_workload_and_all_of_them_on_request(
    swept: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert report.main([str(swept), "--out", str(tmp_path / "out")]) == 0
    lines = capsys.readouterr().out.splitlines()
    table = lines[: next(place for place, line in enumerate(lines) if line.startswith("both met:"))]
    assert max(map(len, table)) <= 110
    assert not any("…" in line for line in table)
    # Two loads with two optimizers each, and each in one line.
    assert sum(line.split()[0] in ("analytic", "poster") or "analytic" in line for line in table if line.strip()) == 4
    assert any(line.endswith("report.html") for line in lines)
    assert report.main([str(swept), "--out", str(tmp_path / "out"), "--full"]) == 0
    assert len(capsys.readouterr().out.splitlines()) > 2 * len(lines)


def test_the_figures_are_twice_readme_width_and_hold_ink(swept: Path) -> None:
    collation = collate([swept])
    settings = mark_best_static(collation.runs)
    drawn = (
        figures.speculation(collation.windows, claims.panel_budgets(settings)),
        chunked.chunked_prefill(settings),
        figures.overview(settings),
    )
    for figure in drawn:
        picture = palette.png(figure)
        pixels = image.imread(io.BytesIO(picture))[..., :3]
        height, width = pixels.shape[:2]
        assert 1100 <= width <= 1800
        assert height >= 500
        assert (pixels < 0.98).any(axis=2).mean() > 0.02
        assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50


def _loads(attained: list[float]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            "scenario": [f"conv x{place}" for place in range(len(attained))],
            "role": "fixed",
            "request_rate_rps": np.arange(1.0, len(attained) + 1),
            "ttft_attainment": attained,
        }
    )


@pytest.mark.parametrize(
    ("attained", "drawn"),
    [
        ([1.0, 1.0, 0.9, 0.1], [0, 1, 2, 3]),
        # All but the lightest from where settings differ.
        ([1.0, 1.0, 0.997, 0.98, 0.96, 0.5, 0.05, 0.01], [0, 2, 4, 5]),
        # Overload comes at once: the mildest of it, and the rest spread over the others.
        ([1.0, 1.0, 1.0, 1.0, 1.0, 0.1, 0.05], [0, 2, 4, 5]),
        ([0.94, 0.8, 0.6, 0.4, 0.08, 0.02], [0, 1, 2, 3]),
        ([1.0] * 6, [0, 1, 3, 5]),
    ],
)
def test_of_many_loads_the_telling_ones_are_drawn(attained: list[float], drawn: list[int]) -> None:
    loads = chunked.telling_loads(_loads(attained))
    assert [int(scenario.removeprefix("conv x")) for scenario in loads.index] == drawn


def test_every_optimizer_and_every_fixed_pair_is_within_its_panel(tmp_path: Path) -> None:
    write_constant(tmp_path / "low", "fixed c=3 n=64", 0.010, attainment=0.01)
    write_constant(tmp_path / "high", "fixed c=3 n=512", 0.300, attainment=0.08)
    write_constant(tmp_path / "own", "analytic", 0.250, attainment=0.09)
    write_constant(tmp_path / "letter", "poster", 0.004, attainment=0.0)
    settings = mark_best_static(collate([tmp_path]).runs)
    (axes,) = chunked.chunked_prefill(settings).axes
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    assert axes.get_yscale() == "log"
    assert right < 15
    for row in settings.itertuples():
        assert left < 100 * row.ttft_attainment < right
        assert bottom < 1e3 * row.tpot_mean_s < top


def test_engines_are_named_for_people() -> None:
    assert engine_name("vicuna_7b_a100") == "Vicuna-7B · A100"
    assert engine_name("llama3_8b_rtx4090") == "Llama-3-8B · RTX4090"
    assert engine_name("vicuna_7b_a100 prefill=first") == "Vicuna-7B · A100, prefill=first"
    assert engine_name("my own engine") == "my own engine"


@pytest.mark.parametrize("count", [1, 2, 3])
def test_titles_stay_over_their_own_panels(tmp_path: Path, count: int) -> None:
    for place in range(count):
        name = "a_workload_with_quite_a_long_name_indeed" + "_again" * place
        write_constant(tmp_path / str(place), "analytic", 0.01, scenario=f"{name} x0.5")
    figure = figures.overview(mark_best_static(collate([tmp_path]).runs))
    FigureCanvasAgg(figure).draw()
    titles = [text.get_window_extent() for axes in figure.axes for text in axes.texts if "Vicuna" in text.get_text()]
    assert len(titles) == count
    assert titles[-1].x1 <= figure.bbox.x1
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(titles))


def test_labels_beside_a_panel_are_moved_apart_and_no_further() -> None:
    assert palette.apart(np.array([0.1, 0.5, 0.9]), 0.1) == pytest.approx([0.1, 0.5, 0.9])
    assert palette.apart(np.array([0.50, 0.52, 0.9]), 0.1) == pytest.approx([0.46, 0.56, 0.9])
    assert palette.apart(np.array([0.98, 0.99, 1.0]), 0.1) == pytest.approx([0.8, 0.9, 1.0])


def test_every_c_and_every_optimizer_has_its_line(swept: Path) -> None:
    collation = collate([swept])
    figure = figures.speculation(collation.windows, claims.panel_budgets(mark_best_static(collation.runs)))
    (axes,) = figure.axes
    assert len(axes.lines) == 4
    assert {text.get_text() for text in axes.texts} >= {"c = 0", "c = 3"}
    colours = palette.colours_of(collation.runs)
    assert colours["analytic"] == palette.COLOURS[0]
    assert len(set(colours.values())) == len(colours)


def test_a_binned_mean_lies_within_its_band_and_pools_the_seeds_of_a_window() -> None:
    windows = pd.DataFrame(
        {
            "scenario": "s",
            "window": [0, 0, 1, 1],
            "seed": [0, 1, 0, 1],
            "request_rate_rps": [1.0, 1.0, 2.0, 2.0],
            "tpot_s": [0.01, 0.03, 0.05, 0.07],
        }
    )
    (row,) = figures.binned(windows, np.array([0.0, 3.0])).to_dict("records")
    assert row["windows"] == 2
    assert row["mean"] == pytest.approx(0.04)
    # Two windows drawn of two: both the first (mean 0.02), one of each, or both the second (0.06).
    assert (row["low"], row["high"]) == pytest.approx((0.02, 0.06))


@pytest.mark.parametrize("labels", [["analytic"], ["fixed c=3 n=512"], ["sarathi 512", "poster"]])
def test_a_report_is_made_of_whatever_was_run(tmp_path: Path, labels: list[str]) -> None:
    for label in labels:
        write_constant(tmp_path / label, label, 0.01)
    assert report.main([str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "report.html").is_file()


def test_what_cannot_be_reported_ends_with_the_reason_and_writes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_constant(tmp_path / "runs" / "a", "analytic", 0.01)
    arguments = [str(tmp_path / "runs"), "--out", str(tmp_path / "out"), "--baseline", "fixed c=9"]
    assert report.main(arguments) == 2
    assert "no run has this label; there are: analytic" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_given_baseline_replaces_the_best_static_setting(tmp_path: Path) -> None:
    _write_seeds(tmp_path, "fixed c=3 n=512", [0.010, 0.010])
    _write_seeds(tmp_path, "sarathi 512", [0.020, 0.0201])
    built = report.build(collate([tmp_path]), baseline="sarathi 512")
    row = built.comparison.set_index("label").loc["fixed c=3 n=512"]
    assert row["difference_mean_s"] == pytest.approx(-0.01005)
    assert row["paired_seeds"] == 2
    assert row["verdict"] == "lower"
