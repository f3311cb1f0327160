"""A small model as drafter: it reads what the target has emitted and writes a chain ahead of it."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.speculation.drafter import LONGEST_CHAIN, Batch, Drafts, Runner, no_drafts
from engine.speculation.sampling import draw


class ModelDrafter:
    """Drafts with a model of the target's vocabulary over its own paged cache.

    The cache uses the block ids of the target's table, so memory is accounted once and a preempted request loses both
    caches together. Tokens that the drafter has not seen (a prompt, or what was emitted while c was 0) are caught up on
    in the first of the c passes.
    """

    most_candidates = LONGEST_CHAIN

    def __init__(self, runner: Runner) -> None:
        self._runner = runner

    def propose(self, batch: Batch) -> Drafts:
        """c passes over the requests; pass k gives candidate k to those that want so many."""
        drafts = no_drafts(batch)
        table, tokens = batch.table, batch.table.tokens
        sampled: dict[int, list[NDArray[np.float64]]] = {
            i: [] for i, request in enumerate(batch.requests) if not request.sampling.greedy
        }
        starts = table.draft_computed[batch.seats].astype(np.int64)
        for depth in range(int(batch.wanted.max(initial=0))):
            active = np.flatnonzero(batch.wanted > depth)
            seats, ends = batch.seats[active], batch.lengths[active] + depth
            begin = starts[active] if depth == 0 else ends - 1
            logits = self._runner.forward(table, seats, begin, ends - begin, np.ones_like(seats))
            chosen = self._choose(batch, active, logits, sampled)
            tokens[seats, ends] = chosen
            drafts.tokens[active, depth] = chosen
            table.draft_computed[seats] = ends
        drafts.counts = batch.wanted.copy()
        for i, rows in sampled.items():
            drafts.probabilities[i] = np.stack(rows) if rows else None
        return drafts

    def forget(self, number: int) -> None:
        """Nothing is kept but the cache, which goes with the request's blocks."""

    def _choose(
        self, batch: Batch, active: NDArray[np.int64], logits: Any, sampled: dict[int, list[NDArray[np.float64]]]
    ) -> NDArray[np.int64]:
        """One token for every active request; a sampled request draws it and notes what from."""
        chosen = logits.argmax(-1).cpu().numpy()
        for row, i in enumerate(active.tolist()):
            if i in sampled:
                request = batch.requests[i]
                weights = request.sampling.probabilities(logits[row : row + 1].double().cpu().numpy())[0]
                sampled[i].append(weights)
                chosen[row] = draw(weights, request.random)
        return chosen
