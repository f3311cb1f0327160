"""Repeats one kind of vLLM iteration, for profiling.

vLLM computes the arranged batch for real, and its results stay: decoding requests continue from one run to the next, a
few tokens longer each time. Prompts are new ones of the same lengths.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.real import Timing, counted
from engine.backends.vllm.engine import VllmEngine
from engine.core.state import DECODING
from engine.latency.design import Point

MOST_STEPS = 14
"""Steps for which a point's requests have candidates and tokens left after their prompts."""


class VllmRehearsal:
    """Puts an idle engine into a given state and repeatedly runs the same kind of iteration from there.

    A point's `fresh` has no meaning here: vLLM's drafter reads a prompt while the target does.

    Args:
        engine: must not serve other requests meanwhile; empty afterwards.
        text: token ids that prompts are cut from; longer than the longest prompt.
    """

    def __init__(self, engine: VllmEngine, text: NDArray[np.int32]) -> None:
        self.engine = engine
        self._text = text
        self._point = Point((), 0)
        self._rng = np.random.default_rng(0)
        self._prompts: list[int] = []
        self._longest = 0
        self._observation = engine.new_observation()

    def arrange(self, point: Point, rng: np.random.Generator) -> None:
        """Bring the engine to the beginning of the iteration; prompts start at random places in the text."""
        engine = self.engine
        self.clear()
        self._point, self._rng = point, rng
        # While the last prompts are read, the first requests grow by one token a step.
        reading = -(-sum(point.kv_tokens) // engine.most_prompt_tokens) + 1
        emitted = MOST_STEPS * (1 + point.candidates) + reading
        room = engine.limits.max_model_len - emitted
        for length in point.kv_tokens:
            # A request nearly as long as the context is shortened, so that it does not end early.
            self._submit(min(length, room), emitted)
        while engine.poll() and (engine.state.requests["phase"][: len(point.kv_tokens)] != DECODING).any():
            engine.step(0, engine.most_prompt_tokens)
        if point.kv_tokens:
            # The candidates of the first run are drafted here.
            engine.step(point.candidates, 1)

    def run(self) -> Timing:
        """Run an iteration of the arranged kind."""
        engine, point = self.engine, self._point
        for number in self._prompts:
            engine.cancel(number)
        self._prompts = []
        lengths = point.prompts
        if point.context > 0:
            self._prompts.append(self._submit(lengths[0], 1))
            engine.step(point.candidates, point.context)
            lengths = lengths[1:]
        self._prompts += [self._submit(length, 1) for length in lengths]
        engine.poll()
        decoding = engine.state.requests[: len(point.kv_tokens)]
        self._longest = int(decoding["computed"].max(initial=0))
        begin = engine.clock.now()
        with self._timed("propose_draft_token_ids") as draft, self._timed("execute_model", "sample_tokens") as model:
            engine.poll()
            engine.observe(self._observation)
            engine.step(point.candidates, sum(point.chunks))
        return Timing(engine.clock.now() - begin, draft[0], model[0] - draft[0])

    def planned(self) -> dict[str, int]:
        """Batch of the latest iteration, as the request table counts it (see `engine.core.state.BATCH`)."""
        return counted(self.engine.state) | {
            "candidates": self._point.candidates,
            "prefill_context": self._point.context,
            "longest_kv_tokens": self._longest,
            "unread_tokens": 0,
        }

    def clear(self) -> None:
        """Empty the engine."""
        self.engine.reset(self.engine.clock)
        self._prompts = []

    def _submit(self, length: int, max_tokens: int) -> int:
        start = int(self._rng.integers(len(self._text) - length))
        return self.engine.submit(self._text[start : start + length], max_tokens)

    @contextmanager
    def _timed(self, *methods: str) -> Iterator[list[float]]:
        """Context in which calls of the model runner's methods are timed."""
        runner = self.engine.runner
        spent = [0.0]

        def timing(own: Any) -> Any:
            def call(*args: Any, **options: Any) -> Any:
                begin = time.perf_counter()
                result = own(*args, **options)
                spent[0] += time.perf_counter() - begin
                return result

            return call

        for method in methods:
            setattr(runner, method, timing(getattr(runner, method)))
        try:
            yield spent
        finally:
            for method in methods:
                delattr(runner, method)
