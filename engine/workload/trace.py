"""Request traces: reading the formats of `engine.workload.formats`, windows and scales."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.workload import formats
from engine.workload.formats import TimeUnit, TraceFormat
from engine.workload.records import Convert, numbers, read_columns
from engine.workload.workload import WorkloadError

log = logging.getLogger(__name__)

RateMode = Literal["stretch", "thin"]
TooLong = Literal["error", "clip", "drop"]
ZeroOutput = Literal["error", "drop"]

_MAX_TOKENS = 1 << 24
"""Tokens that a prompt or an output of a trace may have: no model has a longer context."""
_TICK_TOLERANCE = 0.02


@dataclass(frozen=True)
class Trace:
    """Requests of a trace file in file order: seconds, tokens, and each one's row (1 = the first after a header)."""

    path: Path
    arrival: NDArray[np.float64]
    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]
    row: NDArray[np.int64]

    def keep(self, mask: NDArray[Any]) -> Trace:
        """The requests picked by a boolean mask or an index array."""
        return replace(
            self,
            arrival=self.arrival[mask],
            prompt_tokens=self.prompt_tokens[mask],
            output_tokens=self.output_tokens[mask],
            row=self.row[mask],
        )


def read_trace(
    path: str | Path,
    zero_output: ZeroOutput = "error",
    time_unit: TimeUnit | None = None,
    spread_ticks: bool | None = None,
) -> Trace:
    """Read a trace file (CSV, JSON lines or a JSON list, each also gzipped) and log what was read.

    The format follows from the columns (`engine.workload.formats`); others are ignored. `time_unit` is the unit of
    the times, where it differs from the format's. Requests that generated nothing are an error that names the row;
    `zero_output="drop"` leaves them out, and a format that logs failed requests as 0 tokens always does.
    `spread_ticks`: True spreads arrivals logged by a coarse clock over its ticks; None: only where the format is known
    for such a clock and the arrivals show it.

    Raises:
        WorkloadError: naming file and row.
    """
    file = Path(path)
    if not file.is_file():
        raise WorkloadError(f"{file}: no such trace file; set workload.path to a file. Accepted: {formats.ACCEPTED}")
    form, columns, rows = _read(file, formats.format_of)
    raw, prompt, output = (columns[column] for column in form.columns)
    arrival, unit = formats.seconds(file, form, raw, rows, time_unit)
    back = np.flatnonzero(np.diff(arrival) < 0)
    if back.size:
        raise WorkloadError(
            f"{file}, row {rows[back[0] + 1]}: arrives {arrival[back[0]] - arrival[back[0] + 1]:g} s before the row "
            "above it; sort the file by arrival"
        )
    remarks = [f"times are {unit}"]
    kept = np.ones(rows.size, dtype=bool)
    if form.failures:
        kept = (prompt != 0) & (output != 0)
        remarks += [f"{rows.size - kept.sum():,} failed requests (0 tokens) left out"]
    _check_tokens(file, form.prompt, prompt[kept], rows[kept], least=1)
    _check_tokens(file, form.output, output[kept], rows[kept], least=0)
    silent = kept & (output == 0)
    if silent.any() and zero_output == "error":
        raise WorkloadError(
            f"{file}, row {rows[silent][0]}: 0 output tokens ({int(silent.sum())} such rows); a request must "
            "generate at least one token. Set workload.zero_output=drop to leave these requests out"
        )
    tick = _tick(form, arrival, spread_ticks)
    if tick is not None:
        arrival = spread(arrival, tick)
        remarks += [f"arrivals spread over their ticks of {tick:g} s (workload.spread_ticks=false leaves them)"]
    kept &= ~silent
    if not kept.any():
        raise WorkloadError(f"{file}: the trace has no requests that generated a token")
    trace = Trace(file, arrival, prompt.astype(np.int64), output.astype(np.int64), rows).keep(kept)
    _log(trace, form, remarks)
    return trace


def read_lengths(path: Path) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Prompt and output tokens (R,) of a trace, or of a file with its columns of lengths only.

    Requests without a token of either kind are left out. Raises WorkloadError naming file and row.
    """
    form, columns, rows = _read(path, formats.lengths_of, times=False)
    prompt, output = columns[form.prompt], columns[form.output]
    kept = (prompt != 0) & (output != 0)
    for column, tokens in ((form.prompt, prompt), (form.output, output)):
        _check_tokens(path, column, tokens[kept], rows[kept], least=1)
    if not kept.any():
        raise WorkloadError(f"{path}: the file has no request with a token")
    log.info(
        "%s: lengths of %s requests, on average %.1f prompt and %.1f output tokens; %s without tokens left out",
        path,
        f"{kept.sum():,}",
        prompt[kept].mean(),
        output[kept].mean(),
        f"{rows.size - kept.sum():,}",
    )
    return prompt[kept].astype(np.int64), output[kept].astype(np.int64)


def _read(
    path: Path, recognise: Callable[[Path, list[str]], TraceFormat], times: bool = True
) -> tuple[TraceFormat, dict[str, NDArray[Any]], NDArray[np.int64]]:
    found: list[TraceFormat] = []

    def pick(keys: list[str]) -> dict[str, Convert]:
        form = recognise(path, keys)
        found.append(form)
        wanted: dict[str, Convert] = {form.prompt: numbers, form.output: numbers}
        return {form.time: formats.times_of(form)} | wanted if times else wanted

    columns, rows = read_columns(path, pick)
    return found[0], columns, rows


def _check_tokens(path: Path, column: str, tokens: NDArray[np.float64], rows: NDArray[np.int64], least: int) -> None:
    wrong = np.flatnonzero(~((tokens >= least) & (tokens <= _MAX_TOKENS) & (tokens == np.floor(tokens))))
    if wrong.size:
        raise WorkloadError(
            f"{path}, row {rows[wrong[0]]}: {column} = {tokens[wrong[0]]:g} must be a whole number from 1 to "
            f"{_MAX_TOKENS}"
        )


def _log(trace: Trace, form: TraceFormat, remarks: list[str]) -> None:
    count, duration = trace.row.size, float(np.ptp(trace.arrival))
    rate = f"{(count - 1) / duration:.3g} requests/s" if duration > 0 else "all at once"
    log.info(
        "%s: %s format, %s requests over %s s (%s), on average %s prompt and %s output tokens; %s",
        trace.path,
        form.name,
        f"{count:,}",
        f"{duration:,.6g}",
        rate,
        f"{trace.prompt_tokens.mean():,.1f}",
        f"{trace.output_tokens.mean():,.1f}",
        "; ".join(remarks),
    )


def _tick(form: TraceFormat, arrival: NDArray[np.float64], asked: bool | None) -> float | None:
    """Tick of the clock that logged these arrivals, if they are to be spread; else None.

    Asked for, the format's tick, or the median gap between distinct times. Not asked: the format's tick where the gaps
    are multiples of it within 2 %, at least half of them one tick. Without `hash_ids`, which published traces have,
    exact multiples may be deliberate bursts, which are kept.
    """
    if asked is False or arrival.size < 2:
        return None
    gaps = np.diff(np.unique(arrival))
    if asked:
        return form.tick_s or (float(np.median(gaps)) if gaps.size else None)
    if form.tick_s is None or not gaps.size or gaps.size + 1 == arrival.size:
        return None
    ticks = np.rint(gaps / form.tick_s)
    off = np.abs(gaps - ticks * form.tick_s)
    regular = (off <= _TICK_TOLERANCE * form.tick_s).mean() >= 0.95 and (ticks == 1).mean() >= 0.5
    published = bool(form.also) or (off > 1e-6).any()
    return form.tick_s if regular and published else None


def spread(arrival: NDArray[np.float64], tick: float) -> NDArray[np.float64]:
    """Place each time's arrivals uniformly at random within the tick that it begins, always in the same way.

    A clock with ticks logs requests in simultaneous bunches; given their number, a Poisson stream is uniform. No
    arrival passes the next time, so a tick that came early is shorter.
    """
    distinct, index = np.unique(arrival, return_inverse=True)
    length = np.minimum(tick, np.append(np.diff(distinct), tick))
    return np.sort(arrival + length[index] * np.random.default_rng(0).random(arrival.size))


def prepare_trace(
    trace: Trace,
    *,
    start_s: float = 0.0,
    duration_s: float | None = None,
    rate_scale: float = 1.0,
    rate_mode: RateMode = "stretch",
    max_requests: int | None = None,
    too_long: TooLong = "error",
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    max_total_tokens: int | None = None,
    thin_seed: int = 0,
) -> Trace:
    """Cut a window out of a trace, scale its request rate and bound its lengths; the first arrival becomes 0.

    `start_s` and `duration_s` count from the first request of the file, before scaling. `stretch` divides every
    arrival by `rate_scale` (0.5: the same requests at half the rate, over twice the time); `thin` keeps each request
    with probability `rate_scale`, the same ones for the same `thin_seed`, and those kept at a lower scale are among
    those kept at a higher one. Lengths over a maximum are refused, clipped (the output first, then the prompt) or
    dropped, as `too_long` says. `max_requests` counts the remaining requests.

    Raises `WorkloadError` naming the file, the row or the setting.
    """
    if not (math.isfinite(rate_scale) and rate_scale > 0):
        raise WorkloadError(f"workload.rate_scale={rate_scale} must be a positive number")
    trace = replace(trace, arrival=trace.arrival - trace.arrival[0])
    inside = trace.arrival >= start_s
    if duration_s is not None:
        inside &= trace.arrival < start_s + duration_s
    if not inside.any():
        raise WorkloadError(
            f"{trace.path}: no request in the window workload.start_s={start_s:g}, workload.duration_s={duration_s}; "
            f"the trace runs from 0 to {trace.arrival[-1]:g} s"
        )
    trace = trace.keep(inside)
    if rate_mode == "thin":
        trace = _thin(trace, rate_scale, thin_seed)
    else:
        trace = replace(trace, arrival=trace.arrival / rate_scale)
    trace = _bound_lengths(trace, too_long, max_prompt_tokens, max_output_tokens, max_total_tokens)
    if trace.row.size == 0:
        raise WorkloadError(f"{trace.path}: no request is left after thinning and dropping long ones")
    if max_requests is not None:
        trace = trace.keep(np.arange(min(max_requests, trace.row.size)))
    return replace(trace, arrival=trace.arrival - trace.arrival[0])


def _thin(trace: Trace, rate_scale: float, seed: int) -> Trace:
    if rate_scale > 1.0:
        raise WorkloadError(
            f"workload.rate_scale={rate_scale:g} with workload.rate_mode=thin: thinning can only remove requests; "
            "set workload.rate_mode=stretch to compress time instead"
        )
    # Drawn per file row and not per request left, so that a window keeps the same requests as the whole trace.
    luck = np.random.default_rng(seed).random(int(trace.row.max()) + 1)
    return trace.keep(luck[trace.row] < rate_scale)


def _bound_lengths(
    trace: Trace, too_long: TooLong, max_prompt: int | None, max_output: int | None, max_total: int | None
) -> Trace:
    prompt, output = trace.prompt_tokens, trace.output_tokens
    largest = np.iinfo(np.int64).max
    limits = {
        "max_prompt_tokens": (prompt, largest if max_prompt is None else max_prompt),
        "max_output_tokens": (output, largest if max_output is None else max_output),
        "max_total_tokens": (prompt + output, largest if max_total is None else max_total),
    }
    over = {name: tokens > limit for name, (tokens, limit) in limits.items()}
    if too_long == "drop":
        return trace.keep(~np.logical_or.reduce(list(over.values())))
    if too_long == "clip":
        output = np.minimum(output, largest if max_output is None else max_output)
        prompt = np.minimum(prompt, largest if max_prompt is None else max_prompt)
        if max_total is not None:
            output = np.minimum(output, max_total - 1)
            prompt = np.minimum(prompt, max_total - output)
        return replace(trace, prompt_tokens=prompt, output_tokens=output)
    for name, rows in over.items():
        if rows.any():
            first = int(np.flatnonzero(rows)[0])
            tokens, limit = limits[name]
            raise WorkloadError(
                f"{trace.path}, row {trace.row[first]}: {tokens[first]} tokens exceed workload.{name}={limit} "
                f"({int(rows.sum())} such rows); set workload.too_long=clip or workload.too_long=drop"
            )
    return trace
