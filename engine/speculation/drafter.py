"""Interface of drafters, and a drafter that never proposes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.core.state import MAX_CANDIDATES
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.sampling import Sampling
from engine.speculation.tree import Branches, Drafts


class Speculated(Protocol):
    """Request data for drafters: its settings and its random stream."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def random(self) -> np.random.Generator: ...


class TokenTable(Protocol):
    """The drafters' view of the cache table: token ids by batch slot, and the fill of the drafter's own cache."""

    tokens: NDArray[np.int32]
    draft_computed: NDArray[np.int32]

    def borrow(self, seats: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lend free blocks beyond those the requests hold, up to slot `ends[i]` of each; returns their reach."""


@dataclass
class Batch:
    """B requests to draft for. `table.tokens[seats[i], :lengths[i]]` are request i's tokens so far."""

    table: TokenTable
    numbers: NDArray[np.int64]
    """(B,) the requests' numbers."""
    requests: Sequence[Speculated]
    seats: NDArray[np.int64]
    """(B,) their rows in the table."""
    lengths: NDArray[np.int64]
    """(B,) tokens known: prompt and output."""
    wanted: NDArray[np.int64]
    """(B,) candidates planned; 0 for none."""
    limits: NDArray[np.int64]
    """(B,) most candidates, and greatest depth, within the request's output limit; at least `wanted`."""
    speculation: Speculation = CHAINS


class Drafter(Protocol):
    """Proposes candidate tokens."""

    most_candidates: int
    """Largest c it supports."""

    def propose(self, batch: Batch) -> Drafts:
        """Propose candidates in the batch's allocation; may write to `table.tokens` after the requests' tokens."""

    def forget(self, number: int) -> None:
        """Drop all data of a request that is over."""

    def prepare(self, table: Any, trees: bool) -> None:
        """Do in advance the set-up work of first proposals over such a table; with `trees`, of branched ones."""


def no_drafts(batch: Batch) -> Drafts:
    """Chains of the wanted lengths, with none of their tokens proposed yet."""
    size, width = len(batch.wanted), int(batch.wanted.max(initial=0))
    place: NDArray[np.int32] = np.tile(np.arange(width, dtype=np.int32), (size, 1))
    return Drafts(
        tokens=np.zeros((size, width), dtype=np.int32),
        parents=place - 1,
        depths=place + 1,
        counts=np.zeros(size, dtype=np.int64),
        drawn_from=[None] * size,
    )


class NoDrafter:
    """A drafter without proposals: the engine runs without speculation for every c."""

    most_candidates = 0

    def propose(self, batch: Batch) -> Drafts:
        """No candidates."""
        return no_drafts(batch)

    def forget(self, number: int) -> None:
        """Do nothing: no data is kept."""

    def prepare(self, table: Any, trees: bool) -> None:
        """Do nothing."""


class Runner(Protocol):
    """A model with a paged cache, as the `model` drafter uses it."""

    def forward(
        self,
        table: Any,
        seats: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: NDArray[np.int64],
        branches: Branches | None = None,
    ) -> Any:
        """Logits of the last `keep[i]` of `counts[i]` tokens from slot `starts[i]`, all requests in one pass."""

    def prepare(self, table: Any, trees: bool) -> None:
        """Do in advance the set-up work of first forwards over such a table; with `trees`, of branched ones."""

    def top(self, logits: Any, count: int = 1) -> NDArray[np.int64]:
        """(rows, count) tokens with the highest of the latest forward's logits, falling; negative ids are deferred.

        A deferred token can be drafted on and verified; its id is read together with the target's choices.
        """


LONGEST_CHAIN = MAX_CANDIDATES
