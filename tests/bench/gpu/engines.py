"""Real engines by the name of their configuration."""

from __future__ import annotations

from conf.compose import compose_choice
from engine.backends.torch.config import TorchEngineConfig
from runs.mistakes import instantiate


def configured(name: str, *words: str) -> TorchEngineConfig:
    """The real engine of `conf/engine/NAME.yaml`, with some of its settings replaced by words `key=value`.

    Raises:
        ValueError: no such file, or a setting that the engine refuses; the message names it.
    """
    return instantiate(compose_choice("engine", name, words), TorchEngineConfig)


def but(settings: TorchEngineConfig, **overrides: int) -> TorchEngineConfig:
    """The same settings with some replaced."""
    return settings.model_copy(update=overrides)
