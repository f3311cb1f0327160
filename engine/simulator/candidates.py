"""Simulated speculation: which candidates a batch's drafter proposes, who gets them, and which are accepted.

A workload fixes, for every output position, at which rank of the drafter's order the target's token stands, and how
probable the drafter calls its first choice there. Chains of c each need nothing but the length of the run of first
choices that are right. Everything else is grown here candidate by candidate, the most probable first:

- What stands behind a request's last token is believed by depth: the drafter's first choice at depth d is right, given
  that what stands before it is, with the confidence of the output position d ahead; its choice of rank r with the rest
  of that probability times `rank_shares[r]`, and never more than the choice before it. Off the path that the target
  takes, too, the confidence of the position stands for that of the drafter there, which no log records.
- A candidate of rank r at depth d is right where the workload's rank at that position is r and all before it are right.

Growing takes one drafter pass a level, for the whole batch: down to the level behind the deepest candidate kept (to
know that nothing there is worth keeping), and no deeper than the draft depth.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import zeta

from engine.compiled import kernel, outlined
from engine.core.acceptance import own_acceptance
from engine.core.redistribute import redistribute
from engine.core.state import MAX_CANDIDATES
from engine.simulator.timing import batch_time
from engine.speculation.allocation import Speculation, sink
from engine.speculation.tree import fixed_shape

CHAINS, UNIFORM_TREES, LOCAL, GLOBAL, SLO = range(5)

RANK_EXPONENT = 1.4
"""The drafter believes that its choice of rank r >= 1 is right with probability proportional to r^-1.4, when its first
is not: the law that `engine.workload.agreement` draws ranks from."""


class AcceptanceTrace(NamedTuple):
    """Where drafter and target agree, by output position of all requests of a system.

    run_lengths, rank: (P,) uint8 and confidence: (P,) float32, as in `Workload`; a request's begin at its
    `first_position`, wherever it is served. rank and confidence are empty where chains of c each need neither.
    """

    run_lengths: NDArray[np.uint8]
    rank: NDArray[np.uint8]
    confidence: NDArray[np.float32]


class Sharing(NamedTuple):
    """How the candidates of an action are shared out, and memory to work in.

    kind: how candidates are allocated (`CHAINS`, ...) · branching: most children · by_acceptance, cost_aware: 0 or 1,
    and tpot_target, as in `Speculation` · depths: (MAX_CANDIDATES + 1,) draft depth by c · rank_shares: (branching,) ·
    shape_depths, shape_ranks, shape_parents: (W,) the tree that uniform allocation takes the first c nodes of.

    The rest is memory to work in, by slot of the batch. kept, tokens, order, size: (S,) nodes, tokens, places in a heap
    or an order, nodes on the frontier · value: (S,) of the best node there · frontier_value, frontier_above: (S, W + 2)
    path probability of a node that may be next, and of its parent · frontier_depth, frontier_rank, frontier_right: (S,
    W + 2) likewise, and whether its parent is right · node_depth, node_parent, node_right: (S, W) of the nodes kept,
    best first · need: (S,) · taken, gains: (S * W,) who got the batch's k-th candidate, and tokens expected with it.
    """

    kind: int
    branching: int
    by_acceptance: int
    cost_aware: int
    tpot_target: float
    depths: NDArray[np.int64]
    rank_shares: NDArray[np.float64]
    shape_depths: NDArray[np.int32]
    shape_ranks: NDArray[np.int32]
    shape_parents: NDArray[np.int32]
    kept: NDArray[np.int64]
    tokens: NDArray[np.int64]
    order: NDArray[np.int64]
    size: NDArray[np.int64]
    value: NDArray[np.float64]
    frontier_value: NDArray[np.float64]
    frontier_above: NDArray[np.float64]
    frontier_depth: NDArray[np.int32]
    frontier_rank: NDArray[np.int32]
    frontier_right: NDArray[np.int32]
    node_depth: NDArray[np.int32]
    node_parent: NDArray[np.int32]
    node_right: NDArray[np.int32]
    need: NDArray[np.float64]
    taken: NDArray[np.int64]
    gains: NDArray[np.float64]


def new_trace(positions: int, ranks: bool) -> AcceptanceTrace:
    """Room for so many output positions, with their ranks and confidences or without."""
    ranked = positions if ranks else 0
    return AcceptanceTrace(
        run_lengths=np.zeros(positions, dtype=np.uint8),
        rank=np.zeros(ranked, dtype=np.uint8),
        confidence=np.zeros(ranked, dtype=np.float32),
    )


def new_sharing(speculation: Speculation, max_num_seqs: int) -> Sharing:
    """Candidates shared out as `speculation` says, in batches of up to `max_num_seqs`."""
    kind = _kind(speculation)
    slots, width = (max_num_seqs, MAX_CANDIDATES) if kind != CHAINS else (1, 1)
    shape = fixed_shape(speculation.branching, speculation.draft_depth or speculation.depth(MAX_CANDIDATES))
    ranks = np.arange(1, speculation.branching)
    return Sharing(
        kind=kind,
        branching=speculation.branching,
        by_acceptance=int(speculation.score == "acceptance"),
        cost_aware=int(speculation.cost_aware),
        tpot_target=speculation.tpot_target,
        depths=np.array([speculation.depth(c) if c > 0 else 0 for c in range(MAX_CANDIDATES + 1)], dtype=np.int64),
        rank_shares=np.concatenate(([1.0], ranks**-RANK_EXPONENT / zeta(RANK_EXPONENT, 1))),
        shape_depths=shape.depths,
        shape_ranks=shape.ranks,
        shape_parents=shape.parents,
        kept=np.zeros(slots, dtype=np.int64),
        tokens=np.zeros(slots, dtype=np.int64),
        order=np.zeros(slots, dtype=np.int64),
        size=np.zeros(slots, dtype=np.int64),
        value=np.zeros(slots),
        frontier_value=np.zeros((slots, width + 2)),
        frontier_above=np.zeros((slots, width + 2)),
        frontier_depth=np.zeros((slots, width + 2), dtype=np.int32),
        frontier_rank=np.zeros((slots, width + 2), dtype=np.int32),
        frontier_right=np.zeros((slots, width + 2), dtype=np.int32),
        node_depth=np.zeros((slots, width), dtype=np.int32),
        node_parent=np.zeros((slots, width), dtype=np.int32),
        node_right=np.zeros((slots, width), dtype=np.int32),
        need=np.zeros(slots),
        taken=np.zeros(slots * width, dtype=np.int64),
        gains=np.zeros(slots * width),
    )


def _kind(speculation: Speculation) -> int:
    if speculation.allocation == "slo":
        return SLO
    if speculation.allocation == "global":
        return GLOBAL
    if speculation.branching == 1 and speculation.draft_depth is None:
        return CHAINS
    return LOCAL if speculation.allocation == "local" else UNIFORM_TREES


def grown_trace(trace: AcceptanceTrace, positions: int) -> AcceptanceTrace:
    """The same with room for at least `positions` output positions; `trace` itself if it has it.

    Room at least doubles, so that one workload after another costs amortised constant time.
    """
    have = len(trace.run_lengths)
    if positions <= have:
        return trace
    extra = max(positions, 2 * have) - have
    ranks = extra if trace.rank.size else 0
    return AcceptanceTrace(
        run_lengths=np.pad(trace.run_lengths, (0, extra)),
        rank=np.pad(trace.rank, (0, ranks)),
        confidence=np.pad(trace.confidence, (0, ranks)),
    )


@kernel
def believed(sharing, trace, request, depth, rank):
    """The drafter's probability that its choice of `rank`, `depth` tokens ahead, is right if those before it are."""
    if sharing.by_acceptance == 1:
        first = own_acceptance(request)
    else:
        first = float(trace.confidence[request.first_position + request.generated + depth - 1])
    if rank == 0:
        return first
    return min(first, (1.0 - first) * sharing.rank_shares[rank])


@kernel
def _is_right(sharing, trace, request, depth, rank):
    """1 where the target's token stands at `rank` so many tokens ahead, else 0."""
    return int(trace.rank[request.first_position + request.generated + depth - 1] == rank)


@kernel
def _put(sharing, trace, request, slot, above, depth, rank, parent_right):
    """Add a node to request `slot`'s frontier."""
    place = sharing.size[slot]
    sharing.frontier_value[slot, place] = above * believed(sharing, trace, request, depth, rank)
    sharing.frontier_above[slot, place] = above
    sharing.frontier_depth[slot, place] = depth
    sharing.frontier_rank[slot, place] = rank
    sharing.frontier_right[slot, place] = parent_right
    sharing.size[slot] = place + 1


@kernel
def _value_next(sharing, slot):
    """Write the best path probability on request `slot`'s frontier to `value`; 0 when nothing is left."""
    best = 0.0
    for place in range(sharing.size[slot]):
        best = max(best, sharing.frontier_value[slot, place])
    sharing.value[slot] = best


@kernel
def _begin(sharing, trace, request, slot, depth):
    """Request `slot` has no nodes, and its drafter's first choice on the frontier if it may draft at all."""
    sharing.kept[slot] = 0
    sharing.size[slot] = 0
    if depth > 0:
        _put(sharing, trace, request, slot, 1.0, 1, 0, 1)
    _value_next(sharing, slot)


@kernel
def _take(sharing, trace, request, slot, depth):
    """Keep the best node of request `slot`'s frontier; its first child and its next sibling take its place."""
    best = 0
    for place in range(1, sharing.size[slot]):
        if sharing.frontier_value[slot, place] > sharing.frontier_value[slot, best]:
            best = place
    value, above = sharing.frontier_value[slot, best], sharing.frontier_above[slot, best]
    at, rank = sharing.frontier_depth[slot, best], sharing.frontier_rank[slot, best]
    parent_right = sharing.frontier_right[slot, best]
    last = sharing.size[slot] - 1
    sharing.size[slot] = last
    sharing.frontier_value[slot, best] = sharing.frontier_value[slot, last]
    sharing.frontier_above[slot, best] = sharing.frontier_above[slot, last]
    sharing.frontier_depth[slot, best] = sharing.frontier_depth[slot, last]
    sharing.frontier_rank[slot, best] = sharing.frontier_rank[slot, last]
    sharing.frontier_right[slot, best] = sharing.frontier_right[slot, last]
    right = parent_right * _is_right(sharing, trace, request, at, rank)
    node = sharing.kept[slot]
    sharing.node_depth[slot, node] = at
    sharing.node_parent[slot, node] = parent_right
    sharing.node_right[slot, node] = right
    sharing.kept[slot] = node + 1
    if at < depth:
        _put(sharing, trace, request, slot, value, at + 1, 0, right)
    if rank + 1 < sharing.branching:
        _put(sharing, trace, request, slot, above, at, rank + 1, parent_right)
    _value_next(sharing, slot)
    return value


@kernel
def _most(request):
    """Most candidates that are of use to a request: one token of its output comes from the target."""
    return min(request.output - request.generated - 1, MAX_CANDIDATES)


@kernel
def _fixed_trees(state, i, sharing, trace):
    """The first c_i nodes of the fixed shape; returns how deep they go."""
    batch = state.batches[i]
    deepest = 0
    for slot in range(batch.num_decodes):
        request = state.requests[state.batch_request[i, slot]]
        kept = min(state.batch_tokens[i, slot] - 1, len(sharing.shape_depths))
        for node in range(kept):
            depth, parent = sharing.shape_depths[node], sharing.shape_parents[node]
            parent_right = 1 if parent < 0 else sharing.node_right[slot, parent]
            sharing.node_depth[slot, node] = depth
            sharing.node_parent[slot, node] = parent_right
            sharing.node_right[slot, node] = parent_right * _is_right(
                sharing, trace, request, depth, sharing.shape_ranks[node]
            )
            deepest = max(deepest, depth)
        sharing.kept[slot] = kept
    return deepest


@kernel
def _share_locally(state, i, sharing, trace, depth):
    """The c_i best candidates of each request."""
    batch = state.batches[i]
    for slot in range(batch.num_decodes):
        request = state.requests[state.batch_request[i, slot]]
        while sharing.kept[slot] < state.batch_tokens[i, slot] - 1 and sharing.size[slot] > 0:
            _take(sharing, trace, request, slot, min(depth, _most(request)))


@kernel
def _share_globally(state, i, sharing, trace, depth, budget):
    """The `budget` best candidates of the whole batch beside those kept, by a heap, in O(C log B).

    Returns how many were found; `taken` and `gains` say whose the k-th was and how many tokens are expected with it.
    """
    batch = state.batches[i]
    size = 0
    for slot in range(batch.num_decodes):
        request = state.requests[state.batch_request[i, slot]]
        if sharing.value[slot] > 0.0 and sharing.kept[slot] < _most(request):
            sharing.order[size] = slot
            size += 1
    for position in range(size // 2 - 1, -1, -1):
        sink(sharing.order, size, position, sharing.value)
    expected = float(batch.num_decodes)
    found = 0
    while found < budget and size > 0:
        slot = sharing.order[0]
        request = state.requests[state.batch_request[i, slot]]
        most = _most(request)
        expected += _take(sharing, trace, request, slot, min(depth, most))
        sharing.taken[found] = slot
        sharing.gains[found] = expected
        found += 1
        if sharing.value[slot] <= 0.0 or sharing.kept[slot] >= most:
            size -= 1
            sharing.order[0] = sharing.order[size]
        if size > 0:
            sink(sharing.order, size, 0, sharing.value)
    return found


@kernel
def _share_by_need(state, i, sharing, trace, depth, budget):
    """What each request needs for its TPOT target, the neediest first; returns what is left of the budget.

    A request that has emitted o tokens in l seconds since its first needs A = (l + t) / tpot_target - o expected tokens
    in an iteration of t seconds, of which the target gives one itself. t is how long the latest iteration took. No
    request takes more than the draft depth here, since one that is far behind would take all there is. AdaServe (Li et
    al., 2025, sections 4.1 and 4.3).
    """
    batch = state.batches[i]
    for slot in range(batch.num_decodes):
        request = state.requests[state.batch_request[i, slot]]
        elapsed = state.instances[i].now - request.first_token + batch.elapsed
        sharing.need[slot] = elapsed / sharing.tpot_target - (request.generated - 1)
        place = slot
        while place > 0 and sharing.need[sharing.order[place - 1]] < sharing.need[slot]:
            sharing.order[place] = sharing.order[place - 1]
            place -= 1
        sharing.order[place] = slot
    for position in range(batch.num_decodes):
        slot = sharing.order[position]
        request = state.requests[state.batch_request[i, slot]]
        most = min(depth, _most(request))
        expected = 1.0
        while budget > 0 and expected < sharing.need[slot] and sharing.value[slot] > 0.0 and sharing.kept[slot] < most:
            expected += _take(sharing, trace, request, slot, most)
            budget -= 1
    return budget


@kernel
def _stop_at_best_rate(state, i, sharing, tables, found):
    """Drop the batch's last candidates down to the highest (expected tokens) / T.

    vLLM's adaptive verification keeps argmax_B (1 + sum of survival) / cost(B) candidates of those drafted, from
    profiled step costs. Drafting is over by then and is paid whatever is kept.
    """
    batch = state.batches[i]
    batch.decode_tokens = batch.num_decodes
    best = 0
    rate = batch.num_decodes / batch_time(state, i, tables)
    for k in range(found):
        batch.decode_tokens += 1
        with_it = sharing.gains[k] / batch_time(state, i, tables)
        if with_it > rate:
            rate = with_it
            best = k + 1
    for k in range(best, found):
        sharing.kept[sharing.taken[k]] -= 1


@outlined
def share_candidates(state, i, sharing, trace, tables):
    """Share the planned candidates out among the decodes of the planned batch, as `sharing.kind` says.

    To be called between `plan` and `accept_shared`; not for `CHAINS`. The scheduler's batch then has the tokens that
    each request got, and the drafter's passes.
    """
    batch = state.batches[i]
    budget = batch.decode_tokens - batch.num_decodes
    if budget == 0:
        for slot in range(batch.num_decodes):
            sharing.kept[slot] = 0
        return
    deepest = 0
    most_steps = MAX_CANDIDATES
    if sharing.kind == UNIFORM_TREES:
        deepest = _fixed_trees(state, i, sharing, trace)
        most_steps = deepest
    else:
        depth = sharing.depths[batch.candidate_steps]
        most_steps = 0
        for slot in range(batch.num_decodes):
            request = state.requests[state.batch_request[i, slot]]
            wanted = state.batch_tokens[i, slot] - 1
            may = wanted if sharing.kind == LOCAL else _most(request)
            most_steps = max(most_steps, min(depth, may))
            _begin(sharing, trace, request, slot, min(depth, may))
        found = 0
        if sharing.kind == LOCAL:
            _share_locally(state, i, sharing, trace, depth)
        elif sharing.kind == SLO:
            _share_globally(state, i, sharing, trace, depth, _share_by_need(state, i, sharing, trace, depth, budget))
        else:
            found = _share_globally(state, i, sharing, trace, depth, budget)
        for slot in range(batch.num_decodes):
            for node in range(sharing.kept[slot]):
                deepest = max(deepest, sharing.node_depth[slot, node])
        if sharing.cost_aware == 1:
            batch.candidate_steps = min(deepest + 1, most_steps)
            _stop_at_best_rate(state, i, sharing, tables, found)
    for slot in range(batch.num_decodes):
        sharing.tokens[slot] = 1 + sharing.kept[slot]
    redistribute(state, i, sharing.tokens)
    batch.candidate_steps = min(deepest + 1, most_steps)


@kernel
def accept_chains(state, i, trace):
    """Greedy chain acceptance: min(c_i, run of agreements that starts at the request's next output position)."""
    batch = state.batches[i]
    for slot in range(batch.num_decodes):
        request = state.requests[state.batch_request[i, slot]]
        run = trace.run_lengths[request.first_position + request.generated]
        state.accepted[i, slot] = min(state.batch_tokens[i, slot] - 1, run)


@outlined
def accept_shared(state, i, sharing):
    """The longest path of right candidates of each request, and whether more were verified behind it."""
    batch = state.batches[i]
    for slot in range(batch.num_decodes):
        accepted = 0
        for node in range(state.batch_tokens[i, slot] - 1):
            if sharing.node_right[slot, node] == 1:
                accepted = max(accepted, sharing.node_depth[slot, node])
        reach = accepted
        for node in range(state.batch_tokens[i, slot] - 1):
            if sharing.node_parent[slot, node] == 1 and sharing.node_depth[slot, node] == accepted + 1:
                reach = accepted + 1
        state.accepted[i, slot] = accepted
        state.reach[i, slot] = reach
