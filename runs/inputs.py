"""Digests of the files that settings name, so that an edited file counts as another input."""

import hashlib
import os
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from functools import lru_cache, wraps
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pydantic import BaseModel

P = ParamSpec("P")
R = TypeVar("R")

MODEL = "config.json"
"""A folder that holds this file is a model's."""


def file_digests(settings: Any) -> dict[str, str]:
    """Digest of every file that `settings` names, by the name it has there.

    Args:
        settings: nested mappings, sequences, dataclasses and pydantic models. A string or path in them that leads to a
            file counts, relative to the working directory. A model's folder counts with its files' names, sizes and
            times.
    """
    found: dict[str, str] = {}
    for name in _names(settings):
        if os.path.isfile(name):
            with open(name, "rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()[:16]
        elif os.path.isfile(os.path.join(name, MODEL)):
            found[name] = _folder(Path(name))
    return dict(sorted(found.items()))


def kept(most: int) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """`lru_cache` of `most` results that also compares the contents of the files that the arguments name."""

    def decorate(make: Callable[P, R]) -> Callable[P, R]:
        @lru_cache(maxsize=most)
        def remembered(_contents: tuple[tuple[str, str], ...], *args: P.args, **kwargs: P.kwargs) -> R:
            return make(*args, **kwargs)

        @wraps(make)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            return remembered(tuple(file_digests([args, kwargs]).items()), *args, **kwargs)  # type: ignore[arg-type]

        return call

    return decorate


def _names(settings: Any) -> set[str]:
    if isinstance(settings, str | os.PathLike):
        return {os.fspath(settings)}
    if isinstance(settings, BaseModel):
        settings = dict(settings)
    if is_dataclass(settings) and not isinstance(settings, type):
        settings = [getattr(settings, field.name, None) for field in fields(settings)]
    if isinstance(settings, Mapping):
        settings = list(settings.values())
    if isinstance(settings, list | tuple):
        return {name for entry in settings for name in _names(entry)}
    return set()


def _folder(folder: Path) -> str:
    digest = hashlib.sha256()
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        about = path.stat()
        digest.update(f"{path.relative_to(folder).as_posix()} {about.st_size} {about.st_mtime_ns}\n".encode())
    return digest.hexdigest()[:16]
