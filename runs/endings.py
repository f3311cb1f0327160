"""How an app ends: with one message on what the user can fix, or on Ctrl-C. Needs no library."""

import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class MistakeError(ValueError):
    """Something the user can fix; the message says what and how."""


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks: HYDRA_FULL_ERROR=1, which apps without Hydra read too."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")


@contextmanager
def named() -> Iterator[None]:
    """Passes a ValueError from within on as a MistakeError: the packages' errors already name file, row or key."""
    try:
        yield
    except ValueError as error:
        raise MistakeError(one_line(error)) from error


@contextmanager
def ending(log: logging.Logger, interrupted: str, traceback: Callable[[], bool] = wants_traceback) -> Iterator[None]:
    """Ends an app: with 2 and one message on what the user can fix, with 130 and `interrupted` on Ctrl-C."""
    try:
        yield
    except MistakeError as mistake:
        if traceback():
            raise
        log.error("%s", mistake)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("%s", interrupted)
        sys.exit(130)


def one_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
