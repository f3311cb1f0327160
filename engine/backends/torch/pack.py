"""Many requests' new tokens as one row of a forward: ids, positions, cache slots, and groups for attention."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch.table import CacheTable

KEY_GRANULE = 16
"""Key lengths are padded to a multiple of this."""

EXACT_ROWS = 16
"""In exact mode no matrix product has fewer rows: smaller ones take other code paths that round differently."""


@dataclass
class Group:
    """Requests with equally many new tokens: one padded attention call.

    rows [start, end) of the packed row; `size` requests with `count` new tokens each; `blocks`: (size, blocks) of the
    cache to gather; `positions`: (size, count) of the new tokens; `keys`: padded key length. What layers derive from
    these is kept for the next layer.
    """

    start: int
    end: int
    size: int
    count: int
    keys: int
    blocks: Tensor
    positions: Tensor
    masks: dict[tuple[int, int | None], Tensor] = field(default_factory=dict)
    indices: dict[int, Tensor] = field(default_factory=dict)

    def index(self, kv_heads: int) -> Tensor:
        """(size * kv_heads * blocks,) rows of the pool to gather: every head's blocks one after another."""
        known = self.indices.get(kv_heads)
        if known is None:
            heads = torch.arange(kv_heads, device=self.blocks.device)[:, None]
            known = self.indices[kv_heads] = (self.blocks[:, None] * kv_heads + heads).view(-1)
        return known

    def mask(self, repeat: int, window: int | None, least_rows: int, dtype: torch.dtype) -> Tensor:
        """(size, 1, query rows, keys) additive: 0 where a key is seen, -inf elsewhere.

        Query rows are (new token, head within its key-value head) pairs, token first; `window` is the number of latest
        positions seen, None for all.
        """
        known = self.masks.get((repeat, window))
        if known is not None:
            return known
        keys = torch.arange(self.keys, device=self.positions.device)
        hidden = keys > self.positions[:, :, None]
        if window is not None:
            hidden |= keys <= self.positions[:, :, None] - window
        hidden = hidden.repeat_interleave(repeat, dim=1)
        missing = least_rows - hidden.shape[1]
        if missing > 0:
            hidden = torch.cat((hidden, hidden[:, -1:].expand(-1, missing, -1)), dim=1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)[:, None]
        self.masks[repeat, window] = mask
        return mask


@dataclass
class Pack:
    """One packed forward of T tokens. Tensors are on the model's device."""

    ids: Tensor
    """(1, T)"""
    positions: Tensor
    """(1, T)"""
    places: tuple[Tensor, Tensor]
    """(T,) each: the block and the place within it where a token's keys and values go in the cache."""
    kept: Tensor
    """(rows,) packed rows whose logits are wanted, in the caller's order of requests."""
    groups: list[Group]
    block_size: int
    known_slots: dict[int, Tensor] = field(default_factory=dict)

    def slots(self, kv_heads: int) -> Tensor:
        """(T * kv_heads,) slots of the pool, heads of one token together."""
        known = self.known_slots.get(kv_heads)
        if known is None:
            heads = torch.arange(kv_heads, device=self.places[0].device)
            rows = self.places[0][:, None] * kv_heads + heads
            known = self.known_slots[kv_heads] = (rows * self.block_size + self.places[1][:, None]).view(-1)
        return known


def pack(
    table: CacheTable,
    seats: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    keep: NDArray[np.int64],
    device: torch.device,
    exact: bool = False,
) -> Pack:
    """Lay out `counts[i]` >= 1 tokens from position `starts[i]` of each seat, keeping the last `keep[i]` logits."""
    missing = EXACT_ROWS - int(counts.sum()) if exact else 0
    if missing > 0:
        seats, starts = np.append(seats, table.scratch_seat), np.append(starts, 0)
        counts, keep = np.append(counts, missing), np.append(keep, 0)
    size = table.block_size
    granule = math.lcm(size, KEY_GRANULE) // size
    key_blocks = -(-(starts + counts) // size)
    key_blocks = -(-key_blocks // granule) * granule
    order = np.lexsort((key_blocks, counts))
    seats_sorted, counts_sorted, starts_sorted = seats[order], counts[order], starts[order]
    ends = np.cumsum(counts_sorted)
    begins = ends - counts_sorted
    positions = np.arange(ends[-1]) + np.repeat(starts_sorted - begins, counts_sorted)
    row_seats = np.repeat(seats_sorted, counts_sorted)
    places = table.blocks[row_seats, positions // size].astype(np.int64), positions % size
    last_row = np.empty_like(ends)
    last_row[order] = ends
    kept_ends = np.cumsum(keep)
    kept = np.arange(kept_ends[-1]) + np.repeat(last_row - kept_ends, keep)
    groups = []
    edges = np.flatnonzero(np.diff(counts_sorted)) + 1
    for first, last in pairwise([0, *edges.tolist(), len(order)]):
        blocks = int(key_blocks[order[first:last]].max())
        count = int(counts_sorted[first])
        start, end = int(begins[first]), int(ends[last - 1])
        held = np.zeros((last - first, blocks), dtype=np.int64)
        known = min(blocks, table.blocks.shape[1])
        held[:, :known] = table.blocks[seats_sorted[first:last], :known]
        groups.append(
            Group(
                start=start,
                end=end,
                size=last - first,
                count=count,
                keys=blocks * size,
                blocks=torch.from_numpy(held).to(device),
                positions=torch.from_numpy(positions[start:end].reshape(-1, count)).to(device),
            )
        )
    return Pack(
        ids=torch.from_numpy(table.tokens[row_seats, positions].astype(np.int64)[None]).to(device),
        positions=torch.from_numpy(positions[None]).to(device),
        places=(torch.from_numpy(places[0]).to(device), torch.from_numpy(places[1]).to(device)),
        kept=torch.from_numpy(kept).to(device),
        groups=groups,
        block_size=size,
    )
