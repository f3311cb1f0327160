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

from engine.backends.timing import batch_time
from engine.compiled import kernel, outlined
from engine.core.acceptance import own_acceptance
from engine.core.redistribute import redistribute
from engine.core.state import MAX_CANDIDATES
from engine.speculation.allocation import Speculation, sink
from engine.speculation.tree import fixed_shape

CHAINS, UNIFORM_TREES, LOCAL, GLOBAL, SLO = range(5)

RANK_EXPONENT = 1.4
"""The drafter believes that its choice of rank r >= 1 is right with probability proportional to r^-1.4, when its first
is not: the law that `engine.workload.agreement` draws ranks from."""


class Draws(NamedTuple):
    """The luck of N engines' requests by output position, and how their candidates are shared out.

    run_lengths, rank: (N, P) uint8 and confidence: (N, P) float32, as in `Workload`; rank and confidence are (N, 1)
    where chains of c each need neither.

    kind: how candidates are allocated (`CHAINS`, ...) · branching: most children · by_acceptance, cost_aware: 0 or 1,
    and tpot_target, as in `Speculation` · depths: (MAX_CANDIDATES + 1,) draft depth by c · rank_shares: (branching,) ·
    shape_depths, shape_ranks, shape_parents: (W,) the tree that uniform allocation takes the first c nodes of.

    The rest is memory to work in, by seat of the batch. kept, tokens, order, size: (S,) nodes, tokens, places in a heap
    or an order, nodes on the frontier · value: (S,) of the best node there · frontier_value, frontier_above: (S, W + 2)
    path probability of a node that may be next, and of its parent · frontier_depth, frontier_rank, frontier_right: (S,
    W + 2) likewise, and whether its parent is right · node_depth, node_parent, node_right: (S, W) of the nodes kept,
    best first · need: (S,) · taken, gains: (S * W,) who got the batch's k-th candidate, and tokens expected with it.
    """

    run_lengths: NDArray[np.uint8]
    rank: NDArray[np.uint8]
    confidence: NDArray[np.float32]
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


def new_draws(speculation: Speculation, engines: int, positions: int, max_num_seqs: int) -> Draws:
    """Room for the luck of `engines` workloads of up to `positions` output positions each."""
    kind = _kind(speculation)
    seen = positions if kind != CHAINS else 1
    seats, width = (max_num_seqs, MAX_CANDIDATES) if kind != CHAINS else (1, 1)
    shape = fixed_shape(speculation.branching, speculation.draft_depth or speculation.depth(MAX_CANDIDATES))
    ranks = np.arange(1, speculation.branching)
    return Draws(
        run_lengths=np.zeros((engines, positions), dtype=np.uint8),
        rank=np.zeros((engines, seen), dtype=np.uint8),
        confidence=np.zeros((engines, seen), dtype=np.float32),
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
        kept=np.zeros(seats, dtype=np.int64),
        tokens=np.zeros(seats, dtype=np.int64),
        order=np.zeros(seats, dtype=np.int64),
        size=np.zeros(seats, dtype=np.int64),
        value=np.zeros(seats),
        frontier_value=np.zeros((seats, width + 2)),
        frontier_above=np.zeros((seats, width + 2)),
        frontier_depth=np.zeros((seats, width + 2), dtype=np.int32),
        frontier_rank=np.zeros((seats, width + 2), dtype=np.int32),
        frontier_right=np.zeros((seats, width + 2), dtype=np.int32),
        node_depth=np.zeros((seats, width), dtype=np.int32),
        node_parent=np.zeros((seats, width), dtype=np.int32),
        node_right=np.zeros((seats, width), dtype=np.int32),
        need=np.zeros(seats),
        taken=np.zeros(seats * width, dtype=np.int64),
        gains=np.zeros(seats * width),
    )


def _kind(speculation: Speculation) -> int:
    if speculation.allocation == "slo":
        return SLO
    if speculation.allocation == "global":
        return GLOBAL
    if speculation.branching == 1 and speculation.draft_depth is None:
        return CHAINS
    return LOCAL if speculation.allocation == "local" else UNIFORM_TREES


def grown(draws: Draws, positions: int) -> Draws:
    """The same with room for `positions` output positions; `draws` itself if it has it."""
    extra = positions - draws.run_lengths.shape[1]
    if extra <= 0:
        return draws
    wider = {"run_lengths": np.pad(draws.run_lengths, ((0, 0), (0, extra)))}
    if draws.kind != CHAINS:
        wider |= {name: np.pad(getattr(draws, name), ((0, 0), (0, extra))) for name in ("rank", "confidence")}
    return draws._replace(**wider)  # type: ignore[arg-type]


@kernel
def believed(draws, e, request, depth, rank):
    """The drafter's probability that its choice of `rank`, `depth` tokens ahead, is right if those before it are."""
    if draws.by_acceptance == 1:
        first = own_acceptance(request)
    else:
        first = float(draws.confidence[e, request.first_position + request.generated + depth - 1])
    if rank == 0:
        return first
    return min(first, (1.0 - first) * draws.rank_shares[rank])


@kernel
def _is_right(draws, e, request, depth, rank):
    """1 where the target's token stands at `rank` so many tokens ahead, else 0."""
    return int(draws.rank[e, request.first_position + request.generated + depth - 1] == rank)


@kernel
def _put(draws, e, request, i, above, depth, rank, parent_right):
    """Add a node to request `i`'s frontier."""
    place = draws.size[i]
    draws.frontier_value[i, place] = above * believed(draws, e, request, depth, rank)
    draws.frontier_above[i, place] = above
    draws.frontier_depth[i, place] = depth
    draws.frontier_rank[i, place] = rank
    draws.frontier_right[i, place] = parent_right
    draws.size[i] = place + 1


@kernel
def _value_next(draws, i):
    """Write the best path probability on request `i`'s frontier to `value`; 0 when nothing is left."""
    best = 0.0
    for place in range(draws.size[i]):
        best = max(best, draws.frontier_value[i, place])
    draws.value[i] = best


@kernel
def _begin(draws, e, request, i, depth):
    """Request `i` has no nodes, and its drafter's first choice on the frontier if it may draft at all."""
    draws.kept[i] = 0
    draws.size[i] = 0
    if depth > 0:
        _put(draws, e, request, i, 1.0, 1, 0, 1)
    _value_next(draws, i)


@kernel
def _take(draws, e, request, i, depth):
    """Keep the best node of request `i`'s frontier; its first child and its next sibling take its place."""
    best = 0
    for place in range(1, draws.size[i]):
        if draws.frontier_value[i, place] > draws.frontier_value[i, best]:
            best = place
    value, above = draws.frontier_value[i, best], draws.frontier_above[i, best]
    at, rank = draws.frontier_depth[i, best], draws.frontier_rank[i, best]
    parent_right = draws.frontier_right[i, best]
    last = draws.size[i] - 1
    draws.size[i] = last
    draws.frontier_value[i, best] = draws.frontier_value[i, last]
    draws.frontier_above[i, best] = draws.frontier_above[i, last]
    draws.frontier_depth[i, best] = draws.frontier_depth[i, last]
    draws.frontier_rank[i, best] = draws.frontier_rank[i, last]
    draws.frontier_right[i, best] = draws.frontier_right[i, last]
    right = parent_right * _is_right(draws, e, request, at, rank)
    node = draws.kept[i]
    draws.node_depth[i, node] = at
    draws.node_parent[i, node] = parent_right
    draws.node_right[i, node] = right
    draws.kept[i] = node + 1
    if at < depth:
        _put(draws, e, request, i, value, at + 1, 0, right)
    if rank + 1 < draws.branching:
        _put(draws, e, request, i, above, at, rank + 1, parent_right)
    _value_next(draws, i)
    return value


@kernel
def _most(request):
    """Most candidates that are of use to a request: one token of its output comes from the target."""
    return min(request.output - request.generated - 1, MAX_CANDIDATES)


@kernel
def _fixed_trees(state, e, draws):
    """The first c_i nodes of the fixed shape; returns how deep they go."""
    engine = state.engines[e]
    deepest = 0
    for i in range(engine.num_decodes):
        request = state.requests[e, state.batch_request[e, i]]
        kept = min(state.batch_tokens[e, i] - 1, len(draws.shape_depths))
        for node in range(kept):
            depth, parent = draws.shape_depths[node], draws.shape_parents[node]
            parent_right = 1 if parent < 0 else draws.node_right[i, parent]
            draws.node_depth[i, node] = depth
            draws.node_parent[i, node] = parent_right
            draws.node_right[i, node] = parent_right * _is_right(draws, e, request, depth, draws.shape_ranks[node])
            deepest = max(deepest, depth)
        draws.kept[i] = kept
    return deepest


@kernel
def _share_locally(state, e, draws, depth):
    """The c_i best candidates of each request."""
    engine = state.engines[e]
    for i in range(engine.num_decodes):
        request = state.requests[e, state.batch_request[e, i]]
        while draws.kept[i] < state.batch_tokens[e, i] - 1 and draws.size[i] > 0:
            _take(draws, e, request, i, min(depth, _most(request)))


@kernel
def _share_globally(state, e, draws, depth, budget):
    """The `budget` best candidates of the whole batch beside those kept, by a heap, in O(C log B).

    Returns how many were found; `taken` and `gains` say whose the k-th was and how many tokens are expected with it.
    """
    engine = state.engines[e]
    size = 0
    for i in range(engine.num_decodes):
        request = state.requests[e, state.batch_request[e, i]]
        if draws.value[i] > 0.0 and draws.kept[i] < _most(request):
            draws.order[size] = i
            size += 1
    for position in range(size // 2 - 1, -1, -1):
        sink(draws.order, size, position, draws.value)
    expected = float(engine.num_decodes)
    found = 0
    while found < budget and size > 0:
        i = draws.order[0]
        request = state.requests[e, state.batch_request[e, i]]
        most = _most(request)
        expected += _take(draws, e, request, i, min(depth, most))
        draws.taken[found] = i
        draws.gains[found] = expected
        found += 1
        if draws.value[i] <= 0.0 or draws.kept[i] >= most:
            size -= 1
            draws.order[0] = draws.order[size]
        if size > 0:
            sink(draws.order, size, 0, draws.value)
    return found


@kernel
def _share_by_need(state, e, draws, depth, budget):
    """What each request needs for its TPOT target, the neediest first; returns what is left of the budget.

    A request that has emitted o tokens in l seconds since its first needs A = (l + t) / tpot_target - o expected tokens
    in an iteration of t seconds, of which the target gives one itself. t is how long the latest iteration took. No
    request takes more than the draft depth here, since one that is far behind would take all there is. AdaServe (Li et
    al., 2025, sections 4.1 and 4.3).
    """
    engine = state.engines[e]
    for i in range(engine.num_decodes):
        request = state.requests[e, state.batch_request[e, i]]
        elapsed = engine.now - request.first_token + engine.last_elapsed
        draws.need[i] = elapsed / draws.tpot_target - (request.generated - 1)
        place = i
        while place > 0 and draws.need[draws.order[place - 1]] < draws.need[i]:
            draws.order[place] = draws.order[place - 1]
            place -= 1
        draws.order[place] = i
    for position in range(engine.num_decodes):
        i = draws.order[position]
        request = state.requests[e, state.batch_request[e, i]]
        most = min(depth, _most(request))
        expected = 1.0
        while budget > 0 and expected < draws.need[i] and draws.value[i] > 0.0 and draws.kept[i] < most:
            expected += _take(draws, e, request, i, most)
            budget -= 1
    return budget


@kernel
def _stop_at_best_rate(state, e, draws, tables, found):
    """Drop the batch's last candidates down to the highest (expected tokens) / T.

    vLLM's adaptive verification keeps argmax_B (1 + sum of survival) / cost(B) candidates of those drafted, from
    profiled step costs. Drafting is over by then and is paid whatever is kept.
    """
    engine = state.engines[e]
    engine.decode_tokens = engine.num_decodes
    best = 0
    rate = engine.num_decodes / batch_time(state, e, tables)
    for k in range(found):
        engine.decode_tokens += 1
        with_it = draws.gains[k] / batch_time(state, e, tables)
        if with_it > rate:
            rate = with_it
            best = k + 1
    for k in range(best, found):
        draws.kept[draws.taken[k]] -= 1


@outlined
def share_candidates(state, e, draws, tables):
    """Share the planned candidates out among the decodes of the planned batch, as `draws.kind` says.

    To be called between `plan` and `accept_shared`; not for `CHAINS`. The scheduler's batch then has the tokens that
    each request got, and the drafter's passes.
    """
    engine = state.engines[e]
    budget = engine.decode_tokens - engine.num_decodes
    if budget == 0:
        for i in range(engine.num_decodes):
            draws.kept[i] = 0
        return
    deepest = 0
    most_steps = MAX_CANDIDATES
    if draws.kind == UNIFORM_TREES:
        deepest = _fixed_trees(state, e, draws)
        most_steps = deepest
    else:
        depth = draws.depths[engine.candidate_steps]
        most_steps = 0
        for i in range(engine.num_decodes):
            request = state.requests[e, state.batch_request[e, i]]
            wanted = state.batch_tokens[e, i] - 1
            may = wanted if draws.kind == LOCAL else _most(request)
            most_steps = max(most_steps, min(depth, may))
            _begin(draws, e, request, i, min(depth, may))
        found = 0
        if draws.kind == LOCAL:
            _share_locally(state, e, draws, depth)
        elif draws.kind == SLO:
            _share_globally(state, e, draws, depth, _share_by_need(state, e, draws, depth, budget))
        else:
            found = _share_globally(state, e, draws, depth, budget)
        for i in range(engine.num_decodes):
            for node in range(draws.kept[i]):
                deepest = max(deepest, draws.node_depth[i, node])
        if draws.cost_aware == 1:
            engine.candidate_steps = min(deepest + 1, most_steps)
            _stop_at_best_rate(state, e, draws, tables, found)
    for i in range(engine.num_decodes):
        draws.tokens[i] = 1 + draws.kept[i]
    redistribute(state, e, draws.tokens)
    engine.candidate_steps = min(deepest + 1, most_steps)


@kernel
def accept_chains(state, e, draws):
    """Greedy chain acceptance: min(c_i, run of agreements that starts at the request's next output position)."""
    engine = state.engines[e]
    for i in range(engine.num_decodes):
        request = state.requests[e, state.batch_request[e, i]]
        run = draws.run_lengths[e, request.first_position + request.generated]
        state.accepted[e, i] = min(state.batch_tokens[e, i] - 1, run)


@outlined
def accept_shared(state, e, draws):
    """The longest path of right candidates of each request, and whether more were verified behind it."""
    engine = state.engines[e]
    for i in range(engine.num_decodes):
        accepted = 0
        for node in range(state.batch_tokens[e, i] - 1):
            if draws.node_right[i, node] == 1:
                accepted = max(accepted, draws.node_depth[i, node])
        reach = accepted
        for node in range(state.batch_tokens[e, i] - 1):
            if draws.node_parent[i, node] == 1 and draws.node_depth[i, node] == accepted + 1:
                reach = accepted + 1
        state.accepted[e, i] = accepted
        state.reach[e, i] = reach
