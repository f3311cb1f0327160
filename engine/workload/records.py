"""Records of files that other tools write: CSV, JSON lines and JSON lists, each also gzipped, column by column."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from io import BufferedReader
from itertools import chain, islice
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.workload.workload import WorkloadError

Convert = Callable[[Path, str, Sequence[Any], Sequence[int]], NDArray[Any]]
"""Turns values of a column into an array; told the file, the column and the values' rows, for messages."""
Pick = Callable[[list[str]], dict[str, Convert]]
"""Chooses columns among those that a file has, and how each is converted. Raises WorkloadError if it cannot."""

ENDINGS = (".csv", ".tsv", ".jsonl", ".json")
_GZIP = b"\x1f\x8b"
_CHUNK = 1 << 16


def read_columns(path: Path, pick: Pick) -> tuple[dict[str, NDArray[Any]], NDArray[np.int64]]:
    """Read the columns that `pick` chooses, and the row of each record.

    Rows count from 1 after a CSV's header, lines from 1 in JSON lines, entries from 1 in a JSON list.

    Raises:
        WorkloadError: naming file and row; the file cannot be read, or a record lacks a column.
    """
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file")
    if ending(path) not in ENDINGS:
        raise WorkloadError(
            f"{path}: unknown kind of file; accepted are {', '.join(ENDINGS)}, each also with .gz behind it"
        )
    converters: dict[str, Convert] = {}

    def chosen(keys: list[str]) -> list[str]:
        converters.update(pick(keys))
        return list(converters)

    rows = (_json_rows if ending(path).startswith(".json") else _csv_rows)(path, chosen)
    parts: dict[str, list[NDArray[Any]]] = {}
    numbers: list[NDArray[np.int64]] = []
    while chunk := list(islice(rows, _CHUNK)):
        at = [row for row, _ in chunk]
        numbers.append(np.array(at, dtype=np.int64))
        for (column, convert), values in zip(
            converters.items(), zip(*(values for _, values in chunk), strict=True), strict=True
        ):
            parts.setdefault(column, []).append(convert(path, column, values, at))
    if not numbers:
        raise WorkloadError(f"{path}: the file has no requests")
    for column, pieces in parts.items():
        if len({piece.dtype for piece in pieces}) > 1:
            raise WorkloadError(f"{path}: {column} is a number in some rows and none in others")
    return {column: np.concatenate(pieces) for column, pieces in parts.items()}, np.concatenate(numbers)


def read_json(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Objects of JSON lines or of a JSON list, each with its row. Raises WorkloadError naming file and row."""
    return list(_objects(path))


def numbers(path: Path, column: str, values: Sequence[Any], rows: Sequence[int]) -> NDArray[np.float64]:
    """Finite numbers; numbers written as text count. Raises WorkloadError naming file, row and column."""
    try:
        array = _as_floats(values)
    except (TypeError, ValueError, OverflowError):
        row, value = next((row, value) for row, value in zip(rows, values, strict=True) if not is_number(value))
        raise WorkloadError(f"{path}, row {row}: {column} = {shown(value)} is not a number") from None
    wrong = np.flatnonzero(~np.isfinite(array))
    if wrong.size:
        raise WorkloadError(f"{path}, row {rows[wrong[0]]}: {column} = {array[wrong[0]]:g} must be finite")
    return array


def is_number(value: Any) -> bool:
    """Return True if `numbers` reads this value as a number, finite or not."""
    try:
        _as_floats([value])
    except (TypeError, ValueError, OverflowError):
        return False
    return True


def _as_floats(values: Sequence[Any]) -> NDArray[np.float64]:
    if not set(map(type, values)) <= {int, float, str}:
        raise TypeError
    return np.array([float(value) for value in values])


def shown(value: Any) -> str:
    """The value for messages, quoted and shortened."""
    text = repr(value) if not isinstance(value, int) or abs(value) < 10**40 else "a number of more than 40 digits"
    return text if len(text) <= 60 else f"{text[:57]}..."


def ending(path: Path) -> str:
    """The last ending of a file's name in small letters, `.gz` aside: `trace.csv.gz` ends in `.csv`."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def stem(path: Path) -> str:
    """The file's name without the endings of its kind: `azure.2023-11-16.csv.gz` is `azure.2023-11-16`."""
    bare = path.name[:-3] if path.name.lower().endswith(".gz") else path.name
    known = (*ENDINGS, ".txt", ".md", ".py")
    return bare[: -len(ending(path))] if ending(path) in known and len(bare) > len(ending(path)) else bare


def content_digest(path: Path) -> str:
    """sha256 of the file's bytes; "absent" where it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError:
        return "absent"


def scenario_of(path: Path) -> str:
    """The file's name with six digits of its content's hash, so that files of one name in two folders differ."""
    return f"{stem(path)}@{content_digest(path)[:6]}"


def text_lines(path: Path) -> Iterator[str]:
    """Lines of a UTF-8 file, gzipped or not, without a byte order mark. Raises WorkloadError naming file and line."""
    line = 0
    try:
        with _open(path) as file:
            for raw in file:
                line += 1
                yield raw.decode("utf-8-sig" if line == 1 else "utf-8")
    except UnicodeDecodeError as error:
        raise WorkloadError(
            f"{path}, line {line}: not UTF-8 at byte {error.start + 1}; save the file as UTF-8 text"
        ) from error
    except (OSError, EOFError, zlib.error) as error:
        raise WorkloadError(f"{path}, line {line + 1}: cannot be read ({error}); is the file damaged?") from error


def _open(path: Path) -> gzip.GzipFile | BufferedReader:
    with path.open("rb") as file:
        gzipped = file.read(len(_GZIP)) == _GZIP
    if path.name.lower().endswith(".gz") and not gzipped:
        raise WorkloadError(f"{path}: ends in .gz but is not gzipped; is the file damaged?")
    return gzip.open(path, "rb") if gzipped else path.open("rb")


def _csv_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[int, Sequence[str]]]:
    lines = text_lines(path)
    first = next(lines, "")
    delimiter = max(",;\t", key=first.count)
    row = 0
    try:
        table = csv.reader(chain([first], lines), delimiter=delimiter)
        header = [column.strip() for column in next(table, [])]
        where = [header.index(column) for column in choose(header)]
        take = itemgetter(*where)
        for row, fields in enumerate(table, 1):
            if not fields:
                continue
            if len(fields) <= max(where) or any(fields[len(header) :]):
                raise WorkloadError(f"{path}, row {row}: {len(fields)} fields where the header has {len(header)}")
            yield row, take(fields)
    except csv.Error as error:
        raise WorkloadError(f"{path}, row {row + 1}: cannot be read as CSV: {error}") from error


def _json_rows(path: Path, choose: Callable[[list[str]], list[str]]) -> Iterator[tuple[int, Sequence[Any]]]:
    columns: list[str] | None = None
    for row, record in _objects(path):
        if columns is None:
            columns = choose(list(record))
        missing = [column for column in columns if column not in record]
        if missing:
            raise WorkloadError(
                f"{path}, row {row}: no {', '.join(missing)}; found {', '.join(record)[:200] or 'nothing'}"
            )
        yield row, [record[column] for column in columns]


def _objects(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    lines = enumerate(text_lines(path), 1)
    number, first = next(((number, line) for number, line in lines if line.strip()), (1, ""))
    if first.lstrip().startswith("["):
        entries: Any = _parsed(path, number, first + "".join(line for _, line in lines))
        records: Iterator[tuple[int, Any]] = enumerate(entries, 1)
    else:
        records = ((row, _parsed(path, row, line)) for row, line in chain([(number, first)], lines) if line.strip())
    for row, record in records:
        if not isinstance(record, dict):
            raise WorkloadError(f"{path}, row {row}: must be a JSON object, not {shown(record)}")
        yield row, record


def _parsed(path: Path, row: int, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WorkloadError(f"{path}, row {row}: not JSON ({error})") from error
