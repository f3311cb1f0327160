import logging
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Helpers beside the tests are imported by name, whichever way pytest imports the tests themselves.
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def call_app(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """Calls an app's `main` as the command line would, given its name and overrides; returns its exit status."""
    root = logging.getLogger()
    handlers, level = list(root.handlers), root.level

    def call(main: Callable[[], None], name: str, *overrides: str) -> int:
        monkeypatch.setattr(sys, "argv", [name, *overrides])
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    yield call
    for handler in list(root.handlers):
        root.removeHandler(handler)
        handler.close()
    root.handlers[:], root.level = handlers, level
