"""What engines that run a model in real time have in common: their verbs, their settings, how they are warmed up."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Protocol, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from engine.backends.clock import Clock
from engine.config import EngineLimits
from engine.core.state import State
from engine.core.telemetry import Observation
from engine.latency.design import Point
from engine.latency.measured_fit import MemoryFigures
from engine.speculation.allocation import Speculation
from engine.speculation.sampling import GREEDY, Sampling
from engine.workload.prompts import Prompts

EMBEDDED = "embedded"
"""In place of a folder or a hub id: the model that ships with the project."""

WARMUP_REQUESTS = 8
WARMUP_PROMPT_TOKENS = 256
WARMUP_OUTPUT_TOKENS = 8
WARMUP_CANDIDATES = 4
WARMUP_BUDGET = 512


class RequestError(ValueError):
    """A request cannot be served by this engine; the message says which limit it breaks."""


@dataclass(frozen=True)
class Timing:
    """One iteration as a serving loop pays for it, its controller's decision aside.

    Seconds from the telemetry before it to the outputs stored after it, of these inside the drafter, and inside the
    target's forward.
    """

    seconds: float
    draft_s: float
    forward_s: float


class Rehearsing(Protocol):
    """Puts an engine that has nothing to do into a state, and runs an iteration from there repeatedly."""

    def arrange(self, point: Point, rng: np.random.Generator) -> None:
        """Bring the engine to the beginning of the iteration; prompts start at random places of a text."""

    def run(self) -> Timing:
        """The arranged iteration once."""

    def planned(self) -> dict[str, int]:
        """What the latest iteration was, as the scheduler counts (see `engine.core.state.ENGINE`)."""

    def clear(self) -> None:
        """Empty the engine."""


class RealEngine(Protocol):
    """Serves token-id prompts with a model, one `step` an iteration."""

    clock: Clock
    state: State
    """One engine; its totals and timelines are what was served."""
    limits: EngineLimits
    queue_rows: int
    max_candidates: int
    """The largest c that the drafter can serve."""

    def submit(
        self,
        prompt: Sequence[int] | NDArray[np.integer],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop: Collection[int] = (),
        arrival: float | None = None,
    ) -> int:
        """Queue a request and return its number, counted from 0 since the reset. Raises RequestError."""

    def output(self, number: int) -> list[int]:
        """Tokens generated so far."""

    @property
    def next_arrival(self) -> float | None:
        """When the next submitted request arrives, in s; None when all have."""

    def poll(self) -> bool:
        """Take in the requests that have arrived by now; whether there is anything for `step` to run."""

    def new_observation(self) -> Observation:
        """Fresh zeroed observation arrays of this engine's shapes."""

    def observe(self, observation: Observation) -> None:
        """Write telemetry into `observation` (see `engine.core.telemetry`)."""

    def step(self, candidates: int, token_budget: int) -> bool:
        """Run one iteration at the given c and n; False, at once, when no request has arrived that is unfinished."""

    def run(self, candidates: int, token_budget: int) -> None:
        """Step at one c and n, waiting for arrivals, until every submitted request is over."""

    def reset(self, clock: Clock | None = None) -> None:
        """Forget every request and begin again at 0 s, on a clock that starts now unless given; models stay loaded."""

    def rehearsal(self, text: NDArray[np.int32]) -> Rehearsing:
        """What measures this engine's iterations."""

    def memory(self) -> MemoryFigures:
        """What weights and cache take."""

    def about(self) -> dict[str, Any]:
        """The device and software it runs on; JSON-able."""

    def close(self) -> None:
        """Let go of what it holds; it serves no more."""


class RealEngineConfig(BaseModel):
    """Settings of every engine that runs a model.

    Args:
        name: how reports call it.
        max_num_seqs: most requests in one batch.
        max_model_len: most prompt + output tokens of one request.
        block_size: tokens per KV block.
        profile: the engine yaml that `runs.profile` wrote for this engine on this machine, from which controllers
            predict iteration times; None: there is none, and controllers that predict are refused.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unnamed: ClassVar[frozenset[str]] = frozenset({"name", "max_num_seqs", "max_model_len", "block_size", "profile"})
    """Settings that `name` stands for, or that say what the engine has room for."""

    name: str
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64
    max_model_len: Annotated[int, Field(ge=2)] = 2048
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    profile: Path | None = None

    @property
    def variant(self) -> str:
        """`name`, and what differs from the defaults of that which changes speed or text.

        Two runs are compared as runs of one engine only if these are equal.
        """
        settings = self.model_dump(mode="json", exclude=set(self.unnamed))
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return " ".join([self.name, *(f"{key}={value}" for key, value in settings.items() if value != defaults[key])])

    @property
    def speculation(self) -> Speculation:
        """How the candidates of an action are shared out."""
        raise NotImplementedError

    def governed_by(self, speculation: Speculation | None) -> Self:
        """The same engine sharing candidates as a controller asks for; None: as it is configured.

        Raises ValueError for what the engine cannot do.
        """
        raise NotImplementedError

    @property
    def limits(self) -> EngineLimits:
        """What a scheduler knows of the cache."""
        raise NotImplementedError

    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        raise NotImplementedError

    def build(self, *, ttft_target: float, queue_rows: int = 64) -> RealEngine:
        """Load the models and return the engine; its clock starts when this returns."""
        raise NotImplementedError


def tokenizer_of(model: str) -> Any:
    """The tokenizer of a folder, a hub id or the embedded model."""
    if model == EMBEDDED:
        from engine.models.load import load_tokenizer

        return load_tokenizer()
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def refuse_sharing(asked_for: Speculation) -> ValueError:
    """What a controller is told that asks a real engine for a sharing of candidates that only simulated ones have."""
    return ValueError(
        f"this controller needs candidates shared out by {asked_for.variant!r}, which only simulated engines "
        "do; choose another controller, or a simulated engine (engine=vicuna_7b_a100, or a profile of this one)"
    )


def warm_up(engine: RealEngine, prompts: Prompts) -> None:
    """Serve the beginnings of the first prompts without candidates and with some.

    First calls compile, and first touch memory, which is not the engine's speed.
    """
    for candidates in (0, min(WARMUP_CANDIDATES, engine.max_candidates)):
        submit_beginnings(engine, prompts)
        engine.run(candidates, WARMUP_BUDGET)


def submit_beginnings(engine: RealEngine, prompts: Prompts) -> None:
    """Queue the beginnings of the first prompts."""
    for i in range(min(WARMUP_REQUESTS, prompts.num_requests)):
        most = min(WARMUP_OUTPUT_TOKENS, int(prompts.max_tokens[i]))
        engine.submit(prompts.tokens[i][:WARMUP_PROMPT_TOKENS], most, prompts.sampling[i])
