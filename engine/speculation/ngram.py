"""Prompt lookup: what followed the last time these tokens stood here is proposed again."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.speculation.drafter import LONGEST_CHAIN, Batch, Drafts, no_drafts


class NgramIndex:
    """Where each n-gram of one request ended last, for n in [shortest, longest]; grows with the request."""

    def __init__(self, shortest: int, longest: int) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._next: dict[tuple[int, ...], int] = {}
        self._indexed = 0

    def extend(self, tokens: NDArray[np.int32]) -> None:
        """Take in the tokens that are new since the last call; the last of them has no continuation yet."""
        first = max(0, self._indexed - self._sizes.start)
        recent = tokens[first:].tolist()
        for end in range(self._indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    self._next[tuple(recent[end - size - first : end - first])] = end
        self._indexed = max(self._indexed, len(tokens) - 1)

    def continuation(self, tokens: NDArray[np.int32]) -> int | None:
        """The position after the latest earlier occurrence of the longest n-gram that `tokens` ends with."""
        ending = tokens[-self._sizes.start :].tolist()
        for size in self._sizes:
            if size <= len(ending):
                found = self._next.get(tuple(ending[-size:]))
                if found is not None:
                    return found
        return None


class NgramDrafter:
    """Proposes the continuation of the longest n-gram that stood earlier in the request's own tokens.

    Prompt lookup decoding (Saxena, 2023), by a hash index per request instead of a scan. Its candidates are certain:
    a sampled request accepts each with the target's probability of it.

    Args:
        shortest: least n of the n-grams looked up, >= 1.
        longest: most n; longer matches are tried first.
    """

    most_candidates = LONGEST_CHAIN

    def __init__(self, shortest: int = 1, longest: int = 3) -> None:
        if not 1 <= shortest <= longest:
            raise ValueError(f"shortest={shortest}, longest={longest}: need 1 <= shortest <= longest tokens")
        self._shortest, self._longest = shortest, longest
        self._indices: dict[int, NgramIndex] = {}

    def propose(self, batch: Batch) -> Drafts:
        """Candidates where an n-gram was met before; a match near the end is continued into its own proposal."""
        drafts = no_drafts(batch)
        for i in np.flatnonzero(batch.wanted):
            row = batch.table.tokens[batch.seats[i]]
            length, wanted = int(batch.lengths[i]), int(batch.wanted[i])
            index = self._indices.setdefault(int(batch.numbers[i]), NgramIndex(self._shortest, self._longest))
            index.extend(row[:length])
            source = index.continuation(row[:length])
            if source is None:
                continue
            for place in range(wanted):
                row[length + place] = row[source + place]
            drafts.tokens[i, :wanted] = row[length : length + wanted]
            drafts.counts[i] = wanted
        return drafts

    def forget(self, number: int) -> None:
        """Drop the request's index."""
        self._indices.pop(number, None)
