"""Claims about the command `python -m runs.profile`, where only the packages are installed that docs/gpu.md names."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from engine.config import EngineConfig
from engine.latency.measured import MeasuredIterations, read_provenance
from runs import profile
from runs.evaluation import load_profile
from tests.runs.gpu_box import FINDER, REPOSITORY, refused_packages

SMALL = [
    "engine=torch_tiny",
    "device=cpu",
    "points=50",
    "minutes=1e-6",
    "actions.candidate_choices=[0,2]",
    "actions.budget_choices=[16,64]",
    "engine.name=small",
    "engine.max_num_seqs=4",
    "engine.max_model_len=128",
    "engine.num_kv_blocks=40",
    "predictor.trees=5",
    "speculation.prompts=3",
    "speculation.prompt_tokens=24",
    "speculation.max_tokens=12",
]


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., subprocess.Popen[str]]:
    """Starts `python -m runs.profile` where only these packages can be imported."""
    folder = tmp_path_factory.mktemp("finder")
    (folder / "sitecustomize.py").write_text(FINDER)
    refused = refused_packages()
    assert {"rich", "pandas", "pyarrow", "matplotlib"} <= refused
    assert not {"hydra", "omegaconf", "pydantic"} & refused

    def start(*words: str) -> subprocess.Popen[str]:
        environment = os.environ | {"PYTHONPATH": str(folder), "REFUSED": ",".join(sorted(refused))}
        arguments = [sys.executable, "-m", "runs.profile", *words]
        return subprocess.Popen(
            arguments,
            cwd=REPOSITORY,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            # Tests in the background of a shell ignore Ctrl-C, and their processes would with them.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    return start


@pytest.fixture(scope="module")
def measured_folder(
    command: Callable[..., subprocess.Popen[str]], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, str]:
    """A profile without pyarrow, interrupted and gone on with; what its last command said."""
    out = tmp_path_factory.mktemp("profile")
    visits = out / "visits.jsonl"
    first = command(*SMALL, f"hydra.run.dir={out}")
    while first.poll() is None and not (visits.exists() and visits.read_bytes().count(b"\n") > 5):
        try:
            first.wait(0.02)
        except subprocess.TimeoutExpired:
            continue
    first.send_signal(signal.SIGINT)
    said, _ = first.communicate()
    assert first.returncode == 130, said
    assert "interrupted: the same command goes on from here" in said
    kept = visits.read_bytes()
    again = command(*SMALL, f"hydra.run.dir={out}")
    said, _ = again.communicate()
    assert again.returncode == 0, said
    assert visits.read_bytes().startswith(kept)
    return out, said


def test_without_pyarrow_everything_else_is_there_and_a_word_on_the_rest(measured_folder: tuple[Path, str]) -> None:
    out, said = measured_folder
    assert {path.name for path in out.iterdir()} == {
        "acceptance.jsonl",
        "agreement.npz",
        "card.json",
        "profile.log",
        "provenance.json",
        "table.json",
        "tokens_per_iteration.json",
        "visits.jsonl",
    }
    assert "Tokens per iteration  c=0: 1.00" in said
    assert "iterations.parquet and engine.yaml not written: pyarrow is missing" in said


def test_with_pyarrow_the_same_command_measures_nothing_anew_and_leaves_a_whole_engine(
    measured_folder: tuple[Path, str], call_app: Callable[..., int], tmp_path: Path
) -> None:
    out = shutil.copytree(measured_folder[0], tmp_path / "out")
    visits, begun = (out / "visits.jsonl").read_bytes(), json.loads((out / "provenance.json").read_text())["begun"]
    assert call_app(profile.main, "profile", *SMALL, f"hydra.run.dir={out}") == 0
    assert (out / "visits.jsonl").read_bytes() == visits, "the engine, its machine and its points are the same"
    assert len(MeasuredIterations.read(out / "iterations.parquet")) == 50
    provenance = read_provenance(out / "iterations.parquet")
    assert provenance == json.loads((out / "provenance.json").read_text())
    assert begun is not None
    assert provenance["begun"] == begun
    config = load_profile(out / "engine.yaml")
    chosen = {"name", "latency", "measured", "max_num_seqs", "max_model_len", "num_kv_blocks"}
    assert config.model_dump(exclude=chosen) == EngineConfig(name="", latency="").model_dump(exclude=chosen)


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("engine.devcie=cpu", "engine.devcie: unknown key; did you mean engine.device?"),
        ("pionts=60", "pionts: unknown key; did you mean points?"),
        ("engine=torch_tny", "engine=torch_tny: no such choice; did you mean torch_tiny?"),
        ("engine=nowhere.yaml", "engine=nowhere.yaml: no such file"),
        ("device=gpu", "engine.device='gpu': Input should be 'auto', 'cpu' or 'cuda'"),
        ("engine.max_num_seqs=0", "engine.max_num_seqs=0: "),
        ("engine.prefill=turns", "profile with engine.prefill=chunked"),
        ("points=many", "points='many': "),
        ("points=49", "points=49 must be at least 50"),
        ("minutes=0", "minutes=0: "),
        ("minutes=inf", "minutes=inf: "),
        ("seed=-1", "seed=-1: "),
        ("predictor.features=[weather]", "features=['weather'] must be some of"),
        ("speculation.max_tokens=1", "speculation.max_tokens=1: "),
        ("actions.candidate_choices=[2,0]", "actions.candidate_choices=[2, 0] must be strictly increasing"),
        ("engine=vicuna_7b_a100", "choose engine=torch_small, torch_tiny"),
    ],
)
def test_a_word_that_cannot_be_meant_is_refused_by_name(
    word: str, said: str, call_app: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert call_app(profile.main, "profile", f"hydra.run.dir={tmp_path}", word) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "visits.jsonl").exists()
