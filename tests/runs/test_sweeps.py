"""Sweeps of the apps: folders, figures for a sweeper, and the ends of runs that are told to stop."""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hydra.core.plugins import Plugins

import hydra_plugins
from hydra_plugins.governor.sweeper import AlternativesSweeper
from runs import capacity, evaluate, export, folder, train

TINY = ("workload=poisson_lmsys", "workload.num_requests=20", "controller=fixed")
TRAINED = (
    "kind=small", "env.num_envs=14", "env.distinct_workloads=1", "learner.n_steps=16", "learner.batch_size=32",
    "learner.layers=[4]", "learner.steps=224", "validation_workloads=1",
)  # fmt: skip
SEARCHED = ("workload=poisson_lmsys", "workload.num_requests=300", "controller=fixed", "seeds=[0]", "tolerance=0.5")
EXPORTED = (
    "workload=poisson_lmsys", "workload.num_requests=20", "workload.arrivals.rate=4", "seeds=[0]", "search_seeds=[9]",
    "batch_sizes=[8]", "budgets=[512]", "most_playbacks=2", "actions.candidate_choices=[0,2]",
    "actions.budget_choices=[512]", "controller=goodput", "engine.max_num_seqs=64",
)  # fmt: skip


class Seeking(AlternativesSweeper):
    """A sweeper that decides by what a job returned which job is next; stands in for those of optimizers."""

    told: tuple[float, ...] = ()

    def sweep(self, arguments: list[str]) -> Any:
        """Try two values of the last argument, then the better one again."""
        assert self.launcher is not None
        key, _, values = arguments[-1].partition("=")
        told: list[float] = []
        for number in range(3):
            value = values.split(",")[number if number < 2 else told.index(min(told))]
            (job,) = self.launcher.launch([[*arguments[:-1], f"{key}={value}"]], initial_job_idx=number)
            told.append(job.return_value)
        Seeking.told = tuple(told)


@pytest.fixture
def seeking(monkeypatch: pytest.MonkeyPatch) -> str:
    """The override that chooses `Seeking`, which is put where Hydra takes plugins from."""
    monkeypatch.setattr(hydra_plugins, "seeking", sys.modules[__name__], raising=False)
    monkeypatch.setattr(Seeking, "__module__", "hydra_plugins.seeking")
    Plugins.instance().register(Seeking)
    return "hydra.sweeper._target_=hydra_plugins.seeking.Seeking"


@pytest.mark.parametrize("launcher", ["processes", "basic"])
@pytest.mark.parametrize(
    ("app", "name", "words", "tried", "file", "metric"),
    [
        (evaluate, "evaluate", TINY, "controller.candidates=3,0", folder.SUMMARY, "objective"),
        (train, "train", TRAINED, "seed=0,1", train.RESULT, "eval/objective_ratio"),
    ],
    ids=["evaluate", "train"],
)
def test_a_sweeper_gets_each_jobs_figure(
    call_app: Callable[..., int],
    seeking: str,
    tmp_path: Path,
    launcher: str,
    app: Any,
    name: str,
    words: tuple[str, ...],
    tried: str,
    file: str,
    metric: str,
) -> None:
    given = ["-m", seeking, f"hydra/launcher={launcher}", f"hydra.sweep.dir={tmp_path}"]
    given.append("hydra.sweep.subdir='${hydra:job.num}'")
    assert call_app(app.main, name, *given, *words, tried) == 0
    assert [type(value) for value in Seeking.told] == [float] * 3
    written = [json.loads((tmp_path / str(number) / file).read_text())[metric] for number in range(3)]
    assert list(Seeking.told) == written
    assert written[2] == min(written[:2])


@pytest.mark.parametrize("launcher", ["processes", "basic"])
def test_folders_of_a_sweep_are_named_after_hydras_own_settings(
    call_app: Callable[..., int], tmp_path: Path, launcher: str
) -> None:
    named = ["${hydra:job.name}", "${hydra:runtime.choices.controller}-${hydra:job.num}-seed${seed}"]
    given = [f"hydra.sweep.dir={tmp_path}/{named[0]}", f"hydra.sweep.subdir={named[1]}", f"hydra/launcher={launcher}"]
    assert call_app(evaluate.main, "evaluate", "-m", *TINY, "seed=4,5", *given) == 0
    found = sorted(str(path.parent.relative_to(tmp_path)) for path in tmp_path.rglob(folder.SUMMARY))
    assert found == ["evaluate/fixed-0-seed4", "evaluate/fixed-1-seed5"]


@pytest.mark.parametrize(
    ("app", "name", "words", "swept", "file", "made"),
    [
        (evaluate, "evaluate", TINY, "seed=0,1", folder.SUMMARY, ["*/0", "*/1"]),
        (train, "train", TRAINED, "seed=0,1", train.RESULT, ["vicuna_7b/small-seed0", "vicuna_7b/small-seed1"]),
        (
            capacity, "capacity", SEARCHED, "slo.tpot_target=0.03,0.06", capacity.CAPACITY,
            ["vicuna_7b_a100-poisson_lmsys-fixed-0", "vicuna_7b_a100-poisson_lmsys-fixed-1"],
        ),
        (
            export, "export", EXPORTED, "format=vllm,sglang", "schedule.json",
            ["vicuna_7b_a100-poisson_lmsys-vllm-0", "vicuna_7b_a100-poisson_lmsys-sglang-1"],
        ),
    ],
    ids=["evaluate", "train", "capacity", "export"],
)  # fmt: skip
def test_every_job_of_a_sweep_has_a_folder_of_its_own_by_default(
    call_app: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    app: Any,
    name: str,
    words: tuple[str, ...],
    swept: str,
    file: str,
    made: list[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert call_app(app.main, name, "-m", *words, swept) == 0
    root = tmp_path / "runs" / "outputs" / name
    assert [len(list(root.glob(f"{place}/{file}"))) for place in made] == [1, 1]


def test_a_sweep_names_a_bad_choice_and_the_nearest(
    call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["-m", *TINY[:2], "controller=analitic,fixed", f"hydra.sweep.dir={tmp_path}"]
    assert call_app(evaluate.main, "evaluate", *given) == 1
    assert (
        capsys.readouterr().err.splitlines()[-1].endswith("controller=analitic: no such choice; did you mean analytic?")
    )
    # The job beside it is what it would have been alone.
    assert {path.name for path in (tmp_path / "1").iterdir()} >= {folder.SUMMARY, "evaluate.log"}


@pytest.mark.parametrize("stop", [signal.SIGTERM, signal.SIGINT])
def test_a_run_that_is_stopped_while_it_writes_leaves_nothing_and_says_so(
    call_app: Callable[..., int],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    stop: signal.Signals,
) -> None:
    before = signal.getsignal(signal.SIGTERM)
    # A test runner may have been started with SIGINT ignored, as by nohup.
    at_start = signal.signal(signal.SIGINT, signal.default_int_handler)

    def written(table: Any, path: Path) -> None:
        path.write_bytes(b"half")
        os.kill(os.getpid(), stop)

    monkeypatch.setattr(folder, "_write_table", written)
    try:
        assert call_app(evaluate.main, "evaluate", *TINY, f"hydra.run.dir={tmp_path}") == 130
    finally:
        signal.signal(signal.SIGINT, at_start)
    assert capsys.readouterr().err.splitlines() == ["E interrupted: nothing was written"]
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.log"]
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_that_is_ignored_stays_ignored(call_app: Callable[..., int], tmp_path: Path) -> None:
    before = {number: signal.signal(number, signal.SIG_IGN) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        assert call_app(evaluate.main, "evaluate", *TINY, f"hydra.run.dir={tmp_path}") == 0
        assert [signal.getsignal(number) for number in before] == [signal.SIG_IGN] * 2
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
