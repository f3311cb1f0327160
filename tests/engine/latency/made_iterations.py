"""Measured iterations of an engine whose composition is known."""

from __future__ import annotations

from typing import Any

import numpy as np

from engine.latency.design import Space, design
from engine.latency.measured import MeasuredIterations
from engine.limits import EngineLimits

LIMITS = EngineLimits(total_blocks=4096, block_size=16, watermark_blocks=40, max_num_seqs=64, max_model_len=2048)
SPACE = Space(LIMITS, tuple(range(9)), 4096)
PADDING, VERIFY = 0.5, 0.3


def made_iterations(points: int, seed: int, noise: float = 0.0) -> MeasuredIterations:
    """Iterations of a designed profile, with times from a formula that a latency table can hold exactly."""
    rows = [_row(point) for point in design(SPACE, points, seed)]
    columns: dict[str, list[Any]] = {name: [row[name] for row in rows] for name in rows[0]}
    spread = 1.0 + noise * np.random.default_rng(seed).standard_normal(len(rows))
    for name in ("seconds", "draft_s", "forward_s", "seconds_min"):
        columns[name] = (np.array(columns[name]) * spread).tolist()
    return MeasuredIterations.from_columns(columns)


def _row(point: Any) -> dict[str, Any]:
    decodes, c, kv = len(point.kv_tokens), point.candidates, sum(point.kv_tokens)
    longest = max(point.kv_tokens, default=0)
    chunks, context, unread = point.chunks, point.context, sum(point.kv_tokens[decodes - point.fresh :])
    completed = len(chunks) - (point.left > 0)
    padded = kv + PADDING * (decodes * longest - kv)
    rows = decodes * (1 + c)
    forward = 1e-3 + 2e-5 * (rows + sum(chunks)) + 3e-6 * (rows + completed)
    forward += (5e-5 * decodes + 1e-7 * padded) * (1 + VERIFY * c)
    forward += sum(1e-4 + 1e-6 * chunk + 2e-8 * chunk**2 for chunk in chunks)
    forward += context * (1e-7 + 1e-8 * chunks[0]) if chunks else 0.0
    draft = 0.0
    around = 2e-4 + 1e-6 * (decodes + len(chunks))
    if c > 0 and decodes > 0:
        draft = c * (5e-4 + 1e-5 * decodes + 2e-8 * padded) + 2e-4 + 3e-6 * decodes
        draft += 1e-4 + 1e-6 * unread + 1e-9 * unread**2 if unread else 0.0
        around += 1e-4 + 2e-6 * decodes
    seconds = forward + draft + around
    return {
        "num_decodes": decodes,
        "candidates": c,
        "decode_tokens": rows,
        "candidate_steps": c if decodes else 0,
        "decode_kv_tokens": kv,
        "longest_kv_tokens": longest,
        "num_prefills": len(chunks),
        "prefill_tokens": sum(chunks),
        "prompts_completed": completed,
        "chunks": chunks,
        "prefill_context": context,
        "unread_tokens": unread,
        "seconds": seconds,
        "draft_s": draft,
        "forward_s": forward,
        "seconds_min": seconds,
        "seconds_iqr": 0.0,
        "repeats": 1,
    }
