"""Prompt lookup: proposes the tokens that followed earlier occurrences of a request's last tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.speculation.allocation import Speculation, keep_best
from engine.speculation.drafter import LONGEST_CHAIN, Batch, Drafts, no_drafts


class NgramIndex:
    """Index of the end positions of one request's n-grams, for n in [shortest, longest]; grows with the request.

    The latest `remembered` positions of every n-gram are kept.
    """

    def __init__(self, shortest: int, longest: int, remembered: int = 1) -> None:
        self._sizes = range(longest, shortest - 1, -1)
        self._remembered = remembered
        self._next: dict[tuple[int, ...], tuple[int, ...]] = {}
        self._indexed = 0

    def extend(self, tokens: NDArray[np.int32]) -> None:
        """Add the tokens that are new since the last call; the last of them has no continuation yet."""
        first = max(0, self._indexed - self._sizes.start)
        recent = tokens[first:].tolist()
        for end in range(self._indexed + 1, len(tokens)):
            for size in self._sizes:
                if size <= end:
                    key = tuple(recent[end - size - first : end - first])
                    earlier = self._next.get(key, ())[: self._remembered - 1] if self._remembered > 1 else ()
                    self._next[key] = (end, *earlier)
        self._indexed = max(self._indexed, len(tokens) - 1)

    def continuations(self, tokens: NDArray[np.int32]) -> tuple[int, tuple[int, ...]]:
        """(n, places): the longest n-gram that ends `tokens` and occurred earlier, and the positions after it.

        The latest place comes first; none if there is no such n-gram.
        """
        ending = tokens[-self._sizes.start :].tolist()
        for size in self._sizes:
            if size <= len(ending):
                found = self._next.get(tuple(ending[-size:]))
                if found is not None:
                    return size, found
        return 0, ()

    def continuation(self, tokens: NDArray[np.int32]) -> int | None:
        """The latest of the `continuations`; None if there are none."""
        places = self.continuations(tokens)[1]
        return places[0] if places else None


class NgramDrafter:
    """Proposes the continuations of the longest n-gram that occurred earlier in the request's own tokens.

    Prompt lookup decoding (Saxena, 2023), by a hash index per request instead of a scan. Its candidates are determined
    by the tokens before them. With `branching` > 1 the latest continuations share their beginnings in a tree, of which
    the nodes with the highest path probability are kept.

    This probability is an estimate: the k-th token of a continuation is right with probability r^k. r is the share of
    right tokens among those proposed after a match of this length, over all requests so far, starting from one of two.
    The next latest continuation has the (1 - r) that the one before it leaves.

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
        self._proposed: dict[int, tuple[int, int, list[int]]] = {}
        self._right = np.ones(longest + 1)
        self._tried = np.full(longest + 1, 2.0)

    def propose(self, batch: Batch) -> Drafts:
        """Propose candidates where an n-gram occurred before; a match near the end continues into its own proposal."""
        how = batch.speculation
        depth = how.depth(int(batch.wanted.max(initial=0)))
        most = np.minimum(batch.limits if how.allocation == "global" else batch.wanted, depth)
        matches, places = self._look_up(batch, most)
        rates = self._right[matches] / self._tried[matches]
        if how.branching == 1:
            drafts = _chains(batch, most, places, rates)
        else:
            drafts = _trees(batch, most, places, rates)
        if not _estimated(how):
            return drafts
        for i, found in enumerate(places):
            if found:
                self._proposed[int(batch.numbers[i])] = int(matches[i]), int(batch.lengths[i]), _first_branch(drafts, i)
        return keep_best(how, drafts, batch.wanted, batch.limits)

    def _look_up(self, batch: Batch, most: NDArray[np.int64]) -> tuple[NDArray[np.int64], list[tuple[int, ...]]]:
        """(matched n, continuing places) of every request that may have candidates."""
        matches = np.zeros(len(most), dtype=np.int64)
        places: list[tuple[int, ...]] = [()] * len(most)
        for i in np.flatnonzero(most).tolist():
            tokens = batch.table.tokens[batch.seats[i], : batch.lengths[i]]
            number = int(batch.numbers[i])
            index = self._indices.get(number)
            if index is None:
                index = NgramIndex(self._shortest, self._longest, batch.speculation.branching)
                self._indices[number] = index
            index.extend(tokens)
            if _estimated(batch.speculation):
                self._learn(number, tokens)
            matches[i], places[i] = index.continuations(tokens)
        return matches, places

    def forget(self, number: int) -> None:
        """Drop the request's index."""
        self._indices.pop(number, None)
        self._proposed.pop(number, None)

    def prepare(self, table: Any, trees: bool) -> None:
        """Do nothing."""

    def _learn(self, number: int, tokens: NDArray[np.int32]) -> None:
        """Count how much of the request's latest proposal was right, as far as its tokens are known."""
        if number not in self._proposed:
            return
        match, length, chain = self._proposed.pop(number)
        for proposed, token in zip(chain, tokens[length:].tolist(), strict=False):
            self._tried[match] += 1
            if proposed != token:
                break
            self._right[match] += 1


def _estimated(how: Speculation) -> bool:
    """Return True if path probabilities are needed: a determined tree is cut by them, even under `uniform`."""
    return how.allocation == "global" or how.branching > 1


def _first_branch(drafts: Drafts, i: int) -> list[int]:
    """Tokens of the latest continuation, the first nodes of the tree."""
    parents = drafts.parents[i, : drafts.counts[i]]
    elsewhere = np.flatnonzero(parents != np.arange(len(parents)) - 1)
    return drafts.tokens[i, : elsewhere[0] if len(elsewhere) else len(parents)].tolist()


def _chains(batch: Batch, most: NDArray[np.int64], places: list[tuple[int, ...]], rates: NDArray[np.float64]) -> Drafts:
    """The latest continuation of each request."""
    drafts = no_drafts(batch)
    width = int(most.max(initial=0))
    size, steps = len(most), np.arange(width, dtype=np.int32)
    first = np.array([found[0] if found else -1 for found in places], dtype=np.int64)
    drafts.counts = np.where(first < 0, 0, most)
    source = first[:, None] + steps % np.maximum(1, batch.lengths - first)[:, None]
    drafts.tokens = batch.table.tokens[batch.seats[:, None], source]
    drafts.parents, drafts.depths = np.tile(steps - 1, (size, 1)), np.tile(steps + 1, (size, 1))
    drafts.paths = rates[:, None] ** drafts.depths
    return drafts


def _trees(batch: Batch, most: NDArray[np.int64], places: list[tuple[int, ...]], rates: NDArray[np.float64]) -> Drafts:
    """All continuations of each request, `most` tokens of each, equal beginnings once."""
    size, width = len(most), batch.speculation.branching * int(most.max(initial=0))
    drafts = no_drafts(batch)
    drafts.tokens = np.zeros((size, width), dtype=np.int32)
    drafts.parents = np.full((size, width), -1, dtype=np.int32)
    drafts.depths = np.zeros((size, width), dtype=np.int32)
    drafts.paths = np.zeros((size, width))
    for i, found in enumerate(places):
        if not found:
            continue
        row, length = batch.table.tokens[batch.seats[i]], int(batch.lengths[i])
        nodes = _merged([_continuation(row, length, place, int(most[i])) for place in found], float(rates[i]))
        count = drafts.counts[i] = len(nodes)
        columns: tuple[NDArray[Any], ...] = (drafts.tokens, drafts.parents, drafts.depths, drafts.paths)
        for column, values in zip(columns, zip(*nodes, strict=True), strict=True):
            column[i, :count] = values
    return drafts


def _continuation(row: NDArray[np.int32], length: int, place: int, count: int) -> list[int]:
    """`count` tokens from `place` on; at the end of the known tokens it continues again from `place`."""
    tokens: list[int] = row[place + np.arange(count) % (length - place)].tolist()
    return tokens


def _merged(continuations: list[list[int]], rate: float) -> list[tuple[int, int, int, float]]:
    """(token, parent, depth, path probability) of a tree of the continuations, with shared prefixes."""
    nodes: list[tuple[int, int, int, float]] = []
    children: dict[int, dict[int, int]] = {}
    for continuation in continuations:
        parent, path = -1, 1.0
        for depth, token in enumerate(continuation, start=1):
            siblings = children.setdefault(parent, {})
            if token not in siblings:
                nodes.append((token, parent, depth, path * rate * (1.0 - rate) ** len(siblings)))
                siblings[token] = len(nodes) - 1
            parent = siblings[token]
            path = nodes[parent][3]
    return nodes
