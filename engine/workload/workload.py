"""Workloads: fixed arrivals, token counts, and agreement of drafter and target by position."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
from numba import njit
from numpy.typing import ArrayLike, NDArray

if TYPE_CHECKING:
    from engine.workload.agreement import AgreementModel

RUN_LENGTH_CAP = 255
_ROWS_SHOWN = 5


class WorkloadError(ValueError):
    """A workload, or the file or setting it came from, is not usable; the message names the place and the remedy."""


@njit(cache=True, error_model="numpy")
def run_lengths(rank: NDArray, offset: NDArray) -> NDArray:
    """Length of the run of agreements (rank 0) that starts at each position, within its request, capped at 255.

    `rank` (P,) uint8, `offset` (R+1,) int64; returns (P,) uint8.
    """
    out = np.empty(rank.size, dtype=np.uint8)
    for request in range(offset.size - 1):
        run = 0
        for position in range(offset[request + 1] - 1, offset[request] - 1, -1):
            run = min(run + 1, 255) if rank[position] == 0 else 0
            out[position] = run
    return out


@dataclass(frozen=True, eq=False)
class Workload:
    """R requests with P output positions in total; every array is read-only and checked on construction.

    Output position 0 of a request is the token its prefill emits. A decode step that starts with g >= 1 tokens
    generated drafts positions g, g + 1, ...; with a greedy chain of c candidates it accepts
    `min(c, run_length[offset[r] + g])` of them.

    Raises `WorkloadError` naming the request (and its row in the source) when an array violates the rules below.
    """

    name: str
    arrival: NDArray[np.float64]
    """(R,) seconds, non-decreasing, >= 0."""
    prompt_tokens: NDArray[np.int32]
    """(R,) >= 1."""
    output_tokens: NDArray[np.int32]
    """(R,) >= 1."""
    offset: NDArray[np.int64]
    """(R+1,) first output position of each request in the flat per-position arrays."""
    run_length: NDArray[np.uint8]
    """(P,) consecutive agreements starting at this position; capped at 255, ends with the request."""
    rank: NDArray[np.uint8]
    """(P,) rank of the target's token in the drafter's order; 0 = the drafter's first choice; capped at 255."""
    confidence: NDArray[np.float32]
    """(P,) the drafter's probability of its own first choice."""
    provenance: Mapping[str, Any] = field(default_factory=dict)
    """Provenance: source, seed, options, fitted figures."""
    source_row: NDArray[np.int64] | None = None
    """(R,) row of each request in its source (1 = first row of a trace file); for messages only."""

    def __post_init__(self) -> None:
        for name, dtype in _DTYPES.items():
            object.__setattr__(self, name, _array(self.name, name, getattr(self, name), dtype))
        rows = np.arange(1, self.arrival.size + 1) if self.source_row is None else self.source_row
        object.__setattr__(self, "source_row", _array(self.name, "source_row", rows, np.int64))
        object.__setattr__(self, "provenance", dict(self.provenance))
        self.validate()

    @classmethod
    def build(
        cls,
        name: str,
        arrival: ArrayLike,
        prompt: ArrayLike,
        output: ArrayLike,
        agreement_model: AgreementModel,
        rng: np.random.Generator | int,
        provenance: Mapping[str, Any] | None = None,
        source_row: ArrayLike | None = None,
    ) -> Workload:
        """Draw the agreement of every output position and return the finished workload.

        A request's agreement depends only on the seed (one integer drawn from `rng`, or `rng` itself when it is an
        integer) and on its `source_row`: rescaling the load, dropping other requests or clipping its output does not
        change it.
        """
        seed = int(rng) if isinstance(rng, int | np.integer) else int(rng.integers(2**63))
        prompt_tokens, output_tokens = np.asarray(prompt), np.asarray(output)
        rows = np.arange(1, output_tokens.size + 1) if source_row is None else np.asarray(source_row, dtype=np.int64)
        _require_tokens(name, "output_tokens", output_tokens, rows)
        output_tokens = output_tokens.astype(np.int32)
        drawn = agreement_model.draw(seed, rows, output_tokens)
        return cls(
            name=name,
            arrival=np.asarray(arrival, dtype=np.float64),
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            offset=offsets(output_tokens),
            run_length=drawn.run_length,
            rank=drawn.rank,
            confidence=drawn.confidence,
            provenance={**(provenance or {}), "agreement": agreement_model.describe()},
            source_row=rows,
        )

    @property
    def num_requests(self) -> int:
        """R."""
        return int(self.arrival.size)

    @property
    def num_positions(self) -> int:
        """P, the output tokens of all requests."""
        return int(self.rank.size)

    @property
    def request_rate(self) -> float:
        """Mean arrival rate in requests/s between the first and the last arrival; NaN for fewer than two."""
        span = float(self.arrival[-1] - self.arrival[0])
        return (self.num_requests - 1) / span if span > 0 else float("nan")

    @property
    def total_tokens(self) -> NDArray[np.int64]:
        """(R,) prompt + output tokens, the KV cache use of a finished request."""
        return self.prompt_tokens.astype(np.int64) + self.output_tokens

    @cached_property
    def digest(self) -> str:
        """sha256 over the arrays a run depends on; identifies "the same requests" in reports."""
        sha = hashlib.sha256()
        for name in _DTYPES:
            array = getattr(self, name)
            sha.update(f"{name}{array.dtype.str}{array.size}".encode())
            sha.update(array.data)
        return sha.hexdigest()

    def validate(self) -> None:
        """Check every invariant stated on the fields; raise `WorkloadError` on the first one broken."""
        requests = self.arrival.size
        if requests == 0:
            raise WorkloadError(f"workload {self.name!r} has no requests; widen its time window or its limits")
        rows = self._rows
        for name, size in {"prompt_tokens": requests, "output_tokens": requests, "source_row": requests}.items():
            if getattr(self, name).size != size:
                raise WorkloadError(
                    f"workload {self.name!r}: {name} has {getattr(self, name).size} entries, not {size}"
                )
        _require_arrivals(self.name, self.arrival, rows)
        _require_tokens(self.name, "prompt_tokens", self.prompt_tokens, rows)
        _require_tokens(self.name, "output_tokens", self.output_tokens, rows)
        if not np.array_equal(self.offset, offsets(self.output_tokens)):
            raise WorkloadError(f"workload {self.name!r}: offset must be the running sum of output_tokens from 0")
        for name in ("run_length", "rank", "confidence"):
            if getattr(self, name).size != self.offset[-1]:
                raise WorkloadError(
                    f"workload {self.name!r}: {name} has {getattr(self, name).size} positions, not {self.offset[-1]}"
                )
        if not (self.confidence.min() >= 0.0 and self.confidence.max() <= 1.0):
            raise WorkloadError(f"workload {self.name!r}: confidence must lie in [0, 1]")
        wrong = np.flatnonzero(self.run_length != run_lengths(self.rank, self.offset))
        if wrong.size:
            request = int(np.searchsorted(self.offset, wrong[0], side="right")) - 1
            raise WorkloadError(
                f"workload {self.name!r}, row {rows[request]}, output position {wrong[0] - self.offset[request]}: "
                f"run_length {self.run_length[wrong[0]]} does not count the agreements (rank 0) that follow"
            )

    def check_fits(self, max_model_len: int | None = None, kv_capacity_tokens: int | None = None) -> None:
        """Raise `WorkloadError` if a request (prompt + output) exceeds the context length or the whole KV cache.

        The message names rows, values and the settings that help.
        """
        self._check_limit("the model's context (max_model_len)", max_model_len)
        self._check_limit("the KV cache of this engine", kv_capacity_tokens)

    def subset(self, requests: ArrayLike, name: str | None = None) -> Workload:
        """The given requests (indices in increasing order, or a boolean mask) as a new workload, agreement included."""
        index = np.asarray(requests)
        index = np.flatnonzero(index) if index.dtype == bool else index.astype(np.int64)
        positions = np.concatenate(
            [np.arange(self.offset[r], self.offset[r + 1]) for r in index] or [np.empty(0, np.int64)]
        )
        return Workload(
            name=name or self.name,
            arrival=self.arrival[index],
            prompt_tokens=self.prompt_tokens[index],
            output_tokens=self.output_tokens[index],
            offset=offsets(self.output_tokens[index]),
            run_length=self.run_length[positions],
            rank=self.rank[positions],
            confidence=self.confidence[positions],
            provenance={**self.provenance, "subset_of": self.digest},
            source_row=self._rows[index],
        )

    @property
    def _rows(self) -> NDArray[np.int64]:
        assert self.source_row is not None
        return self.source_row

    def _check_limit(self, what: str, limit: int | None) -> None:
        if limit is None:
            return
        total = self.total_tokens
        over = np.flatnonzero(total > limit)
        if over.size:
            longest = int(over[np.argmax(total[over])])
            raise WorkloadError(
                f"workload {self.name!r}: {over.size} of {self.num_requests} requests exceed {what} of {limit} tokens, "
                f"{_rows_text(self._rows[over])}; the longest, row {self._rows[longest]}, needs {total[longest]} "
                f"tokens ({self.prompt_tokens[longest]} prompt + {self.output_tokens[longest]} output). "
                f"Set workload.too_long=clip or workload.too_long=drop together with workload.max_total_tokens={limit} "
                "(or workload.max_prompt_tokens and workload.max_output_tokens), or choose an engine with more room."
            )


_DTYPES: dict[str, type[np.generic]] = {
    "arrival": np.float64,
    "prompt_tokens": np.int32,
    "output_tokens": np.int32,
    "offset": np.int64,
    "run_length": np.uint8,
    "rank": np.uint8,
    "confidence": np.float32,
}


def offsets(output_tokens: ArrayLike) -> NDArray[np.int64]:
    """(R+1,) running sum of the output lengths, starting with 0."""
    tokens = np.asarray(output_tokens, dtype=np.int64)
    return np.concatenate((np.zeros(1, dtype=np.int64), np.cumsum(tokens)))


def _array(workload: str, name: str, values: ArrayLike, dtype: type[np.generic]) -> NDArray[Any]:
    """A read-only contiguous copy-if-needed of `values`; refuses a cast that would change a value."""
    given = np.asarray(values)
    if given.ndim != 1:
        raise WorkloadError(f"workload {workload!r}: {name} must be one-dimensional, not of shape {given.shape}")
    with np.errstate(invalid="ignore"):
        array = np.ascontiguousarray(given, dtype=dtype)
    if np.issubdtype(dtype, np.integer) and given.dtype != array.dtype and not np.array_equal(given, array):
        bad = int(np.flatnonzero(given != array)[0])
        raise WorkloadError(f"workload {workload!r}: {name}[{bad}] = {given[bad]} is no valid {np.dtype(dtype).name}")
    if array is values or np.shares_memory(array, given):
        array = array.view()
    array.flags.writeable = False
    return array


def _require_arrivals(workload: str, arrival: NDArray[np.float64], rows: NDArray[np.int64]) -> None:
    bad = np.flatnonzero(~np.isfinite(arrival) | (arrival < 0))
    if bad.size:
        raise WorkloadError(
            f"workload {workload!r}, row {rows[bad[0]]}: arrival {arrival[bad[0]]} s must be finite and not negative"
        )
    back = np.flatnonzero(np.diff(arrival) < 0)
    if back.size:
        late = int(back[0]) + 1
        raise WorkloadError(
            f"workload {workload!r}, row {rows[late]}: arrival {arrival[late]} s is earlier than the one before it, "
            f"{arrival[late - 1]} s; sort the requests by arrival"
        )


def _require_tokens(workload: str, name: str, tokens: NDArray[Any], rows: NDArray[np.int64]) -> None:
    with np.errstate(invalid="ignore"):
        bad = np.flatnonzero(~((tokens >= 1) & (tokens <= np.iinfo(np.int32).max) & (tokens == np.floor(tokens))))
    if bad.size:
        raise WorkloadError(
            f"workload {workload!r}, row {rows[bad[0]]}: {name} = {tokens[bad[0]]} must be a whole number of at least 1"
        )


def _rows_text(rows: Sequence[int] | NDArray[np.int64]) -> str:
    shown = ", ".join(str(int(row)) for row in rows[:_ROWS_SHOWN])
    return f"row {shown}" if len(rows) == 1 else f"rows {shown}{', ...' if len(rows) > _ROWS_SHOWN else ''}"
