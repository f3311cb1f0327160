"""Repeats one iteration of a torch engine, for profiling.

Arranging a batch computes no keys and values, because an iteration's time does not depend on them. The scheduler runs
with a substitute for the target that returns the text's next token. Tokens, batch slots, blocks and the drafter's
progress are the same as after real serving.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.real import Timing, counted
from engine.backends.torch.engine import TorchEngine
from engine.latency.design import SPARE_TOKENS, Point
from engine.speculation.sampling import most_probable


class Rehearsal:
    """Puts an idle engine into a given state and repeatedly runs the same iteration from there.

    Args:
        engine: must not serve other requests meanwhile; empty afterwards.
        text: token ids that prompts are cut from; longer than the longest prompt.
    """

    def __init__(self, engine: TorchEngine, text: NDArray[np.int32]) -> None:
        self.engine = engine
        self._text = text
        self._sources: dict[int, NDArray[np.int32]] = {}
        self._saved: list[tuple[NDArray[Any], NDArray[Any]]] = []
        self._outputs: dict[int, int] = {}
        self._unread: list[int] = []
        self._point = Point((), 0)
        self._observation = engine.new_observation()

    def arrange(self, point: Point, rng: np.random.Generator) -> None:
        """Bring the engine to the beginning of the iteration; prompts start at random places in the text."""
        engine = self.engine
        self.clear()
        self._point = point
        room = engine.limits.max_model_len
        for length in (*point.kv_tokens, *point.prompts):
            start = int(rng.integers(len(self._text) - length))
            source = self._text[start : start + length + 1]
            limit = min(point.candidates + SPARE_TOKENS, room - length)
            self._sources[engine.submit(source[:length], limit)] = source
        ready = sum(point.kv_tokens) + point.context
        if ready > 0:
            with self._known():
                engine.step(0, ready)
        decodes = range(len(point.kv_tokens))
        self._unread = list(decodes)[len(point.kv_tokens) - point.fresh :]
        read = [number for number in decodes if number not in self._unread]
        engine.table.draft_computed[engine.table.seat_of[read]] = engine.state.requests["computed"][read]
        self._outputs = {number: len(engine.output(number)) for number in self._sources}
        arrays = [
            array
            for array in (*engine.state, *engine.feed, *engine.seen, *vars(engine.table).values())
            if isinstance(array, np.ndarray)
        ]
        self._saved = [(array, array.copy()) for array in arrays]

    def run(self) -> Timing:
        """Run the arranged iteration once."""
        self._restore()
        engine = self.engine
        begin = engine.clock.now()
        engine.poll()
        engine.observe(self._observation)
        engine.step(self._point.candidates, sum(self._point.chunks))
        return Timing(engine.clock.now() - begin, engine.draft_s, engine.forward_s)

    def planned(self) -> dict[str, int]:
        """Batch of the latest iteration, as the scheduler counts it (see `engine.core.state.BATCH`)."""
        kv = self._point.kv_tokens
        return counted(self.engine.state) | {
            "candidates": self._point.candidates,
            "prefill_context": self._point.context,
            "longest_kv_tokens": max(kv, default=0),
            "unread_tokens": sum(kv[number] for number in self._unread),
        }

    def clear(self) -> None:
        """Empty the engine."""
        self.engine.reset(self.engine.clock)
        self._sources = {}

    def _restore(self) -> None:
        engine = self.engine
        for array, saved in self._saved:
            array[...] = saved
        for number, count in self._outputs.items():
            del engine._generations[number].output[count:]
        for number in self._unread:
            engine.drafter.forget(number)

    @contextmanager
    def _known(self) -> Iterator[None]:
        """Context in which the target does not run and the next token is that of the text."""

        def forward(table: Any, seats: Any, starts: Any, counts: Any, keep: Any, *_: Any, **__: Any) -> torch.Tensor:
            ends, numbers = (starts + counts)[keep > 0], table.owner[seats[keep > 0]]
            following = [int(self._sources[number][end]) for number, end in zip(numbers.tolist(), ends, strict=True)]
            logits = torch.zeros(len(following), self.engine.model.vocab_size, device=self.engine.model.device)
            logits[torch.arange(len(following)), following] = 1.0
            return logits

        def top(logits: torch.Tensor, *_: Any) -> NDArray[np.int64]:
            return most_probable(logits)[:, None]

        model = self.engine.model
        with _replaced(model, "forward", forward), _replaced(model, "top", top):
            yield


@contextmanager
def _replaced(owner: Any, method: str, by: Callable[..., Any]) -> Iterator[None]:
    setattr(owner, method, by)
    try:
        yield
    finally:
        delattr(owner, method)
