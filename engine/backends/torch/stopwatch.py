"""Durations of parts of an iteration, on the host or on an asynchronous GPU."""

from __future__ import annotations

import time
from types import TracebackType

import torch


class Stopwatch:
    """Context manager that times a block of code; on CUDA it times the device's work and not only the launches.

    `seconds` may be read once the device has done that work; reading it does not wait.
    """

    def __init__(self, device: torch.device) -> None:
        self._events: tuple[torch.cuda.Event, torch.cuda.Event] | None = None
        if device.type == "cuda":
            self._events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._begin = self._seconds = 0.0
        self._ran = False

    def __enter__(self) -> None:
        self._ran = True
        if self._events is not None:
            self._events[0].record()
        self._begin = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, problem: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._seconds = time.perf_counter() - self._begin
        if self._events is not None:
            self._events[1].record()

    def reset(self) -> None:
        """Back to 0 s."""
        self._seconds, self._ran = 0.0, False

    @property
    def seconds(self) -> float:
        """Duration of the latest block since `reset`."""
        if self._events is not None and self._ran:
            return 1e-3 * self._events[0].elapsed_time(self._events[1])
        return self._seconds
