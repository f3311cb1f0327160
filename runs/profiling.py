"""What a profile is configured with, validated; `runs.measuring` does the work. No Hydra."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, model_validator

from engine.backends.torch.config import TorchEngineConfig
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.core.action import ActionGrid
from engine.latency.measured_card import MEASURED_FOREST
from engine.latency.predictors import Forest
from runs import measuring
from runs.measured_folder import Result


class SpeculationPrompts(BaseModel):
    """Held-out prompts that are served under every c: how many, of how many tokens, with how many output tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: int = 32
    prompt_tokens: int = 192
    max_tokens: int = 64


class Profile(BaseModel):
    """What is measured, and how a simulated engine is made of it.

    Args:
        engine: the real engine.
        actions: the choices of c and n that the points cover.
        minutes: of measuring iterations; every point is measured once whatever this says.
        points: iterations to measure; 0 for the usual number, which is larger on a GPU.
        seed: draws the points, their order and the prompts.
        predictor: the regression that controllers predict with, for its held-out error.
        speculation: prompts that are served under every c.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: TorchEngineConfig | VllmEngineConfig
    actions: ActionGrid = ActionGrid()
    minutes: float = 4.0
    points: int = 0
    seed: int = 0
    predictor: Forest = MEASURED_FOREST
    speculation: SpeculationPrompts = SpeculationPrompts()

    @model_validator(mode="after")
    def _can_be_measured(self) -> Profile:
        measuring.check(self, self.engine.limits.prefill)
        return self

    def run(self, out: Path, progress: Callable[[str], Any]) -> Result:
        """See `runs.measuring.profile`."""
        subject = measuring.Subject(
            self.engine.model_dump(mode="json", exclude={"profile"}),
            self.engine.tokenizer,
            partial(self.engine.build, ttft_target=1.0),
        )
        return measuring.profile(subject, self, out, progress)
