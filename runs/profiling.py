"""One profile: a real engine is measured, and becomes a simulated one. No Hydra."""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.backends.measure import collect, loads, measure
from engine.backends.real import RealEngine
from engine.backends.torch.acceptance import agreement, speculate
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.files import write_whole
from engine.latency.design import Space, design
from engine.latency.measured import MeasuredIterations
from engine.latency.measured_card import MEASURED_FOREST, card
from engine.latency.measured_fit import fit_table
from engine.latency.predictors import Forest
from engine.latency.table_file import dump
from engine.models.corpus import cut_prompts, library_texts

log = logging.getLogger(__name__)

VISITS = "visits.jsonl"
ITERATIONS = "iterations.parquet"
TABLE = "table.json"
CARD = "card.json"
ACCEPTANCE = "acceptance.jsonl"
AGREEMENT = "agreement.npz"
TOKENS_PER_ITERATION = "tokens_per_iteration.json"
PROVENANCE = "provenance.json"
ENGINE = "engine.yaml"

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
        points: iterations to measure.
        seed: draws the points, their order and the prompts.
        predictor: the regression that controllers predict with, for its held-out error.
        speculation: prompts that are served under every c.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: TorchEngineConfig | VllmEngineConfig
    actions: ActionGrid = ActionGrid()
    minutes: Annotated[float, Field(gt=0.0)] = 4.0
    points: Annotated[int, Field(ge=50)] = 300
    seed: Annotated[int, Field(ge=0)] = 0
    predictor: Forest = MEASURED_FOREST
    speculation: SpeculationPrompts = SpeculationPrompts()

    @model_validator(mode="after")
    def _mixes(self) -> Profile:
        if self.engine.limits.prefill != "chunked":
            raise ValueError(
                f"engine.prefill={self.engine.limits.prefill}: iterations that mix prompts with decodes cannot be "
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
        text, prompts = self._texts()
        # An engine that never drafts plans no candidates, whatever c is.
        choices = tuple(c for c in self.actions.candidate_choices if c <= engine.max_candidates)
        space = Space(engine.limits, choices or (0,), max(self.actions.budget_choices))
        points = design(space, self.points, self.seed)
        with progress("Measuring") as on_progress:
            measure(
                engine,
                text,
                points,
                out / VISITS,
                seconds=60.0 * self.minutes,
                seed=self.seed,
                identity=self.identity,
                on_progress=on_progress,
            )
        with progress("Speculating") as on_progress:
            gains = self._speculation(engine, prompts, space, out, on_progress)
        measured = collect(out / VISITS)
        provenance = self._provenance(engine, out, measured)
        name = f"{self.engine.name}_measured"
        document = fit_table(measured, name, engine.memory(), provenance)
        scores = card(measured, self.predictor, self.seed)
        partial = out / f".{ITERATIONS}.partial"
        measured.write(partial)
        os.replace(partial, out / ITERATIONS)
        _write_json(out / CARD, scores)
        _write_json(out / PROVENANCE, provenance)
        write_whole(out / TABLE, dump(document).encode())
        # The engine file comes last: where there is one, everything that it names is there.
        write_whole(out / ENGINE, self._engine_yaml(engine, name, out).encode())
        return Result(measured, scores, gains)

    @property
    def identity(self) -> str:
        """What the measured times depend on beside the points."""
        settings = self.engine.model_dump(mode="json", exclude={"profile"})
        return json.dumps(settings | {"machine": _processor()}, sort_keys=True)

    def _texts(self) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
        """Held-out text in one piece, and the prompts that are served."""
        tokenizer = self.engine.tokenizer()
        texts = list(library_texts(held_out=True))
        lengths = [self.speculation.prompt_tokens] * self.speculation.prompts
        prompts = cut_prompts(texts, tokenizer, lengths, np.random.default_rng(self.seed))
        pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for _, text in texts]
        return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), [prompt.tokens for prompt in prompts]

    def _speculation(
        self,
        engine: RealEngine,
        prompts: list[NDArray[np.int32]],
        space: Space,
        out: Path,
        on_progress: Progress | None,
    ) -> dict[int, float]:
        """Serve the prompts under every c; writes the acceptance log of the largest and the agreement."""
        gains: dict[int, float] = {}
        for done, candidates in enumerate(space.candidates):
            run = speculate(engine, prompts, self.speculation.max_tokens, candidates, space.most_prefill)
            gains[candidates] = run.tokens_per_iteration
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
            "tokens_per_iteration": {str(c): round(gain, 4) for c, gain in gains.items()},
        }
        _write_json(out / TOKENS_PER_ITERATION, content)
        return gains

    def _engine_yaml(self, engine: RealEngine, name: str, out: Path) -> str:
        limits = engine.limits
        settings = EngineConfig(
            name=name,
            latency=str((out / TABLE).resolve()),
            max_num_seqs=limits.max_num_seqs,
            max_model_len=limits.max_model_len,
            block_size=limits.block_size,
            watermark=self.engine.watermark,
            num_kv_blocks=limits.total_blocks,
            measured=(out / ITERATIONS).resolve(),
        )
        target = f"{EngineConfig.__module__}.{EngineConfig.__qualname__}"
        return yaml.safe_dump({"_target_": target, **settings.model_dump(mode="json")}, sort_keys=False)

    def _provenance(self, engine: RealEngine, out: Path, measured: MeasuredIterations) -> dict[str, Any]:
        load = loads(out / VISITS)
        about = engine.about()
        return {
            "source": "whole iterations measured by python -m runs.profile",
            "engine": self.engine.model_dump(mode="json", exclude={"profile"}),
            "points": len(measured),
            "repeats_median": float(np.median(measured.repeats)),
            "seed": self.seed,
            "written": time.strftime("%Y-%m-%d %H:%M:%S %Z"),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "torch_threads": torch.get_num_threads(),
            "device": "cpu" if about["device"] == "cpu" else about["device_name"],
            "load_average_median": round(float(np.median(load)), 2),
            "load_average_max": round(max(load), 2),
            "python": platform.python_version(),
            **{package: found for package, found in about.items() if package in ("torch", "transformers", "vllm")},
            **{package: version(package) for package in ("numpy", "scikit-learn")},
        }


@dataclass(frozen=True)
class Result:
    """A finished profile: its iterations, held-out errors by prediction and group, tokens per iteration by c."""

    measured: MeasuredIterations
    card: dict[str, dict[str, float]]
    tokens_per_iteration: dict[int, float]


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def _write_json(path: Path, content: Any) -> None:
    write_whole(path, (json.dumps(content, indent=1, allow_nan=False) + "\n").encode())
