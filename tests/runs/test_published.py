"""Published claims: counted by hand from fabricated runs, in the report, and the experiments that make real ones."""

import json
import math
from html import escape
from pathlib import Path

import fake_runs
import pytest
from test_configs import evaluation, jobs_of

from engine.config import EngineConfig
from runs import report
from runs.evaluation import Evaluation
from runs.reporting import published
from runs.reporting.collate import Collation, collate

SCENARIO = "poisson_sharegpt 0.5/s"
# Median TTFT and P99 TBT in s, a value a seed.
SCHEDULED = {
    ("whole", "fixed c=0 n=8192"): ((0.5, 0.52), (0.6, 0.62)),
    ("first", "fixed c=0 n=8192"): ((0.5, 0.5), (0.7, 0.9)),
    ("turns", "fixed c=0 n=512"): ((1.0, 1.0), (0.2, 0.2)),
    ("chunked", "sarathi 512"): ((0.8, 0.8), (0.16, 0.16)),
}
# Mean latency in s by load and label, a value a seed.
LATENCIES = {
    "poisson_lmsys 1/s": {"fixed c=0 n=64": (5, 5), "fixed c=1 n=64": (2.5, 2.5), "goodput n=64": (2.5, 2.6)},
    "poisson_lmsys 8/s": {"fixed c=0 n=64": (4, 4), "fixed c=1 n=64": (8, 8), "goodput n=64": (4.4, 4.44)},
}


def _write(folder: Path, engine: str, scenario: str, label: str, seed: int, **figures: float) -> None:
    place = {"engine": engine, "scenario": scenario, "digest": f"{seed} {scenario}"}
    fake_runs.write_constant(folder / f"{len(list(folder.glob('*')))}", label, 0.02, seed=seed, **place)
    path = folder / f"{len(list(folder.glob('*'))) - 1}" / "summary.json"
    summary = json.loads(path.read_text())
    summary |= figures
    summary["run"]["request_rate_rps"] = float(scenario.split()[1].removesuffix("/s"))
    path.write_text(json.dumps(summary))


@pytest.fixture
def scheduled(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    for (prefill, label), (ttft, tbt) in SCHEDULED.items():
        engine = EngineConfig(name="small", latency="x", prefill=prefill).variant  # type: ignore[arg-type]
        for seed in range(2):
            _write(folder, engine, SCENARIO, label, seed, ttft_p50_s=ttft[seed], itl_p99_s=tbt[seed])
    return folder


@pytest.fixture
def served(tmp_path: Path) -> Path:
    folder = tmp_path / "runs"
    folder.mkdir()
    for scenario, labels in LATENCIES.items():
        for label, latencies in labels.items():
            for seed, latency in enumerate(latencies):
                _write(folder, "small prefill=first", scenario, label, seed, e2e_mean_s=latency)
    return folder


def _collated(folder: Path) -> Collation:
    return collate([folder])


def test_the_ablation_pairs_schedulers_of_one_engine_on_the_same_requests(scheduled: Path) -> None:
    frame = published.sarathi_ablation(_collated(scheduled).runs).set_index("comparison")
    assert set(frame["engine"]) == {"small"}
    assert set(frame["budget"]) == {512}
    expected = {
        "hybrid_ttft": (0.5 / 0.8 + 0.52 / 0.8) / 2,
        "hybrid_tbt": (0.6 / 0.16 + 0.62 / 0.16) / 2,
        "chunked_ttft": 1.0 / 0.8,
        "chunked_tbt": (0.2 / 0.6 + 0.2 / 0.62) / 2,
        "both_tbt": 0.16 / 0.2,
    }
    assert frame["ratio"].to_dict() == pytest.approx(expected)
    assert set(frame["verdict"]) == {"holds"}
    assert frame.loc["hybrid_tbt", ["low", "high"]].to_list() == pytest.approx(
        # The seeds' ratios are 3.75 and 3.875, and t at 97.5 % with one degree of freedom is 12.706.
        [3.8125 - 12.7062 * 0.0625, 3.8125 + 12.7062 * 0.0625],
        abs=1e-4,
    )
    assert frame.loc["hybrid_ttft", "published"] == pytest.approx(0.53 / 0.76)
    assert frame.loc["chunked_tbt", "published"] == pytest.approx(0.17 / 0.68)


def test_values_of_schedulers_are_means_over_seeds_and_whole_prompts_have_no_budget(scheduled: Path) -> None:
    frame = published.scheduler_values(_collated(scheduled).runs).set_index("prefill")
    assert frame["budget"].to_dict() == {"whole": 0, "first": 0, "turns": 512, "chunked": 512}
    assert frame.loc["whole", ["ttft_s", "tbt_s"]].to_list() == pytest.approx([0.51, 0.61])
    assert frame.loc["whole", ["tbt_low_s", "tbt_high_s"]].to_list() == pytest.approx([0.482938, 0.737062], abs=1e-5)


@pytest.mark.parametrize(
    ("low", "high", "below", "said"),
    [
        (0.8, 0.9, True, "holds"),
        (0.8, 0.9, False, "fails"),
        (1.1, 1.2, True, "fails"),
        (1.1, 1.2, False, "holds"),
        (0.9, 1.1, True, "not separable"),
        (math.nan, math.nan, True, "one seed: no interval"),
    ],
)
def test_a_verdict_is_said_where_the_interval_excludes_one(low: float, high: float, below: bool, said: str) -> None:
    assert published.verdict(low, high, below) == said


def test_speed_ups_are_latency_without_speculation_over_with_it(served: Path) -> None:
    frame = published.smartspec_speedups(_collated(served).runs).set_index(["scenario", "label"])
    light, heavy = LATENCIES
    assert frame.loc[(light, "goodput n=64"), "ratio"] == pytest.approx((5 / 2.5 + 5 / 2.6) / 2)
    assert frame.loc[(light, "goodput n=64"), "over_best"] == pytest.approx((2.5 / 2.5 + 2.5 / 2.6) / 2)
    assert frame.loc[(light, "goodput n=64"), "verdict"] == "faster"
    assert frame.loc[(heavy, "goodput n=64"), "ratio"] == pytest.approx((4 / 4.4 + 4 / 4.44) / 2)
    assert frame.loc[(heavy, "goodput n=64"), "verdict"] == "slower"
    assert frame.loc[(heavy, "fixed c=1 n=64"), "ratio"] == pytest.approx(0.5)
    assert frame.loc[(heavy, "fixed c=0 n=64"), "verdict"] == "equal"
    said = published.find(_collated(served).runs).sentences
    assert said[0].startswith(f"SmartSpec, goodput n=64: slower than no speculation at 1 of 2 loads ({heavy})")
    assert "largest speed-up 1.96 [1.47, 2.45] at poisson_lmsys 1/s" in said[0]
    assert "k = 1 slower from 8/s (lowest 0.50)" in said[1]


@pytest.mark.parametrize(("runs", "picture"), [("scheduled", "sarathi_claims"), ("served", "smartspec_claims")])
def test_the_report_says_draws_and_tabulates_them(
    runs: str, picture: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(runs)
    assert report.main([str(folder), "--out", str(tmp_path / "report")]) == 0
    html = (tmp_path / "report" / "report.html").read_text()
    assert (tmp_path / "report" / f"{picture}.png").is_file()
    assert (tmp_path / "report" / f"{picture}.csv").is_file()
    assert escape(published.CAPTIONS[picture][0]) in html
    assert ("holds: 0.64 [0.48, 0.80] (0.70)" if runs == "scheduled" else "0.90 [0.85, 0.96]") in html


def test_a_report_of_other_runs_has_no_such_section(tmp_path: Path) -> None:
    for number, label in enumerate(("fixed c=0 n=64", "fixed c=4 n=64", "goodput n=64")):
        fake_runs.write_constant(tmp_path / "runs" / str(number), label, 0.01)
    assert published.find(_collated(tmp_path / "runs").runs) == published.Published([], [], {}, {})


@pytest.mark.parametrize(
    ("name", "prefills"), [("sarathi_claims", {"first", "whole", "turns", "chunked"}), ("smartspec_claims", {"first"})]
)
def test_the_jobs_of_the_experiments_are_different_runs_on_engines_that_prefill_so(
    name: str, prefills: set[str]
) -> None:
    jobs = jobs_of(name)
    assert len({tuple(job) for job in jobs}) == len(jobs)
    assert len({text for job in jobs for text in job if text.startswith("seed=")}) >= 5
    first_of = {text: job for job in reversed(jobs) for text in job if "prefill" in text or "controller=" in text}
    made = [evaluation(*job) for job in first_of.values()]
    assert {one.engine.prefill for one in made} == prefills


def test_an_evaluation_is_named_after_how_its_engine_prefills() -> None:
    def engine_of(*overrides: str) -> str:
        made: Evaluation = evaluation("workload=synthetic", "workload.num_requests=5", "controller=fixed", *overrides)
        return str(made.run().summary["run"]["engine"])

    assert engine_of() == "vicuna_7b_a100"
    assert engine_of("engine.prefill=turns") == "vicuna_7b_a100 prefill=turns"
