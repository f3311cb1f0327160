"""A forward's inputs in one piece of memory: they reach a GPU in one copy, and stay where a captured graph reads."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.torch.promises import Promises
from engine.backends.torch.table import CacheTable
from engine.compiled import kernel
from engine.core.state import MAX_CANDIDATES
from engine.speculation.tree import Branches

_ALIGNED = 4
"""Every part begins at a multiple of this many int32, which is 16 bytes."""

_NO_TREES = np.zeros(0, dtype=np.int64), np.zeros((0, 0), dtype=np.int32), np.zeros((0, 0), dtype=np.int32)

STAGED = 2 * MAX_CANDIDATES

NODES_SEEN = 64
"""Slots behind its root that a token of a tree may see: bits of an int64."""


class Inputs(NamedTuple):
    """Inputs of one forward, as numpy arrays or as tensors.

    bits: (T,) int64 · kept: (K,) int64 rows whose logits are wanted · entries: (K,) int64 of `Promises.values`, where
    their choices go · ids, positions, slots, prefix: (T,) int32 · tiles: (tiles, 4) int32 · blocks: (requests, blocks)
    int32. See `engine.backends.torch.triton_kernels` for prefix, bits and tiles.
    """

    bits: Any
    kept: Any
    entries: Any
    ids: Any
    positions: Any
    slots: Any
    prefix: Any
    tiles: Any
    blocks: Any

    def first(self, rows: int, tiles: int) -> Inputs:
        """The parts for the first `rows` rows and `tiles` tiles."""
        return Inputs._make((*(part[:rows] for part in self[:-2]), self.tiles[:tiles], self.blocks))


class Layout(NamedTuple):
    """Capacity of each part of `Inputs`."""

    rows: int
    kept: int
    tiles: int
    requests: int
    blocks: int

    def cut(self, memory: Any, wide: Any) -> Inputs:
        """The parts within `memory`, (`size`,) int32 of an array or a tensor; `wide` is the type of 64-bit integers."""
        parts, begin = [], 0
        for count in self._counts:
            parts.append(memory[begin : begin + count])
            begin += -(-count // _ALIGNED) * _ALIGNED
        tiles, blocks = parts[-2].reshape(-1, 4), parts[-1].reshape(self.requests, self.blocks)
        return Inputs._make((*(part.view(wide) for part in parts[:3]), *parts[3:-2], tiles, blocks))

    @property
    def size(self) -> int:
        """int32 of all parts together."""
        return sum(-(-count // _ALIGNED) * _ALIGNED for count in self._counts)

    @property
    def _counts(self) -> tuple[int, ...]:
        wide = (2 * self.rows, 2 * self.kept, 2 * self.kept)
        return *wide, *(self.rows,) * 4, 4 * self.tiles, self.requests * self.blocks


class Staged:
    """Memory on the host that a forward's inputs are written to and copied from."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.memory = torch.empty(layout.size, dtype=torch.int32, pin_memory=device.type == "cuda")
        self.used_at = -1
        self._all = layout.cut(self.memory.numpy(), np.int64)
        self._parts: dict[tuple[int, int], Inputs] = {}

    def parts(self, rows: int, tiles: int) -> Inputs:
        """Arrays for the first `rows` rows and `tiles` tiles."""
        if (known := self._parts.get((rows, tiles))) is None:
            known = self._parts[rows, tiles] = self._all.first(rows, tiles)
        return known


class Staging:
    """A ring of `Staged` buffers: a buffer that the GPU has not copied yet is not overwritten.

    It holds the forwards of more than one iteration. Reading an iteration's deferred tokens waits for all of them, so
    that no other wait is needed.
    """

    def __init__(self, layout: Layout, device: torch.device, promises: Promises) -> None:
        self._layout, self._device, self._promises = layout, device, promises
        self._ring: list[Staged] = []
        self._turn = 0

    def next(self) -> Staged:
        """Memory from which no copy is pending."""
        if self._turn == len(self._ring) < STAGED:
            self._ring.append(Staged(self._layout, self._device))
        self._turn %= len(self._ring)
        staged = self._ring[self._turn]
        if staged.used_at == self._promises.settled and self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        staged.used_at = self._promises.settled
        self._turn += 1
        return staged


@kernel
def _write(
    bits, kept, entries, ids, positions, slots, prefix, tiles, blocks,
    tokens, table, seats, starts, counts, keep, promised, spare, scratch, block_size, tile_rows, roots, parents, depths,
):  # fmt: skip
    """Fill `Inputs`; padding rows beyond the batch's own attend to nothing and are cached in scratch."""
    row, tile, wanted = 0, 0, 0
    for i in range(len(seats)):
        seat, end = seats[i], starts[i] + counts[i]
        for b in range((end + block_size - 1) // block_size):
            blocks[i, b] = table[seat, b]
        for j in range(counts[i]):
            if j % tile_rows == 0:
                last = min(j + tile_rows, counts[i])
                tiles[tile, 0] = row
                tiles[tile, 1] = last - j
                tiles[tile, 2] = i
                tiles[tile, 3] = starts[i] + last
                tile += 1
            slot = starts[i] + j
            node = -1
            if len(roots) > 0:
                node = slot - roots[i] - 1
            ids[row] = tokens[seat, slot]
            slots[row] = table[seat, slot // block_size] * block_size + slot % block_size
            seen = np.int64(0)
            if node < 0:
                positions[row] = slot
                prefix[row] = slot + 1
            else:
                positions[row] = roots[i] + depths[i, node]
                prefix[row] = roots[i] + 1
                while node >= 0:
                    seen |= np.int64(1) << np.int64(node)
                    node = parents[i, node]
            bits[row] = seen
            if j >= counts[i] - keep[i]:
                kept[wanted] = row
                entries[wanted] = promised[wanted]
                wanted += 1
            row += 1
    for spare_row in range(row, len(ids)):
        ids[spare_row] = 0
        positions[spare_row] = 0
        slots[spare_row] = scratch
        prefix[spare_row] = 0
        bits[spare_row] = 0
    for spare_tile in range(tile, len(tiles)):
        tiles[spare_tile, 1] = 0
    for nobody in range(wanted, len(kept)):
        kept[nobody] = 0
        entries[nobody] = spare


def write(
    inputs: Inputs,
    table: CacheTable,
    seats: NDArray[np.int64],
    starts: NDArray[np.int64],
    counts: NDArray[np.int64],
    keep: NDArray[np.int64],
    promised: NDArray[np.int64],
    spare: int,
    tile_rows: int,
    branches: Branches | None,
) -> None:
    """Write a forward's inputs, arguments as in `PagedModel.forward`.

    Args:
        promised: (sum of keep,) entries of `Promises.values` for the choices.
        spare: the entry for choices that were not requested.
        tile_rows: most rows of a tile.

    Raises ValueError for a tree that reaches more than `NODES_SEEN` slots behind its root.
    """
    trees = _NO_TREES
    if branches is not None:
        if (behind := int((starts + counts - branches.roots).max()) - 1) > NODES_SEEN:
            raise ValueError(f"a tree of {behind} slots: a token sees at most {NODES_SEEN} behind its root")
        trees = branches.roots, np.ascontiguousarray(branches.parents), np.ascontiguousarray(branches.depths)
    scratch = int(table.blocks[table.scratch_seat, 0]) * table.block_size
    _write(
        *inputs, table.tokens, table.blocks, seats, starts, counts, keep, promised, spare, scratch, table.block_size,
        tile_rows, *trees,
    )  # fmt: skip
