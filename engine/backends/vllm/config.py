"""Configuration of a governed vLLM: its controller, the predictions it uses, and its limits."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable
from engine.latency.measured import MeasuredIterations
from engine.latency.model import LatencyModel
from engine.plant import Plant

CONTROLLER_VARIABLE = "GOVERNOR_CONTROLLER"
SECTION = "governor"
USUAL_TTFT_TARGET_S = 1.0


class GovernorError(ValueError):
    """vLLM cannot be governed as it is configured; the message names the key and what to change."""


class GovernorConfig(BaseModel):
    """The `governor` section of vLLM's `--additional-config`.

    Args:
        controller: a controller's yaml, as in `conf/controller`: `_target_` and settings. The environment variable
            GOVERNOR_CONTROLLER names it where this is not given.
        engine: an engine's yaml, as in `conf/engine` or as `runs.profile` writes it, the source of predicted iteration
            times; not needed by controllers without predictions.
        ttft_target: latency requirement on TTFT in s; None: the controller's own, or 1 s.
        actions: the choices of controllers that choose from a grid; those above vLLM's maxima are left out.
        queue_rows: waiting requests that are observed one by one.
        time_limit_s: longest wait of a step for its decision.
        most_failures: consecutive failures after which the controller is switched off.
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
        return _made("controller", self.controller)

    def plant(self, most_candidates: int, most_tokens: int, max_num_seqs: int, kv_tokens: int) -> Plant:
        """Static engine information for the controller: choices within vLLM's maxima, predicted iteration times.

        `kv_tokens` is the capacity of the KV cache.
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
        engine = _made("engine", self.engine)
        if not isinstance(engine, EngineConfig):
            raise GovernorError(f"{SECTION}.engine={self.engine}: it describes no simulated engine")
        choices = (grid.candidate_choices, grid.budget_choices)
        if engine.measured is not None:
            return LookupTable.of_measured(MeasuredIterations.read(engine.measured), *choices, max_num_seqs, kv_tokens)
        return LookupTable.load_or_fit(LatencyModel.load(engine.latency), *choices, max_num_seqs, kv_tokens)


def _within(choices: tuple[int, ...], most: int) -> tuple[int, ...]:
    """The choices not above `most`; `most` itself where there is none."""
    return tuple(choice for choice in choices if choice <= most) or (most,)


def _made(group: str, path: Path) -> Any:
    """The object that a yaml of a group of `conf` describes, composed and made by Hydra. Raises GovernorError."""
    # A vLLM that is not governed has no use for Hydra, and nothing else in the engine has.
    from hydra.errors import InstantiationException
    from hydra.utils import instantiate

    from conf.compose import ChoiceError, compose_choice

    try:
        return instantiate(compose_choice(group, str(path)), _convert_="all")
    except ChoiceError as error:
        raise GovernorError(f"{SECTION}.{error}") from error
    except (InstantiationException, OmegaConfBaseException) as error:
        cause = error.__cause__ if isinstance(error.__cause__, ValueError) else error
        raise GovernorError(f"{SECTION}.{group}={path}: {' '.join(str(cause).split())}") from error
