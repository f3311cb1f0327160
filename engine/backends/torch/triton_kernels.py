"""Triton kernels for the parts of a Llama-family layer between two matrix products.

Everything that differs between iterations (owners of rows, visible positions, cache slots) is read from device memory,
so that a captured graph can be replayed for another batch. Rows are tokens. Scores and sums
are float32 whatever the model's type.
"""

# Kernels only annotate the arguments that are compile-time constants.
# mypy: disable-error-code="no-untyped-def"

from __future__ import annotations

from functools import cache

import torch
import triton
import triton.language as tl
from torch import Tensor

KEYS_AT_ONCE = 64
"""Keys that a program of `paged_attention` processes per step."""

_HEADS_AT_ONCE = 8
_LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def _embed(ids, promised, table, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    token = tl.load(ids + row).to(tl.int64)
    later = tl.load(promised + tl.maximum(-1 - token, 0))
    token = tl.where(token < 0, later, token)
    found = tl.load(table + token * WIDTH + columns, mask=inside)
    tl.store(out + row.to(tl.int64) * WIDTH + columns, found, mask=inside)


@triton.jit
def _normalise(hidden, added, weight, out, eps, ADDED: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    columns = tl.arange(0, BLOCK)
    inside = columns < WIDTH
    at = tl.program_id(0).to(tl.int64) * WIDTH + columns
    value = tl.load(hidden + at, mask=inside, other=0.0)
    if ADDED:
        value = value + tl.load(added + at, mask=inside, other=0.0)
        tl.store(hidden + at, value, mask=inside)
    wide = value.to(tl.float32)
    scaled = wide * tl.rsqrt(tl.sum(wide * wide, axis=0) / WIDTH + eps)
    # The family normalises in float32 and scales in the model's type.
    scaled = scaled.to(value.dtype) * tl.load(weight + columns, mask=inside, other=0.0)
    tl.store(out + at, scaled, mask=inside)


@triton.jit
def _activate(gate_up, out, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    inside = columns < WIDTH
    gate = tl.load(gate_up + row * 2 * WIDTH + columns, mask=inside, other=0.0)
    up = tl.load(gate_up + row * 2 * WIDTH + WIDTH + columns, mask=inside, other=0.0)
    wide = gate.to(tl.float32)
    active = (wide * tl.sigmoid(wide)).to(gate.dtype)
    tl.store(out + row * WIDTH + columns, active * up, mask=inside)


@triton.jit
def _turn_and_cache(
    qkv, cos, sin, positions, slots, keys, values,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_SIZE: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    head = tl.program_id(1) * AT_ONCE + tl.arange(0, AT_ONCE)
    inside = head < HEADS + 2 * KV_HEADS
    d = tl.arange(0, HALF)
    at = (row.to(tl.int64) * (HEADS + 2 * KV_HEADS) + head)[:, None] * (2 * HALF) + d[None, :]
    first = tl.load(qkv + at, mask=inside[:, None], other=0.0)
    second = tl.load(qkv + at + HALF, mask=inside[:, None], other=0.0)
    angle = tl.load(positions + row).to(tl.int64) * HALF + d
    c = tl.load(cos + angle)[None, :]
    s = tl.load(sin + angle)[None, :]
    a = first.to(tl.float32)
    b = second.to(tl.float32)
    turned_first = (a * c - b * s).to(first.dtype)
    turned_second = (b * c + a * s).to(first.dtype)
    is_query = head < HEADS
    tl.store(qkv + at, turned_first, mask=is_query[:, None])
    tl.store(qkv + at + HALF, turned_second, mask=is_query[:, None])
    slot = tl.load(slots + row).to(tl.int64)
    is_key = (head >= HEADS) & (head < HEADS + KV_HEADS)
    is_value = (head >= HEADS + KV_HEADS) & inside
    kv_head = tl.where(is_key, head - HEADS, head - HEADS - KV_HEADS)
    place = (slot // BLOCK_SIZE * KV_HEADS + kv_head) * BLOCK_SIZE + slot % BLOCK_SIZE
    to = place[:, None] * (2 * HALF) + d[None, :]
    tl.store(keys + to, turned_first, mask=is_key[:, None])
    tl.store(keys + to + HALF, turned_second, mask=is_key[:, None])
    tl.store(values + to, first, mask=is_value[:, None])
    tl.store(values + to + HALF, second, mask=is_value[:, None])


@triton.jit(do_not_specialize=["rows"])
def _attend(
    query, keys, values, tiles, block_table, prefix, bits, out, partial, peaks, sums, scale, rows, query_stride,
    table_width,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK_SIZE: tl.constexpr, TREES: tl.constexpr,
    SPLITS: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    first = tl.load(tiles + 4 * tile)
    count = tl.load(tiles + 4 * tile + 1)
    request = tl.load(tiles + 4 * tile + 2).to(tl.int64)
    held = tl.load(tiles + 4 * tile + 3)
    if count > 0:
        REPEAT: tl.constexpr = HEADS // KV_HEADS
        m = tl.arange(0, BLOCK_M)
        d = tl.arange(0, WIDTH)
        live = m < count * REPEAT
        row = (first + m // REPEAT).to(tl.int64)
        head = kv_head * REPEAT + m % REPEAT
        q = tl.load(query + (row * query_stride + head * WIDTH)[:, None] + d[None, :], mask=live[:, None], other=0.0)
        seen = tl.load(prefix + row, mask=live, other=0)
        if TREES:
            branch = tl.load(bits + row, mask=live, other=0)
        span = (held + SPLITS * BLOCK_N - 1) // (SPLITS * BLOCK_N) * BLOCK_N
        begin = split * span
        end = tl.minimum(begin + span, held)
        peak = tl.full((BLOCK_M,), float("-inf"), tl.float32)
        total = tl.zeros((BLOCK_M,), tl.float32)
        found = tl.zeros((BLOCK_M, WIDTH), tl.float32)
        for start in range(begin, end, BLOCK_N):
            key = start + tl.arange(0, BLOCK_N)
            inside = key < end
            block = tl.load(block_table + request * table_width + key // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            at = ((block * KV_HEADS + kv_head) * BLOCK_SIZE + key % BLOCK_SIZE) * WIDTH
            k = tl.load(keys + at[None, :] + d[:, None], mask=inside[None, :], other=0.0)
            score = tl.dot(q, k, input_precision="ieee") * (scale * _LOG2_E)
            visible = key[None, :] < seen[:, None]
            if TREES:
                behind = (key[None, :] - seen[:, None]).to(tl.int64)
                node = tl.minimum(tl.maximum(behind, 0), 63)
                visible = visible | ((behind >= 0) & (behind < 64) & (((branch[:, None] >> node) & 1) == 1))
            score = tl.where(visible & inside[None, :], score, float("-inf"))
            higher = tl.maximum(peak, tl.max(score, axis=1))
            # A row without keys so far has no maximum to subtract.
            base = tl.where(higher == float("-inf"), 0.0, higher)
            weight = tl.exp2(score - base[:, None])
            kept = tl.exp2(peak - base)
            total = total * kept + tl.sum(weight, axis=1)
            v = tl.load(values + at[:, None] + d[None, :], mask=inside[:, None], other=0.0)
            found = found * kept[:, None] + tl.dot(weight.to(v.dtype), v, input_precision="ieee")
            peak = higher
        result = row * HEADS + head
        if SPLITS == 1:
            found = found / tl.where(total > 0.0, total, 1.0)[:, None]
            to = out + (result * WIDTH)[:, None] + d[None, :]
            tl.store(to, found.to(out.dtype.element_ty), mask=live[:, None])
        else:
            result = split.to(tl.int64) * rows * HEADS + result
            tl.store(partial + (result * WIDTH)[:, None] + d[None, :], found, mask=live[:, None])
            tl.store(peaks + result, peak, mask=live)
            tl.store(sums + result, total, mask=live)


@triton.jit(do_not_specialize=["results"])
def _join(partial, peaks, sums, out, results, WIDTH: tl.constexpr, SPLITS: tl.constexpr):
    result = tl.program_id(0).to(tl.int64)
    split = tl.arange(0, SPLITS)
    d = tl.arange(0, WIDTH)
    peak = tl.load(peaks + split * results + result)
    highest = tl.max(peak, axis=0)
    share = tl.exp2(peak - tl.where(highest == float("-inf"), 0.0, highest))
    total = tl.sum(tl.load(sums + split * results + result) * share, axis=0)
    parts = tl.load(partial + ((split * results + result) * WIDTH)[:, None] + d[None, :])
    found = tl.sum(parts * share[:, None], axis=0) / tl.where(total > 0.0, total, 1.0)
    tl.store(out + result * WIDTH + d, found.to(out.dtype.element_ty))


def attention_warps(block_m: int, capability: int) -> int:
    """Warps of an attention program, by query rows and the GPU's major compute capability.

    From 9 on four warps multiply 64 rows together; before, four would keep more than their registers hold.
    """
    return 4 if block_m < 64 or (block_m == 64 and capability >= 9) else 8


@cache
def _capability() -> int:
    return torch.cuda.get_device_capability()[0] if torch.cuda.is_available() else 0


def embed(ids: Tensor, promised: Tensor, table: Tensor) -> Tensor:
    """(T, width) rows of an embedding table for token ids (T,) int32; an id -1 - i stands for `promised[i]`."""
    width = table.shape[1]
    out = table.new_empty(len(ids), width)
    _embed[(len(ids),)](ids, promised, table, out, WIDTH=width, BLOCK=triton.next_power_of_2(width))
    return out


def normalise(hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    """RMS norm of the rows of `hidden` (T, width), to which `added` is added first, in place."""
    width = hidden.shape[1]
    out = torch.empty_like(hidden)
    block = triton.next_power_of_2(width)
    warps = min(max(block // 512, 1), 16)
    _normalise[(len(hidden),)](
        hidden, hidden if added is None else added, weight, out, eps,
        ADDED=added is not None, WIDTH=width, BLOCK=block, num_warps=warps,
    )  # fmt: skip
    return out


def activate(gate_up: Tensor) -> Tensor:
    """(T, width) silu(gate) * up of rows (T, 2 width), gate first."""
    rows, width = gate_up.shape[0], gate_up.shape[1] // 2
    out = gate_up.new_empty(rows, width)
    block = min(1024, triton.next_power_of_2(width))
    _activate[(rows, triton.cdiv(width, block))](gate_up, out, WIDTH=width, BLOCK=block)
    return out


def turn_and_cache(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    keys: Tensor,
    values: Tensor,
    heads: int,
    kv_heads: int,
    block_size: int,
) -> None:
    """Turn queries in place by their positions, and put turned keys and values in the cache.

    qkv: (T, heads + 2 kv_heads, width) · cos, sin: (positions, width / 2) float32 · positions, slots: (T,) int32, a
    slot being block * block_size + place · keys, values: a layer's pools (`engine.backends.torch.attention.Pool`).
    """
    grid = (qkv.shape[0], triton.cdiv(heads + 2 * kv_heads, _HEADS_AT_ONCE))
    _turn_and_cache[grid](
        qkv, cos, sin, positions, slots, keys, values,
        HEADS=heads, KV_HEADS=kv_heads, HALF=qkv.shape[2] // 2, BLOCK_SIZE=block_size, AT_ONCE=_HEADS_AT_ONCE,
    )  # fmt: skip


def paged_attention(
    query: Tensor,
    keys: Tensor,
    values: Tensor,
    tiles: Tensor,
    block_table: Tensor,
    prefix: Tensor,
    bits: Tensor | None,
    scale: float,
    block_size: int,
    kv_heads: int,
    *,
    tile_rows: int,
    splits: int = 1,
) -> Tensor:
    """(T, heads, width) attention of T new tokens over their requests' cache, these tokens included.

    Args:
        query: (T, heads, width), rows any distance apart; width a power of two of at least 16.
        keys, values: a layer's pools, (blocks * kv_heads, block_size * width).
        tiles: (tiles, 4) int32: first row, rows (at most `tile_rows`; 0 for a tile that is none), request, and the
            slots of the request that any of its rows sees. Rows outside all tiles are undefined.
        block_table: (requests, blocks) int32.
        prefix: (T,) int32: number of its request's first slots that a row sees.
        bits: (T,) int64: where bit i is set, the row also sees slot `prefix + i`; None: no row sees any.
        scale: of scores.
        tile_rows: rows per program.
        splits: programs that share a tile's keys, a power of two; a second kernel combines their results
            (Flash-Decoding, Dao et al., 2023).
    """
    rows, heads, width = query.shape
    out = query.new_empty(rows, heads, width)
    if splits > 1:
        partial = torch.empty(splits, rows, heads, width, dtype=torch.float32, device=query.device)
        peaks, sums = torch.empty(2, splits, rows, heads, dtype=torch.float32, device=query.device)
    else:
        partial = peaks = sums = out
    block_m = max(16, triton.next_power_of_2(tile_rows * (heads // kv_heads)))
    _attend[(len(tiles), kv_heads, splits)](
        query, keys, values, tiles, block_table, prefix, prefix if bits is None else bits, out, partial, peaks, sums,
        scale, rows, query.stride(0), block_table.shape[1],
        HEADS=heads, KV_HEADS=kv_heads, WIDTH=width, BLOCK_SIZE=block_size, TREES=bits is not None,
        SPLITS=splits, BLOCK_M=block_m, BLOCK_N=KEYS_AT_ONCE,
        num_warps=attention_warps(block_m, _capability()), num_stages=2,
    )  # fmt: skip
    if splits > 1:
        _join[(rows * heads,)](partial, peaks, sums, out, rows * heads, WIDTH=width, SPLITS=splits, num_warps=1)
    return out
