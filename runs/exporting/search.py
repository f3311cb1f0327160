"""The schedule with the lowest objective, found by playing schedules back."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from engine.latency.model import LatencyModel

SAME = 5e-4
"""Relative difference of the objective below which the simpler of two schedules is taken."""


@dataclass(frozen=True)
class Ranges:
    """Ranges of batch sizes that get one c each.

    ends: (K,) highest size of each, ascending, the last is the engine's `max_num_seqs`.
    """

    ends: tuple[int, ...]

    @property
    def begins(self) -> tuple[int, ...]:
        """(K,) lowest size of each."""
        return (1, *(end + 1 for end in self.ends[:-1]))

    @classmethod
    def up_to(cls, batch_sizes: Sequence[int], max_num_seqs: int) -> Ranges:
        """The sizes below `max_num_seqs`, and it."""
        return cls((*(size for size in batch_sizes if size < max_num_seqs), max_num_seqs))

    def of(self, sizes: NDArray[np.int32]) -> NDArray[np.int64]:
        """The range that each batch size is in; larger ones are in the last."""
        return np.minimum(np.searchsorted(self.ends, sizes), len(self.ends) - 1)


@dataclass(frozen=True)
class Seen:
    """What was chosen while batches of each range decoded.

    seconds: (K,) time spent in each · candidates: (K,) the c that most of this time was spent with, -1 where there was
    none · total_budget: middle of the tokens allowed in iterations that had prompts · kv_tokens: cached tokens a
    decoding request held on average.
    """

    seconds: NDArray[np.float64]
    candidates: NDArray[np.int64]
    total_budget: float
    kv_tokens: float

    @classmethod
    def of(cls, iterations: NDArray[np.void], ranges: Ranges) -> Seen:
        """From rows of `ITERATION`."""
        decoding = iterations[iterations["num_decodes"] > 0]
        seconds = decoding["end_s"] - decoding["start_s"]
        which = ranges.of(decoding["num_decodes"])
        spent = np.zeros((len(ranges.ends), int(iterations["candidates"].max(initial=0)) + 1))
        np.add.at(spent, (which, decoding["candidates"]), seconds)
        prompts = iterations[iterations["prefill_tokens"] > 0]
        totals = prompts["token_budget"] + prompts["decode_tokens"]
        held = float(decoding["num_decodes"] @ seconds)
        return cls(
            seconds=spent.sum(axis=1),
            candidates=np.where(spent.sum(axis=1) > 0, spent.argmax(axis=1), -1),
            total_budget=float(np.median(totals)) if totals.size else 1.0,
            kv_tokens=float(decoding["kv_tokens"] @ seconds) / held if held > 0 else 1.0,
        )


def cheapest_by_size(
    latency: LatencyModel, ranges: Ranges, tokens: NDArray[np.float64], kv_tokens: float
) -> NDArray[np.int64]:
    """(K,) the c of the least decode time a token, T / (B G(c)), for a batch in the middle of each range."""
    chosen = []
    for begin, end in zip(ranges.begins, ranges.ends, strict=True):
        size = (begin + end) // 2
        times = [latency.time(size, c, size * kv_tokens) / tokens[c] for c in range(tokens.size)]
        chosen.append(int(np.argmin(times)))
    return np.array(chosen)


@dataclass(frozen=True)
class Choice:
    """c of each range and the total budget."""

    candidates: tuple[int, ...]
    total_budget: int

    @property
    def steps(self) -> int:
        """How often c changes from one range to the next."""
        return sum(a != b for a, b in pairwise(self.candidates))

    def with_candidates(self, place: int, candidates: int) -> Choice:
        """The same with another c in one range."""
        return replace(self, candidates=(*self.candidates[:place], candidates, *self.candidates[place + 1 :]))


Score = Callable[[Choice], float]
"""Objective of a choice when played back; infinite where no engine can be given it."""


def search(
    score: Score,
    starts: Sequence[Choice],
    budgets: Sequence[int],
    most_candidates: int,
    order: Sequence[int],
    most_scores: int,
) -> tuple[Choice, float]:
    """Coordinate search from the best of `starts`: one range's c, or the budget, is changed by one step at a time.

    First every budget is tried with the best start. Then, until nothing helps or `most_scores` different choices were
    scored, each coordinate in turn is moved to its neighbours and stays where the objective is lowest: the budget, and
    c of the ranges in `order` (those that the workload reaches, the busiest first). At last the largest budget is
    taken, and neighbouring ranges get one c, where this costs less than `SAME` of the objective: a budget that just
    holds what was served here would starve prompts at a higher load.

    Raises:
        ValueError: no start can be given to an engine at any budget.
    """
    known: dict[Choice, float] = {}

    def scored(choice: Choice) -> float:
        if choice not in known:
            known[choice] = score(choice) if len(known) < most_scores else math.inf
        return known[choice]

    best = min(starts, key=scored)
    best = min((best, *(replace(start, total_budget=budget) for start in {best, starts[0]} for budget in budgets)),
               key=scored)  # fmt: skip
    if math.isinf(known[best]):
        raise ValueError(
            f"no budget of {list(budgets)} holds a batch of the engine's max_num_seqs: set a larger one in budgets"
        )
    before = math.inf
    while known[best] < before and len(known) < most_scores:
        before = known[best]
        place = budgets.index(best.total_budget)
        near = [replace(best, total_budget=budgets[i]) for i in (place - 1, place + 1) if 0 <= i < len(budgets)]
        best = min((best, *near), key=scored)
        for place in order:
            now = best.candidates[place]
            near = [best.with_candidates(place, c) for c in (now - 1, now + 1) if 0 <= c <= most_candidates]
            best = min((best, *near), key=scored)

    def remembered(choice: Choice) -> float:
        if math.isinf(known.get(choice, math.inf)):
            known[choice] = score(choice)
        return known[choice]

    bound = known[best] * (1.0 + SAME)
    larger = (replace(best, total_budget=budget) for budget in reversed(budgets))
    best = next(choice for choice in larger if remembered(choice) <= bound)
    return _simplified(best, remembered, order, bound)


def _simplified(best: Choice, scored: Score, order: Sequence[int], bound: float) -> tuple[Choice, float]:
    """Give neighbouring groups of ranges one c, the idlest first, while the objective stays within `bound`.

    Ranges that are not in `order` keep theirs: what they get makes no difference to what is served here.
    """
    found = scored(best)
    changed = True
    while changed:
        changed = False
        for place in reversed(order):
            group = [i for i in _alike(best.candidates, place) if i in order]
            for beside in (group[0] - 1, group[-1] + 1):
                if changed or not 0 <= beside < len(best.candidates):
                    continue
                simpler = best
                for i in group:
                    simpler = simpler.with_candidates(i, best.candidates[beside])
                if simpler.steps < best.steps and scored(simpler) <= bound:
                    best, found, changed = simpler, scored(simpler), True
    return best, found


def _alike(candidates: Sequence[int], place: int) -> range:
    """The places around one that have its c."""
    begin = end = place
    while begin > 0 and candidates[begin - 1] == candidates[place]:
        begin -= 1
    while end + 1 < len(candidates) and candidates[end + 1] == candidates[place]:
        end += 1
    return range(begin, end + 1)
