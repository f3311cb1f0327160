"""The device under the benchmarks: its clock, what it can do at most, and how often the host waits for it."""

from __future__ import annotations

import platform
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from engine.backends.clocks import clocks_of

REPEATS = 20
SYNC_WARNING = "synchronizing CUDA operation"
"""What torch's warning of a synchronising call says."""


@dataclass(frozen=True)
class Peaks:
    """What the device was measured to do: bytes/s of a copy, read and written bytes both counted, and FLOP/s."""

    copy_bytes_per_s: float
    matmul_flop_per_s: float
    matmul_dtype: str


@dataclass
class Syncs:
    """How often the host waited for the device; None where that cannot be told (no CUDA)."""

    count: int | None = None


def seconds(work: Callable[[], object], device: torch.device, repeats: int = REPEATS, warmup: int = 3) -> float:
    """Median seconds of `work` on the device's clock: CUDA events around it, or this process's clock on a CPU."""
    for _ in range(warmup):
        work()
    if device.type != "cuda":
        return statistics.median(_timed(work) for _ in range(repeats))
    pairs = [(torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)) for _ in range(repeats)]
    for begin, end in pairs:
        begin.record()
        work()
        end.record()
    torch.cuda.synchronize(device)
    return statistics.median(1e-3 * begin.elapsed_time(end) for begin, end in pairs)


def _timed(work: Callable[[], object]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def measured_peaks(device: torch.device, copy_bytes: int, matmul_size: int, dtype: torch.dtype) -> Peaks:
    """A copy of random data within the device's memory, and a square product of random matrices.

    Random, because constant data draw less power and so run at clocks that no real work reaches.

    Args:
        device: measured.
        copy_bytes: copied, half of what is then counted.
        matmul_size: rows and columns.
        dtype: of the product.
    """
    copied = _copy_seconds(device, copy_bytes // 4)
    multiplied = _matmul_seconds(device, matmul_size, dtype)
    return Peaks(
        copy_bytes_per_s=2 * (copy_bytes // 4 * 4) / copied,
        matmul_flop_per_s=2 * matmul_size**3 / multiplied,
        matmul_dtype=str(dtype).removeprefix("torch."),
    )


def _copy_seconds(device: torch.device, floats: int) -> float:
    source = torch.randn(floats, device=device)
    target = torch.empty_like(source)
    return seconds(lambda: target.copy_(source), device)


def _matmul_seconds(device: torch.device, size: int, dtype: torch.dtype) -> float:
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    out = torch.empty_like(left)
    return seconds(lambda: torch.matmul(left, right, out=out), device)


@contextmanager
def counted_syncs(device: torch.device) -> Iterator[Syncs]:
    """Within, the host's waits for the device are counted; the count stands when the block is left.

    torch warns of what synchronises implicitly (`.item()`, a copy to pageable memory, a stream's `synchronize`); waits
    for an event or for the whole device are not among these, and are counted where they are called.
    """
    found = Syncs()
    if device.type != "cuda":
        yield found
        return
    explicit = [0]
    usual = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with _counted(torch.cuda.Event, "synchronize", explicit), _counted(torch.cuda, "synchronize", explicit):
                yield found
        finally:
            torch.cuda.set_sync_debug_mode(usual)
    found.count = explicit[0] + sum(SYNC_WARNING in str(one.message) for one in caught)


@contextmanager
def _counted(owner: Any, name: str, calls: list[int]) -> Iterator[None]:
    own = getattr(owner, name)

    def call(*args: Any, **options: Any) -> Any:
        calls[0] += 1
        return own(*args, **options)

    setattr(owner, name, call)
    try:
        yield
    finally:
        setattr(owner, name, own)


def about(device: torch.device) -> dict[str, Any]:
    """What was measured on: device, software, and on CUDA driver, clocks, power and temperature as they are now."""
    found: dict[str, Any] = {"device": str(device), "torch": torch.__version__, "python": platform.python_version()}
    if device.type != "cuda":
        return found | {"name": platform.processor() or platform.machine(), "torch_threads": torch.get_num_threads()}
    properties = torch.cuda.get_device_properties(device)
    found |= {
        "name": properties.name,
        "memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
    }
    clocks = clocks_of(str(device))
    return found if clocks is None else found | clocks.about() | clocks.read()
