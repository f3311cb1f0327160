"""Latency tables for the simulator, fitted to measured iterations of a real engine.

Every curve of `LatencyTables` is piecewise linear in its argument, so an iteration's time is a sum of columns with
non-negative weights (`engine.latency.curves`). They are fitted to relative errors, separately for the target's forward,
the drafter, and the rest of the iteration, which the engine times separately.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.latency.curves import hats, nodes, rising, solve_weights
from engine.latency.measured import MeasuredIterations
from engine.latency.table_file import KV_STEP_TOKENS, SCHEMA, rounded

FRACTIONS = np.linspace(0.0, 1.0, 11).tolist()


@dataclass(frozen=True)
class MemoryFigures:
    """Memory section of a table file, in bytes."""

    total_bytes: float
    weight_bytes: float
    drafter_weight_bytes: float
    kv_bytes_per_token: int


def weight_bytes(model: Any) -> float:
    """Memory taken by the weights of a torch module, in bytes."""
    return float(sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()))


def fit_table(
    measured: MeasuredIterations, name: str, memory: MemoryFigures, provenance: dict[str, Any]
) -> dict[str, Any]:
    """A latency table's document (see `engine.latency.table_file`) for the engine that was measured.

    Raises ValueError when no measured iteration decodes.
    """
    if not (measured.num_decodes > 0).any():
        raise ValueError("no measured iteration decodes: a profile needs more points")
    forward = _fit_forward(measured)
    drafter = _fit_drafter(measured, forward["attention"]["padding"])
    around = _fit_overhead(measured)
    for key in ("speculation_seconds", "speculation_request_seconds"):
        around[key] += drafter.pop(key)
    return {
        "schema": SCHEMA,
        "name": name,
        "tensor_parallel": 1,
        **forward,
        "drafter": drafter,
        "overhead": around,
        "memory": {
            "gpu_memory_bytes": memory.total_bytes,
            "weight_bytes": memory.weight_bytes,
            "drafter_weight_bytes": memory.drafter_weight_bytes,
            "activation_reserve_bytes": 0.0,
            "kv_bytes_per_token": memory.kv_bytes_per_token,
        },
        "provenance": provenance,
    }


def _fit_forward(measured: MeasuredIterations) -> dict[str, Any]:
    planned = measured.planned_tokens
    tokens = planned + measured.prefill_tokens
    rows = planned + measured.prompts_completed
    decodes = measured.num_decodes
    token_nodes = nodes(len(measured), tokens.max())
    request_nodes = nodes(len(measured), decodes.max())
    chunks = np.zeros((len(measured), max(1, *(len(chunk) for chunk in measured.chunks))))
    for row, found in enumerate(measured.chunks):
        chunks[row, : len(found)] = found
    first = chunks[:, 0]
    prefill = np.stack(
        [(chunks > 0).sum(axis=1), chunks.sum(axis=1), (chunks**2).sum(axis=1),
         measured.prefill_context * (first > 0), measured.prefill_context * first], axis=1,
    )  # fmt: skip
    on = hats(decodes, request_nodes) * (decodes > 0)[:, None]
    verified = (planned - decodes) / np.maximum(decodes, 1)
    fixed = [rising(tokens, token_nodes), rows[:, None].astype(np.float64), prefill]

    def solve(verify: float, padding: float) -> tuple[list[NDArray[np.float64]], float]:
        each = measured.padded_kv_tokens(padding) / np.maximum(decodes, 1)
        factor = (1.0 + verify * verified)[:, None]
        return solve_weights([*fixed, on * factor, on * each[:, None] * factor], measured.forward_s, measured.seconds)

    verify = 0.3
    padding = min(FRACTIONS, key=lambda value: solve(verify, value)[1])
    verify = min(FRACTIONS, key=lambda value: solve(value, padding)[1])
    (linear, head, (start, token, square, cached, crossed), start_s, kv_token_s), _ = solve(verify, padding)
    longest = max(1.0, np.ceil(measured.longest_kv_tokens.max() / KV_STEP_TOKENS)) * KV_STEP_TOKENS
    chunk_nodes = np.array([1, *range(16, 256, 16), *range(256, 1024, 64), *range(1024, 4096, 256)])
    chunk_nodes = np.append(chunk_nodes[chunk_nodes < chunks.max()], max(2.0, chunks.max()))
    return {
        "linear": {"tokens": token_nodes.tolist(), "seconds": rounded(np.cumsum(linear), 6)},
        "head": {"rows": [0, int(rows.max())], "seconds": rounded([0.0, float(head[0]) * rows.max()], 6)},
        "decode_attention": {
            "requests": request_nodes.tolist(),
            "kv_tokens_per_request": [0.0, longest],
            "seconds": rounded(np.stack([start_s, start_s + kv_token_s * longest], axis=1), 6),
        },
        "prefill_attention": {
            "fresh_chunk": chunk_nodes.tolist(),
            "fresh_seconds": rounded(start + token * chunk_nodes + square * chunk_nodes**2, 6),
            "chunk": chunk_nodes.tolist(),
            "extra_seconds": [0.0] * len(chunk_nodes),
            "context_token_seconds": rounded(cached + crossed * chunk_nodes, 6),
        },
        "attention": {"verify_row_fraction": verify, "padding": padding},
    }


def _fit_drafter(measured: MeasuredIterations, padding: float) -> dict[str, Any]:
    drafting = (measured.candidates > 0) & (measured.num_decodes > 0)
    nothing = {
        "requests": [1.0, 2.0],
        "step_seconds": [0.0, 0.0],
        "kv_token_seconds": 0.0,
        "prefill_seconds": 0.0,
        "prefill_token_seconds": 0.0,
        "unread_tokens": [0.0, 1.0],
        "unread_seconds": [0.0, 0.0],
        "speculation_seconds": 0.0,
        "speculation_request_seconds": 0.0,
    }
    if not drafting.any() or not measured.draft_s[drafting].any():
        return nothing
    seen = measured.subset(drafting)
    request_nodes = nodes(len(seen), seen.num_decodes.max())
    unread = seen.unread_tokens.astype(np.float64)
    steps = seen.candidates[:, None].astype(np.float64)
    blocks = [
        steps * rising(seen.num_decodes, request_nodes),
        steps * seen.padded_kv_tokens(padding)[:, None],
        np.stack([unread > 0, unread, unread**2], axis=1).astype(np.float64),
        np.ones((len(seen), 1)),
        seen.num_decodes[:, None].astype(np.float64),
    ]
    (step, kv, (start, token, square), once, request), _ = solve_weights(blocks, seen.draft_s, seen.seconds)
    at = np.array([1, *range(32, 512, 32), *range(512, 2048, 128), *range(2048, 8192, 512)])
    at = np.append(at[at < unread.max()], max(2.0, unread.max()))
    return nothing | {
        "requests": request_nodes.tolist(),
        "step_seconds": rounded(np.cumsum(step), 6),
        "kv_token_seconds": float(kv[0]),
        "unread_tokens": [0.0, *at.tolist()],
        "unread_seconds": [0.0, *rounded(start + token * at + square * at**2, 6)],
        "speculation_seconds": float(once[0]),
        "speculation_request_seconds": float(request[0]),
    }


def _fit_overhead(measured: MeasuredIterations) -> dict[str, Any]:
    around = np.maximum(measured.seconds - measured.forward_s - measured.draft_s, 0.0)
    drafting = ((measured.candidates > 0) & (measured.num_decodes > 0)).astype(np.float64)
    requests = (measured.num_decodes + measured.num_prefills).astype(np.float64)
    columns = np.stack([np.ones(len(measured)), requests, drafting, drafting * measured.num_decodes], axis=1)
    (weights,), _ = solve_weights([columns], around, measured.seconds)
    fixed, request, speculation, speculation_request = weights.tolist()
    return {
        "fixed_seconds": fixed,
        "per_request_seconds": request,
        "speculation_seconds": speculation,
        "speculation_request_seconds": speculation_request,
        "idle_drafter_seconds": 0.0,
        "idle_drafter_request_seconds": 0.0,
    }
