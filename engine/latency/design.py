"""Design of a measurement: few iterations that cover an engine's whole operating range."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import NDArray

from engine.limits import EngineLimits

SHORTEST_KV_TOKENS = 16
SPARE_TOKENS = 8
"""Left of a request's context after its candidates, so that no measured iteration ends a request."""

PREFILL_ONLY, DECODE_ONLY = 0.15, 0.5
"""Shares of the design; the rest are mixed."""

SPREAD = 1.0
"""Most that the log of cached tokens spreads (standard deviation) among the requests of a batch."""


@dataclass(frozen=True)
class Point:
    """One iteration to measure.

    kv_tokens: (B,) cached tokens of each decoding request · candidates: c · chunks: prompt tokens of each prefill ·
    context: cached tokens of the first prefill's prompt · left: prompt tokens that the last prefill's chunk leaves for
    later · fresh: number of decoding requests, at the end of the batch, whose prompts ended in the previous iteration,
    so that a drafter has not read them.
    """

    kv_tokens: tuple[int, ...]
    candidates: int
    chunks: tuple[int, ...] = ()
    context: int = 0
    left: int = 0
    fresh: int = 0

    @property
    def prompts(self) -> list[int]:
        """Prompt tokens of each prefilling request."""
        lengths = list(self.chunks)
        if lengths:
            lengths[0] += self.context
            lengths[-1] += self.left
        return lengths


@dataclass(frozen=True)
class Space:
    """Operating range of an engine: its limits, the choices of c, the largest n.

    `longest` and `room` follow from the limits: cached tokens of one request, and of all, at which an iteration with
    the most candidates still fits.
    """

    limits: EngineLimits
    candidates: tuple[int, ...]
    most_prefill: int

    @property
    def longest(self) -> int:
        return self.limits.max_model_len - max(self.candidates) - SPARE_TOKENS

    @property
    def room(self) -> int:
        return (self.limits.total_blocks - self.limits.watermark_blocks) * self.limits.block_size

    def reserve(self, decodes: int) -> int:
        """Further cache slots (tokens) that `decodes` requests may need, counted in whole blocks."""
        return decodes * (max(self.candidates) + 1 + self.limits.block_size)


def design(space: Space, points: int, seed: int) -> list[Point]:
    """`points` iterations: the range's edges, then a Latin hypercube over log B, c, log KV, log n, and the rest.

    Sizes are drawn log-uniformly, because iteration time is flat where they are small. Batches are from even to as
    uneven as those of real requests; half of the prefill budgets are one prompt's chunk, the rest is split unevenly.

    Raises:
        ValueError: an engine too small to hold a request with the most candidates.
    """
    from scipy.stats import qmc

    if space.longest < SHORTEST_KV_TOKENS or space.room <= space.reserve(1) + SHORTEST_KV_TOKENS:
        raise ValueError(
            f"max_model_len={space.limits.max_model_len} tokens and {space.limits.total_blocks} KV blocks leave no "
            f"room for a request with {max(space.candidates)} candidates; raise them, or lower the candidate choices"
        )
    chosen = edges(space)[:points]
    missing = points - len(chosen)
    if missing > 0:
        rng = np.random.default_rng(seed)
        rows = qmc.LatinHypercube(d=9, rng=np.random.default_rng([seed, 1])).random(missing)
        chosen += [_point(space, row, rng) for row in rows]
    return chosen


def edges(space: Space) -> list[Point]:
    """Points that sampling would miss: corners of the range (B of 1 and most, c and n of 0 and most, KV low and full).

    Also batches of prompts only, short and long, begun and not, and prompts beside half of the requests.
    """
    most = space.limits.max_num_seqs
    top, wide = max(space.candidates), space.most_prefill
    prompts = -(-wide // space.longest)
    found = []
    for decodes in sorted({1, most}):
        for candidates in sorted({0, top}):
            for kv in (SHORTEST_KV_TOKENS, space.longest):
                found.append(_decodes(space, [kv] * decodes, candidates))
                # Prompts beside all requests take the place of some of them, and their share of the cache.
                beside = _decodes(space, [kv] * min(decodes, max(1, most - prompts)), candidates, wide)
                found.append(_with_prefill(space, beside, wide, [1.0], 0.0, False))
    for tokens in sorted({min(16, wide), min(256, wide), wide}):
        found.append(_with_prefill(space, _decodes(space, [], 0), tokens, [1.0], 0.0, False))
        found.append(_with_prefill(space, _decodes(space, [], 0), tokens, [1.0], 1.0, True))
    for decodes in sorted({1, most // 2 or 1}):
        for candidates in sorted({0, top}):
            batch = _decodes(space, [256] * decodes, candidates)
            found += [_with_prefill(space, batch, tokens, [1.0], 0.0, True) for tokens in (min(32, wide), wide)]
    return list(dict.fromkeys(found))


def digest(points: Sequence[Point]) -> str:
    """Digest of a design, equal only for equal designs."""
    return hashlib.sha256(json.dumps([asdict(point) for point in points]).encode()).hexdigest()[:16]


def _log_uniform(low: float, high: float, share: float) -> int:
    return round(low * (max(high, low) / low) ** share)


def _point(space: Space, row: np.ndarray, rng: np.random.Generator) -> Point:
    kind, share, candidates, cached, spread, budget, parts, context, fresh = row.tolist()
    decodes = 0 if kind < PREFILL_ONLY else _log_uniform(1, space.limits.max_num_seqs, share)
    mean = _log_uniform(SHORTEST_KV_TOKENS, space.longest, cached)
    lengths = mean * np.exp(SPREAD * spread * rng.standard_normal(decodes))
    choice = space.candidates[min(int(candidates * len(space.candidates)), len(space.candidates) - 1)]
    batch = _decodes(space, lengths.tolist(), choice if decodes else 0)
    if decodes and choice and fresh < 0.4:
        batch = Point(batch.kv_tokens, batch.candidates, fresh=1)
    if PREFILL_ONLY <= kind < PREFILL_ONLY + DECODE_ONLY:
        return batch
    tokens = _log_uniform(min(8, space.most_prefill), space.most_prefill, budget)
    count = 1 if parts < 0.5 else 2 if parts < 0.8 else 3
    shares = rng.dirichlet(np.full(count, 3.0))
    return _with_prefill(space, batch, tokens, shares, max(0.0, 2.0 * context - 1.0), rng.random() < 0.5)


def _decodes(space: Space, lengths: Sequence[float], candidates: int, prompts: int = 0) -> Point:
    """Decoding requests of about these cached tokens: within the context, fewer and shorter where the cache is full.

    Of a full cache, room is left for so many tokens of `prompts`, but never more than half of it.
    """
    lengths = lengths[: space.room // (space.reserve(1) + 1)]
    kv = np.clip(np.round(lengths), SHORTEST_KV_TOKENS, space.longest).astype(np.int64)
    free = space.room - space.reserve(len(kv))
    held = prompts + -(-prompts // space.longest) * space.limits.block_size
    free -= min(held, max(0, free - len(kv)) // 2)
    if kv.sum() > free:
        # One token each, and of the rest as many as there are, in proportion.
        kv = 1 + np.floor((kv - 1) * ((free - len(kv)) / (kv.sum() - len(kv)))).astype(np.int64)
    return Point(tuple(kv.tolist()), candidates)


def _with_prefill(
    space: Space, batch: Point, tokens: int, shares: Sequence[float] | NDArray[np.float64], context: float, cut: bool
) -> Point:
    """The batch with a budget of `tokens` split into such shares or over more prompts, as far as slots and cache reach.

    `context` in [0, 1]: none, or a share (by log) of what the first prompt can have cached; `cut`: the last prompt goes
    on after its chunk.
    """
    limits = space.limits
    decodes = len(batch.kv_tokens)
    free = space.room - sum(batch.kv_tokens) - space.reserve(decodes)
    slots = limits.max_num_seqs - decodes
    longest = space.longest
    if slots < 1:
        return batch
    # Every prompt may waste most of a block.
    count = min(max(len(shares), -(-tokens // longest)), slots)
    while count > 1 and free - count * limits.block_size < count:
        count -= 1
    tokens = min(tokens, count * longest, free - count * limits.block_size)
    if tokens < 1:
        return batch
    chunks = _split(tokens, np.asarray(shares), min(count, tokens), longest)
    count = len(chunks)
    spare = min(longest - chunks[0], free - tokens - count * limits.block_size)
    cached = _log_uniform(limits.block_size, spare, context) if context > 0 and spare > limits.block_size else 0
    unheld = free - tokens - cached - count * limits.block_size
    left = min(64, unheld, longest - chunks[-1] - (cached if count == 1 else 0)) if cut else 0
    return Point(batch.kv_tokens, batch.candidates, tuple(chunks), cached, max(0, left), batch.fresh)


def _split(tokens: int, shares: NDArray[np.float64], count: int, longest: int) -> list[int]:
    """`count` chunks of at most `longest` tokens that sum to `tokens`, in these shares if there are as many."""
    if len(shares) != count:
        shares = np.ones(count)
    chunks = np.clip(np.floor(tokens * shares / shares.sum()), 1, longest).astype(np.int64)
    while (missing := tokens - int(chunks.sum())) != 0:
        if missing > 0:
            where = int(chunks.argmin())
            chunks[where] += min(missing, longest - int(chunks[where]))
        else:
            chunks[int(chunks.argmax())] -= 1
    return [int(chunk) for chunk in chunks]
