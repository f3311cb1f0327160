"""Medians of repeated measurements, printed with the machine's load. Nothing here fails on a time."""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable

RUNS = 7


def median_seconds(work: Callable[[], object], runs: int = RUNS) -> float:
    """Median CPU seconds that `work` takes, after one unmeasured run: what a core does, however busy the others are."""

    def timed() -> float:
        begin = time.process_time()
        work()
        return time.process_time() - begin

    return median_reported(timed, runs)


def median_reported(work: Callable[[], float], runs: int = RUNS) -> float:
    """Median of the seconds that `work` says the part that counts took, after one unmeasured run."""
    work()
    return statistics.median(work() for _ in range(runs))


def title(text: str) -> None:
    """Print a heading with the load average: a busy machine shares its caches."""
    load = " ".join(f"{value:.2f}" for value in os.getloadavg())
    print(f"\n{text}  [{os.cpu_count()} cores, load average {load}]")


def rate(name: str, per_second: float, target: float | None = None) -> None:
    """Print a rate per CPU second and how many times its target it is."""
    _line(name, f"{per_second:,.0f} /s", "" if target is None else f"{per_second / target:.2f}x of {target:,.0f} /s")


def duration(name: str, seconds: float, limit_s: float | None = None) -> None:
    """Print a duration and which share of its limit it is."""
    shown = f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e6:.2f} us"
    limit = "" if limit_s is None else f"{seconds / limit_s:.2f} of {limit_s:g} s"
    _line(name, shown, limit)


def _line(name: str, value: str, comparison: str) -> None:
    print(f"  {name:<58}{value:>18}   {comparison}")
