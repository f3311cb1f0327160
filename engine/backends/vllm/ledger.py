"""Records the steps of a vLLM scheduler in the request table that all engines are measured by.

vLLM is not imported: the scheduler's owner reports each event.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from engine.core.foreign import preempt, take_up
from engine.core.live import stop_after
from engine.core.scheduler import commit
from engine.core.state import DECODING, State


@dataclass(frozen=True)
class Entry:
    """A request in a step: its row, its tokens, and True if its drafter proposed fewer candidates than requested."""

    row: int
    tokens: int
    ran_out: bool = False


class Ledger:
    """Writes steps into instance 0 of a state.

    Args:
        state: with the requests appended and submitted.
    """

    def __init__(self, state: State) -> None:
        self.state = state
        self._batch: list[Entry] = []
        self._decodes = 0

    def preempted(self, row: int) -> None:
        """Record, before the step is planned, that a running request lost its blocks."""
        preempt(self.state, 0, row)

    def planned(self, entries: Sequence[Entry], candidates: int, token_budget: int, free_blocks: int) -> None:
        """Record a scheduled step of these requests; `candidates` is the c that its drafts were requested with."""
        requests = self.state.requests
        decodes = [entry for entry in entries if requests["phase"][entry.row] == DECODING]
        prefills = [entry for entry in entries if requests["phase"][entry.row] != DECODING]
        self._batch, self._decodes = decodes + prefills, len(decodes)
        rows = np.array([entry.row for entry in self._batch], dtype=np.int64)
        tokens = np.array([entry.tokens for entry in self._batch], dtype=np.int64)
        take_up(self.state, 0, rows, tokens, self._decodes, candidates, token_budget, free_blocks)

    def done(self, emitted: Sequence[int], ended: Sequence[bool], elapsed: float, free_blocks: int) -> None:
        """Record the end of the step, `elapsed` s after it began.

        emitted: tokens of each request, in the order of `rows` · ended: True for finished requests · free_blocks: after
        finished requests have freed theirs.
        """
        state = self.state
        for i, (entry, tokens, over) in enumerate(zip(self._batch, emitted, ended, strict=True)):
            if i < self._decodes:
                state.accepted[0, i] = tokens - 1
                # Tokens after a request's end are cut off, accepted or not.
                if over:
                    state.reach[0, i] = tokens - 1
                elif entry.ran_out:
                    state.reach[0, i] = max(int(state.reach[0, i]), tokens)
            request = state.requests[entry.row]
            if over and request["generated"] + tokens < request["output"]:
                stop_after(state, 0, entry.row, tokens)
        commit(state, 0, elapsed)
        state.instances["free_blocks"][0] = free_blocks

    @property
    def rows(self) -> list[int]:
        """The requests of the latest step, in the order that `done` takes."""
        return [entry.row for entry in self._batch]
