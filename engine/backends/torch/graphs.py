"""CUDA graphs of forwards, captured when their shape is first met and replayed from then on."""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import TypeVar

import torch

log = logging.getLogger(__name__)

Result = TypeVar("Result")


class Graphs:
    """Runs functions on a GPU; a function that is run again under the same key is replayed.

    A function reads its inputs from tensors that stay where they are, and returns tensors that the next run may
    overwrite. All graphs share one pool of memory. Without a GPU, and after a capture has failed, functions are called.
    """

    def __init__(self, device: torch.device) -> None:
        self.enabled = device.type == "cuda"
        self._device = device
        self._known: dict[Hashable, tuple[torch.cuda.CUDAGraph, object]] = {}
        self._pool = torch.cuda.graph_pool_handle() if self.enabled else None

    def __len__(self) -> int:
        return len(self._known)

    def run(self, key: Hashable, function: Callable[[], Result]) -> Result:
        """Run `function` and return its result, whose work may still be in progress on the device."""
        if not self.enabled:
            return function()
        if key not in self._known:
            try:
                self._known[key] = self._capture(function)
            except RuntimeError as problem:
                self.enabled = False
                log.warning("no CUDA graph could be captured (%s): forwards are launched kernel by kernel", problem)
                return function()
        graph, result = self._known[key]
        graph.replay()
        return result  # type: ignore[return-value]

    def forget(self) -> None:
        """Drop all graphs, because the tensors they read have moved."""
        self._known.clear()

    def _capture(self, function: Callable[[], Result]) -> tuple[torch.cuda.CUDAGraph, Result]:
        # Kernels compile, and libraries allocate, in the calls before: neither may happen during a capture.
        current, aside = torch.cuda.current_stream(self._device), torch.cuda.Stream(self._device)
        aside.wait_stream(current)
        with torch.cuda.stream(aside):
            for _ in range(2):
                function()
        current.wait_stream(aside)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._pool):
            result = function()
        return graph, result
