"""One profile: a real engine is measured, and becomes a simulated one."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.backends.clocks import clocks_of
from engine.backends.measure import begin, measure
from engine.backends.real import RealEngine
from engine.backends.torch.acceptance import agreement, speculate
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.core.action import ActionGrid
from engine.files import write_whole
from engine.latency.design import Space, design
from engine.latency.measured_card import MEASURED_FOREST
from engine.latency.predictors import Forest
from engine.models.corpus import cut_prompts, library_texts
from runs.measured_folder import (
    ACCEPTANCE,
    AGREEMENT,
    TOKENS_PER_ITERATION,
    VISITS,
    Result,
    finish,
    processor,
    write_json,
)

FEWEST_POINTS = 50

USUAL_POINTS, USUAL_POINTS_GPU = 300, 3000
"""A GPU's iterations are short, and their times are staircases in every size: graphs and products are padded."""

Progress = Callable[[int, int], Any]


class SpeculationPrompts(BaseModel):
    """Held-out prompts that are served under every c: how many, of how many tokens, with how many output tokens."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    prompts: Annotated[int, Field(ge=1)] = 32
    prompt_tokens: Annotated[int, Field(ge=1)] = 192
    max_tokens: Annotated[int, Field(ge=2)] = 64


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
    minutes: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 4.0
    points: Annotated[int, Field(ge=0)] = 0
    seed: Annotated[int, Field(ge=0)] = 0
    predictor: Forest = MEASURED_FOREST
    speculation: SpeculationPrompts = SpeculationPrompts()

    @model_validator(mode="after")
    def _can_be_measured(self) -> Profile:
        if 0 < self.points < FEWEST_POINTS:
            raise ValueError(f"points={self.points} must be at least {FEWEST_POINTS}, or 0 for the usual number")
        prefill = self.engine.limits.prefill
        if prefill != "chunked":
            raise ValueError(
                f"engine.prefill={prefill}: iterations that mix prompts with decodes cannot be "
                "measured; profile with engine.prefill=chunked, the profile holds for every other"
            )
        return self

    def run(self, out: Path, progress: Callable[[str], Any]) -> Result:
        """Measure what is still missing in the folder `out`, and write everything else anew.

        `progress` makes, from a description, a context manager of a function of (done, total), or of None.

        Raises:
            ValueError: the engine cannot be built or is too small for the choices, or `out` holds another profile.
        """
        engine = self.engine.build(ttft_target=1.0)
        engine.prepare()
        text, prompts = self._texts()
        # An engine that never drafts plans no candidates, whatever c is.
        choices = tuple(c for c in self.actions.candidate_choices if c <= engine.max_candidates)
        space = Space(engine.limits, choices or (0,), max(self.actions.budget_choices))
        about = engine.about()
        usual = USUAL_POINTS if about["device"] == "cpu" else USUAL_POINTS_GPU
        points = design(space, self.points or usual, self.seed)
        settings = self.engine.model_dump(mode="json", exclude={"profile"})
        identity, clocks = _identity(settings, about), clocks_of(about["device"])
        begin(out / VISITS, points, identity)
        with progress("Measuring") as on_progress:
            measure(
                engine,
                text,
                points,
                out / VISITS,
                seconds=60.0 * self.minutes,
                seed=self.seed,
                identity=identity,
                sensors=None if clocks is None else clocks.read,
                on_progress=on_progress,
            )
        with progress("Speculating") as on_progress:
            gains = self._speculate(engine, prompts, space, out, on_progress)
        return finish(out, settings, engine, clocks, self.predictor, self.seed, gains)

    def _texts(self) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
        """Held-out text in one piece, and the prompts that are served."""
        texts, tokenizer = list(library_texts(held_out=True)), self.engine.tokenizer()
        lengths = [self.speculation.prompt_tokens] * self.speculation.prompts
        prompts = cut_prompts(texts, tokenizer, lengths, np.random.default_rng(self.seed))
        pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for _, text in texts]
        return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), [prompt.tokens for prompt in prompts]

    def _speculate(
        self,
        engine: RealEngine,
        prompts: list[NDArray[np.int32]],
        space: Space,
        out: Path,
        on_progress: Progress | None,
    ) -> dict[int, float]:
        """Serve the prompts under every c, and return the tokens per iteration that each gave.

        Writes these, the acceptance log of the largest c, and the agreement.
        """
        gains: dict[int, float] = {}
        for done, candidates in enumerate(space.candidates):
            run = speculate(engine, prompts, self.speculation.max_tokens, candidates, space.most_prefill)
            gains[candidates] = round(run.tokens_per_iteration, 4)
            if on_progress is not None:
                on_progress(done + 1, len(space.candidates))
        write_whole(out / ACCEPTANCE, "".join(json.dumps(turn) + "\n" for turn in run.turns).encode())
        if isinstance(engine, TorchEngine):
            # Only a drafter of our own can be asked what it would have proposed at every position.
            partial = out / f".{AGREEMENT}.partial.npz"
            np.savez_compressed(partial, **agreement(engine, prompts, run.outputs))  # type: ignore[arg-type]
            os.replace(partial, out / AGREEMENT)
        content = {
            "drafter": self.engine.drafter,
            "workload": "held-out prompts, greedy",
            **self.speculation.model_dump(),
            "tokens_per_iteration": {str(c): gain for c, gain in gains.items()},
        }
        write_json(out / TOKENS_PER_ITERATION, content)
        return gains


def _identity(settings: dict[str, Any], about: dict[str, Any]) -> str:
    """What the measured times depend on beside the points."""
    machine = {"machine": processor()}
    if about["device"] != "cpu":
        machine["gpu"] = about["device_name"]
    return json.dumps(settings | machine, sort_keys=True)
