"""Real engines by the name of their configuration, read without Hydra: a bare GPU machine has no need of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.backends.torch.config import TorchEngineConfig

FOLDER = Path(__file__).resolve().parents[3] / "conf" / "engine"


def configured(name: str, **overrides: Any) -> TorchEngineConfig:
    """The real engine of `conf/engine/NAME.yaml`, with some of its settings replaced.

    Raises:
        ValueError: no such file, or a setting that the engine refuses.
    """
    return TorchEngineConfig.model_validate(_settings(name) | overrides)


def overridden(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from words `key=value`, values as in YAML. Raises ValueError for a word without `=`."""
    found = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals:
            raise ValueError(f"--set {word}: a setting is written key=value, for example max_num_seqs=32")
        found[key] = yaml.safe_load(value)
    return found


def _settings(name: str) -> dict[str, Any]:
    """A file's settings over those of the files that its `defaults` name, in that order."""
    path = FOLDER / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in FOLDER.glob("torch_*.yaml")))
        raise ValueError(f"--engine {name}: there is no {path}; one of {known}")
    own = yaml.safe_load(path.read_text(encoding="utf-8"))
    found: dict[str, Any] = {}
    for base in own.pop("defaults", ["_self_"]):
        found |= own if base == "_self_" else _settings(base)
    found.pop("_target_", None)
    return found
