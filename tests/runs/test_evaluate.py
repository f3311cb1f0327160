"""The evaluation app: real runs of tiny workloads, what they leave, and what is refused."""

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import wandb

from controllers.fixed import Fixed
from runs import evaluate, folder, mistakes
from runs.code import code_digest
from runs.reporting.collate import collate

REPOSITORY = Path(__file__).resolve().parents[2]
TINY = ("workload=poisson_lmsys", "workload.num_requests=60", "workload.arrivals.rate=6.0")
Run = Callable[..., int]


@pytest.fixture
def run(call_app: Callable[..., int]) -> Callable[..., int]:
    """Calls the app as the command line would; returns its exit status."""
    return functools.partial(call_app, evaluate.main, "evaluate")


def in_process_of_its_own(*overrides: str, cwd: Path = REPOSITORY) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "runs.evaluate", *overrides]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=600, check=False)


def summary_of(out: Path) -> dict[str, Any]:
    summary = json.loads((out / folder.SUMMARY).read_text())
    assert isinstance(summary, dict)
    return summary


def trace(path: Path, text: str = "arrival_s,prompt_tokens,output_tokens\n0.0,50,8\n0.5,700,1\n0.9,20,30\n") -> Path:
    path.write_text(text)
    return path


def test_the_documented_command_leaves_the_documented_files(tmp_path: Path) -> None:
    trace(tmp_path / "requests.csv")
    done = in_process_of_its_own(
        "engine=vicuna_7b_a100",
        "workload=trace",
        "workload.path=requests.csv",
        "workload.rate_scale=0.5",
        "controller=analytic",
        "controller.ttft_target=1.0",
        "seed=0",
        f"hydra.run.dir={tmp_path / 'out'}",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["config.yaml", "evaluate.log", "requests.parquet", "summary.json"]
    summary = summary_of(tmp_path / "out")
    assert summary["requests_finished"] == 3
    assert re.fullmatch("requests@[0-9a-f]{6} x0.5", summary["run"]["scenario"])
    assert summary["run"]["workload"] == "trace"
    arrivals = pd.read_parquet(tmp_path / "out" / folder.REQUESTS)["arrival_s"]
    np.testing.assert_allclose(arrivals, [0.0, 1.0, 1.8])


def test_the_same_seed_gives_the_same_bytes_in_two_processes(tmp_path: Path) -> None:
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        done = in_process_of_its_own(
            *TINY, "controller=poster", f"seed={seed}", "record_iterations=true", f"hydra.run.dir={tmp_path / name}"
        )
        assert done.returncode == 0, done.stderr
    for file in (folder.REQUESTS, folder.ITERATIONS):
        first, again, other = ((tmp_path / name / file).read_bytes() for name in "abc")
        assert first == again
        assert first != other


@pytest.mark.parametrize(
    "controller", [("fixed", "controller.candidates=3"), ("sarathi",), ("poster",), ("analytic",)], ids=lambda c: c[0]
)
@pytest.mark.parametrize("charge", ["constant", "measured", "off"])
def test_every_request_finishes_once_with_its_exact_tokens(
    run: Run, tmp_path: Path, controller: tuple[str, ...], charge: str
) -> None:
    name, *settings = controller
    out = tmp_path / "out"
    assert run(*TINY, f"controller={name}", *settings, f"charge_decisions={charge}", f"hydra.run.dir={out}") == 0
    requests = pd.read_parquet(out / folder.REQUESTS)
    assert len(requests) == 60
    assert (requests["generated_tokens"] == requests["output_tokens"]).all()
    assert (requests["arrival_s"] <= requests["admitted_s"]).all()
    assert (requests["admitted_s"] < requests["first_token_s"]).all()
    assert (requests["first_token_s"] <= requests["finish_s"]).all()
    assert (requests["tpot_s"].isna() == (requests["output_tokens"] == 1)).all()
    summary = summary_of(out)
    assert summary["token_goodput_tps"] == pytest.approx(requests["output_tokens"].sum() / summary["duration_s"])
    assert summary["decision_time_mean_s"] > 0


def test_measured_decisions_cost_more_time_than_free_ones(run: Run, tmp_path: Path) -> None:
    # One request: among several, a delay of microseconds can change who is batched with whom, for better or worse.
    alone = (*TINY, "workload.num_requests=1", "controller=fixed")
    for charge in ("off", "measured"):
        assert run(*alone, f"charge_decisions={charge}", f"hydra.run.dir={tmp_path / charge}") == 0
    free, measured = (summary_of(tmp_path / charge) for charge in ("off", "measured"))
    assert measured["tpot_mean_s"] > free["tpot_mean_s"]
    assert measured["decision_time_p50_s"] < 1e-3


def test_iterations_account_for_every_token(run: Run, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert run(*TINY, "controller=fixed", "record_iterations=true", f"hydra.run.dir={out}") == 0
    requests, iterations = (pq.read_table(out / name).to_pandas() for name in (folder.REQUESTS, folder.ITERATIONS))
    assert iterations["emitted_tokens"].sum() == requests["output_tokens"].sum()
    assert iterations["prefill_tokens"].sum() == requests["prompt_tokens"].sum()
    assert (iterations["end_s"].to_numpy()[:-1] <= iterations["start_s"].to_numpy()[1:] + 1e-9).all()
    assert len(iterations) == summary_of(out)["iterations"]


def test_a_sweep_runs_every_combination_and_can_be_reported(tmp_path: Path) -> None:
    done = in_process_of_its_own(
        "-m",
        "experiment=quick",
        "seed=0,1",
        "workload=azure_conv_like",
        "workload.duration_s=20",
        "workload.rate_scale=1.0",
        "controller=fixed,analytic",
        "controller.token_budget=512",
        "hydra.launcher.workers=2",
        f"hydra.sweep.dir={tmp_path / 'sweep'}",
    )
    assert done.returncode != 0
    assert "controller.token_budget" in done.stderr
    done = in_process_of_its_own(
        "-m",
        "experiment=quick",
        "seed=0,1",
        "workload=azure_conv_like",
        "workload.duration_s=20",
        "workload.rate_scale=1.0",
        "controller=vllm_schedule,analytic",
        "hydra.launcher.workers=2",
        f"hydra.sweep.dir={tmp_path / 'again'}",
    )
    assert done.returncode == 0, done.stderr
    runs = collate([tmp_path / "again"]).runs
    assert set(runs["label"]) == {"vllm_schedule 768", "vllm_schedule 2048", "analytic"}
    assert len(runs) == 6
    assert runs.groupby("seed")["workload_digest"].nunique().tolist() == [1, 1]


def test_a_controller_held_to_one_budget_says_so(run: Run, tmp_path: Path) -> None:
    assert run(*TINY, "controller=analytic", "actions.budget_choices=[512]", f"hydra.run.dir={tmp_path}") == 0
    identity = summary_of(tmp_path)["run"]
    assert (identity["label"], identity["candidates"], identity["token_budget"]) == ("analytic n=512", None, 512)


def test_the_slo_follows_the_controllers_target_and_a_difference_is_said(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*TINY, "controller=poster", "controller.ttft_target=0.3", f"hydra.run.dir={tmp_path / 'a'}") == 0
    assert summary_of(tmp_path / "a")["run"]["ttft_target_s"] == 0.3
    capsys.readouterr()
    assert run(*TINY, "controller=poster", "slo.ttft_target=0.5", f"hydra.run.dir={tmp_path / 'b'}") == 0
    assert summary_of(tmp_path / "b")["run"]["ttft_target_s"] == 0.5
    assert "slo.ttft_target=0.5" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["controlle=fixed"], ["controlle"]),
        (["controller=fixd"], ["controller=fixd", "did you mean fixed?"]),
        (["workload.rate=3"], ["workload.rate"]),
        (["+controller.ttft_taget=1"], ["controller.ttft_taget", "did you mean ttft_target?"]),
        (["+sed=1"], ["sed", "unknown key"]),
        (["seed=one"], ["seed='one'", "integer"]),
        (["seed=-1"], ["seed=-1"]),
        (["charge_decisions=sometimes"], ["charge_decisions='sometimes'", "'constant'"]),
        (["engine.max_num_seqs=0"], ["engine.max_num_seqs=0"]),
        (["engine.latency=nowhere"], ["nowhere", "vicuna_7b_a100"]),
        (["engine.gpu_memory_utilization=0.1"], ["gpu_memory_utilization=0.1"]),
        (["controller=fixed", "controller.token_budget=0"], ["token_budget=0", "between 1 and"]),
        (["controller=fixed", "controller.candidates=99"], ["candidates=99"]),
        (["controller=fixed", "controller.candidates=lots"], ["controller.candidates='lots'"]),
        (["controller.ttft_target=-1"], ["controller.ttft_target=-1"]),
        (["actions.budget_choices=[64,32]"], ["actions.budget_choices", "strictly increasing"]),
        (["workload.rate_scale=0"], ["workload.rate_scale=0"]),
        (["workload.arrivals.rate=fast"], ["workload.arrivals.rate='fast'"]),
        (["engine.max_model_len=64"], ["max_model_len", "row"]),
        (["engine.num_kv_blocks=2"], ["KV cache", "row"]),
        (["workload=trace"], ["workload.path"]),
        (["workload=trace", "workload.path=absent.csv"], ["absent.csv", "no such trace file"]),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_a_mistake_ends_with_its_name_and_writes_nothing(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: list[str]
) -> None:
    base = [text for text in TINY if not (overrides[0] == "workload=trace" and text.startswith("workload"))]
    assert run(*base, *overrides, f"hydra.run.dir={tmp_path / 'out'}") != 0
    _assert_refused(capsys.readouterr().err, tmp_path / "out", said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("time,prompt_tokens,output_tokens\n0,1,1\n", ["no column arrival_s"]),
        ("arrival_s,prompt_tokens,output_tokens\n1,5,5\n0,5,5\n", ["row 2", "sort"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,-5,5\n", ["row 1", "prompt_tokens = -5"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,nan\n", ["row 1", "output_tokens = nan"]),
        ("arrival_s,prompt_tokens,output_tokens\n", ["no requests"]),
        ("arrival_s,prompt_tokens,output_tokens\n0,5,5\n1,90000,5\n", ["row 2", "90005"]),
    ],
    ids=["unknown column", "unsorted", "negative", "NaN", "empty", "too long"],
)
def test_a_bad_trace_is_refused_with_file_and_row(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: list[str]
) -> None:
    path = trace(tmp_path / "requests.csv", text)
    out = tmp_path / "out"
    assert run("workload=trace", f"workload.path={path}", f"hydra.run.dir={out}") == 2
    _assert_refused(capsys.readouterr().err, out, ["requests", *said])


def _assert_refused(message: str, out: Path, said: list[str]) -> None:
    for part in said:
        assert part in message
    assert "Traceback" not in message
    assert len(message.splitlines()) <= 30  # Hydra lists every choice of a group
    assert not [path.name for path in out.glob("*") if path.name != "evaluate.log"]


def test_an_interrupted_run_leaves_no_summary(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(folder, "_write_table", stopped)
    assert run(*TINY, "controller=fixed", f"hydra.run.dir={tmp_path}") == 130
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.log"]
    assert "interrupted" in capsys.readouterr().err


def test_a_second_run_into_the_same_folder_replaces_the_first(run: Run, tmp_path: Path) -> None:
    arguments = (*TINY, "controller=fixed", f"hydra.run.dir={tmp_path}")
    assert run(*arguments, "record_iterations=true") == 0
    assert run(*arguments, "seed=5") == 0
    assert summary_of(tmp_path)["run"]["seed"] == 5
    assert not (tmp_path / folder.ITERATIONS).exists()


def test_a_resumed_run_is_left_alone_unless_configuration_or_code_changed(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def written() -> int:
        return (tmp_path / folder.SUMMARY).stat().st_mtime_ns

    arguments = (*TINY, "controller=fixed", "resume=true", f"hydra.run.dir={tmp_path}")
    assert run(*arguments) == 0
    first = written()
    assert run(*arguments) == 0
    assert written() == first
    assert run(*arguments, "seed=5") == 0
    assert summary_of(tmp_path)["run"]["seed"] == 5
    second = written()
    monkeypatch.setattr(evaluate, "code_digest", lambda: "another")
    assert run(*arguments, "seed=5") == 0
    assert written() > second
    # What was killed before its summary was there is run.
    (tmp_path / folder.SUMMARY).unlink()
    monkeypatch.undo()
    assert run(*arguments, "seed=5") == 0
    assert summary_of(tmp_path)["requests_finished"] == 60


@pytest.fixture
def sweep(call_app: Callable[..., int], tmp_path: Path) -> Callable[..., int]:
    """Sweeps in this process into a folder of its own; returns the exit status."""
    base = ("-m", *TINY, "controller=fixed", "hydra.launcher.workers=1", f"hydra.sweep.dir={tmp_path / 'sweep'}")
    return functools.partial(call_app, evaluate.main, "evaluate", *base)


def times_of(folder_of_sweep: Path) -> dict[str, int]:
    return {path.parent.name: path.stat().st_mtime_ns for path in folder_of_sweep.glob(f"*/{folder.SUMMARY}")}


def test_a_sweep_that_was_stopped_keeps_its_finished_runs_by_default(sweep: Run, tmp_path: Path) -> None:
    assert sweep("seed=0,1,2") == 0
    before = times_of(tmp_path / "sweep")
    (tmp_path / "sweep" / "1" / folder.SUMMARY).unlink()
    # None of these decides a result.
    assert sweep("seed=0,1,2", "resume=true", "logger.project=another", "optimized_metric=tpot_mean_s") == 0
    after = times_of(tmp_path / "sweep")
    assert {name for name in after if before[name] == after[name]} == {"0", "2"}
    assert sweep("seed=0,1,2", "resume=false") == 0
    assert not set(after.values()) & set(times_of(tmp_path / "sweep").values())


def test_a_single_run_is_made_again_by_default(run: Run, tmp_path: Path) -> None:
    assert run(*TINY, "controller=fixed", f"hydra.run.dir={tmp_path}") == 0
    first = (tmp_path / folder.SUMMARY).stat().st_mtime_ns
    assert run(*TINY, "controller=fixed", f"hydra.run.dir={tmp_path}") == 0
    assert (tmp_path / folder.SUMMARY).stat().st_mtime_ns > first


def test_an_edited_trace_is_served_anew(run: Run, tmp_path: Path) -> None:
    header = "arrival_s,prompt_tokens,output_tokens\n"
    path = trace(tmp_path / "requests.csv", header + "0.0,50,8\n0.9,20,30\n")
    out = tmp_path / "out"
    arguments = ("workload=trace", f"workload.path={path}", "controller=fixed", "resume=true", f"hydra.run.dir={out}")
    assert run(*arguments) == 0
    first = (out / folder.SUMMARY).stat().st_mtime_ns
    assert run(*arguments) == 0
    assert (out / folder.SUMMARY).stat().st_mtime_ns == first
    about = path.stat()
    trace(path, header + "0.0,50,8\n0.9,20,40\n")
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert run(*arguments) == 0
    assert pd.read_parquet(out / folder.REQUESTS)["output_tokens"].tolist() == [8, 40]
    assert list(summary_of(out)["run"]["inputs"]) == [str(path)]


@pytest.mark.parametrize("launcher", ["processes", "basic"])
def test_a_bad_job_costs_only_itself_and_is_named_at_the_end(
    call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], launcher: str
) -> None:
    given = ["-m", *TINY, "controller=fixed", "controller.candidates=99,1", "seed=0,-1", f"hydra/launcher={launcher}"]
    if launcher == "processes":
        given.append("hydra.launcher.workers=1")
    assert call_app(evaluate.main, "evaluate", *given, f"hydra.sweep.dir={tmp_path}") == 1
    assert sorted(path.parent.name for path in tmp_path.glob(f"*/{folder.SUMMARY}")) == ["2"]
    left = json.loads((tmp_path / "0" / mistakes.FAILURE).read_text())
    assert "candidates=99 must be between 0 and 32" in left["error"]
    assert "controller.candidates=99" in left["overrides"]
    said = capsys.readouterr().err
    listed = said[said.index("3 of 4 jobs failed:") :].splitlines()
    assert [line.split()[0] for line in listed[1:4]] == ["0", "1", "3"]
    assert "seed=-1" in listed[3]
    assert "Traceback" not in said
    # The failure goes with its cause.
    assert call_app(evaluate.main, "evaluate", *given, f"hydra.sweep.dir={tmp_path}", "seed=0") == 1
    given[given.index("controller.candidates=99,1")] = "controller.candidates=0,1"
    assert call_app(evaluate.main, "evaluate", *given, f"hydra.sweep.dir={tmp_path}", "seed=0,1") == 0
    assert not list(tmp_path.glob(f"*/{mistakes.FAILURE}"))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["experiment=quick", "hydra.run.dir={}"], ["hydra.run.dir={}", " jobs", "set hydra.sweep.dir={}"]),
        (["-m", "seed=0,1", "hydra.run.dir={}"], ["hydra.run.dir={}", "2 jobs", "set hydra.sweep.dir={}"]),
        (["hydra.sweep.dir={}", "hydra.run.dir={}"], ["hydra.sweep.dir={}", "set hydra.run.dir", "-m"]),
    ],
    ids=["preset", "sweep", "run"],
)
def test_the_folder_of_a_run_is_not_a_sweeps(
    call_app: Callable[..., int],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: list[str],
) -> None:
    out = tmp_path / "out"
    assert call_app(evaluate.main, "evaluate", *(text.format(out) for text in overrides)) == 2
    message = capsys.readouterr().err
    assert all(part.format(out) in message for part in said)
    assert not [path for path in out.rglob("*") if path.name != "evaluate.log"]


def test_a_metric_that_no_run_has_is_refused_with_the_nearest(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*TINY, "controller=fixed", "optimized_metric=tpot_men_s", f"hydra.run.dir={tmp_path}") == 2
    said = capsys.readouterr().err
    assert "optimized_metric=tpot_men_s" in said
    assert "did you mean tpot_mean_s?" in said


def test_an_overloaded_run_says_so_in_one_line_and_another_does_not(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    few = ("workload=poisson_sharegpt", "workload.num_requests=1000", "controller=fixed", f"hydra.run.dir={tmp_path}")
    for rate, overloaded in ((1, False), (8, True)):
        assert run(*few, f"workload.arrivals.rate={rate}") == 0
        lines = [line for line in capsys.readouterr().err.splitlines() if "overloaded:" in line]
        assert len(lines) == overloaded
        assert summary_of(tmp_path)["overloaded"] is overloaded
        assert all(f"{summary_of(tmp_path)['request_rate_rps']:.3g} requests/s arrived" in line for line in lines)


def test_without_arguments_the_engine_keeps_up_and_nothing_is_logged_elsewhere(run: Run, tmp_path: Path) -> None:
    assert run(f"hydra.run.dir={tmp_path}") == 0
    summary = summary_of(tmp_path)
    assert summary["overloaded"] is False
    assert summary["slo_attainment"] > 0.99
    assert not (tmp_path / "wandb").exists()


def test_a_run_says_which_scenario_and_code_it_is_of_and_whether_its_controller_peeks(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run(*TINY, "controller=fixed", "scenario=7b/tiny", f"hydra.run.dir={tmp_path / 'a'}") == 0
    summary = summary_of(tmp_path / "a")
    identity = summary["run"]
    assert (identity["scenario"], identity["peeks"], identity["code"]) == ("7b/tiny", False, code_digest())
    assert 0 < summary["decision_time_p50_s"] <= summary["decision_time_p99_s"]
    monkeypatch.setattr(Fixed, "peeks", True)
    assert run(*TINY, "controller=fixed", f"hydra.run.dir={tmp_path / 'b'}") == 0
    assert summary_of(tmp_path / "b")["run"]["peeks"] is True
    assert collate([tmp_path]).runs["role"].tolist() == ["static", "bound"]


def test_offline_logging_stays_in_the_run_folder(
    run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert run(*TINY, "logger=offline", "controller=fixed", f"hydra.run.dir={tmp_path}") == 0
    wandb.teardown()  # its own process writes the file, and has written it when it has ended
    (logged,) = (tmp_path / "wandb").glob("offline-run-*/*.wandb")
    assert b"serving/tpot_s" in logged.read_bytes()
    assert "wandb" not in capfd.readouterr().out


def test_an_edited_trace_gives_its_new_requests_in_the_same_process(tmp_path: Path, run: Run) -> None:
    path = trace(tmp_path / "requests.csv")
    scenarios = []
    for name in ("before", "after"):
        out = tmp_path / name
        assert (
            run("workload=trace", f"workload.path={path}", "controller=fixed", "logger=none", f"hydra.run.dir={out}")
            == 0
        )
        summary = summary_of(out)
        scenarios.append(summary["run"]["scenario"])
        assert summary["requests_total"] == (3 if name == "before" else 2)
        trace(path, "arrival_s,prompt_tokens,output_tokens\n0.0,50,8\n0.5,700,4\n")
    assert scenarios[0] != scenarios[1]
