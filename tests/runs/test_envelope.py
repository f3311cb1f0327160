"""The envelope of static c in real runs: by hand, and in the report."""

import json
from pathlib import Path

import fake_runs
import pytest

from runs import report
from runs.reporting.collate import collate
from runs.reporting.envelope import envelope

# TPOT in ms by load and label, a value a seed.
TPOTS = {
    "prompts 1/s": {"fixed c=0 n=64": (10, 12), "fixed c=4 n=64": (8, 9), "analytic n=64": (8.2, 9.3)},
    "prompts 5/s": {"fixed c=0 n=64": (20, 22), "fixed c=4 n=64": (40, 38), "analytic n=64": (24, 22)},
}


def write_real_runs(root: Path) -> None:
    for scenario, labels in TPOTS.items():
        for label, tpots in labels.items():
            for seed, tpot in enumerate(tpots):
                folder = root / f"{scenario}-{label}-{seed}".replace("/", "_")
                rate = float(scenario.split()[1].removesuffix("/s"))
                place = {"scenario": scenario, "engine": "torch_small", "digest": f"{seed}{rate}"}
                fake_runs.write_constant(folder, label, tpot / 1e3, seed=seed, **place)
                summary = json.loads((folder / "summary.json").read_text())
                summary["run"] |= {"backend": {"device": "cpu"}, "token_budget": 64, "request_rate_rps": rate}
                (folder / "summary.json").write_text(json.dumps(summary))


@pytest.fixture
def real_runs(tmp_path: Path) -> Path:
    write_real_runs(tmp_path / "runs")
    return tmp_path / "runs"


def test_the_envelope_is_the_best_c_of_each_load_and_ratios_are_paired_by_seed(real_runs: Path) -> None:
    frame = envelope(collate([real_runs]).runs, {("torch_small", "prompts"): "n=64"})
    analytic = frame[frame["label"] == "analytic n=64"].set_index("request_rate_rps")
    assert analytic["best"].to_dict() == {1.0: "fixed c=4 n=64", 5.0: "fixed c=0 n=64"}
    assert analytic.loc[1.0, "ratio"] == pytest.approx((8.2 / 8 + 9.3 / 9) / 2)
    assert analytic.loc[5.0, "ratio"] == pytest.approx((24 / 20 + 22 / 22) / 2)
    assert analytic.loc[5.0, ["low", "high"]].to_list() == pytest.approx(
        [1.1 - 12.7062 * 0.1, 1.1 + 12.7062 * 0.1], abs=1e-4
    )
    assert frame.loc[frame["label"] == frame["best"], "ratio"].to_list() == [1.0, 1.0]


def test_another_budget_is_not_in_the_envelope(real_runs: Path) -> None:
    assert envelope(collate([real_runs]).runs, {("torch_small", "prompts"): "n=32"}).empty


def test_the_report_of_real_runs_draws_them_and_judges_the_controller(real_runs: Path, tmp_path: Path) -> None:
    assert report.main([str(real_runs), "--out", str(tmp_path / "report")]) == 0
    html = (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / "envelope.png").is_file()
    assert "Real runs: TPOT against request rate" in html
    assert "TPOT against the envelope of static c" in html
    assert "1.100 [-0.171, 2.371]" in html


def test_the_report_of_simulated_runs_has_no_such_figure(tmp_path: Path) -> None:
    fake_runs.write_constant(tmp_path / "runs" / "a", "fixed c=0 n=64", 0.01)
    fake_runs.write_constant(tmp_path / "runs" / "b", "fixed c=4 n=64", 0.02)
    assert report.main([str(tmp_path / "runs"), "--out", str(tmp_path / "report")]) == 0
    assert not (tmp_path / "report" / "envelope.png").exists()
