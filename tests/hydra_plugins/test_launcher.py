"""The launcher: what a sweep gets back when its jobs succeed, fail or die."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.core.singleton import Singleton
from hydra.core.utils import JobStatus
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig

from hydra_plugins.governor._jobs import Job, Outcome, work
from hydra_plugins.governor._workers import Workers
from hydra_plugins.governor.launcher import ProcessLauncher
from runs import evaluate, folder
from runs.endings import INTERRUPTED, stopped_by_sigterm

CONF = Path(__file__).resolve().parents[2] / "conf"

forks = pytest.mark.skipif(sys.platform != "linux", reason="the jobs of these tests cannot be pickled")


class Told:
    """Stands in for `Jobs`: does what the first override says."""

    def run(self, job: Job) -> Outcome:
        number, (order,) = job
        if order == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        return Outcome(number, error="refused") if order == "fail" else Outcome(number, float(number))


def outcomes(orders: list[str], share: int, count: int) -> tuple[dict[int, Outcome], Workers]:
    numbered = [(number, [order]) for number, order in enumerate(orders)]
    shares = [numbered[i : i + share] for i in range(0, len(numbered), share)]
    with Workers(Told(), shares, count) as workers:  # type: ignore[arg-type]
        found = list(workers.outcomes())
    assert len(found) == len(orders)
    return {outcome.number: outcome for outcome in found}, workers


@forks
def test_a_finished_sweep_stops_no_worker_by_force() -> None:
    for _ in range(10):
        found, workers = outcomes(["succeed"] * 7, share=2, count=2)
        assert found == {number: Outcome(number, float(number)) for number in range(7)}
        assert [process.exitcode for process in workers._ended] == [0, 0]


@forks
@pytest.mark.parametrize("count", [1, 2])
def test_a_worker_that_dies_costs_the_job_that_it_ran(count: int) -> None:
    found, _ = outcomes(["succeed", "die", "succeed", "succeed", "fail", "die"], share=4, count=count)
    assert {number: (outcome.value, outcome.error) for number, outcome in found.items()} == {
        0: (0.0, None),
        1: (None, "its process ended with SIGKILL"),
        2: (2.0, None),
        3: (3.0, None),
        4: (None, "refused"),
        5: (None, "its process ended with SIGKILL"),
    }


@forks
def test_a_worker_ends_when_its_parent_is_gone() -> None:
    context = multiprocessing.get_context("fork")
    ours, its = context.Pipe()
    process = context.Process(target=work, args=(Told(), Singleton.get_state(), its, [ours]))
    process.start()
    its.close()
    ours.close()
    process.join(60.0)
    assert process.exitcode == 0


def seed_of(config: DictConfig) -> float:
    """A job that dislikes one seed."""
    if config.seed == 1:
        raise ValueError("seed 1 is\nnot liked")
    if config.seed == 2:
        sys.exit(7)
    return float(config.seed)


@pytest.fixture
def launch(tmp_path: Path) -> Callable[..., Any]:
    """Launches jobs of the evaluation app's configuration with a task instead of the app."""
    GlobalHydra.instance().clear()
    hydra = Hydra.create_main_hydra2("evaluate", create_config_search_path(str(CONF)))
    GlobalHydra.instance().clear()
    config = hydra.compose_config(
        "evaluate", ["hydra.mode=MULTIRUN", f"hydra.sweep.dir={tmp_path}"], run_mode=RunMode.MULTIRUN
    )
    context = HydraContext(hydra.config_loader, Callbacks(config))

    def call(task: Callable[[DictConfig], Any], workers: int, jobs: list[list[str]]) -> Any:
        launcher = ProcessLauncher(workers)
        launcher.setup(hydra_context=context, task_function=task, config=config)
        return launcher.launch(jobs, 10)

    return call


@pytest.mark.parametrize("workers", [1, 2])
def test_jobs_return_their_values_in_order_and_the_failed_their_errors(
    launch: Callable[..., Any], workers: int
) -> None:
    overrides = [["seed=3"], ["seed=1"], ["seed=2"], ["sed=0"], ["engine=none_such"], ["seed=4"]]
    returned = launch(seed_of, workers, overrides)
    assert [job.overrides for job in returned] == overrides
    assert [job.status == JobStatus.COMPLETED for job in returned] == [True, False, False, False, False, True]
    assert [returned[0].return_value, returned[5].return_value] == [3.0, 4.0]
    errors = [str(job._return_value) for job in returned[1:5]]
    assert errors[3].startswith("engine=none_such: no such choice; there are")
    assert errors[:3] == ["seed 1 is not liked", "ended with exit status 7", "sed: unknown key; did you mean seed?"]


def test_the_evaluation_returns_the_metric_that_a_sweeper_optimizes(launch: Callable[..., Any], tmp_path: Path) -> None:
    tiny = ["workload.num_requests=20", "controller=fixed"]
    metrics = ["objective", "ttft_p99_s"]
    jobs = [[*tiny, f"optimized_metric={metric}"] for metric in metrics]
    # The second time the runs are there already.
    for _ in range(2):
        returned = [job.return_value for job in launch(evaluate.job, 1, jobs)]
        assert all(isinstance(value, float) for value in returned)
        summaries = [json.loads((tmp_path / name / folder.SUMMARY).read_text()) for name in ("10", "11")]
        assert returned == [summary[metric] for summary, metric in zip(summaries, metrics, strict=True)]


def test_an_interrupted_sweep_says_how_to_go_on(
    launch: Callable[..., Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(config: DictConfig) -> float:
        # As the app does on Ctrl-C.
        return 0.0 if config.seed < 2 else sys.exit(INTERRUPTED)

    with pytest.raises(SystemExit) as ended:
        launch(stopped, 1, [[f"seed={seed}"] for seed in range(4)])
    assert ended.value.code == INTERRUPTED
    said = capsys.readouterr().err
    assert f"interrupted: 2 of 4 jobs have finished, in {tmp_path}" in said
    assert f"hydra.sweep.dir={tmp_path} goes on" in said


def test_sigterm_interrupts_a_sweep(launch: Callable[..., Any]) -> None:
    def terminated(config: DictConfig) -> float:
        os.kill(os.getpid(), signal.SIGTERM)
        return float(config.seed)

    with pytest.raises(SystemExit) as ended, stopped_by_sigterm():
        launch(terminated, 1, [["seed=0"], ["seed=1"]])
    assert ended.value.code == INTERRUPTED
