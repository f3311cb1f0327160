"""Read request traces: plain CSV, Azure's LLM inference traces and Mooncake's JSONL."""

from __future__ import annotations

import csv
import gzip
import io
import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any, Literal

import numpy as np
from numpy.typing import NDArray

from engine.workload.workload import WorkloadError

RateMode = Literal["stretch", "thin"]
TooLong = Literal["error", "clip", "drop"]
ZeroOutput = Literal["error", "drop"]

_SECONDS = ("arrival_s", "prompt_tokens", "output_tokens")
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")
_MOONCAKE = ("timestamp", "input_length", "output_length")
_ACCEPTED = f"CSV with {','.join(_SECONDS)} or Azure's {','.join(_AZURE)}; JSONL with Mooncake's {', '.join(_MOONCAKE)}"
_MAX_TOKENS = np.iinfo(np.int32).max


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


def read_trace(path: str | Path, zero_output: ZeroOutput = "error") -> Trace:
    """Read a trace file; the format follows from the name (.csv, .jsonl, each also .gz) and the columns.

    Extra columns are ignored. Requests that generated nothing (some traces log cancelled ones) are an error that names
    the row; `zero_output="drop"` leaves them out instead. Raises `WorkloadError` naming file and row.
    """
    file = Path(path)
    if not file.is_file():
        raise WorkloadError(f"{file}: no such trace file; set workload.path to a file ({_ACCEPTED})")
    name = file.name.removesuffix(".gz")
    readers: dict[str, Callable[[Path], Trace]] = {".csv": _read_csv, ".jsonl": _read_jsonl}
    reader = readers.get(Path(name).suffix.lower())
    if reader is None:
        raise WorkloadError(f"{file}: unknown kind of trace; accepted are .csv, .csv.gz, .jsonl and .jsonl.gz")
    try:
        trace = reader(file)
    except (UnicodeDecodeError, OSError, EOFError, csv.Error) as error:
        raise WorkloadError(f"{file}: cannot be read as {name.rsplit('.', 1)[1].upper()}: {error}") from error
    if trace.row.size == 0:
        raise WorkloadError(f"{file}: the trace has no requests")
    back = np.flatnonzero(np.diff(trace.arrival) < 0)
    if back.size:
        raise WorkloadError(
            f"{file}, row {trace.row[back[0] + 1]}: arrives {trace.arrival[back[0]] - trace.arrival[back[0] + 1]:g} s "
            "before the row above it; sort the file by arrival"
        )
    silent = trace.output_tokens == 0
    if silent.any() and zero_output == "error":
        raise WorkloadError(
            f"{file}, row {trace.row[silent][0]}: 0 output tokens ({int(silent.sum())} such rows); a request must "
            "generate at least one token. Set workload.zero_output=drop to leave these requests out"
        )
    return trace.keep(~silent)


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
    dropped, as `too_long` says. `max_requests` counts what is left.

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
    # Drawn per file row and not per request left, so that a window keeps what the whole trace would keep.
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


def _open(path: Path) -> IO[str]:
    if path.name.endswith(".gz"):
        return io.TextIOWrapper(gzip.open(path, "rb"), encoding="utf-8-sig", newline="")
    return path.open(encoding="utf-8-sig", newline="")


def _read_csv(path: Path) -> Trace:
    with _open(path) as file:
        rows = csv.reader(file)
        header = [column.strip() for column in next(rows, [])]
        body = list(rows)
    while body and not body[-1]:
        body.pop()
    columns = _SECONDS if set(_SECONDS) <= set(header) else _AZURE
    missing = [column for column in columns if column not in header]
    if missing:
        raise WorkloadError(
            f"{path}: no column {', '.join(_missing_from_nearest(header))}; found {', '.join(header) or 'none'}. "
            f"Accepted: {_ACCEPTED}"
        )
    where = [header.index(column) for column in columns]
    short = next((i for i, row in enumerate(body) if len(row) <= max(where)), None)
    if short is not None:
        raise WorkloadError(f"{path}, row {short + 1}: {len(body[short])} fields where the header has {len(header)}")
    arrival, prompt, output = ([row[i] for row in body] for i in where)
    times = _timestamps(path, arrival) if columns is _AZURE else _numbers(path, columns[0], arrival)
    return _checked(path, columns, times, _numbers(path, columns[1], prompt), _numbers(path, columns[2], output))


def _missing_from_nearest(header: list[str]) -> list[str]:
    """The columns lacking from the form that the header is closest to."""
    nearest = max((_SECONDS, _AZURE), key=lambda form: sum(column in header for column in form))
    return [column for column in nearest if column not in header]


def _read_jsonl(path: Path) -> Trace:
    fields: tuple[list[Any], list[Any], list[Any]] = ([], [], [])
    with _open(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise WorkloadError(f"{path}, row {number}: not JSON ({error})") from error
            missing = [key for key in _MOONCAKE if not isinstance(record, dict) or key not in record]
            if missing:
                found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise WorkloadError(
                    f"{path}, row {number}: no field {', '.join(missing)}; found {found}. Accepted: {_ACCEPTED}"
                )
            for values, key in zip(fields, _MOONCAKE, strict=True):
                values.append(record[key])
    arrival, prompt, output = (_numbers(path, key, values) for key, values in zip(_MOONCAKE, fields, strict=True))
    trace = _checked(path, _MOONCAKE, arrival / 1000.0, prompt, output)
    return replace(trace, arrival=spread_ticks(trace.arrival))


def spread_ticks(arrival: NDArray[np.float64]) -> NDArray[np.float64]:
    """Spread arrivals that were logged on a coarse clock over their ticks, if they were.

    Mooncake's traces log arrivals in ticks of 3 s: taken literally, requests would come in simultaneous bunches. The
    tick is the greatest common divisor of the times; where it is at least 0.1 s and arrivals share a time, each tick's
    arrivals are placed uniformly at random inside it (what a Poisson stream looks like given its count), always in
    the same way. Other arrivals are returned as they are.
    """
    if arrival.size < 2 or not np.isfinite(arrival).all() or (np.diff(arrival) < 0).any():
        return arrival
    milliseconds = np.rint(arrival * 1000.0).astype(np.int64)
    tick = float(np.gcd.reduce(milliseconds - milliseconds[0])) / 1000.0
    if tick < 0.1 or not (np.diff(milliseconds) == 0).any():
        return arrival
    spread = arrival + tick * np.random.default_rng(0).random(arrival.size)
    # Ticks do not overlap, so sorting everything sorts within each tick only.
    return np.sort(spread)


def _numbers(path: Path, column: str, values: list[Any]) -> NDArray[np.float64]:
    try:
        return np.array(values, dtype=np.float64)
    except (TypeError, ValueError):
        for row, value in enumerate(values, 1):
            try:
                float(value)
            except (TypeError, ValueError):
                raise WorkloadError(f"{path}, row {row}: {column} = {value!r} is not a number") from None
        raise


def _timestamps(path: Path, values: list[str]) -> NDArray[np.float64]:
    """Seconds since the first of Azure's timestamps, `2023-11-16 18:15:46.6805900`, with or without a UTC offset."""
    plain = [value.strip().removesuffix("+00:00").removesuffix("Z") for value in values]
    try:
        stamps = np.array(plain, dtype="datetime64[ns]")
    except ValueError:
        stamps = np.array([_timestamp(path, row, value) for row, value in enumerate(plain, 1)], dtype="datetime64[ns]")
    missing = np.flatnonzero(np.isnat(stamps))
    if missing.size:
        raise WorkloadError(f"{path}, row {missing[0] + 1}: TIMESTAMP = {values[missing[0]]!r} is not a time")
    if stamps.size == 0:
        return np.empty(0)
    return (stamps - stamps[0]) / np.timedelta64(1, "s")


def _timestamp(path: Path, row: int, value: str) -> np.datetime64:
    try:
        return np.datetime64(value, "ns")
    except ValueError:
        raise WorkloadError(
            f"{path}, row {row}: TIMESTAMP = {value!r} is not a time like 2023-11-16 18:15:46.6805900"
        ) from None


def _checked(
    path: Path,
    columns: tuple[str, str, str],
    arrival: NDArray[np.float64],
    prompt: NDArray[np.float64],
    output: NDArray[np.float64],
) -> Trace:
    """Refuse what is not finite, whole or at least `least`; name the first row that is not."""
    for column, tokens, least in ((columns[1], prompt, 1), (columns[2], output, 0)):
        with np.errstate(invalid="ignore"):
            wrong = np.flatnonzero(~((tokens >= least) & (tokens <= _MAX_TOKENS) & (tokens == np.floor(tokens))))
        if wrong.size:
            raise WorkloadError(
                f"{path}, row {wrong[0] + 1}: {column} = {tokens[wrong[0]]:g} must be a whole number of at least 1"
            )
    wrong = np.flatnonzero(~np.isfinite(arrival))
    if wrong.size:
        raise WorkloadError(f"{path}, row {wrong[0] + 1}: {columns[0]} = {arrival[wrong[0]]} must be finite")
    return Trace(
        path, arrival, prompt.astype(np.int64), output.astype(np.int64), np.arange(1, arrival.size + 1, dtype=np.int64)
    )
