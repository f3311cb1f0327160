"""Formats of published request traces: identifying columns and time units.

docs/workloads.md has the table for readers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.workload.records import Convert, is_number, numbers, shown
from engine.workload.workload import WorkloadError

TimeUnit = Literal["s", "ms", "us", "ns"]

_PER_SECOND: dict[TimeUnit, float] = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
_NAMES: dict[TimeUnit, str] = {"s": "seconds", "ms": "milliseconds", "us": "microseconds", "ns": "nanoseconds"}
_EPOCH = (1e9, 1e10)
"""Seconds since 1970 from 2001 to 2286: ten digits."""
_USUAL_RATE = (0.01, 100.0)
"""Plausible requests/s of a trace whose unit is inferred from its rate."""
_CENTURY_S = 100 * 365.25 * 86400


@dataclass(frozen=True)
class TraceFormat:
    """A format of trace: `time`, `prompt` and `output` name its columns.

    Args:
        unit: of the times; None: dates, or a unit to be inferred from the numbers.
        also: other columns, any of which distinguishes this format from one with the same three.
        tick_s: resolution in s of a coarse clock that logged the arrivals; None: no such clock.
        failures: rows with 0 tokens are failed requests.
    """

    name: str
    time: str
    prompt: str
    output: str
    unit: TimeUnit | None = "s"
    also: tuple[str, ...] = ()
    tick_s: float | None = None
    failures: bool = False

    @property
    def columns(self) -> tuple[str, str, str]:
        """Time, prompt tokens, output tokens."""
        return self.time, self.prompt, self.output

    def matches(self, keys: Sequence[str]) -> bool:
        """Return True if a file with these columns has this format."""
        return set(self.columns) <= set(keys) and (not self.also or any(key in keys for key in self.also))


_LENGTHS = ("input_length", "output_length")
FORMATS = (
    TraceFormat("Governor's", "arrival_s", "prompt_tokens", "output_tokens"),
    TraceFormat("Azure's", "TIMESTAMP", "ContextTokens", "GeneratedTokens", unit=None),
    TraceFormat("Bailian's", "timestamp", *_LENGTHS, also=("chat_id", "parent_chat_id", "turn")),
    TraceFormat("Mooncake's", "timestamp", *_LENGTHS, unit="ms", also=("hash_ids",), tick_s=3.0),
    TraceFormat("timestamp, input_length, output_length", "timestamp", *_LENGTHS, unit=None, tick_s=3.0),
    TraceFormat("BurstGPT's", "Timestamp", "Request tokens", "Response tokens", failures=True),
    TraceFormat("Vidur's", "arrived_at", "num_prefill_tokens", "num_decode_tokens"),
    TraceFormat("SplitwiseSim's", "arrival_timestamp", "prompt_size", "token_size"),
)
ACCEPTED = (
    f"{','.join(FORMATS[0].columns)}, or the columns of Azure's, Bailian's, Mooncake's, BurstGPT's, Vidur's or "
    "SplitwiseSim's traces, as CSV or JSONL (docs/workloads.md)"
)


def format_of(path: Path, keys: list[str]) -> TraceFormat:
    """The format of a file with these columns. Raises WorkloadError naming the nearest format's missing columns."""
    form = next((form for form in FORMATS if form.matches(keys)), None)
    if form is not None:
        return form
    nearest = max(FORMATS, key=lambda form: sum(column in keys for column in form.columns))
    missing = [column for column in nearest.columns if column not in keys]
    hint = f"Accepted: {ACCEPTED}"
    if "prompt" in keys or "conversations" in keys:
        hint = f"This looks like text of requests: an engine that runs a model takes it as workload=prompts. {hint}"
    elif missing == [nearest.time]:
        hint = (
            "A file of lengths without times gives the lengths of a synthetic workload: workload=synthetic "
            f"workload/lengths=file workload.lengths.path={path}"
        )
    raise WorkloadError(
        f"{path}: no column {', '.join(missing)}; found {', '.join(map(str, keys))[:200] or 'none'}. {hint}"
    )


def lengths_of(path: Path, keys: list[str]) -> TraceFormat:
    """The format whose lengths a file with these columns has, with times or without."""
    form = next((form for form in FORMATS if {form.prompt, form.output} <= set(keys)), None)
    return form if form is not None else format_of(path, keys)


def times(path: Path, column: str, values: Sequence[Any], rows: Sequence[int]) -> NDArray[Any]:
    """Numbers as they are, or ISO 8601 dates with or without a UTC offset, as datetime64[ns]."""
    if not isinstance(values[0], str) or is_number(values[0]):
        return numbers(path, column, values, rows)
    import pandas as pd

    wrong = next((i for i, value in enumerate(values) if not isinstance(value, str) or is_number(value)), None)
    if wrong is None:
        stamps = pd.to_datetime(pd.Series(values), format="ISO8601", utc=True, errors="coerce")
        missing = np.flatnonzero(stamps.isna())
        if not missing.size:
            return stamps.dt.tz_localize(None).to_numpy().astype("datetime64[ns]")
        wrong = int(missing[0])
    raise WorkloadError(
        f"{path}, row {rows[wrong]}: {column} = {shown(values[wrong])} is not a time like 2023-11-16 18:15:46.6805900"
    )


def times_of(form: TraceFormat) -> Convert:
    """Converter of a format's times; it refuses dates where the format has none."""
    return times if form.unit is None else numbers


def seconds(
    path: Path, form: TraceFormat, raw: NDArray[Any], rows: NDArray[np.int64], unit: TimeUnit | None
) -> tuple[NDArray[np.float64], str]:
    """Seconds, from the first time of the file if they are dates, and the name of the unit that was read.

    Raises:
        WorkloadError: a negative time, or an ambiguous unit.
    """
    if raw.dtype.kind == "M":
        if unit is not None:
            raise WorkloadError(f"{path}: {form.time} holds dates; leave workload.time_unit unset")
        arrival = (raw - raw[0]) / np.timedelta64(1, "s")
        called = "dates"
    else:
        negative = np.flatnonzero(raw < 0)
        if negative.size:
            raise WorkloadError(f"{path}, row {rows[negative[0]]}: {form.time} = {raw[negative[0]]:g} is negative")
        counted = unit or _unit_of(path, form, raw)
        since_1970 = raw[0] / _PER_SECOND[counted] >= _EPOCH[0]
        arrival = (raw - raw[0] if since_1970 else raw) / _PER_SECOND[counted]
        called = _NAMES[counted]
    if np.ptp(arrival) > _CENTURY_S:
        raise WorkloadError(
            f"{path}: {form.time} read as {called} spans {np.ptp(arrival):g} s, more than a century; "
            "set workload.time_unit to what it counts"
        )
    return arrival, called


def _unit_of(path: Path, form: TraceFormat, raw: NDArray[np.float64]) -> TimeUnit:
    """The format's unit; else inferred from the size of numbers that count from 1970, or from the implied rate.

    Milliseconds are logged as whole numbers: times with fractions, or at unusual rates, are not read as milliseconds.
    """
    if form.unit == "s":
        return form.unit
    for unit, per_second in _PER_SECOND.items():
        if _EPOCH[0] <= raw[0] / per_second < _EPOCH[1]:
            return unit
    whole, span = bool((raw == np.floor(raw)).all()), float(np.ptp(raw))
    if span == 0.0:
        return form.unit or "s"
    units: tuple[TimeUnit, ...] = ("s", "ms")
    rate = {unit: (raw.size - 1) / span * _PER_SECOND[unit] for unit in units}
    likely = [unit for unit, one in rate.items() if _USUAL_RATE[0] <= one < _USUAL_RATE[1]]
    if form.unit == "ms" and whole:
        likely = ["ms"] if rate["ms"] < _USUAL_RATE[1] else []
    elif len(likely) > 1 and not whole:
        likely = ["s"]
    if len(likely) != 1:
        begin = ", ".join(f"{value:g}" for value in raw[:4])
        raise WorkloadError(
            f"{path}: {form.time} = {begin}{', ...' if raw.size > 4 else ''} may count seconds ({rate['s']:.3g} "
            f"requests/s) or milliseconds ({rate['ms']:.3g} requests/s); set workload.time_unit=s or "
            "workload.time_unit=ms"
        )
    return likely[0]
