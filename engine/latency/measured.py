"""Measured iterations: the table that a profile writes, one row per iteration, and its split to test predictions."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from engine.files import FileFaultError, read_table, reading, write_table

PROVENANCE_KEY = "provenance"
"""Key of a file's metadata that holds the provenance of its iterations, as JSON."""

LOAD_EDGES = (0, 1, 9, 33, 65, 129, 1 << 30)


class MeasuredError(ValueError):
    """A file of measured iterations cannot be used; the message names the file and what is wrong."""


@dataclass(frozen=True)
class MeasuredIterations:
    """S iterations of a real engine, every array (S,).

    num_decodes: B · candidates: c asked for · decode_tokens: verified, at most B (1 + c) · candidate_steps: the most
    candidates that any request got · decode_kv_tokens: cached tokens of the decoding requests, and longest_kv_tokens of
    one · num_prefills, prefill_tokens, prompts_completed · chunks: the prompt tokens of each prefill ·
    prefill_context: tokens that the first prefill's prompt had cached · unread_tokens: of the decoding requests' cached
    tokens, those that the drafter reads in this iteration because their prompts ended just before it · seconds: median
    from plan to commit; of these draft_s in the drafter and forward_s in the target's forward · seconds_min,
    seconds_iqr, repeats: minimum, interquartile range and number of the timings.
    """

    num_decodes: NDArray[np.int64]
    candidates: NDArray[np.int64]
    decode_tokens: NDArray[np.int64]
    candidate_steps: NDArray[np.int64]
    decode_kv_tokens: NDArray[np.int64]
    longest_kv_tokens: NDArray[np.int64]
    num_prefills: NDArray[np.int64]
    prefill_tokens: NDArray[np.int64]
    prompts_completed: NDArray[np.int64]
    chunks: list[tuple[int, ...]]
    prefill_context: NDArray[np.int64]
    unread_tokens: NDArray[np.int64]
    seconds: NDArray[np.float64]
    draft_s: NDArray[np.float64]
    forward_s: NDArray[np.float64]
    seconds_min: NDArray[np.float64]
    seconds_iqr: NDArray[np.float64]
    repeats: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.seconds)

    @classmethod
    def from_columns(cls, columns: dict[str, Any]) -> MeasuredIterations:
        """Build from a column of values for every field; KeyError names a missing one."""
        made: dict[str, Any] = {}
        for field in fields(cls):
            if field.name == "chunks":
                made["chunks"] = [tuple(int(chunk) for chunk in chunks) for chunks in columns["chunks"]]
            else:
                kind = np.float64 if field.name.startswith("seconds") or field.name.endswith("_s") else np.int64
                made[field.name] = np.array(columns[field.name], dtype=kind)
        return cls(**made)

    @classmethod
    def read(cls, path: str | Path) -> MeasuredIterations:
        """Read a file of `write`. Raises MeasuredError: no such file, not parquet, a column missing, no rows."""
        try:
            columns = read_table(path).to_pydict()
        except FileFaultError as error:
            raise _unreadable(error) from error
        missing = {field.name for field in fields(cls)} - columns.keys()
        if missing or not columns["seconds"]:
            what = f"no column {', '.join(sorted(missing))}" if missing else "no rows"
            raise MeasuredError(f"{path}: {what}; measure again with `python -m runs.profile`")
        return cls.from_columns(columns)

    def write(self, path: str | Path, provenance: dict[str, Any] | None = None) -> None:
        """One parquet file, its origin with it (`read_provenance`); equal iterations and origins give equal bytes."""
        import pyarrow as pa

        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        columns["chunks"] = pa.array(self.chunks, type=pa.list_(pa.int32()))
        origin = {PROVENANCE_KEY: json.dumps(provenance or {}, allow_nan=False)}
        write_table(Path(path), pa.table(columns, metadata=origin))

    def subset(self, rows: ArrayLike) -> MeasuredIterations:
        """The rows of a boolean mask or of indices."""
        index = np.arange(len(self))[np.asarray(rows)]
        columns = {field.name: getattr(self, field.name) for field in fields(self)}
        picked: dict[str, Any] = {name: values[index] for name, values in columns.items() if name != "chunks"}
        return MeasuredIterations(**picked, chunks=[self.chunks[i] for i in index])

    @property
    def planned_tokens(self) -> NDArray[np.int64]:
        """B (1 + c): tokens that the scheduler plans to verify, before a drafter proposes fewer."""
        return self.num_decodes * (1 + self.candidates)

    def padded_kv_tokens(self, padding: float) -> NDArray[np.float64]:
        """Cached tokens of the decodes, plus the share `padding` of each one's difference to the longest."""
        padded = self.num_decodes * self.longest_kv_tokens
        return self.decode_kv_tokens + padding * (padded - self.decode_kv_tokens)

    @property
    def kinds(self) -> dict[str, NDArray[np.bool_]]:
        """Rows by kind of batch: decode only, prefill only, mixed."""
        decoding, filling = self.num_decodes > 0, self.prefill_tokens > 0
        return {
            "decode only": decoding & ~filling,
            "prefill only": ~decoding & filling,
            "mixed": decoding & filling,
        }

    @property
    def groups(self) -> dict[str, NDArray[np.bool_]]:
        """Groups of rows for error reports: overall, the kinds, buckets of decodes; without empty groups."""
        found = {"overall": np.ones(len(self), dtype=bool)} | self.kinds
        for low, high in pairwise(LOAD_EDGES[1:]):
            rows = (self.num_decodes >= low) & (self.num_decodes < high)
            found[f"{low}-{min(high - 1, int(self.num_decodes.max(initial=0)))} decodes"] = rows
        return {name: rows for name, rows in found.items() if rows.any()}

    def folds(self, count: int, seed: int) -> NDArray[np.int64]:
        """(S,) fold, out of `count`, in which a row is held out: shuffled within kind and bucket of decodes."""
        rng = np.random.default_rng(seed)
        bucket = np.searchsorted(LOAD_EDGES, self.num_decodes, side="right")
        stratum = 2 * bucket + (self.prefill_tokens > 0)
        order = np.lexsort((rng.random(len(self)), stratum))
        fold = np.empty(len(self), dtype=np.int64)
        fold[order] = np.arange(len(self)) % count
        return fold


def read_provenance(path: str | Path) -> dict[str, Any]:
    """Provenance of a file's iterations; empty if it has none. Raises MeasuredError: no parquet file."""
    try:
        found = read_table(path, []).schema.metadata or {}
        with reading(path):
            origin: dict[str, Any] = json.loads(found.get(PROVENANCE_KEY.encode(), b"{}"))
    except FileFaultError as error:
        raise _unreadable(error) from error
    return origin


def errors(measured: MeasuredIterations, predicted_s: NDArray[np.float64]) -> dict[str, float]:
    """Mean absolute relative error of predicted seconds (S,), by `MeasuredIterations.groups`."""
    error = np.abs(predicted_s / measured.seconds - 1.0)
    return {name: float(error[rows].mean()) for name, rows in measured.groups.items()}


def _unreadable(error: FileFaultError) -> MeasuredError:
    return MeasuredError(f"{error}; measured iterations are what `python -m runs.profile` leaves")
