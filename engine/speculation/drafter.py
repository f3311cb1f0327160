"""What every drafter offers the engine, and the drafter that never proposes anything."""

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
    """What a drafter may know of a request: its settings and its random stream."""

    @property
    def sampling(self) -> Sampling: ...

    @property
    def random(self) -> np.random.Generator: ...


class TokenTable(Protocol):
    """The cache's table as drafters see it: token ids by seat, and how far the drafter's own cache is filled."""

    tokens: NDArray[np.int32]
    draft_computed: NDArray[np.int32]

    def borrow(self, seats: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Name free blocks behind what the seats hold, up to slot `ends[i]` of each; returns how far they reach."""


@dataclass
class Batch:
    """B requests that want candidates. `table.tokens[seats[i], :lengths[i]]` is what request i has so far."""

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
    """(B,) most candidates, and deepest, that the request's output leaves room for; at least `wanted`."""
    speculation: Speculation = CHAINS


class Drafter(Protocol):
    """Proposes candidate tokens."""

    most_candidates: int
    """Largest c it can be asked for."""

    def propose(self, batch: Batch) -> Drafts:
        """Candidates for the batch, allocated as it asks; may write to `table.tokens` behind what the requests have."""

    def forget(self, number: int) -> None:
        """Drop whatever is kept for a request that is over."""

    def prepare(self, table: Any, trees: bool) -> None:
        """Do beforehand what first proposals over such a table, with `trees` branched ones, would take time for."""


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
    """Never proposes anything: the engine runs without speculation whatever c is."""

    most_candidates = 0

    def propose(self, batch: Batch) -> Drafts:
        """No candidates."""
        return no_drafts(batch)

    def forget(self, number: int) -> None:
        """Nothing is kept."""

    def prepare(self, table: Any, trees: bool) -> None:
        """There is nothing to do."""


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
        """Do beforehand what first forwards over such a table, with `trees` branched ones, would take time for."""

    def top(self, logits: Any, count: int = 1) -> NDArray[np.int64]:
        """(rows, count) tokens with the highest of the latest forward's logits, falling; negative ones are promised.

        A promised token can be drafted on and verified; which one it is comes to be known with the target's choices.
        """


LONGEST_CHAIN = MAX_CANDIDATES
