"""Compiled float32 CPU kernels of a Llama layer: products of few rows, normalisation, gating, attention.

Weights are (inputs, outputs). Keys and values of a layer are (blocks, kv heads, block size, width), and attention reads
them in place; they are gathered only for many new tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numba
import numpy as np

_OPTIONS = {"cache": True, "error_model": "numpy", "fastmath": {"reassoc", "contract", "nsz", "arcp"}, "nogil": True}
"""Sums may be reordered, which vectorisation requires."""

_kernel: Callable[..., Any] = numba.njit(**_OPTIONS, _nrt=False)  # type: ignore[call-overload]
"""Without reference counting of arrays, as `engine.compiled.kernel`."""

_counting: Callable[..., Any] = numba.njit(**_OPTIONS)  # type: ignore[call-overload]
"""For functions that call `np.dot`."""

_TILE_OUTPUTS = 1024
"""Outputs that a product of few rows works on at a time: four rows of weights and results fit the nearest cache."""

_PRODUCT_ROWS = 24
"""From this number of query rows per key-value head, attention is two products over gathered keys, not a loop."""

TILE_ROWS = 128
"""Query rows of one such product."""


@_kernel
def _exp(x):
    """exp of the nearest x in [-87, 88], within 2e-7 of itself; without branches, so that loops of it become vectors.

    By 2^n and Cephes' polynomial.
    """
    x = min(max(x, np.float32(-87.0)), np.float32(88.0))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)
    p = np.float32(1.9875691500e-4)
    p = p * r + np.float32(1.3981999507e-3)
    p = p * r + np.float32(8.3334519073e-3)
    p = p * r + np.float32(4.1665795894e-2)
    p = p * r + np.float32(1.6666665459e-1)
    p = p * r + np.float32(5.0000001201e-1)
    p = p * r * r + r + np.float32(1.0)
    return p * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)


@_kernel
def _copy(source, target):
    for d in range(len(source)):
        target[d] = source[d]


@_kernel
def _add_four(x, w, k, first, end, m, out):
    """Add the products of inputs k to k + 3 to outputs [first, end) of rows m to m + 3."""
    a0, a1, a2, a3 = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
    b0, b1, b2, b3 = x[m + 1, k], x[m + 1, k + 1], x[m + 1, k + 2], x[m + 1, k + 3]
    c0, c1, c2, c3 = x[m + 2, k], x[m + 2, k + 1], x[m + 2, k + 2], x[m + 2, k + 3]
    d0, d1, d2, d3 = x[m + 3, k], x[m + 3, k + 1], x[m + 3, k + 2], x[m + 3, k + 3]
    w0, w1, w2, w3 = w[k, first:end], w[k + 1, first:end], w[k + 2, first:end], w[k + 3, first:end]
    a, b, c, d = out[m, first:end], out[m + 1, first:end], out[m + 2, first:end], out[m + 3, first:end]
    for n in range(len(w0)):
        v0, v1, v2, v3 = w0[n], w1[n], w2[n], w3[n]
        a[n] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
        b[n] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3
        c[n] += c0 * v0 + c1 * v1 + c2 * v2 + c3 * v3
        d[n] += d0 * v0 + d1 * v1 + d2 * v2 + d3 * v3


@_kernel
def _add_two(x, w, k, first, end, m, out):
    """As `_add_four`, rows m and m + 1."""
    a0, a1, a2, a3 = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
    b0, b1, b2, b3 = x[m + 1, k], x[m + 1, k + 1], x[m + 1, k + 2], x[m + 1, k + 3]
    w0, w1, w2, w3 = w[k, first:end], w[k + 1, first:end], w[k + 2, first:end], w[k + 3, first:end]
    a, b = out[m, first:end], out[m + 1, first:end]
    for n in range(len(w0)):
        v0, v1, v2, v3 = w0[n], w1[n], w2[n], w3[n]
        a[n] += a0 * v0 + a1 * v1 + a2 * v2 + a3 * v3
        b[n] += b0 * v0 + b1 * v1 + b2 * v2 + b3 * v3


@_kernel
def _add_one(x, w, k, first, end, m, out):
    """As `_add_four`, row m."""
    a0, a1, a2, a3 = x[m, k], x[m, k + 1], x[m, k + 2], x[m, k + 3]
    w0, w1, w2, w3 = w[k, first:end], w[k + 1, first:end], w[k + 2, first:end], w[k + 3, first:end]
    a = out[m, first:end]
    for n in range(len(w0)):
        a[n] += a0 * w0[n] + a1 * w1[n] + a2 * w2[n] + a3 * w3[n]


@_kernel
def times(rows, matrix, out):
    """`rows` (T, K) times `matrix` (K, N) for small T, where BLAS is up to three times slower.

    Every piece of the matrix is read once and used for all rows while it is in the nearest cache.
    """
    count, inputs = rows.shape
    outputs = matrix.shape[1]
    fours, pairs, whole = count - count % 4, count - count % 2, inputs - inputs % 4
    for m in range(count):
        out[m, :] = np.float32(0.0)
    for first in range(0, outputs, _TILE_OUTPUTS):
        end = min(first + _TILE_OUTPUTS, outputs)
        for k in range(0, whole, 4):
            for m in range(0, fours, 4):
                _add_four(rows, matrix, k, first, end, m, out)
            for m in range(fours, pairs, 2):
                _add_two(rows, matrix, k, first, end, m, out)
            for m in range(pairs, count):
                _add_one(rows, matrix, k, first, end, m, out)
        for k in range(whole, inputs):
            for m in range(count):
                for n in range(first, end):
                    out[m, n] += rows[m, k] * matrix[k, n]


@_kernel
def embed(embedding, tokens, seats, starts, counts, hidden):
    """Embeddings (T, D) of `counts[i]` tokens from `starts[i]` of every batch slot."""
    row = 0
    for i in range(len(seats)):
        for t in range(counts[i]):
            _copy(embedding[tokens[seats[i], starts[i] + t]], hidden[row])
            row += 1


@_kernel
def _normalise(row, weight, eps, out):
    """Root mean square normalisation."""
    total = np.float32(0.0)
    for d in range(len(row)):
        total += row[d] * row[d]
    factor = np.float32(1.0) / np.sqrt(total / np.float32(len(row)) + eps)
    for d in range(len(row)):
        out[d] = row[d] * factor * weight[d]


@_kernel
def add_and_normalise(hidden, added, weight, eps, out):
    """Add to the residual stream (T, D), in place, and normalise the sum."""
    for t in range(len(hidden)):
        row, more = hidden[t], added[t]
        for d in range(len(row)):
            row[d] += more[d]
        _normalise(row, weight, eps, out[t])


@_kernel
def finish(hidden, added, weight, eps, counts, keep, out):
    """The same for the last `keep[i]` of every request's `counts[i]` rows, one after another in `out`."""
    row, kept = 0, 0
    for i in range(len(counts)):
        row += counts[i]
        for t in range(row - keep[i], row):
            for d in range(hidden.shape[1]):
                hidden[t, d] += added[t, d]
            _normalise(hidden[t], weight, eps, out[kept])
            kept += 1


@_kernel
def gate(gate_up, out):
    """silu(gate) * up: (T, 2 I) to (T, I)."""
    width = out.shape[1]
    for t in range(len(out)):
        row, active = gate_up[t], out[t]
        for d in range(width):
            active[d] = row[d] / (np.float32(1.0) + _exp(-row[d])) * row[width + d]


@_kernel
def _turn(part, cos, sin):
    """Rotary embedding of one head, in place."""
    half = len(part) // 2
    for d in range(half):
        first, second = part[d], part[half + d]
        part[d] = first * cos[d] - second * sin[d]
        part[half + d] = second * cos[half + d] + first * sin[half + d]


@_kernel
def _position(tree, slot):
    """The position of the token in a slot."""
    root, _, depths = tree
    return slot if slot <= root else root + depths[slot - root - 1]


@_kernel
def _hide_strangers(scores, low, tree, slot, least):
    """Mask the scores, from slot `low` on, of tree nodes other than `slot` and its ancestors.

    `least` is the first position seen.
    """
    root, parents, depths = tree
    below = slot + 1
    node = slot - root - 1
    while below > root + 1:
        at = root + 1 + node
        for hidden in range(max(at + 1, low), below):
            scores[hidden - low] = -np.inf
        if node >= 0:
            if root + depths[node] < least:
                scores[at - low] = -np.inf
            node = parents[node]
        below = at


@_kernel
def _turn_and_cache(rows, heads, blocks, start, tree, keys, values, cos, sin):
    """Turn one request's queries and keys in place and cache its keys and values."""
    kv_heads, size, width = keys.shape[1], keys.shape[2], keys.shape[3]
    for t in range(len(rows)):
        slot, row = start + t, rows[t]
        block, place, position = blocks[slot // size], slot % size, _position(tree, slot)
        for h in range(heads + kv_heads):
            _turn(row[h * width : (h + 1) * width], cos[position], sin[position])
        for h in range(kv_heads):
            at = (heads + h) * width
            _copy(row[at : at + width], keys[block, h, place])
            at += kv_heads * width
            _copy(row[at : at + width], values[block, h, place])


@_kernel
def _softmax(scores, first, end):
    """Probabilities over scores[first:end], in place; zero elsewhere."""
    highest = scores[first]
    for j in range(first, end):
        highest = max(highest, scores[j])
    total = np.float32(0.0)
    for j in range(first, end):
        scores[j] = _exp(scores[j] - highest)
        total += scores[j]
    share = np.float32(1.0) / total
    for j in range(first, end):
        scores[j] *= share
    scores[:first] = np.float32(0.0)
    scores[end:] = np.float32(0.0)


@_kernel
def _dots(query, keys, scores):
    """Products of a query with the keys (n, W) of a block."""
    count, width = keys.shape
    fours = count - count % 4
    for j in range(0, fours, 4):
        k0, k1, k2, k3 = keys[j], keys[j + 1], keys[j + 2], keys[j + 3]
        s0, s1, s2, s3 = np.float32(0.0), np.float32(0.0), np.float32(0.0), np.float32(0.0)
        for d in range(width):
            q = query[d]
            s0 += q * k0[d]
            s1 += q * k1[d]
            s2 += q * k2[d]
            s3 += q * k3[d]
        scores[j], scores[j + 1], scores[j + 2], scores[j + 3] = s0, s1, s2, s3
    for j in range(fours, count):
        s0 = np.float32(0.0)
        for d in range(width):
            s0 += query[d] * keys[j, d]
        scores[j] = s0


@_kernel
def _mix(shares, values, out):
    """Add the values (n, W) of a block in the given shares."""
    count, width = values.shape
    fours = count - count % 4
    for j in range(0, fours, 4):
        p0, p1, p2, p3 = shares[j], shares[j + 1], shares[j + 2], shares[j + 3]
        v0, v1, v2, v3 = values[j], values[j + 1], values[j + 2], values[j + 3]
        for d in range(width):
            out[d] += p0 * v0[d] + p1 * v1[d] + p2 * v2[d] + p3 * v3[d]
    for j in range(fours, count):
        for d in range(width):
            out[d] += shares[j] * values[j, d]


@_kernel
def _attend_by_block(rows, out, blocks, keys, values, start, tree, window, scale, room):
    """One request's new tokens, query row by query row, over keys and values where they are in the cache."""
    kv_heads, size, width = keys.shape[1], keys.shape[2], keys.shape[3]
    heads = out.shape[1] // width
    for t in range(len(rows)):
        end = start + t + 1
        least = _position(tree, start + t) + 1 - window
        first = max(0, min(least, tree[0] + 1))
        low, high = first // size, (end - 1) // size + 1
        scores = room[: (high - low) * size]
        for head in range(heads):
            h = head // (heads // kv_heads)
            query = rows[t, head * width : (head + 1) * width]
            for d in range(width):
                query[d] *= scale
            for b in range(low, high):
                _dots(query, keys[blocks[b], h], scores[(b - low) * size : (b - low + 1) * size])
            _hide_strangers(scores, low * size, tree, end - 1, least)
            _softmax(scores, first - low * size, end - low * size)
            mixed = out[t, head * width : (head + 1) * width]
            mixed[:] = np.float32(0.0)
            for b in range(low, high):
                _mix(scores[(b - low) * size : (b - low + 1) * size], values[blocks[b], h], mixed)


@_counting
def _attend_by_product(rows, heads, out, blocks, keys, values, h, start, tree, window, scale, room, gathered, queried):
    """One request's new tokens over gathered keys, a tile of query rows at a time.

    Query heads [heads[0], heads[1]) share key-value head `h`.
    """
    size, width = keys.shape[2], keys.shape[3]
    count, repeat = len(rows), heads[1] - heads[0]
    held = (start + count - 1) // size + 1
    key_rows = gathered[: held * size * width].reshape(held * size, width)
    value_rows = gathered[held * size * width : 2 * held * size * width].reshape(held * size, width)
    for b in range(held):
        key_rows[b * size : (b + 1) * size] = keys[blocks[b], h]
        value_rows[b * size : (b + 1) * size] = values[blocks[b], h]
    tokens = max(1, TILE_ROWS // repeat)
    for begin in range(0, count, tokens):
        stop = min(begin + tokens, count)
        lines, seen = (stop - begin) * repeat, start + stop
        queries = queried[: lines * width].reshape(lines, width)
        found = queried[lines * width : 2 * lines * width].reshape(lines, width)
        scores = room[: lines * seen].reshape(lines, seen)
        for line in range(lines):
            head = heads[0] + line % repeat
            for d in range(width):
                queries[line, d] = rows[begin + line // repeat, head * width + d] * scale
        np.dot(queries, key_rows[:seen].T, scores)
        for line in range(lines):
            end = start + begin + line // repeat + 1
            least = _position(tree, end - 1) + 1 - window
            _hide_strangers(scores[line], 0, tree, end - 1, least)
            _softmax(scores[line], max(0, min(least, tree[0] + 1)), end)
        np.dot(scores, value_rows[:seen], found)
        for line in range(lines):
            head = heads[0] + line % repeat
            out[begin + line // repeat, head * width : (head + 1) * width] = found[line]


@_counting
def attend(
    rows, out, table, seats, starts, counts, trees, keys, values, cos, sin, window, scale, room, gathered, queried
):
    """Turn queries and keys of all new tokens, cache keys and values, attend: (T, (H + 2 KH) W) to `out` (T, H W).

    table: (seats, blocks) of the cache · trees: the arrays of `engine.speculation.tree.Branches`, empty for none ·
    cos, sin: (positions, W) · room: floats for max(TILE_ROWS, heads of a key-value head) rows over all slots and a
    block more · gathered: two W for each of these slots · queried: two W for each of these rows.
    """
    kv_heads, width = keys.shape[1], keys.shape[3]
    heads = out.shape[1] // width
    repeat = heads // kv_heads
    roots, parents, depths = trees
    nowhere = np.zeros(0, dtype=np.int32)
    row = 0
    for i in range(len(seats)):
        blocks, start, count = table[seats[i]], starts[i], counts[i]
        mine, result = rows[row : row + count], out[row : row + count]
        tree = start + count, nowhere, nowhere
        if len(roots) > 0:
            tree = roots[i], parents[i], depths[i]
        _turn_and_cache(mine, heads, blocks, start, tree, keys, values, cos, sin)
        if count * repeat < _PRODUCT_ROWS:
            _attend_by_block(mine, result, blocks, keys, values, start, tree, window, scale, room)
        else:
            for h in range(kv_heads):
                shared = h * repeat, (h + 1) * repeat
                _attend_by_product(
                    mine, shared, result, blocks, keys, values, h, start, tree, window, scale, room, gathered, queried
                )
        row += count
