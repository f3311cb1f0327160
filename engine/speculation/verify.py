"""Lossless verification of candidate trees: output is distributed as if the target had generated it alone.

Greedy requests walk down the tree while a child is the target's own choice. For sampled requests there are two rules.

*Drawn candidates*: the children of a node were drawn from the drafter's q one after another, without replacement. They
are tried in that order: child x is accepted with probability min(1, p(x) / q(x)); after a rejection p becomes
norm(max(0, p - q)) and q loses x and is normalised again; when all are rejected the token is drawn from the resulting p
(Sequoia, Chen et al., 2024, algorithm 2; SpecInfer, Miao et al., ASPLOS 2024, algorithm 2, has the same
recursion for independent draws). With one child it is speculative sampling (Leviathan, Kalman, Matias, ICML 2023,
algorithm 1). This is lossless only if the tree's shape was fixed before its tokens were drawn: keeping only the
drawn nodes that look probable changes their distribution.

*Determined candidates*: the tree follows from the tokens before it, as the drafter's most probable tokens or a prompt
lookup do. A token is drawn from the target's p. If it is a child, the walk continues there; otherwise it is emitted.
This is lossless for every such tree and every subset of its nodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.speculation.sampling import draw


@kernel
def accept_greedy(choices, first_row, tokens, parents, paths, accepted, reach):
    """Walk down every request's tree as long as a child is the target's choice.

    choices: (rows,) the target's choices at all verified rows · first_row: (B + 1,) where request i's rows begin: one
    for its last token, then one for each node · tokens, parents: (B, W) · paths: (B, W) result, the accepted nodes ·
    accepted: (B,) result, how many · reach: (B,) result, `accepted`, and one more if there were further candidates,
    all rejected. The token emitted after the accepted ones is the choice at the row of the last of them.
    """
    for i in range(len(accepted)):
        count = first_row[i + 1] - first_row[i] - 1
        a = 0
        at = -1
        more = 0
        for node in range(count):
            if parents[i, node] == at:
                more = 1
                if choices[first_row[i] + 1 + at] == tokens[i, node]:
                    paths[i, a] = node
                    a += 1
                    at = node
                    more = 0
        accepted[i] = a
        reach[i] = a + more


def accept_sampled(
    target: NDArray[np.float64],
    tokens: NDArray[np.integer],
    parents: NDArray[np.integer],
    drawn_from: Sequence[NDArray[np.float64] | None] | None,
    random: np.random.Generator,
) -> tuple[list[int], int, int]:
    """(accepted nodes from the root down, the token emitted after them, their reach) of one sampled request.

    Args:
        target: (nodes + 1, V) p, the target's distribution after the request's last token and after each node.
        tokens, parents: (nodes,) as in `Drafts`.
        drawn_from: q by 1 + node where its children were drawn; None for determined candidates.
        random: the request's own stream.

    The reach is the number of accepted nodes, and one more if the last of them had children, all rejected.
    """
    path: list[int] = []
    at = -1
    while True:
        children = np.flatnonzero(parents == at).tolist()
        if drawn_from is None or not children:
            token = draw(target[1 + at], random)
            found = next((child for child in children if tokens[child] == token), None)
        else:
            q = drawn_from[1 + at]
            assert q is not None
            found, token = _try_drawn(target[1 + at], q, children, tokens, random)
        if found is None:
            return path, token, len(path) + bool(children)
        path.append(found)
        at = found


def _try_drawn(
    p: NDArray[np.float64],
    q: NDArray[np.float64],
    children: list[int],
    tokens: NDArray[np.integer],
    random: np.random.Generator,
) -> tuple[int | None, int]:
    """(the accepted child, its token), or (None, a token drawn from the residual of p after the rejections)."""
    q = q.copy()
    for child in children:
        total = q.sum()
        if total <= 0.0:
            # q had fewer tokens than the shape has children: the rest were not drawn.
            break
        q /= total
        token = int(tokens[child])
        if random.random() * q[token] < p[token]:
            return child, token
        left = np.maximum(p - q, 0.0)
        remaining = left.sum()
        if remaining <= 0.0:
            # p = q up to rounding leaves an empty residual, and a rejection there is itself a rounding error.
            break
        p = left / remaining
        q[token] = 0.0
    return None, draw(p, random)
