"""Claims about how a governed vLLM is configured; no vLLM is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from engine.backends.vllm.config import CONTROLLER_VARIABLE, GovernorConfig, GovernorError

CONF = Path(__file__).resolve().parents[4] / "conf"


@pytest.mark.parametrize("path", sorted((CONF / "controller").glob("*.yaml")), ids=lambda path: path.stem)
def test_every_controller_of_the_repository_can_be_named(path: Path) -> None:
    assert GovernorConfig(controller=path).load_controller().label()


def test_the_environment_names_the_controller_where_the_configuration_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "controller.yaml"
    monkeypatch.setenv(CONTROLLER_VARIABLE, str(path))
    assert GovernorConfig.read({}).controller == path
    assert GovernorConfig.read({"governor": {"controller": "other.yaml"}}).controller == Path("other.yaml")


@pytest.mark.parametrize(
    ("section", "named"),
    [
        ({}, CONTROLLER_VARIABLE),
        ("fixed", "must be a mapping"),
        ({"controller": "a.yaml", "typo": 1}, "governor.typo"),
        ({"controller": "a.yaml", "time_limit_s": 0}, "governor.time_limit_s=0"),
        ({"controller": "a.yaml", "actions": {"candidate_choices": [3, 1]}}, "governor.actions.candidate_choices"),
    ],
)
def test_a_wrong_configuration_is_refused_with_its_key(
    section: Any, named: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(CONTROLLER_VARIABLE, raising=False)
    with pytest.raises(GovernorError, match=named):
        GovernorConfig.read({"governor": section})


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("_target_: controllers.fixed.Fixed\ncandidate: 3\n", "candidate"),
        ("_target_: controllers.fixed.Missing\n", "controllers.fixed.Missing"),
        ("_target_: nowhere.at.All\n", "nowhere.at.All"),
        ("- 1\n", "holds no mapping"),
        ("a: [", "governor.controller"),
    ],
)
def test_a_wrong_controller_file_is_refused_with_its_name(tmp_path: Path, text: str, named: str) -> None:
    path = tmp_path / "controller.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(GovernorError, match=named) as error:
        GovernorConfig(controller=path).load_controller()
    assert str(path) in str(error.value)


def test_a_choice_of_the_repository_is_named_or_built_on(tmp_path: Path) -> None:
    assert GovernorConfig(controller=Path("sarathi")).load_controller().label() == "sarathi 512"
    own = tmp_path / "own.yaml"
    own.write_text("defaults: [fixed, _self_]\ntoken_budget: 128\n", encoding="utf-8")
    assert GovernorConfig(controller=own).load_controller().token_budget == 128


def test_only_a_simulated_engine_predicts() -> None:
    engine = CONF / "engine" / "torch_tiny.yaml"
    plant = GovernorConfig(controller=Path("analytic"), engine=engine).plant(4, 2048, 64, 100_000)
    with pytest.raises(GovernorError, match=r"governor\.engine=.*torch_tiny\.yaml: it describes no simulated engine"):
        plant.predict()
