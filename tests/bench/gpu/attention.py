"""Ways to attend over the same paged cache: gathering for SDPA, FlexAttention over its pages, and our Triton kernel."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from engine.backends.torch.attention import PagedStep
from engine.backends.torch.pack import pack
from tests.bench.gpu.device import REPEATS
from tests.bench.gpu.paged import Attend, PagedBatch, Timed, timed

SMALL_TILE, LARGE_TILES = 16, (64, 128)
"""(Row, head of a key-value head) pairs that a program of our kernel takes at once: at most the small tile of requests
with few rows, and of others what of the large ones is faster."""

SPLITS = (1, 2, 4, 8, 16, 32)
"""Ways to share the keys of a small tile that are tried; the fastest is reported."""

FLEX_ROWS = 128
"""Query rows of a block of FlexAttention's mask: its kernels' default."""


class UnavailableError(RuntimeError):
    """A way cannot be tried here; the message says why."""


@dataclass(frozen=True)
class Compared:
    """What a way took on a batch; without `timed`, `reason` says why it was not tried."""

    case: str
    way: str
    block_size: int
    rows: int
    kv_bytes: int
    flop: float
    timed: Timed | None
    reason: str = ""
    setting: str = ""


def compare(batch: PagedBatch, ways: list[str], repeats: int = REPEATS) -> list[Compared]:
    """Every way on one batch, against float64."""
    # What is gathered is written first: from here on every way finds the same cache.
    gathered(batch)(0)
    reference = batch.reference(0)
    found = []
    for way in ways:
        try:
            took, setting = _fastest(batch, WAYS[way](batch), reference, repeats)
            reason = ""
        except Exception as problem:
            # A compiler or a kernel that fails says so in its row, and the other ways are still compared.
            took, setting, reason = None, "", f"{type(problem).__name__}: {str(problem).strip().splitlines()[0][:160]}"
        case = batch.case
        shown = f"{case.name}, B = {case.requests}, {case.kv_tokens} cached"
        rows = case.requests * case.rows
        found.append(Compared(shown, way, batch.block_size, rows, batch.kv_bytes, batch.flop, took, reason, setting))
    return found


def _fastest(batch: PagedBatch, settings: dict[str, Attend], reference: Tensor, repeats: int) -> tuple[Timed, str]:
    results = {name: timed(batch, attend, reference, repeats) for name, attend in settings.items()}
    best = min(results, key=lambda name: results[name].graph_s or results[name].launched_s)
    return results[best], best


def gathered(batch: PagedBatch) -> Attend:
    """Blocks copied into one piece for SDPA (`PagedStep`); new keys and values are written by the same call."""
    case = batch.case
    counts = np.full(case.requests, case.rows, dtype=np.int64)
    seats = np.arange(case.requests)
    packed = pack(batch.table, seats, batch.starts, counts, counts, batch.device, branches=batch.branches)
    query = batch.query.transpose(0, 1)[None]
    steps: list[PagedStep] = []

    def attend(layer: int) -> Tensor:
        if layer == 0:
            steps[:] = [PagedStep(batch.pool, packed, False)]
        return steps[0].attend(query, batch.new_keys, batch.new_values, batch.scale, {})[0]

    return attend


def flexible(batch: PagedBatch) -> Attend:
    """FlexAttention, compiled, its block mask naming the cache's blocks; keys lie head by head, as it reads them.

    The layout is a copy of the pool's: FlexAttention cannot read heads that are interleaved block by block.
    """
    from torch.nn.attention.flex_attention import flex_attention

    torch.compiler.reset()
    run: Any = torch.compile(flex_attention, fullgraph=True, dynamic=False)
    case, heads, size = batch.case, batch.heads, batch.block_size
    mask = _block_mask(batch)
    query = batch.query.view(case.requests, case.rows, heads.heads, heads.width).transpose(1, 2)
    caches = []
    for held in zip(batch.pool.keys, batch.pool.values, strict=True):
        shape = (-1, heads.kv_heads, size, heads.width)
        caches.append([part.view(shape).transpose(0, 1).reshape(1, heads.kv_heads, -1, heads.width) for part in held])
    options = {"BLOCK_N": size} if size < FLEX_ROWS // 2 else None

    def attend(layer: int) -> Tensor:
        found: Tensor = run(
            query,
            *caches[layer],
            block_mask=mask,
            scale=batch.scale,
            enable_gqa=heads.heads != heads.kv_heads,
            kernel_options=options,
        )
        return found.transpose(1, 2).reshape(batch.query.shape)

    return attend


def _block_mask(batch: PagedBatch) -> Any:
    """Which of the cache's blocks a request's rows see whole, and in part; columns are blocks where they lie."""
    from torch.nn.attention.flex_attention import BlockMask

    case, size, total = batch.case, batch.block_size, batch.table.num_blocks
    groups = -(-case.rows // FLEX_ROWS)
    counts = np.zeros((2, case.requests, 1, groups), dtype=np.int32)
    indices = np.zeros((2, case.requests, 1, groups, total), dtype=np.int32)
    # Blocks of other requests lie behind everything that is seen.
    place = np.full((case.requests, total), 1 << 30, dtype=np.int64)
    for request in range(case.requests):
        held = batch.table.blocks[request, : -(-int(batch.ends[request]) // size)]
        place[request, held] = np.arange(len(held))
        for group in range(groups):
            rows = slice(group * FLEX_ROWS, (group + 1) * FLEX_ROWS)
            whole = int(batch.prefix[request, rows].min()) // size
            seen = -(-int(batch.sees[request, rows].max()) // size)
            for kind, blocks in enumerate((held[whole:seen], held[:whole])):
                counts[kind, request, 0, group] = len(blocks)
                indices[kind, request, 0, group, : len(blocks)] = blocks
    on_device = [torch.from_numpy(part).to(batch.device) for part in (*counts, *indices)]
    where, prefix, bits = (torch.from_numpy(part).to(batch.device) for part in (place, batch.prefix, batch.bits))

    def visible(b: Tensor, _h: Tensor, q: Tensor, key: Tensor) -> Tensor:
        slot = where[b, key // size] * size + key % size
        behind = slot - prefix[b, q]
        branch = (bits[b, q] >> behind.clamp(0, 62)) & 1
        return (behind < 0) | ((behind <= 62) & (branch == 1))

    return BlockMask.from_kv_blocks(
        on_device[0],
        on_device[2],
        on_device[1],
        on_device[3],
        BLOCK_SIZE=(FLEX_ROWS, size),
        mask_mod=visible,
        seq_lengths=(case.rows, total * size),
        compute_q_blocks=False,
    )


def kernel(batch: PagedBatch, tile: int, splits: int) -> Attend:
    """Our Triton kernel, reading the pool as it lies; `splits` programs share the keys of `tile` rows' heads."""
    if batch.device.type != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        raise UnavailableError("Triton compiles for a GPU; TRITON_INTERPRET=1 interprets the kernel here, slowly")
    from engine.backends.torch.triton_kernels import paged_attention

    case, heads = batch.case, batch.heads
    most = max(1, min(case.rows, tile // (heads.heads // heads.kv_heads)))
    tiles = [
        (request * case.rows + row, min(most, case.rows - row), request, batch.sees[request, row : row + most].max())
        for request in range(case.requests)
        for row in range(0, case.rows, most)
    ]
    blocks = -(-int(batch.ends.max()) // batch.block_size)
    on_device = [
        torch.from_numpy(np.ascontiguousarray(part)).to(batch.device)
        for part in (
            np.array(tiles, dtype=np.int32),
            batch.table.blocks[: case.requests, :blocks],
            batch.prefix.reshape(-1).astype(np.int32),
            batch.bits.reshape(-1),
        )
    ]

    def attend(layer: int) -> Tensor:
        return paged_attention(
            batch.query,
            batch.pool.keys[layer],
            batch.pool.values[layer],
            on_device[0],
            on_device[1],
            on_device[2],
            None if batch.branches is None else on_device[3],
            batch.scale,
            batch.block_size,
            heads.kv_heads,
            tile_rows=most,
            splits=splits,
        )

    return attend


def _kernels(batch: PagedBatch) -> dict[str, Attend]:
    if batch.case.rows > SMALL_TILE:
        # A prompt's tiles fill the chip without sharing.
        return {f"tiles of {tile}": kernel(batch, tile, 1) for tile in LARGE_TILES}
    return {f"{splits} splits": kernel(batch, SMALL_TILE, splits) for splits in SPLITS}


WAYS: dict[str, Callable[[PagedBatch], dict[str, Attend]]] = {
    "gather + SDPA": lambda batch: {"": gathered(batch)},
    "FlexAttention": lambda batch: {"": flexible(batch)},
    "Triton": _kernels,
}
"""By name, the settings of each way that are tried."""
