"""A small model as drafter: reads the target's output and grows candidate trees after it, level by level."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.state import MAX_CANDIDATES
from engine.speculation.allocation import best_nodes, keep_best
from engine.speculation.calibration import Calibration
from engine.speculation.drafter import LONGEST_CHAIN, Batch, Drafts, Runner, no_drafts
from engine.speculation.sampling import Sampling, draw
from engine.speculation.tree import Branches, fixed_shape

MOST_EXPANDED = 2 * MAX_CANDIDATES
"""Most nodes of one request that the drafter computes children of in one iteration."""


class ModelDrafter:
    """Drafts with a model of the target's vocabulary over its own paged cache.

    Every level of the trees is one pass over the requests, in which new nodes see their ancestors only. The cache uses
    the block ids of the target's table, so memory is accounted once and a preempted request loses both caches together;
    nodes that are computed and not kept lie in free blocks. The first pass also reads tokens that the drafter has not
    seen: a prompt, tokens emitted while c was 0, the accepted path of a tree.
    """

    most_candidates = LONGEST_CHAIN

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._calibration = Calibration()

    def propose(self, batch: Batch) -> Drafts:
        """Draft trees for the batch, one pass per level; see `Speculation` for their shape."""
        if batch.speculation.ranked:
            grown = _Growth(batch, self._runner, self._calibration).run()
            return keep_best(batch.speculation, grown, batch.wanted, batch.limits)
        return self._chains(batch) if batch.speculation.branching == 1 else self._fixed_trees(batch)

    def forget(self, number: int) -> None:
        """Drop the request's latest tree; its cache goes with its blocks."""
        self._calibration.forget(number)

    def prepare(self, table: Any, trees: bool) -> None:
        """See `Drafter.prepare`."""
        self._runner.prepare(table, trees)

    def _chains(self, batch: Batch) -> Drafts:
        """Draft a chain of c_i tokens for each request; accepted ones stay in the cache."""
        table = batch.table
        drafts = no_drafts(batch)
        drafts.counts = np.minimum(batch.wanted, batch.speculation.depth(int(batch.wanted.max(initial=0))))
        sampled = _note_draws(batch, drafts)
        for depth in range(int(drafts.counts.max(initial=0))):
            who = np.flatnonzero(drafts.counts > depth)
            if depth == 0:
                logits = _catch_up(self._runner, batch, who)
            else:
                seats, ends = batch.seats[who], batch.lengths[who] + depth
                table.tokens[seats, ends - 1] = drafts.tokens[who, depth - 1]
                one = np.ones_like(who)
                logits = self._runner.forward(table, seats, ends - 1, one, one)
                table.draft_computed[seats] = ends
            drafts.tokens[who, depth] = self._runner.top(logits)[:, 0]
            if sampled:
                _draw(batch, drafts, logits, who, np.full_like(who, depth - 1))
        return drafts

    def _fixed_trees(self, batch: Batch) -> Drafts:
        """Draft the first c_i nodes of a shape: greedy requests take the top tokens, sampled ones draw theirs."""
        how, most = batch.speculation, int(batch.wanted.max(initial=0))
        shape = fixed_shape(how.branching, how.depth(most))
        size, width = len(batch.wanted), min(most, len(shape.parents))
        drafts = no_drafts(batch)
        drafts.tokens = np.zeros((size, width), dtype=np.int32)
        drafts.parents = np.tile(shape.parents[:width], (size, 1))
        drafts.depths = np.tile(shape.depths[:width], (size, 1))
        counts = drafts.counts = np.minimum(batch.wanted, width)
        sampled = _note_draws(batch, drafts)
        slots = _Slots(batch, width, width)
        nodes = np.array([-1])
        for depth in range(1, 1 + int(shape.depths[:width].max(initial=0))):
            who, which = np.nonzero(shape.first_child[1 + nodes] < counts[:, None])
            above = nodes[which]
            if depth == 1:
                logits = _catch_up(self._runner, batch, who)
            else:
                logits = slots.compute(self._runner, who, above, drafts)
            nodes = np.flatnonzero(shape.depths[:width] == depth)
            ranks = shape.ranks[nodes]
            row = np.zeros((size, width + 1), dtype=np.int64)
            row[who, 1 + above] = np.arange(len(who))
            take, which = np.nonzero(nodes < counts[:, None])
            child = nodes[which]
            top = self._runner.top(logits, 1 + int(ranks.max()))
            drafts.tokens[take, child] = top[row[take, 1 + shape.parents[child]], ranks[which]]
            if sampled:
                _draw(batch, drafts, logits, who, above)
        return drafts


class _Slots:
    """Cache slots of computed nodes in the drafter's cache, after each request's last token."""

    def __init__(self, batch: Batch, nodes: int, slots: int) -> None:
        size = len(batch.wanted)
        self._batch = batch
        self.used = np.zeros(size, dtype=np.int64)
        self._slot_of = np.full((size, nodes + 1), -1, dtype=np.int32)
        self._parents = np.full((size, slots), -1, dtype=np.int32)
        self._depths = np.zeros((size, slots), dtype=np.int32)

    def compute(self, runner: Runner, who: NDArray[np.int64], nodes: NDArray[np.int64], drafts: Drafts) -> Any:
        """Logits after nodes of requests, grouped by request; their parents have been computed before."""
        batch = self._batch
        requests, first, counts = np.unique(who, return_index=True, return_counts=True)
        slots = self.used[who] + np.arange(len(who)) - np.repeat(first, counts)
        starts = batch.lengths[requests] + self.used[requests]
        self._slot_of[who, 1 + nodes] = slots
        self._parents[who, slots] = self._slot_of[who, 1 + drafts.parents[who, nodes]]
        self._depths[who, slots] = drafts.depths[who, nodes]
        self.used[requests] += counts
        batch.table.tokens[batch.seats[who], batch.lengths[who] + slots] = drafts.tokens[who, nodes]
        branches = None
        if batch.speculation.branching > 1:
            branches = Branches(batch.lengths[requests] - 1, self._parents[requests], self._depths[requests])
        return runner.forward(batch.table, batch.seats[requests], starts, counts, counts, branches)


class _Growth:
    """Trees grown by path probability, as `Calibration` estimates it.

    The children of every node that allocation would keep so far are computed. A path probability only falls along a
    path, so no descendant of a node outside the best can be among the best: leaving it unexpanded does not change the
    result. At most `MOST_EXPANDED` nodes of a request are expanded, and no more than there are free cache slots.
    """

    def __init__(self, batch: Batch, runner: Runner, calibration: Calibration) -> None:
        self._batch, self._runner, self._calibration = batch, runner, calibration
        how = batch.speculation
        # Under global allocation a request may get candidates that others do not use.
        may = batch.limits if how.allocation == "global" else batch.wanted
        self._depth = np.minimum(how.depth(int(batch.wanted.max(initial=0))), may)
        further = max(0, int(self._depth.max(initial=0)) - 1)
        slots = min(MOST_EXPANDED, further * int(batch.wanted.sum() if how.branching > 1 else 1))
        self._room = np.zeros_like(may)
        if slots > 0:
            self._room = batch.table.borrow(batch.seats, batch.lengths + slots) - batch.lengths
        size, width = len(may), how.branching * (1 + slots)
        self._slots = _Slots(batch, width, max(1, slots))
        self._drafts = Drafts(
            tokens=np.zeros((size, width), dtype=np.int32),
            parents=np.full((size, width), -1, dtype=np.int32),
            depths=np.zeros((size, width), dtype=np.int32),
            counts=np.zeros(size, dtype=np.int64),
            drawn_from=[None] * size,
            paths=np.zeros((size, width)),
        )
        self._cells = np.zeros((size, width), dtype=np.int64)
        self._greedy = np.array([request.sampling.greedy for request in batch.requests], dtype=np.bool_)

    def run(self) -> Drafts:
        """The trees, with more nodes than allocation will keep."""
        batch, numbers = self._batch, self._batch.numbers.tolist()
        for number, seat, length in zip(numbers, batch.seats.tolist(), batch.lengths.tolist(), strict=True):
            self._calibration.learn(number, batch.table.tokens[seat, :length])
        who = np.flatnonzero(self._depth > 0)
        self._append(who, np.full_like(who, -1), _catch_up(self._runner, self._batch, who), 1)
        for depth in range(1, int(self._depth.max(initial=0))):
            who, nodes = self._frontier(depth)
            if len(who) == 0:
                break
            self._append(who, nodes, self._slots.compute(self._runner, who, nodes, self._drafts), depth + 1)
        self._calibration.propose(numbers, batch.lengths.tolist(), self._drafts, self._cells)
        return self._drafts

    def _append(self, who: NDArray[np.int64], nodes: NDArray[np.int64], logits: Any, depth: int) -> None:
        """Give nodes, grouped by request, their most probable children."""
        drafts, branching = self._drafts, min(self._batch.speculation.branching, logits.shape[-1])
        assert drafts.paths is not None
        probabilities, tokens = self._most_probable(who, logits, branching)
        above = np.where(nodes < 0, 1.0, drafts.paths[who, nodes])
        requests, first, counts = np.unique(who, return_index=True, return_counts=True)
        begins = drafts.counts[who] + branching * (np.arange(len(who)) - np.repeat(first, counts))
        rows, columns = who[:, None], begins[:, None] + np.arange(branching)
        drafts.tokens[rows, columns] = tokens
        drafts.parents[rows, columns] = nodes[:, None]
        drafts.depths[rows, columns] = depth
        cells = self._cells[rows, columns] = self._calibration.cells(probabilities, self._greedy[who])
        drafts.paths[rows, columns] = above[:, None] * self._calibration.estimate(probabilities, cells)
        drafts.counts[requests] += branching * counts

    def _most_probable(
        self, who: NDArray[np.int64], logits: Any, count: int
    ) -> tuple[NDArray[np.float64], NDArray[np.int64]]:
        """(F, count) probabilities and tokens, falling; a sampled request's under its settings."""
        best = logits.double().softmax(-1).topk(count, dim=-1)
        probabilities, tokens = np.nan_to_num(best.values.cpu().numpy()), best.indices.cpu().numpy()
        for row, i in enumerate(who.tolist()):
            sampling = self._batch.requests[i].sampling
            if not sampling.greedy:
                weights = _distribution(sampling, logits, row)
                tokens[row] = np.argsort(-weights, kind="stable")[:count]
                probabilities[row] = weights[tokens[row]]
        return np.minimum(probabilities, 1.0), tokens

    def _frontier(self, depth: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """(requests, nodes) of the deepest level that allocation would currently keep, the best that fit."""
        batch, drafts = self._batch, self._drafts
        assert drafts.paths is not None
        order, kept = best_nodes(batch.speculation, drafts.paths, drafts.counts, batch.wanted, batch.limits)
        chosen = np.arange(order.shape[1]) < kept[:, None]
        chosen &= np.take_along_axis(drafts.depths, order, axis=1) == depth
        chosen &= (self._depth > depth)[:, None]
        chosen &= np.cumsum(chosen, axis=1) <= (self._room - self._slots.used)[:, None]
        who, place = np.nonzero(chosen)
        return who, order[who, place]


def _note_draws(batch: Batch, drafts: Drafts) -> bool:
    """Reserve memory for the distributions of sampled requests' candidates; returns whether there are any."""
    sampled = [i for i, request in enumerate(batch.requests) if not request.sampling.greedy]
    for i in sampled:
        drafts.drawn_from[i] = [None] * (drafts.tokens.shape[1] + 1)
    return bool(sampled)


def _catch_up(runner: Runner, batch: Batch, who: NDArray[np.int64]) -> Any:
    """Logits after the requests' last tokens; the drafter first reads their unseen tokens."""
    seats, ends = batch.seats[who], batch.lengths[who]
    starts = batch.table.draft_computed[seats].astype(np.int64)
    logits = runner.forward(batch.table, seats, starts, ends - starts, np.ones_like(who))
    batch.table.draft_computed[seats] = ends
    return logits


def _distribution(sampling: Sampling, logits: Any, row: int) -> NDArray[np.float64]:
    """(V,) distribution of a sampled request's candidates; arbitrary where the drafter's logits are not finite.

    The target verifies candidates, so such a drafter costs speed but no request fails.
    """
    scores = logits[row : row + 1].double().cpu().numpy()
    if not np.isfinite(scores.max()):
        scores = np.zeros_like(scores)
    return sampling.probabilities(scores)[0]


def _draw(batch: Batch, drafts: Drafts, logits: Any, who: NDArray[np.int64], nodes: NDArray[np.int64]) -> None:
    """Draw the children of sampled requests' nodes without replacement, and record their distributions."""
    for row, (i, node) in enumerate(zip(who.tolist(), nodes.tolist(), strict=True)):
        noted = drafts.drawn_from[i]
        if noted is None:
            continue
        request = batch.requests[i]
        noted[1 + node] = weights = _distribution(request.sampling, logits, row)
        left = weights.copy()
        for child in np.flatnonzero(drafts.parents[i, : drafts.counts[i]] == node):
            if left.any():
                drafts.tokens[i, child] = token = draw(left, request.random)
                left[token] = 0.0
