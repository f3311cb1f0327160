"""Calibration of a drafter's probabilities against observed acceptance, learned while serving."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.speculation.tree import Drafts

PARTS = 16
"""Number of probability bins."""

PRIOR = 16.0
"""Weight of the drafter's own probability, in observations."""


@kernel
def _learn(text, tokens, parents, counts, cells, tried, right):
    """Follow a request's later tokens through its tree: every child of a node on the path was right or wrong.

    text: (tokens,) tokens after the root · tokens, parents, cells: (W,) of one tree.
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

    A greedy target always takes its most probable token. Even a drafter that knows the target's distribution therefore
    underestimates its own first choice and overestimates the others. Counts are kept by greedy or sampled requests,
    first choices or others, and probability. The drafted trees depend on them, the emitted tokens do not.
    """

    def __init__(self) -> None:
        self._tried = np.zeros(4 * PARTS)
        self._right = np.zeros(4 * PARTS)
        self._waiting: dict[int, tuple[int, Drafts, NDArray[np.int64], int]] = {}

    def cells(self, probabilities: NDArray[np.float64], greedy: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Bins in which tokens of these probabilities (F, ranks) are counted; `greedy`: (F,) of their requests."""
        part = np.minimum((probabilities * PARTS).astype(np.int64), PARTS - 1)
        first = np.arange(probabilities.shape[1]) == 0
        return part + PARTS * (first + 2 * greedy[:, None])

    def estimate(self, probabilities: NDArray[np.float64], cells: NDArray[np.int64]) -> NDArray[np.float64]:
        """Probability that such tokens are right, given that all tokens before them are."""
        shares: NDArray[np.float64] = (self._right[cells] + PRIOR * probabilities) / (self._tried[cells] + PRIOR)
        return shares

    def propose(self, numbers: list[int], lengths: list[int], grown: Drafts, cells: NDArray[np.int64]) -> None:
        """Store trees grown after `lengths[i]` tokens of request `numbers[i]`, to be compared with its later tokens."""
        for i, (number, length) in enumerate(zip(numbers, lengths, strict=True)):
            self._waiting[number] = i, grown, cells, length

    def learn(self, number: int, tokens: NDArray[np.int32]) -> None:
        """Compare the request's latest tree with its tokens since then."""
        waiting = self._waiting.pop(number, None)
        if waiting is not None:
            i, grown, cells, length = waiting
            tree = grown.tokens[i], grown.parents[i], grown.counts[i], cells[i]
            _learn(tokens[length:], *tree, self._tried, self._right)

    def forget(self, number: int) -> None:
        """Forget a request that is over."""
        self._waiting.pop(number, None)
