"""Memory of each running request: its batch slot, its KV blocks, its token ids.

The scheduler only counts blocks. This table assigns block ids to match the scheduler's counts after every plan.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.state import State
from engine.limits import EngineLimits

SCRATCH_TOKENS = 16
"""Cache slots that belong to no request, for padding rows of a forward."""


@kernel
def _leave(requests, owner, seat_of, blocks, held, free_blocks, free_seats, free_counts):
    """Free the batch slot and blocks of every request whose blocks the scheduler has freed."""
    for seat in range(len(held)):
        r = owner[seat]
        if r >= 0 and requests[r].blocks == 0:
            for i in range(held[seat]):
                free_blocks[free_counts[0]] = blocks[seat, i]
                free_counts[0] += 1
            held[seat] = 0
            owner[seat] = -1
            seat_of[r] = -1
            free_seats[free_counts[1]] = seat
            free_counts[1] += 1


@kernel
def _enter(requests, batch, owner, seat_of, blocks, held, free_blocks, free_seats, free_counts, entered):
    """Assign batch slots to new requests and ids to newly counted blocks; returns the number of new requests."""
    new = 0
    for r in batch:
        seat = seat_of[r]
        if seat < 0:
            free_counts[1] -= 1
            seat = free_seats[free_counts[1]]
            seat_of[r] = seat
            owner[seat] = r
            entered[new] = r
            new += 1
        while held[seat] < requests[r].blocks:
            free_counts[0] -= 1
            blocks[seat, held[seat]] = free_blocks[free_counts[0]]
            held[seat] += 1
    return new


@kernel
def _lend(seats, ends, blocks, held, free_blocks, free, block_size, reached):
    """Write ids of free blocks behind those that the requests hold; the blocks stay free."""
    for i in range(len(seats)):
        count = held[seats[i]]
        while count * block_size < ends[i] and free > 0 and count < blocks.shape[1]:
            free -= 1
            blocks[seats[i], count] = free_blocks[free]
            count += 1
        reached[i] = min(ends[i], count * block_size)


@kernel
def _extend(tokens, draft_computed, seats, lengths, counts, new):
    """Append tokens to those of the requests, and discard the drafter's progress past them."""
    at = 0
    for i in range(len(seats)):
        for j in range(counts[i]):
            tokens[seats[i], lengths[i] + j] = new[at]
            at += 1
        if counts[i] > 0:
            draft_computed[seats[i]] = min(draft_computed[seats[i]], lengths[i] + counts[i] - 1)


class CacheTable:
    """Batch slots ("seats"), blocks and tokens of up to `max_num_seqs` running requests.

    tokens: (seats + 1, max_model_len + 1) int32 ids, prompt then output then candidates · blocks: (seats + 1, blocks of
    the longest request) int32, block i of a seat holds its positions [i * block_size, (i + 1) * block_size) · owner:
    (seats,) request in the seat, -1 if free · draft_computed: (seats + 1,) tokens in the drafter's cache. The last row
    is the scratch seat.
    """

    def __init__(self, limits: EngineLimits) -> None:
        seats = limits.max_num_seqs
        self.block_size = limits.block_size
        self.scratch_seat = seats
        scratch_blocks = math.ceil(SCRATCH_TOKENS / limits.block_size)
        self.num_blocks = limits.total_blocks + scratch_blocks
        width = max(scratch_blocks, math.ceil(limits.max_model_len / limits.block_size))
        self.tokens = np.zeros((seats + 1, max(SCRATCH_TOKENS, limits.max_model_len + 1)), dtype=np.int32)
        self.blocks = np.zeros((seats + 1, width), dtype=np.int32)
        self.blocks[seats, :scratch_blocks] = np.arange(limits.total_blocks, self.num_blocks)
        self.draft_computed = np.zeros(seats + 1, dtype=np.int32)
        self.owner = np.full(seats, -1, dtype=np.int64)
        self.held = np.zeros(seats, dtype=np.int64)
        self.seat_of = np.full(64, -1, dtype=np.int64)
        self._free_blocks = np.arange(limits.total_blocks - 1, -1, -1, dtype=np.int64)
        self._free_seats = np.arange(seats - 1, -1, -1, dtype=np.int64)
        self._free_counts = np.array([limits.total_blocks, seats], dtype=np.int64)
        self._entered = np.zeros(seats, dtype=np.int64)

    @property
    def free_blocks(self) -> int:
        """Number of free blocks."""
        return int(self._free_counts[0])

    def follow(self, state: State) -> list[int]:
        """Update batch slots and blocks to the batch just planned; returns the requests with a new batch slot.

        A request that was preempted and returns counts as new: its cache is lost.
        """
        room = len(state.requests)
        if room > len(self.seat_of):
            self.seat_of = np.pad(self.seat_of, (0, room - len(self.seat_of)), constant_values=-1)
        planned = state.batches[0]
        batch = state.batch_request[0, : planned["num_decodes"] + planned["num_prefills"]]
        self.leave(state)
        count = _enter(state.requests, batch, *self._places, self._free_counts, self._entered)
        entered: list[int] = self._entered[:count].tolist()
        self.draft_computed[self.seat_of[entered]] = 0
        return entered

    def extend(
        self,
        seats: NDArray[np.int64],
        lengths: NDArray[np.int64],
        counts: NDArray[np.int64],
        new: NDArray[np.int64],
    ) -> None:
        """Write `counts[i]` of the `new` tokens after the first `lengths[i]` of each request.

        Where there are any, the drafter has read no more than all but the last of them.
        """
        _extend(self.tokens, self.draft_computed, seats, lengths, counts, new)

    def places(
        self, seats: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """The blocks, and the places within them, of `counts[i]` cache slots from `starts[i]` on of every request."""
        ends = np.cumsum(counts)
        slots = np.arange(counts.sum()) + np.repeat(starts - ends + counts, counts)
        return self.blocks[np.repeat(seats, counts), slots // self.block_size].astype(np.int64), slots % self.block_size

    def unfilled(
        self, seats: NDArray[np.int64], starts: NDArray[np.int64], counts: NDArray[np.int64]
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """`places` left behind the new tokens, `counts[i]` from `starts[i]` on, in blocks that begin with one."""
        ends = starts + counts
        missing = -ends % self.block_size
        begun = np.flatnonzero((ends + missing - self.block_size >= starts) & (missing > 0))
        return self.places(seats[begun], ends[begun], missing[begun])

    def leave(self, state: State) -> None:
        """Free the batch slot and blocks of every request that has no blocks left in `state`."""
        _leave(state.requests, *self._places, self._free_counts)

    def renumber(self, count: int) -> None:
        """Count requests from the one that was number `count`; those before it have left."""
        self.owner[self.owner >= 0] -= count
        self.seat_of = np.concatenate((self.seat_of[count:], np.full(count, -1, dtype=np.int64)))

    @property
    def _places(self) -> tuple[NDArray[Any], ...]:
        return self.owner, self.seat_of, self.blocks, self.held, self._free_blocks, self._free_seats

    def borrow(self, seats: NDArray[np.int64], ends: NDArray[np.int64]) -> NDArray[np.int64]:
        """Lend free blocks beyond those the requests hold, for slots up to `ends[i]`; returns the slots they reach.

        Contents written there are lost at the next `follow`. No block is lent to two requests.
        """
        reached = np.zeros(len(seats), dtype=np.int64)
        free = self._free_counts[0]
        _lend(seats, ends, self.blocks, self.held, self._free_blocks, free, self.block_size, reached)
        return reached
