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
from engine.speculation.tree import Branches, hide

KEY_GRANULE = 16
"""Key lengths are padded to a multiple of this."""

EXACT_ROWS = 16
"""In exact mode no matrix product has fewer rows: smaller ones take other code paths that round differently."""


MERGED_ROW_KEYS = 2048
"""Groups are merged while that adds at most this many (query row, key) pairs, the cost of a separate attention call."""


@dataclass
class Group:
    """Requests with about equally many new tokens: one padded attention call.

    rows [start, end) of the packed row; `size` requests with up to `count` new tokens each, the last of a request
    repeated where it has fewer; `blocks`: (size, blocks) of the cache to gather; `slots`: (size, count) of the new
    tokens; `keys`: padded key length; `branches`: of these requests. What layers derive from these is kept for the next
    layer.
    """

    start: int
    end: int
    size: int
    count: int
    keys: int
    blocks: Tensor
    slots: Tensor
    padding: tuple[Tensor, Tensor] | None = None
    """(size * count,) packed row of each padded one, and (end - start,) padded row of each packed one; None: equal."""
    branches: Branches | None = None
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
        hidden = self._hidden(window).repeat_interleave(repeat, dim=1)
        missing = least_rows - hidden.shape[1]
        if missing > 0:
            hidden = torch.cat((hidden, hidden[:, -1:].expand(-1, missing, -1)), dim=1)
        mask = torch.zeros(hidden.shape, dtype=dtype, device=hidden.device).masked_fill_(hidden, -math.inf)[:, None]
        self.masks[repeat, window] = mask
        return mask

    def _hidden(self, window: int | None) -> Tensor:
        """(size, count, keys) True where a new token does not see a key."""
        if self.branches is not None:
            found = np.zeros((self.size, self.count, self.keys), dtype=np.bool_)
            hide(found, self.slots.cpu().numpy(), *self.branches, np.iinfo(np.int64).max if window is None else window)
            return torch.from_numpy(found).to(self.slots.device)
        keys = torch.arange(self.keys, device=self.slots.device)
        hidden = keys > self.slots[:, :, None]
        if window is not None:
            hidden |= keys <= self.slots[:, :, None] - window
        return hidden


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
    branches: Branches | None = None,
) -> Pack:
    """Lay out `counts[i]` >= 1 tokens from cache slot `starts[i]` of each request; the last `keep[i]` get logits."""
    missing = EXACT_ROWS - int(counts.sum()) if exact else 0
    if missing > 0:
        seats, starts = np.append(seats, table.scratch_seat), np.append(starts, 0)
        counts, keep = np.append(counts, missing), np.append(keep, 0)
        if branches is not None:
            branches = branches.of(np.append(np.arange(len(branches.roots)), 0))
            branches.roots[-1] = missing
    size = table.block_size
    granule = math.lcm(size, KEY_GRANULE) // size
    own_blocks = -(-(starts + counts) // size)
    key_blocks = -(-own_blocks // granule) * granule
    order = np.lexsort((key_blocks, counts))
    seats_sorted, counts_sorted, starts_sorted = seats[order], counts[order], starts[order]
    ends = np.cumsum(counts_sorted)
    begins = ends - counts_sorted
    slots = np.arange(ends[-1]) + np.repeat(starts_sorted - begins, counts_sorted)
    row_seats = np.repeat(seats_sorted, counts_sorted)
    places = table.blocks[row_seats, slots // size].astype(np.int64), slots % size
    positions = slots
    if branches is not None:
        positions = _positions(slots, np.repeat(order, counts_sorted), branches)
    last_row = np.empty_like(ends)
    last_row[order] = ends
    kept_ends = np.cumsum(keep)
    kept = np.arange(kept_ends[-1]) + np.repeat(last_row - kept_ends, keep)
    groups = []
    for first, last in _edges(counts_sorted, key_blocks[order] * size):
        blocks = int(key_blocks[order[first:last]].max())
        count = int(counts_sorted[last - 1])
        start, end = int(begins[first]), int(ends[last - 1])
        # Padding beyond a request's own blocks repeats its first block: masked values are multiplied by zero, which
        # would let another request's NaN through.
        column = np.arange(blocks)
        column = np.where(column < own_blocks[order[first:last], None], column, 0)
        held = table.blocks[seats_sorted[first:last, None], column].astype(np.int64)
        group_slots, padding = slots[start:end].reshape(-1, 1), None
        if counts_sorted[first] < count:
            column = np.arange(count)
            rows = begins[first:last, None] + np.minimum(column, counts_sorted[first:last, None] - 1)
            real = np.flatnonzero(column < counts_sorted[first:last, None])
            group_slots = slots[rows]
            padding = torch.from_numpy(rows.reshape(-1)).to(device), torch.from_numpy(real).to(device)
        groups.append(
            Group(
                start=start,
                end=end,
                size=last - first,
                count=count,
                keys=blocks * size,
                blocks=torch.from_numpy(held).to(device),
                slots=torch.from_numpy(group_slots.reshape(-1, count)).to(device),
                padding=padding,
                branches=None if branches is None else branches.of(order[first:last]),
            )
        )
    return Pack(
        ids=torch.from_numpy(table.tokens[row_seats, slots].astype(np.int64)[None]).to(device),
        positions=torch.from_numpy(positions[None]).to(device),
        places=(torch.from_numpy(places[0]).to(device), torch.from_numpy(places[1]).to(device)),
        kept=torch.from_numpy(kept).to(device),
        groups=groups,
        block_size=size,
    )


def _positions(slots: NDArray[np.int64], requests: NDArray[np.int64], branches: Branches) -> NDArray[np.int64]:
    """Positions of the tokens at `slots`: behind the root by depth, and elsewhere the slot itself."""
    roots = branches.roots[requests]
    behind = slots - roots - 1
    depths = branches.depths[requests, np.clip(behind, 0, branches.depths.shape[1] - 1)]
    return np.where(behind < 0, slots, roots + depths)


def _edges(counts: NDArray[np.int64], keys: NDArray[np.int64]) -> list[tuple[int, int]]:
    """[first, last) of each group of requests, given in rising order of new tokens, with their padded key lengths."""
    edges = np.flatnonzero(np.diff(counts)) + 1
    parts = list(pairwise([0, *edges.tolist(), len(counts)]))
    merged = parts[:1]
    for first, last in parts[1:]:
        begin, end = merged[-1]
        longest = int(keys[begin:last].max())
        missing = int((counts[last - 1] - counts[begin:end]).sum())
        if missing * longest <= MERGED_ROW_KEYS:
            merged[-1] = begin, last
        else:
            merged.append((first, last))
    return merged
