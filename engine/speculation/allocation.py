"""Allocation of a batch's candidates: uniform, local or global allocation of one budget."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.speculation.tree import Drafts

Allocation = Literal["uniform", "local", "global", "slo"]
Score = Literal["confidence", "acceptance"]

TREE_DEPTH = 8
"""Most drafter steps of a tree, and of chains under global allocation, unless `draft_depth` says otherwise."""


@dataclass(frozen=True)
class Speculation:
    """Allocation of the candidates of an action c; the batch's budget is the sum of the planned c_i.

    Args:
        allocation: `uniform`: c_i each, in a shape that is fixed before tokens are known. `local`: each request keeps
            its own c_i candidates of the highest path probability (EAGLE-2, Li et al., 2024, section 4). `global`: the
            candidates of the highest path probability over the whole batch, as many as the budget (TETRIS, Wu et al.,
            2025). `slo`: first those that each request needs to meet the TPOT target, then the best of the batch
            (AdaServe, Li et al., 2025).
        branching: most children of a node; 1 drafts chains.
        draft_depth: most drafter steps in an iteration; None: c for chains that get c each, otherwise 8, but under
            `global` and `slo` no more than 2 c. Every step runs for the whole batch.
        score: source of a candidate's probability: the drafter's `confidence`, or the share of the request's
            own candidates accepted so far (`acceptance`; SmartSpec, X. Liu et al., 2024, section 4).
        cost_aware: with `global`, keep no more candidates than give the highest (expected tokens) / T.
        tpot_target: s per token; read with `slo` only.
    """

    allocation: Allocation = "uniform"
    branching: int = 1
    draft_depth: int | None = None
    score: Score = "confidence"
    cost_aware: bool = False
    tpot_target: float = 0.05

    def __post_init__(self) -> None:
        if self.allocation not in get_args(Allocation):
            raise ValueError(f"allocation={self.allocation!r} must be one of {', '.join(get_args(Allocation))}")
        if self.score not in get_args(Score):
            raise ValueError(f"score={self.score!r} must be one of {', '.join(get_args(Score))}")
        if self.cost_aware and self.allocation != "global":
            raise ValueError(f"cost_aware=true needs allocation=global, not {self.allocation}")
        if not self.tpot_target > 0.0:
            raise ValueError(f"tpot_target={self.tpot_target} must be a number of seconds above 0")
        if self.branching < 1:
            raise ValueError(f"branching={self.branching} must be at least 1 (chains)")
        if self.draft_depth is not None and self.draft_depth < 1:
            raise ValueError(f"draft_depth={self.draft_depth} must be at least 1 token, or null")

    @property
    def ranked(self) -> bool:
        """True if candidates are chosen by path probability; a local chain has no choice."""
        return self.allocation == "global" or (self.allocation == "local" and self.branching > 1)

    def depth(self, candidates: int) -> int:
        """Most drafter steps when the largest c_i is `candidates`."""
        if self.draft_depth is not None:
            return self.draft_depth
        if self.allocation in ("global", "slo"):
            return min(2 * candidates, max(candidates, TREE_DEPTH))
        return candidates if self.branching == 1 else min(candidates, TREE_DEPTH)

    @property
    def variant(self) -> str:
        """Label in reports, next to the controller's; empty for chains of c each."""
        parts: list[str] = [] if self.allocation == "uniform" and self.branching == 1 else [self.allocation]
        parts += ["by acceptance"] if self.score == "acceptance" else []
        parts += ["cost-aware"] if self.cost_aware else []
        parts += [f"top {self.branching}"] if self.branching > 1 else []
        parts += [f"depth {self.draft_depth}"] if self.draft_depth is not None else []
        return " ".join(parts)


CHAINS = Speculation()
"""c candidates in a row for every request."""


@kernel
def sink(heap, size, position, value):
    """Sift the entry at `position` down until no child is greater; ties go to the earlier request."""
    entry = heap[position]
    while True:
        child = 2 * position + 1
        if child >= size:
            break
        other = child + 1
        if other < size and (
            value[heap[other]] > value[heap[child]]
            or (value[heap[other]] == value[heap[child]] and heap[other] < heap[child])
        ):
            child = other
        below = heap[child]
        if value[below] < value[entry] or (value[below] == value[entry] and below > entry):
            break
        heap[position] = below
        position = child
    heap[position] = entry


@kernel
def share_globally(paths, limits, budget, heap, value, kept):
    """Count the nodes that each request keeps so that the batch's `budget` best are kept, in O(C log B).

    paths: (B, W) each request's path probabilities in falling order · limits: (B,) most nodes each may keep · heap:
    (B,) int64 and value: (B,) float64, scratch · kept: (B,) result. A path probability never exceeds that of
    the path's beginning, so the kept nodes are closed under prefixes, and no other set of `budget` nodes within the
    limits has a greater sum. Nodes of probability 0 are never kept.
    """
    size = 0
    for i in range(len(limits)):
        kept[i] = 0
        value[i] = paths[i, 0] if limits[i] > 0 else 0.0
        if value[i] > 0.0:
            heap[size] = i
            size += 1
    for position in range(size // 2 - 1, -1, -1):
        sink(heap, size, position, value)
    while budget > 0 and size > 0:
        best = heap[0]
        kept[best] += 1
        budget -= 1
        if kept[best] < limits[best] and paths[best, kept[best]] > 0.0:
            value[best] = paths[best, kept[best]]
        else:
            size -= 1
            heap[0] = heap[size]
        if size > 0:
            sink(heap, size, 0, value)


def best_nodes(
    speculation: Speculation,
    paths: NDArray[np.float64],
    counts: NDArray[np.int64],
    wanted: NDArray[np.int64],
    limits: NDArray[np.int64],
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(order, kept): request i keeps its nodes `order[i, :kept[i]]`, in falling order of path probability.

    Args:
        paths: (B, W) path probabilities, parents before their children.
        counts: (B,) nodes of each.
        wanted: (B,) c_i.
        limits: (B,) most nodes a request may have whatever the budget; at least c_i.
    """
    known = np.arange(paths.shape[1]) < counts[:, None]
    falling = np.where(known, paths, -1.0)
    # A stable order keeps a parent before a child of the same probability.
    order = np.argsort(-falling, axis=1, kind="stable")
    if speculation.allocation != "global" or paths.shape[1] == 0:
        return order, np.minimum(counts, wanted)
    kept = np.zeros(len(counts), dtype=np.int64)
    heap, value = np.zeros(len(counts), dtype=np.int64), np.zeros(len(counts))
    ranked = np.take_along_axis(falling, order, axis=1)
    share_globally(ranked, np.minimum(counts, limits), int(wanted.sum()), heap, value, kept)
    return order, kept


def keep_best(speculation: Speculation, grown: Drafts, wanted: NDArray[np.int64], limits: NDArray[np.int64]) -> Drafts:
    """Prune grown trees to the nodes that allocation keeps; see `best_nodes`."""
    assert grown.paths is not None
    order, kept = best_nodes(speculation, grown.paths, grown.counts, wanted, limits)
    order = order[:, : int(kept.max(initial=0))]
    number = np.full((len(kept), grown.tokens.shape[1] + 1), -1, dtype=np.int32)
    np.put_along_axis(number, 1 + order, np.arange(order.shape[1], dtype=np.int32)[None], axis=1)
    parents = np.take_along_axis(grown.parents, order, axis=1)
    return Drafts(
        tokens=np.take_along_axis(grown.tokens, order, axis=1),
        parents=np.take_along_axis(number, 1 + parents, axis=1),
        depths=np.take_along_axis(grown.depths, order, axis=1),
        counts=kept,
        drawn_from=grown.drawn_from,
        paths=np.take_along_axis(grown.paths, order, axis=1),
    )
