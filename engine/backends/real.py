"""Common interface and warm-up of engines that run a model in real time."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.backends.clock import Clock, WallClock
from engine.core import state as core
from engine.core.feed import arrive, feed_from, new_feed
from engine.core.live import append, for_limits
from engine.core.telemetry import Observation, allocate_observation, forget, new_seen
from engine.latency.design import Point
from engine.latency.measured_fit import MemoryFigures
from engine.limits import EngineLimits
from engine.models.shapes import shape_named, shape_tokenizer
from engine.speculation.sampling import GREEDY, Sampling

if TYPE_CHECKING:
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
    """Seconds of one iteration as a serving loop pays for it, without the controller's decision.

    Total time from the telemetry before it to the outputs stored after it, and the parts of it inside the drafter and
    inside the target's forward.
    """

    seconds: float
    draft_s: float
    forward_s: float


class Rehearsing(Protocol):
    """Puts an idle engine into a given state and repeatedly runs an iteration from there."""

    def arrange(self, point: Point, rng: np.random.Generator) -> None:
        """Bring the engine to the beginning of the iteration; prompts start at random places in a text."""

    def run(self) -> Timing:
        """Run the arranged iteration once."""

    def planned(self) -> dict[str, int]:
        """Batch of the latest iteration, as the scheduler counts it (see `engine.core.state.BATCH`)."""

    def clear(self) -> None:
        """Empty the engine."""


def counted(state: core.State) -> dict[str, int]:
    """Batch of the latest iteration, as the request table counts it (see `engine.core.state.BATCH`)."""
    names = (
        "num_decodes",
        "decode_tokens",
        "candidate_steps",
        "decode_kv_tokens",
        "num_prefills",
        "prefill_tokens",
        "prompts_completed",
    )
    return {name: int(state.batches[name][0]) for name in names}


class RealEngine(ABC):
    """Serves token-id prompts with a model, one `step` an iteration.

    Args:
        limits: scheduler limits.
        vocab_size: prompts hold token ids below it.
        max_candidates: the largest c that the drafter can serve.
        ttft_target: latency requirement on TTFT in s, which telemetry and lateness are counted against.
        queue_rows: M, the requests an observation lists one by one.
        clock: real time unless given.
    """

    def __init__(
        self,
        limits: EngineLimits,
        vocab_size: int,
        max_candidates: int,
        *,
        ttft_target: float,
        queue_rows: int,
        clock: Clock | None,
    ) -> None:
        self.limits, self.max_candidates, self.queue_rows = limits, max_candidates, queue_rows
        self.state = for_limits(limits, 64, ttft_target)
        """One instance; its totals and timelines record the served requests."""
        self.feed = new_feed(1)
        self.seen = new_seen(1)
        self.clock: Clock = WallClock() if clock is None else clock
        self.emitted: list[tuple[int, list[int]]] = []
        """(request, tokens) of the latest iteration."""
        self.finished: list[int] = []
        """Requests that ended with it."""
        self.failed: list[int] = []
        """Requests cancelled by it because the model's logits for them were not finite."""
        self._vocab_size = vocab_size
        self._earliest = 0.0

    @abstractmethod
    def submit(
        self,
        prompt: Sequence[int] | NDArray[np.integer],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop: Collection[int] = (),
        arrival: float | None = None,
    ) -> int:
        """Queue a request and return its number, counted from 0 since the reset.

        Args:
            prompt: token ids.
            max_tokens: most tokens to generate.
            sampling: how tokens are chosen.
            stop: tokens that end the output.
            arrival: s on the engine's clock, possibly in the future; now if not given. Requests are submitted in order
                of arrival, none before `earliest_arrival`.

        Raises:
            RequestError: when the request cannot be served, or arrives before one submitted earlier.
        """

    def _append(
        self, prompt: Sequence[int] | NDArray[np.integer], max_tokens: int, arrival: float | None
    ) -> tuple[NDArray[np.int32], float, int]:
        """Add a request to the table; its tokens, arrival and row. Raises RequestError."""
        tokens = np.array(prompt, dtype=np.int32)
        self._check(tokens, max_tokens)
        if arrival is None:
            arrival = max(self.clock.now(), self._earliest)
        elif arrival < self._earliest:
            raise RequestError(
                f"arrival={arrival} s is in the past: the latest arrival was, or arrivals were looked at, at "
                f"{self._earliest} s"
            )
        self._earliest = arrival
        self.state = core.grown(self.state, int(self.feed.end[0]) + 1)
        return tokens, arrival, int(append(self.state, self.feed, arrival, len(tokens), max_tokens))

    def _check(self, prompt: NDArray[np.int32], max_tokens: int) -> None:
        if prompt.ndim != 1 or prompt.size == 0 or max_tokens < 1:
            raise RequestError(f"prompt of shape {prompt.shape}, max_tokens={max_tokens}: need at least one token each")
        if prompt.min() < 0 or prompt.max() >= self._vocab_size:
            raise RequestError(f"prompt holds token {prompt.max()}; ids are 0 to {self._vocab_size - 1}")
        most = min(self.limits.max_model_len, self.limits.total_blocks * self.limits.block_size)
        if prompt.size + max_tokens > most:
            raise RequestError(
                f"prompt of {prompt.size} and max_tokens={max_tokens} exceed {most} tokens, the engine's context or "
                "cache"
            )

    @abstractmethod
    def cancel(self, number: int) -> bool:
        """Cancel a request, keeping its output so far; returns False when it was over already."""

    @abstractmethod
    def output(self, number: int) -> list[int]:
        """Tokens generated so far."""

    @property
    def earliest_arrival(self) -> float:
        """Earliest arrival time in s that the next submitted request may have.

        While an iteration runs, arrivals after its start are allowed: the scheduler has not looked for them yet.
        """
        return self._earliest

    @property
    def next_arrival(self) -> float | None:
        """Arrival time of the next submitted request, in s; None when all have arrived."""
        row = self.feed.next[0]
        return None if row == self.feed.end[0] else float(self.state.requests["arrival"][row])

    @property
    def requests(self) -> NDArray[np.void]:
        """The rows of the request table in use (a view)."""
        return self.state.requests[: self.feed.end[0]]

    @property
    def arrived(self) -> NDArray[np.void]:
        """The rows of the requests that have arrived (a view)."""
        return self.state.requests[: self.feed.next[0]]

    def poll(self) -> bool:
        """Queue the requests that have arrived by now; returns whether `step` has anything to run."""
        return self._release(self.clock.now())

    def _release(self, now: float) -> bool:
        """Queue the requests that have arrived; returns whether any request is unfinished."""
        before = int(self.feed.next[0])
        unfinished = arrive(self.state, 0, self.feed, now)
        self._arrived(range(before, int(self.feed.next[0])))
        self._earliest = max(self._earliest, math.nextafter(now, math.inf))
        return bool(unfinished)

    def _arrived(self, rows: range) -> None:  # noqa: B027 - only engines with a queue beside the table need it
        """The requests of these rows joined the queue."""

    def new_observation(self) -> Observation:
        """Fresh zeroed observation arrays of this engine's shapes."""
        return allocate_observation(1, self.queue_rows, self.max_candidates)

    @abstractmethod
    def observe(self, observation: Observation) -> None:
        """Write telemetry into `observation` (see `engine.core.telemetry`)."""

    @abstractmethod
    def step(self, candidates: int, token_budget: int) -> bool:
        """Run one iteration at the given c and n; False, at once, when no request has arrived that is unfinished."""

    def run(self, candidates: int, token_budget: int) -> None:
        """Step at one c and n, waiting for arrivals, until every submitted request is over."""
        while True:
            if not self.step(candidates, token_budget):
                moment = self.next_arrival
                if moment is None:
                    return
                self.clock.wait_until(moment)

    def reset(self, clock: Clock | None = None) -> None:
        """Forget every request and begin again at 0 s, on a clock that starts now unless given; models stay loaded."""
        core.clear(self.state, 0)
        forget(self.seen, 0)
        feed_from(self.feed, 0, 0, 0)
        self.emitted, self.finished, self.failed = [], [], []
        self._earliest = 0.0
        self.clock = WallClock() if clock is None else clock

    def prepare(self) -> None:  # noqa: B027 - most engines need no set-up
        """Do in advance whatever would slow down the first iterations; serves no requests meanwhile."""

    @abstractmethod
    def rehearsal(self, text: NDArray[np.int32]) -> Rehearsing:
        """Driver that repeats single iterations of this engine, for profiling."""

    @abstractmethod
    def memory(self) -> MemoryFigures:
        """Memory taken by weights and cache."""

    @abstractmethod
    def about(self) -> dict[str, Any]:
        """Device and software that the engine runs on; JSON-serialisable."""

    @abstractmethod
    def close(self) -> None:
        """Release the engine's resources; it cannot serve afterwards."""


def tokenizer_of(model: str, trust_remote_code: bool = False) -> Any:
    """The tokenizer of a folder, a hub id, the embedded model or a shape. Raises ModelFilesError."""
    shape = shape_named(model)
    if shape is not None:
        return shape_tokenizer(shape)
    if model == EMBEDDED:
        from engine.models.load import load_tokenizer

        return load_tokenizer()
    from engine.models.load import load_pretrained_tokenizer

    return load_pretrained_tokenizer(model, trust_remote_code=trust_remote_code)


def warm_up(engine: RealEngine, prompts: Prompts) -> None:
    """Serve the beginnings of the first prompts without candidates and with some.

    First calls compile code and touch memory for the first time, so their times do not show the engine's speed.
    """
    engine.prepare()
    for candidates in (0, min(WARMUP_CANDIDATES, engine.max_candidates)):
        submit_beginnings(engine, prompts)
        engine.run(candidates, WARMUP_BUDGET)


def submit_beginnings(engine: RealEngine, prompts: Prompts) -> None:
    """Queue the beginnings of the first prompts."""
    for i in range(min(WARMUP_REQUESTS, prompts.num_requests)):
        most = min(WARMUP_OUTPUT_TOKENS, int(prompts.max_tokens[i]))
        engine.submit(prompts.tokens[i][:WARMUP_PROMPT_TOKENS], most, prompts.sampling[i])
