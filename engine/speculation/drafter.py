"""What every drafter offers the engine, and the drafter that never proposes anything."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.core.state import MAX_CANDIDATES
from engine.speculation.sampling import Sampling


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
    """(B,) candidates asked for; 0 for none."""


@dataclass
class Drafts:
    """A chain of candidates for each request of a `Batch`."""

    tokens: NDArray[np.int32]
    """(B, most wanted); row i is valid up to `counts[i]`."""
    counts: NDArray[np.int64]
    """(B,) candidates proposed, at most as many as wanted."""
    probabilities: list[NDArray[np.float64] | None]
    """(counts[i], V) what a sampled request's candidates were drawn from; None: the drafter was certain."""


class Drafter(Protocol):
    """Proposes candidate tokens."""

    most_candidates: int
    """Longest chain it can propose."""

    def propose(self, batch: Batch) -> Drafts:
        """Candidates for the batch; may write them to `table.tokens` behind what the requests have."""

    def forget(self, number: int) -> None:
        """Drop whatever is kept for a request that is over."""


def no_drafts(batch: Batch) -> Drafts:
    """Room for the batch's candidates with none proposed."""
    size = len(batch.wanted)
    width = int(batch.wanted.max(initial=0))
    return Drafts(np.zeros((size, width), dtype=np.int32), np.zeros(size, dtype=np.int64), [None] * size)


class NoDrafter:
    """Never proposes anything: the engine runs without speculation whatever c is."""

    most_candidates = 0

    def propose(self, batch: Batch) -> Drafts:
        """No candidates."""
        return no_drafts(batch)

    def forget(self, number: int) -> None:
        """Nothing is kept."""


class Runner(Protocol):
    """A model with a paged cache, as the `model` drafter uses it."""

    def forward(
        self,
        table: Any,
        seats: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: NDArray[np.int64],
    ) -> Any:
        """Logits of the last `keep[i]` of `counts[i]` tokens from position `starts[i]`, all requests in one pass."""


LONGEST_CHAIN = MAX_CANDIDATES
