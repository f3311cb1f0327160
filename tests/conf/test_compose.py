"""Claims about configurations that are composed from Python: Hydra's own, whatever else of Hydra is going on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import hydra
import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.version import VersionBase

from conf.compose import ChoiceError, compose, compose_choice
from envs.named import named_workload

JOB = """
import hydra
from hydra.core.hydra_config import HydraConfig

@hydra.main(version_base="1.2", config_path={folder!r}, config_name="own")
def job(config):
    from envs.named import named_workload
    print(config.rate, named_workload("bench_idle").name, HydraConfig.get().job.name, HydraConfig.get().job.num)

job()
"""


def test_a_job_that_names_a_workload_goes_on_as_if_it_had_not(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("rate: 1\n")
    app = tmp_path / "mine.py"
    app.write_text(JOB.format(folder=str(tmp_path)))
    words = ["-m", "rate=1,2", f"hydra.sweep.dir={tmp_path / 'out'}", "hydra/launcher=basic"]
    ran = subprocess.run(
        [sys.executable, str(app), *words],
        cwd=Path(__file__).resolve().parents[2],
        env={"PYTHONPATH": str(Path(__file__).resolve().parents[2]), "PATH": ""},
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stderr
    lines = [line for line in ran.stdout.splitlines() if "bench_idle" in line]
    assert lines == ["1 bench_idle mine 0", "2 bench_idle mine 1"]


def test_what_is_global_in_hydra_is_put_back(tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("rate: 1\n")
    with hydra.initialize_config_dir(str(tmp_path), "mine", version_base="1.2"):
        before = GlobalHydra.instance(), GlobalHydra.instance().hydra
        assert compose_choice("engine", "torch_tiny")["name"] == "torch_tiny"
        with pytest.raises(ChoiceError):
            compose_choice("engine", "torch_tny")
        assert (GlobalHydra.instance(), GlobalHydra.instance().hydra) == before
        assert JobRuntime.instance().get("name") == "mine"
        assert str(VersionBase.instance().getbase()) == "1.2"
        assert hydra.compose("own").rate == 1
    assert not GlobalHydra.instance().is_initialized()
    assert compose("evaluate", ["seed=3"]).seed == 3
    assert not GlobalHydra.instance().is_initialized()


def test_a_choice_is_what_its_defaults_list_and_the_words_make_of_it(tmp_path: Path) -> None:
    own = tmp_path / "it's own, [1].yaml"
    own.write_text("defaults: [torch_small, _self_]\nname: mine\nthreads: 2\n")
    made = compose_choice("engine", str(own), ["dtype=bfloat16"])
    assert {key: made[key] for key in ("name", "threads", "layers", "dtype")} == {
        "name": "mine",
        "threads": 2,
        "layers": 24,
        "dtype": "bfloat16",
    }
    assert compose_choice("workload/lengths", "fixed")["output_tokens"] == 128


@pytest.mark.parametrize(
    ("choice", "said"),
    [
        ("torch_tny", "engine=torch_tny: no such choice; did you mean torch_tiny?"),
        ("", "engine=: no such choice; there are "),
        ("nowhere.yaml", "engine=nowhere.yaml: no such file"),
        ("{folder}/list.yaml", "list.yaml: cannot be read as a configuration: it holds no mapping"),
        ("{folder}/broken.yaml", "broken.yaml: cannot be read as a configuration"),
    ],
)
def test_what_cannot_be_composed_is_named_on_one_line(choice: str, said: str, tmp_path: Path) -> None:
    for name, text in (("list", "- 1\n"), ("broken", "a: [")):
        (tmp_path / f"{name}.yaml").write_text(text)
    with pytest.raises(ChoiceError) as refused:
        compose_choice("engine", choice.format(folder=tmp_path))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_workload_that_its_class_refuses_is_named(tmp_path: Path) -> None:
    own = tmp_path / "own.yaml"
    for text, said in (
        ("defaults: [bench_idle, _self_]\nrate_scale: -1\n", "rate_scale"),
        ("name: ${nowhere}\n_target_: engine.workload.source.SyntheticSource\n", "nowhere"),
        ("name: mine\n", "describes a dict, which is no workload"),
        ("name: ???\n", "no default for name"),
    ):
        own.write_text(text)
        with pytest.raises(ValueError, match=said) as refused:
            named_workload(str(own))
        assert "\n" not in str(refused.value)
        assert "own.yaml" in str(refused.value)
