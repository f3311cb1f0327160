"""The end of an app: one message on what the user can fix, or on Ctrl-C."""

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from engine.signals import handled

FULL_ERROR = "HYDRA_FULL_ERROR"

INTERRUPTED = 130
"""Exit status of a process that was told to stop."""

_WANTED = os.environ.get(FULL_ERROR, "0") not in ("", "0")


class MistakeError(ValueError):
    """Something the user can fix; the message says what and how."""


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks: HYDRA_FULL_ERROR=1 at the start, which apps without Hydra read too."""
    return _WANTED


@contextmanager
def named() -> Iterator[None]:
    """Passes a ValueError or OSError from within on as a MistakeError: they already name file, row or key."""
    try:
        yield
    except MistakeError:
        raise
    except OSError as error:
        raise MistakeError(of_system(error)) from error
    except ValueError as error:
        raise MistakeError(one_line(error)) from error


@contextmanager
def ending(log: logging.Logger, interrupted: str, traceback: Callable[[], bool] = wants_traceback) -> Iterator[None]:
    """Ends an app: with 2 and one message on what the user can fix, with 130 and `interrupted` on Ctrl-C."""
    try:
        yield
    except (MistakeError, OSError) as mistake:
        if traceback():
            raise
        log.error("%s", of_system(mistake) if isinstance(mistake, OSError) else mistake)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("%s", interrupted)
        sys.exit(INTERRUPTED)


@contextmanager
def stopped_by_sigterm() -> Iterator[None]:
    """Makes SIGTERM what Ctrl-C is, so that a run that is being written cleans up after itself."""
    with handled(signal.default_int_handler, signal.SIGTERM):
        yield


def command(main: Callable[[], int]) -> None:
    """Run the `main` of an app without Hydra and exit with what it returns, or as `ending` does."""
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    with stopped_by_sigterm(), ending(logging.getLogger("runs"), "interrupted"), named():
        status = main()
    sys.exit(status)


def of_system(error: OSError) -> str:
    """What the operating system refused, the file first."""
    said = error.strerror or one_line(error)
    return f"{error.filename}: {said}" if error.filename is not None else said


def one_line(error: BaseException) -> str:
    """What an exception says, on one line."""
    return " ".join(str(error).split()) or type(error).__name__
