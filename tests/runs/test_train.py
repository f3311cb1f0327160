"""`python -m runs.train` as a process: killed at any moment it goes on, and what the user got wrong is named."""

from __future__ import annotations

import csv
import json
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from runs import distill, train
from runs.learning.checkpoint import CHECKPOINT, PICKLE
from runs.learning.record import METRICS

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = [
    "kind=small",
    "env.num_envs=14",
    "env.distinct_workloads=2",
    "learner.n_steps=32",
    "learner.batch_size=64",
    "learner.layers=[16]",
    "learner.steps=12_000",
    "validation_workloads=1",
    "validation_every=6_000",
    "log_every=1_000",
    "checkpoint_s=0.2",
]
WALL = {"train/wall_s", "train/steps_per_s"}


def _command(folder: Path) -> list[str]:
    return [sys.executable, "-m", "runs.train", *SMALL, f"hydra.run.dir={folder}"]


def _rows(folder: Path) -> list[dict[str, str]]:
    with (folder / METRICS).open(encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in WALL} for row in csv.DictReader(file)]


def test_a_process_killed_twice_leaves_what_an_undisturbed_one_leaves(tmp_path: Path) -> None:
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    subprocess.run(_command(whole), check=True, cwd=REPOSITORY, env=environment, capture_output=True)
    luck = random.Random(0)
    kills = 0
    while True:
        process = subprocess.Popen(
            _command(broken), cwd=REPOSITORY, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE
        )
        begun = (broken / CHECKPOINT).stat().st_mtime_ns if (broken / CHECKPOINT).exists() else 0
        try:
            while kills < 2:
                process.wait(timeout=luck.uniform(0.05, 0.3))
                break
        except subprocess.TimeoutExpired:
            pass
        while kills < 2 and process.poll() is None:
            saved = (broken / CHECKPOINT).exists() and (broken / CHECKPOINT).stat().st_mtime_ns > begun
            try:
                process.wait(timeout=luck.uniform(0.01, 0.4))
            except subprocess.TimeoutExpired:
                if saved:
                    process.send_signal(signal.SIGKILL)
                    kills += 1
                    break
        _, said = process.communicate()
        if process.returncode != -signal.SIGKILL:
            assert process.returncode == 0, said.decode()
            break
    assert kills == 2
    assert _rows(broken) == _rows(whole)
    assert (broken / "policy.npz").read_bytes() == (whole / "policy.npz").read_bytes()
    assert not list(broken.glob(".*.partial"))
    result = json.loads((broken / train.RESULT).read_text())
    assert result["steps"] >= 12_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["+learner.gama=0.9"], "learner.gama: unknown key"),
        (["learner.gamma=2"], "learner.gamma=2"),
        (["env.num_envs=2"], "num_envs=2 leaves scenarios without any"),
        (["learner=policy_iteration"], "env.residual={candidates: 2, budgets: 3}"),
        (["env.residual={candidates: 1, base: {guard: 7}}"], "guard"),
    ],
)
def test_what_the_user_got_wrong_is_named(
    overrides: list[str], message: str, call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_app(train.main, "train", *overrides, f"hydra.run.dir={tmp_path}") == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "policy.npz").exists()


def test_a_checkpoint_that_is_a_pickle_is_refused_before_anything_is_written(
    call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / PICKLE).write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    assert call_app(train.main, "train", *SMALL, "logger=offline", f"hydra.run.dir={tmp_path}") == 2
    (said,) = (line for line in capsys.readouterr().err.splitlines() if "pickle" in line)
    assert f"{tmp_path / PICKLE} is a pickle of an earlier version" in said
    assert {path.name for path in tmp_path.iterdir()} <= {PICKLE, "train.log"}


def test_the_last_line_says_that_the_policy_before_training_is_kept(
    call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A residual policy that does not move stays at `analytic`'s choice, so that no step is better than the first."""
    still = ["learner.steps=448", "learner.learning_rate=1e-30", "learner.final_learning_rate=1e-30"]
    still += ["env.residual={candidates: 1, budgets: 1}"]
    assert call_app(train.main, "train", *SMALL, *still, f"hydra.run.dir={tmp_path}") == 0
    assert json.loads((tmp_path / train.RESULT).read_text())["best_at_step"] == 0
    last = capsys.readouterr().err.splitlines()[-1]
    assert f"written to {tmp_path}: the policy of step 0, as it was before training, since none up to step 448" in last


def test_the_last_line_names_the_step_of_the_policy_that_is_kept() -> None:
    assert train.kept({"best_at_step": 6_272, "steps": 12_096}) == "the policy of step 6,272 of 12,096"


def test_a_distilled_table_serves_and_says_what_is_lost(call_app: Callable[..., int], tmp_path: Path) -> None:
    small = ["workloads=1", "validation_workloads=1", "env=vicuna_7b"]
    assert call_app(distill.main, "distill", *small, f"hydra.run.dir={tmp_path}") == 0
    result = json.loads((tmp_path / train.RESULT).read_text())
    assert result["decisions"] > 1000
    # The table is analytic's own median choice: neither free nor ruinous.
    assert 0.9 < result["table_to_controller/objective_ratio"] < 3.0
    assert (tmp_path / "table.npz").is_file()
