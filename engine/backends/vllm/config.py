"""What a governed vLLM is told: which controller, on what predictions, within which limits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from yaml import YAMLError

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable
from engine.latency.measured import MeasuredIterations
from engine.latency.model import LatencyModel
from engine.plant import Plant

CONTROLLER_VARIABLE = "GOVERNOR_CONTROLLER"
SECTION = "governor"
TARGET = "_target_"
USUAL_TTFT_TARGET_S = 1.0


class GovernorError(ValueError):
    """vLLM cannot be governed as it is configured; the message names the key and what to change."""


class GovernorConfig(BaseModel):
    """The `governor` section of vLLM's `--additional-config`.

    Args:
        controller: a controller's yaml, as in `conf/controller`: `_target_` and settings. The environment variable
            GOVERNOR_CONTROLLER names it where this is not given.
        engine: an engine's yaml, as in `conf/engine` or as `runs.profile` writes it, whose iteration times controllers
            predict with; one that predicts nothing needs none.
        ttft_target: latency requirement on TTFT in s; None: the controller's own, or 1 s.
        actions: the choices of controllers that choose from a grid; those above vLLM's maxima are left out.
        queue_rows: waiting requests that are observed one by one.
        time_limit_s: how long a step waits for its decision.
        most_failures: decisions in a row that may fail before the controller is switched off.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    controller: Path
    engine: Path | None = None
    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] | None = None
    actions: ActionGrid = ActionGrid()
    queue_rows: Annotated[int, Field(ge=1, le=4096)] = 64
    time_limit_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.01
    most_failures: Annotated[int, Field(ge=1)] = 100

    @classmethod
    def read(cls, additional_config: Any) -> GovernorConfig:
        """The section in vLLM's `additional_config`, with the environment's controller. Raises GovernorError."""
        given = additional_config.get(SECTION, {}) if isinstance(additional_config, Mapping) else {}
        if not isinstance(given, Mapping):
            raise GovernorError(f"additional_config[{SECTION!r}]={given!r} must be a mapping with the key 'controller'")
        settings = dict(given)
        if "controller" not in settings and os.environ.get(CONTROLLER_VARIABLE):
            settings["controller"] = os.environ[CONTROLLER_VARIABLE]
        if "controller" not in settings:
            raise GovernorError(
                f'no controller: give --additional-config \'{{"{SECTION}": {{"controller": "controller.yaml"}}}}\' '
                f"or set {CONTROLLER_VARIABLE} to the path of such a yaml"
            )
        try:
            return cls.model_validate(settings)
        except ValidationError as error:
            first = error.errors()[0]
            key = ".".join(str(part) for part in (SECTION, *first["loc"]))
            raise GovernorError(f"{key}={first.get('input')!r}: {first['msg']}") from error

    def load_controller(self) -> Any:
        """The configured controller, made. Raises GovernorError naming file and key."""
        return made(read_yaml(self.controller, "controller"), self.controller)

    def plant(self, most_candidates: int, most_tokens: int, max_num_seqs: int, kv_tokens: int) -> Plant:
        """What the controller may know: the choices within vLLM's maxima, and the predicted iteration times.

        `kv_tokens` is what the KV cache holds.
        """
        grid = ActionGrid(
            candidate_choices=_within(self.actions.candidate_choices, most_candidates),
            budget_choices=_within(self.actions.budget_choices, most_tokens),
        )
        return Plant(grid, lambda: self._predict(grid, max_num_seqs, kv_tokens))

    def _predict(self, grid: ActionGrid, max_num_seqs: int, kv_tokens: int) -> LookupTable:
        if self.engine is None:
            raise GovernorError(
                f"{SECTION}.engine: this controller predicts iteration times; name an engine's yaml, one of "
                "conf/engine or as python -m runs.profile writes it"
            )
        settings = read_yaml(self.engine, "engine")
        settings.pop(TARGET, None)
        try:
            engine = EngineConfig.model_validate(settings)
        except ValidationError as error:
            raise GovernorError(f"{SECTION}.engine={self.engine}: {error}") from error
        choices = (grid.candidate_choices, grid.budget_choices)
        if engine.measured is not None:
            return LookupTable.of_measured(MeasuredIterations.read(engine.measured), *choices, max_num_seqs, kv_tokens)
        return LookupTable.load_or_fit(LatencyModel.load(engine.latency), *choices, max_num_seqs, kv_tokens)


def _within(choices: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The choices not above `most`; `most` itself where there is none."""
    return tuple(choice for choice in choices if choice <= most) or (most,)


def read_yaml(path: Path, key: str) -> dict[str, Any]:
    """A yaml file's mapping, its interpolations resolved. Raises GovernorError naming `key`."""
    try:
        settings = OmegaConf.to_container(OmegaConf.load(path), resolve=True)
    except (OSError, UnicodeDecodeError, YAMLError, OmegaConfBaseException) as error:
        raise GovernorError(f"{SECTION}.{key}={path}: {error}") from error
    if not isinstance(settings, dict):
        raise GovernorError(f"{SECTION}.{key}={path} must hold a mapping, got {settings!r}")
    return {str(name): value for name, value in settings.items()}


def made(settings: Any, source: Path) -> Any:
    """What a mapping with `_target_` describes, and everything in it likewise; anything else as it is."""
    if isinstance(settings, list):
        return [made(item, source) for item in settings]
    if not isinstance(settings, Mapping):
        return settings
    inner = {name: made(value, source) for name, value in settings.items()}
    if TARGET not in inner:
        return inner
    target = inner.pop(TARGET)
    module, _, name = str(target).rpartition(".")
    try:
        build = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise GovernorError(f"{source}: {TARGET}={target!r} names nothing that can be imported: {error}") from error
    try:
        return build(**inner)
    except (TypeError, ValueError) as error:
        raise GovernorError(f"{source}: {error}") from error
