"""How often a drafter's candidates turn out right, by how probable it called them: learned while serving."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.speculation.tree import Drafts

PARTS = 16
"""Probabilities are told apart by 1 / PARTS."""

PRIOR = 16.0
"""The drafter's own word counts as so many observations."""


@kernel
def _learn(text, tokens, parents, counts, cells, tried, right):
    """Follow what a request went on with through its tree: every child of a node on the way was right or wrong.

    text: (tokens,) what followed the root · tokens, parents, cells: (W,) of one tree.
    """
    at = -1
    node = 0
    for place in range(len(text)):
        found = -1
        for node in range(at + 1, counts):
            if parents[node] == at:
                tried[cells[node]] += 1
                if tokens[node] == text[place]:
                    right[cells[node]] += 1
                    found = node
        if found < 0:
            break
        at = found


class Calibration:
    """Turns the drafter's probability of a token into the share of such tokens that were right.

    A greedy target takes its most probable token every time, not as often as it is probable: a drafter that knows the
    target's distribution still calls its own first choice less probable than it is to be right, and the others more.
    Kept for greedy and sampled requests, first choices and others, and by probability. Which trees are drafted depends
    on it, what is emitted does not.
    """

    def __init__(self) -> None:
        self._tried = np.zeros(4 * PARTS)
        self._right = np.zeros(4 * PARTS)
        self._waiting: dict[int, tuple[int, Drafts, NDArray[np.int64], int]] = {}

    def cells(self, probabilities: NDArray[np.float64], greedy: NDArray[np.bool_]) -> NDArray[np.int64]:
        """What tokens of these probabilities (F, ranks) are counted under; `greedy`: (F,) of their requests."""
        part = np.minimum((probabilities * PARTS).astype(np.int64), PARTS - 1)
        first = np.arange(probabilities.shape[1]) == 0
        return part + PARTS * (first + 2 * greedy[:, None])

    def estimate(self, probabilities: NDArray[np.float64], cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """The probability that such tokens are right, given that what stands before them is."""
        shares: NDArray[np.float64] = (self._right[cells] + PRIOR * probabilities) / (self._tried[cells] + PRIOR)
        return shares

    def propose(self, numbers: list[int], lengths: list[int], grown: Drafts, cells: NDArray[np.int64]) -> None:
        """Remember trees that were grown behind `lengths[i]` tokens of request `numbers[i]`, until it is known more."""
        for i, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            self._waiting[number] = i, grown, cells, length

    def learn(self, number: int, tokens: NDArray[np.int32]) -> None:
        """Compare the request's latest tree with what it has become."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            i, grown, cells, length = waiting
            tree = grown.tokens[i], grown.parents[i], grown.counts[i], cells[i]
            _learn(tokens[length:], *tree, self._tried, self._right)

    def forget(self, number: int) -> None:
        """The request is over."""
        self._waiting.pop(number, None)
