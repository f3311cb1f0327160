"""Atomic file writes, and readers whose errors name the damaged file."""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    import pyarrow as pa


class FileFaultError(ValueError):
    """A file cannot be read or written; the message gives its name and the reason."""


class WriteError(OSError):
    """A file cannot be written; `filename` is its final name."""


@contextmanager
def reading(path: str | Path, maker: str = "", kind: str = "what is expected here") -> Iterator[None]:
    """Context that turns any error of reading a missing or damaged file into a one-line FileFaultError.

    Args:
        path: the file being read.
        maker: the command that writes such files, for the end of the message.
        kind: of the file.
    """
    hint = f"; {maker}" if maker else ""
    try:
        yield
    except FileNotFoundError as error:
        raise FileFaultError(f"{path}: no such file{hint}") from error
    except FileFaultError:
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.strerror is not None:
            raise FileFaultError(f"{path}: cannot be read: {error.strerror}{hint}") from error
        what = f"no {error}" if isinstance(error, KeyError) else _said(error)
        raise FileFaultError(f"{path}: not readable as {kind} ({what}){hint}") from error


@contextmanager
def writing(path: str | Path) -> Iterator[None]:
    """Context that adds the name of the written file to an OSError, which write errors lack."""
    try:
        yield
    except WriteError:
        raise
    except OSError as error:
        raise WriteError(error.errno, f"cannot be written: {error.strerror or _said(error)}", str(path)) from error


def write_whole(path: Path, content: bytes) -> None:
    """Write a file under a temporary name, then rename it; missing folders are made. Raises OSError naming it."""
    partial = path.with_name(f".{path.name}.partial")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            partial.write_bytes(content)
            os.replace(partial, path)
        finally:
            remove(partial)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Lock a folder, made if missing, against writes of other processes, until the block or this process ends.

    The lock is on the folder itself, so no lock file remains. Systems without such locks get none.

    Raises FileFaultError when another process holds it.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    if importlib.util.find_spec("fcntl") is None:
        yield
        return
    import fcntl

    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise FileFaultError(
                f"{folder}: another process is writing into this folder; wait for it, or choose another one"
            ) from error
        except OSError:
            # Some network file systems lock no folders.
            pass
        yield
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a file if it can be."""
    try:
        path.unlink(missing_ok=True)
    except OSError:
        return


def read_json(path: Path, maker: str = "") -> Any:
    """A JSON file's content. Raises FileFaultError."""
    with reading(path, maker, "JSON"):
        return json.loads(path.read_text(encoding="utf-8"))


def read_arrays(path: Path, names: Iterable[str], maker: str = "") -> dict[str, NDArray[Any]]:
    """Arrays of a `.npz`. Raises FileFaultError, also where one is missing."""
    with reading(path, maker, "numpy arrays"), np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in names}


def write_arrays(path: Path, arrays: dict[str, NDArray[Any]]) -> None:
    """Write a compressed `.npz` atomically."""
    content = io.BytesIO()
    np.savez_compressed(content, **arrays)  # type: ignore[arg-type]
    write_whole(path, content.getvalue())


def write_table(path: Path, table: pa.Table) -> None:
    """Write a parquet file with checksums atomically; equal tables give equal bytes."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    content = pa.BufferOutputStream()
    pq.write_table(table, content, compression="zstd", write_statistics=False, write_page_checksum=True)
    write_whole(path, content.getvalue().to_pybytes())


def read_table(
    path: str | Path, columns: Iterable[str] | None = None, maker: str = "", sha256: str | None = None
) -> pa.Table:
    """A parquet file, or columns of it, its checksums verified. Raises FileFaultError, also for a missing column.

    The checksums are of pages; `sha256`, where it is known, is of the whole file.
    """
    import pyarrow.parquet as pq

    with reading(path, maker, "parquet"):
        # Opened here: the reader gives its message without the file's name, and a folder would be a data set.
        with open(path, "rb") as file:
            if sha256 is not None and hashlib.file_digest(file, "sha256").hexdigest() != sha256:
                raise FileFaultError(f"{path}: damaged or edited: its sha256 is not the one it was written with")
            parquet = pq.ParquetFile(file, page_checksum_verification=True)
            wanted = None if columns is None else list(columns)
            for name in wanted or ():
                if name not in parquet.schema_arrow.names:
                    raise FileFaultError(f"{path}: column '{name}' is missing")
            # All columns are read: damage to a column that was not requested is damage to the file.
            table = parquet.read(use_threads=False)
        table.validate(full=True)
        return table if wanted is None else table.select(wanted)


def _said(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
