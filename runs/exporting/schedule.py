"""Candidates by batch size and one token budget: what the engines' own schedules are made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES

Entry = tuple[int, int, int]
"""(lowest batch size, highest, candidates), both sizes included."""


class ScheduleError(ValueError):
    """A schedule that no engine should be given; the message names the entry and what is wrong with it."""


@dataclass(frozen=True)
class Schedule:
    """c by the number of requests in a batch, and the tokens of an iteration over decodes, candidates and prompts.

    draft_slots: tokens that the engine takes off the budget for each request, beside its c + 1.

    Raises ScheduleError when an entry, or the budget, is impossible (`check_schedule`).
    """

    entries: tuple[Entry, ...]
    total_budget: int
    most_candidates: int
    max_num_seqs: int
    draft_slots: int = 0

    def __post_init__(self) -> None:
        check_schedule(self.entries, self.total_budget, self.most_candidates, self.max_num_seqs, self.draft_slots)

    @property
    def speculates(self) -> bool:
        """Whether any batch gets candidates."""
        return self.longest > 0

    @property
    def longest(self) -> int:
        """The most candidates that any batch size gets."""
        return max(candidates for _, _, candidates in self.entries)

    @property
    def rises(self) -> tuple[tuple[Entry, Entry], ...]:
        """Neighbouring entries of which the one for larger batches has more candidates."""
        return tuple((one, other) for one, other in pairwise(self.entries) if other[2] > one[2])


def check_schedule(
    entries: Sequence[Entry], total_budget: int, most_candidates: int, max_num_seqs: int, draft_slots: int = 0
) -> None:
    """Refuse what would mislead an engine, or what it would refuse itself.

    Entries begin at 1, are sorted, leave no gap, do not overlap, end at `max_num_seqs`, have no more than
    `most_candidates`, and differ from their neighbours; the budget holds every batch's tokens, c + 1 and
    `draft_slots` a request: with less, an engine leaves requests of a full batch out of every step.

    Raises:
        ScheduleError: naming the first entry that is not so.
    """
    if not entries:
        raise ScheduleError("a schedule needs at least one entry [lowest batch size, highest, candidates]")
    if not 0 <= most_candidates <= MAX_CANDIDATES:
        raise ScheduleError(f"the most candidates must be between 0 and {MAX_CANDIDATES}, not {most_candidates}")
    if not 1 <= total_budget <= MAX_TOKEN_BUDGET:
        raise ScheduleError(f"total_budget={total_budget} must be between 1 and {MAX_TOKEN_BUDGET} tokens")
    begin, end, before = 0, 0, -1
    for low, high, candidates in entries:
        entry = f"entry {[low, high, candidates]}"
        if high < low:
            raise ScheduleError(f"{entry} ends before it begins")
        if end == 0 and low != 1:
            raise ScheduleError(f"{entry}: the first entry must begin at batch size 1")
        if low <= end:
            wrong = "is not sorted: it belongs before" if high < begin else "overlaps"
            raise ScheduleError(f"{entry} {wrong} the entry {[begin, end, before]}")
        if low > end + 1:
            raise ScheduleError(f"{entry} leaves a gap: batch sizes {end + 1} to {low - 1} have no candidates given")
        if not 0 <= candidates <= most_candidates:
            raise ScheduleError(f"{entry}: candidates must be between 0 and the maximum of {most_candidates}")
        if candidates == before:
            raise ScheduleError(f"{entry} has the candidates of the entry before it: make one of the two")
        needed = min(high, max_num_seqs) * (1 + candidates + draft_slots)
        if needed > total_budget:
            raise ScheduleError(
                f"{entry} needs {needed} tokens for a batch of {min(high, max_num_seqs)}, more than total_budget="
                f"{total_budget}"
            )
        begin, end, before = low, high, candidates
    if end != max_num_seqs:
        raise ScheduleError(f"the last entry ends at batch size {end}, the engine's max_num_seqs is {max_num_seqs}")


def merged(ends: Sequence[int], candidates: Sequence[int]) -> tuple[Entry, ...]:
    """Entries of ranges that end at `ends`, the first from 1, where neighbours with equal candidates are one entry."""
    entries: list[Entry] = []
    for end, chosen in zip(ends, candidates, strict=True):
        if entries and entries[-1][2] == chosen:
            entries[-1] = (entries[-1][0], end, chosen)
        else:
            entries.append((entries[-1][1] + 1 if entries else 1, end, chosen))
    return tuple(entries)
