"""Real engines by the name of their configuration, read without Hydra: a bare GPU machine has no need of it."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import yaml

from runs.bare import engine_settings
from runs.bare_config import read_choice
from runs.endings import MistakeError

Settings = SimpleNamespace
"""Attributes as `engine.backends.torch.config.TorchEngineConfig` has them."""


def configured(name: str, **overrides: Any) -> Settings:
    """The real engine of `conf/engine/NAME.yaml`, with some of its settings replaced.

    Raises:
        MistakeError: no such file, or a setting that the engine refuses; the message names it.
    """
    return engine_settings(read_choice("engine", name) | overrides)


def but(settings: Settings, **overrides: Any) -> Settings:
    """The same settings with some replaced."""
    return Settings(**(vars(settings) | overrides))


def overridden(assignments: Sequence[str]) -> dict[str, Any]:
    """Settings from words `key=value`, values as in YAML. Raises MistakeError for a word without `=`."""
    found = {}
    for word in assignments:
        key, equals, value = word.partition("=")
        if not equals:
            raise MistakeError(f"--set {word}: a setting is written key=value, for example max_num_seqs=32")
        found[key] = yaml.safe_load(value)
    return found
