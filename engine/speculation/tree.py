"""Candidate trees: proposals for the requests of a batch, and their attention structure in a forward."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.state import MAX_CANDIDATES

NEXT_RANK = 2 / 3
"""Acceptance assumed by fixed shapes: probability that the drafter's next token is right, given that those before it
are wrong. A chain of three comes before a second child of the root, a chain of four after it."""


@dataclass
class Drafts:
    """A tree of candidates for each of B requests, a row each; in a chain every node has one child.

    Nodes are numbered from 0, parents before their children. Rows are valid up to `counts`.
    """

    tokens: NDArray[np.int32]
    """(B, W)"""
    parents: NDArray[np.int32]
    """(B, W) node, or -1 for the request's last token."""
    depths: NDArray[np.int32]
    """(B, W) tokens from the request's last one: 1 for its children."""
    counts: NDArray[np.int64]
    """(B,) nodes."""
    drawn_from: list[list[NDArray[np.float64] | None] | None]
    """For a request whose candidates were drawn: by 1 + node, the distribution (V,) that the node's children were drawn
    from without replacement, in the order of their numbers. None: they are determined by the tokens before them."""
    paths: NDArray[np.float64] | None = None
    """(B, W) estimated probability that the node and all above it are accepted; only where allocation asks for it."""

    @property
    def branched(self) -> bool:
        """True if any of the trees is more than a chain."""
        return bool(_branched(self.parents, self.counts))


class Branches(NamedTuple):
    """Tree structure of a forward's new tokens, where they are not plain text.

    roots: (R,) the slot in each request's cache after which its tree begins · parents: (R, W) by slot behind the
    root, the slot behind the root of the token before it, -1 for the root · depths: (R, W) likewise, distance from the
    root. Tokens at or before the root are plain text.
    """

    roots: NDArray[np.int64]
    parents: NDArray[np.int32]
    depths: NDArray[np.int32]

    def of(self, requests: NDArray[np.int64]) -> Branches:
        """The branches of some requests."""
        return Branches(self.roots[requests], self.parents[requests], self.depths[requests])


@kernel
def _branched(parents, counts):
    for i in range(len(counts)):
        for node in range(counts[i]):
            if parents[i, node] != node - 1:
                return True
    return False


@kernel
def hide(hidden, slots, roots, parents, depths, window):
    """Mark the cache slots that a new token does not see: all but the text before the root and its own ancestors.

    hidden: (R, count, keys) bool, all False at first · slots: (R, count) of the new tokens · roots, parents, depths: as
    in `Branches` · window: latest positions seen, by depth and not by slot.
    """
    keys = hidden.shape[2]
    for i in range(hidden.shape[0]):
        for t in range(hidden.shape[1]):
            node = slots[i, t] - roots[i] - 1
            position = slots[i, t] if node < 0 else roots[i] + depths[i, node]
            last = min(slots[i, t], roots[i])
            for key in range(keys):
                hidden[i, t, key] = key > last or key <= position - window
            while node >= 0:
                if roots[i] + depths[i, node] > position - window:
                    hidden[i, t, roots[i] + 1 + node] = False
                node = parents[i, node]


class Shape(NamedTuple):
    """A tree that is fixed before its tokens are known; its first c nodes are the tree of c candidates.

    parents, depths: (W,) int32 as in `Drafts` · ranks: (W,) which of its parent's children a node is, 0 the most
    probable · first_child: (W + 1,) by 1 + node, the number of its first child, W if it has none.
    """

    parents: NDArray[np.int32]
    depths: NDArray[np.int32]
    ranks: NDArray[np.int32]
    first_child: NDArray[np.int32]


@lru_cache(maxsize=64)
def fixed_shape(branching: int, depth: int) -> Shape:
    """The nodes with the highest assumed probability, up to `branching` children each and `depth` deep.

    A node whose path goes through children of ranks r is right with probability prod NEXT_RANK (1 - NEXT_RANK)^r. This
    is Sequoia's static tree (Chen et al., 2024, section 3.1) for one acceptance rate by rank everywhere. With
    `branching` = 1 it is a chain.
    """
    nodes: list[tuple[int, int, int]] = []
    candidates = [(-NEXT_RANK, 1, 0, -1)]
    while candidates and len(nodes) < MAX_CANDIDATES:
        best = min(candidates)
        candidates.remove(best)
        value, at, rank, parent = best
        number = len(nodes)
        nodes.append((parent, at, rank))
        if at < depth:
            candidates.append((value * NEXT_RANK, at + 1, 0, number))
        if rank + 1 < branching:
            candidates.append((value * (1.0 - NEXT_RANK), at, rank + 1, parent))
    parents, depths, ranks = (np.array(column, dtype=np.int32) for column in zip(*nodes, strict=True))
    first_child = np.full(len(nodes) + 1, len(nodes), dtype=np.int32)
    for number in range(len(nodes) - 1, -1, -1):
        first_child[1 + parents[number]] = number
    return Shape(parents, depths, ranks, first_child)
