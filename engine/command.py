"""The end of a command of this package: one line on what its user can fix, not a traceback."""

from __future__ import annotations

import sys
from collections.abc import Callable


def run(main: Callable[[], int | None]) -> None:
    """Exit with what `main` returns; with 2 and one line where it raises a ValueError or an OSError."""
    try:
        status = main()
    except OSError as error:
        file = f"{error.filename}: " if error.filename is not None else ""
        sys.exit(_refused(f"{file}{error.strerror or error}"))
    except ValueError as error:
        sys.exit(_refused(str(error)))
    sys.exit(status)


def _refused(why: str) -> int:
    print(f"error: {' '.join(why.split())}", file=sys.stderr)
    return 2
