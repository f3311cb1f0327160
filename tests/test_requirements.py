"""The constraints hold every requirement at a version that pyproject.toml allows; Hydra runs no shell command."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest
from omegaconf import OmegaConf
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from runs import mistakes

REPOSITORY = Path(__file__).resolve().parents[1]
CHOSEN_BY_TORCH = {"torch", "triton"}


def _constraints() -> dict[str, Requirement]:
    lines = (REPOSITORY / "constraints.txt").read_text(encoding="utf-8").splitlines()
    requirements = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(requirement.name): requirement for requirement in requirements}


def test_every_requirement_is_held_at_a_version_that_it_allows() -> None:
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    held = _constraints()
    for requirement in map(Requirement, project["dependencies"] + project["optional-dependencies"]["dev"]):
        name = canonicalize_name(requirement.name)
        if name not in CHOSEN_BY_TORCH:
            (pin,) = held[name].specifier
            assert pin.operator == "=="
            assert requirement.specifier.contains(pin.version), f"{held[name]} is not in {requirement}"


def test_the_constraints_leave_the_choice_of_torch_open() -> None:
    held = _constraints()
    assert "torch" not in held
    assert not any(name.startswith(("nvidia", "cuda")) or "+" in str(pin) for name, pin in held.items())
    assert all(pin.marker is None and pin.url is None for pin in held.values()), "one file for every Python"
    assert {spec.operator for spec in held["triton"].specifier} == {"<="}


def test_a_configuration_cannot_name_a_shell_command() -> None:
    with pytest.raises(mistakes.MistakeError, match=r"os\.system"):
        mistakes.instantiate(OmegaConf.create({"_target_": "os.system", "command": "exit 1"}), int)
