"""Rows of requests that are over, kept on disk until the run is summed up."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.state import REQUEST

log = logging.getLogger(__name__)


class Ledger:
    """Keeps what a request table no longer holds, in a file without a name that is gone when the process is.

    Memory stays flat however many requests there are. A full disk costs the rows and nothing else: `lost` counts them.
    """

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder, buffering=0)  # noqa: SIM115 - closed by `close`
        self._bytes = 0
        self.lost = 0

    def add(self, rows: NDArray[Any]) -> None:
        """Keep rows (`engine.core.state.REQUEST`), which follow those kept before."""
        content = rows.tobytes()
        try:
            if self._file.write(content) == len(content):
                self._bytes += len(content)
                return
            reason = "the disk is full"
        except OSError as error:
            reason = str(error)
        self._file.seek(self._bytes)
        if not self.lost:
            log.error("summary.json will miss requests: %s", reason)
        self.lost += len(rows)

    def whole(self, rows: NDArray[np.void]) -> NDArray[np.void]:
        """The kept rows, followed by these."""
        self._file.seek(0)
        kept = np.frombuffer(self._file.read()[: self._bytes], dtype=REQUEST)
        return np.concatenate((kept, rows))

    def close(self) -> None:
        """Let go of the file."""
        self._file.close()
