"""What a run leaves on disk, written all at once or not at all."""

import hashlib
import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from engine.files import remove, write_table, writing

CONFIG = "config.yaml"
SUMMARY = "summary.json"
REQUESTS = "requests.parquet"
ITERATIONS = "iterations.parquet"
OUTPUTS = "outputs.jsonl"
REQUESTS_SHA256 = "requests_sha256"
"""Key of the summary: the digest of `requests.parquet` as it was written, whose checksums leave out its footer."""


def write_run(
    folder: Path,
    config: str,
    summary: dict[str, Any],
    requests: dict[str, NDArray[Any]],
    iterations: NDArray[np.void] | None,
    outputs: Sequence[dict[str, Any]] | None = None,
) -> None:
    """Write a run's files beside their final names, then rename them, the summary last.

    Where there is a summary, everything it speaks of is there; a run that is killed leaves none. It holds the sha256 of
    `requests.parquet`, so that damage anywhere in that file is found. The parquet files
    depend on their contents alone, so that equal runs are equal byte by byte.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder, config, summary, requests, iterations, outputs)


def _write(
    folder: Path,
    config: str,
    summary: dict[str, Any],
    requests: dict[str, NDArray[Any]],
    iterations: NDArray[np.void] | None,
    outputs: Sequence[dict[str, Any]] | None,
) -> None:
    partial = {name: folder / f".{name}.partial" for name in (CONFIG, REQUESTS, ITERATIONS, OUTPUTS, SUMMARY)}
    try:
        partial[CONFIG].write_text(config, encoding="utf-8")
        _write_table(requests, partial[REQUESTS])
        if iterations is None:
            del partial[ITERATIONS]
        else:
            names = iterations.dtype.names or ()
            _write_table({name: np.ascontiguousarray(iterations[name]) for name in names}, partial[ITERATIONS])
        if outputs is None:
            del partial[OUTPUTS]
        else:
            lines = "".join(json.dumps(output, ensure_ascii=False) + "\n" for output in outputs)
            partial[OUTPUTS].write_text(lines, encoding="utf-8")
        digest = hashlib.sha256(partial[REQUESTS].read_bytes()).hexdigest()
        partial[SUMMARY].write_text(summary_text(summary | {REQUESTS_SHA256: digest}), encoding="utf-8")
        # An older summary would speak of files that are about to be replaced.
        for name in (SUMMARY, ITERATIONS, OUTPUTS):
            (folder / name).unlink(missing_ok=True)
        for name, path in partial.items():
            os.replace(path, folder / name)
    finally:
        for path in partial.values():
            remove(path)


def summary_text(summary: dict[str, Any]) -> str:
    """The contents of `summary.json`."""
    return json.dumps(_plain(summary), indent=1, allow_nan=False) + "\n"


def _write_table(columns: dict[str, NDArray[Any]], path: Path) -> None:
    write_table(path, pa.table(columns))


def _plain(value: Any) -> Any:
    """JSON has no NaN: what has no value is null."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
