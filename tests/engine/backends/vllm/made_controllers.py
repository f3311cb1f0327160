"""Controllers that do as a test says."""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping
from typing import Any

from engine.plant import Plant

FREE = threading.Event()
"""What a controller that hangs waits for."""


class Scripted:
    """Plays pairs (c, n) over and over, and keeps what it saw."""

    def __init__(self, actions: list[Any]) -> None:
        self.actions = actions

    def reset(self, plant: Plant) -> None:
        """Begin with the first pair."""
        self.plant = plant
        self.seen: list[Mapping[str, Any]] = []

    def choose(self, observation: Mapping[str, Any]) -> Any:
        """The next pair."""
        self.seen.append(observation)
        return self.actions[(len(self.seen) - 1) % len(self.actions)]

    def label(self) -> str:
        """Its name."""
        return "scripted"


class Faulty(Scripted):
    """Decides well at first (vLLM's start asks once) and every `good_every`-th time; else raises, sleeps for a second,
    hangs, or answers `nonsense`."""

    def __init__(self, fault: str, good_every: int, nonsense: Any = None) -> None:
        super().__init__([(1, 64)])
        self.fault, self.good_every, self.nonsense = fault, good_every, nonsense
        self.decisions = 0

    def choose(self, observation: Mapping[str, Any]) -> Any:
        """A decision or a fault."""
        answer = super().choose(observation)
        self.decisions += 1
        if self.decisions % self.good_every == 0 or self.decisions == 1:
            return answer
        if self.fault == "raises":
            raise RuntimeError("no idea")
        if self.fault == "sleeps":
            time.sleep(1.0)
        if self.fault == "hangs":
            FREE.wait()
        return self.nonsense
