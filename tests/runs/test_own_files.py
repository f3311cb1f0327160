"""A choice of a config group may be a path; everything else means what it did."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.errors import ConfigCompositionException
from omegaconf import DictConfig

REPOSITORY = Path(__file__).resolve().parents[2]
MINE = "defaults:\n  - vicuna_7b_a100\n  - _self_\nname: mine\nmax_num_seqs: 7\n"


def composed(*overrides: str) -> DictConfig:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base=None):
        return compose("evaluate", list(overrides))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", ["{here}/out/my.yaml", "out/my.yaml", "./out/my.yaml", "../{name}/out/my.yaml"])
def test_a_path_is_read_and_its_defaults_are_the_applications(here: Path, path: str) -> None:
    (here / "out").mkdir()
    (here / "out" / "my.yaml").write_text(MINE)
    engine = composed(f"engine={path.format(here=here, name=here.name)}", "engine.block_size=32").engine
    assert (engine.name, engine.max_num_seqs, engine.block_size) == ("mine", 7, 32)
    assert engine.latency == composed().engine.latency


def test_a_path_works_for_every_group_nested_and_global_ones_too(here: Path) -> None:
    (here / "lengths.yaml").write_text(
        "_target_: engine.workload.lengths.FixedLengths\nprompt_tokens: 3\noutput_tokens: 4\n"
    )
    (here / "controller.yaml").write_text("defaults: [fixed, _self_]\ncandidates: 6\n")
    (here / "workload.yaml").write_text("defaults: [synthetic, _self_]\nname: mine\n")
    (here / "experiment.yaml").write_text("# @package _global_\nseed: 5\n")
    config = composed(
        "workload=workload.yaml",
        "workload/lengths=lengths.yaml",
        "controller=controller.yaml",
        "experiment=experiment.yaml",
    )
    assert (config.workload.name, config.workload.lengths.output_tokens) == ("mine", 4)
    assert (config.controller.candidates, config.controller.token_budget, config.seed) == (6, 512, 5)


def test_the_applications_choices_keep_their_meaning(here: Path) -> None:
    (here / "vicuna_13b_a100").write_text("name: not meant\n")
    assert composed("engine=vicuna_13b_a100").engine.name == "vicuna_13b_a100"
    assert composed("engine=vicuna_13b_a100.yaml").engine.name == "vicuna_13b_a100"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, r"engine=absent/mine\.yaml: no such file .*torch_tiny"),
        ("- 1\n", "no mapping"),
        ("a: [", "cannot be read"),
    ],
)
def test_a_file_that_is_missing_or_no_configuration_is_refused_by_name(here: Path, text: str | None, said: str) -> None:
    if text is not None:
        (here / "absent").mkdir()
        (here / "absent" / "mine.yaml").write_text(text)
    with pytest.raises(ConfigCompositionException, match=said):
        composed("engine=absent/mine.yaml")


def test_a_path_that_may_mean_two_files_is_refused(here: Path) -> None:
    (here / "lengths").mkdir()
    for path in ("lengths/mine.yaml", "mine.yaml"):
        (here / path).write_text("name: mine\n")
    with pytest.raises(ConfigCompositionException, match="both there"):
        composed("workload=lengths/mine.yaml")


def test_a_sweep_goes_over_paths(here: Path) -> None:
    for name in ("one", "two"):
        (here / f"{name}.yaml").write_text(MINE.replace("mine", name))
    command = [sys.executable, "-m", "runs.evaluate", "-m", "engine=one.yaml,two.yaml", "workload=poisson_lmsys"]
    command += ["workload.num_requests=5", "controller=fixed", "logger=none", "hydra.sweep.dir=out"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stderr
    made = [(here / "out" / str(job) / "config.yaml").read_text() for job in (0, 1)]
    assert ["name: one" in made[0], "name: two" in made[1]] == [True, True]
