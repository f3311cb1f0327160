"""The planned batch of one iteration, as arrays for the torch engine."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.state import State
from engine.speculation.tree import Branches, Drafts


@dataclass
class Planned:
    """Arrays over the requests of a batch, decodes first."""

    rows: NDArray[np.int64]
    """In the scheduler's table."""
    numbers: NDArray[np.int64]
    seats: NDArray[np.int64]
    starts: NDArray[np.int64]
    counts: NDArray[np.int64]
    limits: NDArray[np.int64]
    """(decodes,) most candidates that a decode's output limit leaves room for."""
    decodes: int
    completes: NDArray[np.bool_]
    """Prefills whose last chunk this is; the rest False."""
    ran_out: NDArray[np.bool_]
    """(decodes,) True where the drafter proposed fewer candidates than requested."""
    scored: NDArray[np.bool_]
    """Prefills that need the logits after every token."""

    @property
    def keep(self) -> NDArray[np.int64]:
        """Rows of logits wanted: all of a decode or a scored prompt, the last of another prompt's last chunk."""
        keep = np.where(self.scored, self.counts, self.completes)
        keep[: self.decodes] = self.counts[: self.decodes]
        return keep

    def requests_of(self, rows: NDArray[np.bool_]) -> set[int]:
        """Places in the batch of the emitting requests to which the marked rows of logits belong."""
        if not rows.any():
            return set()
        emits = self.completes.copy()
        emits[: self.decodes] = True
        marked = np.repeat(np.arange(len(self.numbers)), self.keep)[rows]
        return set(marked[emits[marked]].tolist())

    def branches(self, drafts: Drafts) -> Branches | None:
        """Tree structure of the new tokens; None where they are all chains and chunks."""
        if not drafts.branched:
            return None
        roots = self.starts + self.counts
        roots[: self.decodes] = self.starts[: self.decodes]
        none = np.zeros((len(roots) - self.decodes, drafts.parents.shape[1]), dtype=np.int32)
        return Branches(roots, np.concatenate((drafts.parents, none)), np.concatenate((drafts.depths, none)))


@kernel
def _look_up(requests, batch_request, batch_tokens, seat_of, decodes, rows, seats, starts, counts, limits, completes):
    for i in range(len(rows)):
        r = batch_request[i]
        rows[i] = r
        seats[i] = seat_of[r]
        starts[i] = requests[r].computed
        counts[i] = batch_tokens[i]
        if i < decodes:
            limits[i] = requests[r].output - requests[r].generated - 1
        completes[i] = i >= decodes and starts[i] + counts[i] == requests[r].context


def look_up(state: State, seat_of: NDArray[np.int64], retired: int, decodes: int, size: int) -> Planned:
    """The planned batch of `size` requests, decodes first.

    `seat_of`: by row of the table · `retired`: rows that have left the table.
    """
    rows, seats, starts, counts = np.empty((4, size), dtype=np.int64)
    limits, completes = np.empty(decodes, dtype=np.int64), np.empty(size, dtype=np.bool_)
    batch = state.requests, state.batch_request[0], state.batch_tokens[0]
    _look_up(*batch, seat_of, decodes, rows, seats, starts, counts, limits, completes)
    ran_out = np.zeros(decodes, dtype=np.bool_)
    scored = np.zeros(size, dtype=np.bool_)
    return Planned(rows, rows + retired, seats, starts, counts, limits, decodes, completes, ran_out, scored)
