"""Observations and plants written by hand, for tests of single decisions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.action import ActionGrid
from engine.core.telemetry import LOAD_FIELDS, RATE_BANDS
from engine.latency.lookup import LookupGrid, LookupTable
from engine.plant import Plant

QUEUE_ROWS = 4
DEPTH = 8


def observation(
    queue: tuple[tuple[float, float], ...] = (),
    drafted: tuple[float, ...] = (),
    accepted: tuple[float, ...] = (),
    rates: tuple[float, ...] = (),
    **load: float,
) -> dict[str, NDArray[np.float32]]:
    """Telemetry with these fields of `load`, (tokens, slack) rows, counts by depth and by rate; all else is 0."""
    fields = {"ttft_target_s": 1.0} | load
    made: dict[str, Any] = {
        "load": np.array([fields.pop(name, 0.0) for name in LOAD_FIELDS], dtype=np.float32),
        "queue": np.zeros((QUEUE_ROWS + 1, 2), dtype=np.float32),
        "drafted": np.zeros(DEPTH, dtype=np.float32),
        "accepted": np.zeros(DEPTH, dtype=np.float32),
        "rates": np.zeros(RATE_BANDS, dtype=np.float32),
    }
    assert not fields, f"no such telemetry: {fields}"
    made["queue"][: len(queue)] = np.array(queue, dtype=np.float32).reshape(-1, 2)
    made["drafted"][: len(drafted)] = drafted
    made["accepted"][: len(accepted)] = accepted
    made["rates"][: len(rates)] = rates
    return made


def verified(requests: int, accepted_each: int, candidates: int, **load: float) -> dict[str, NDArray[np.float32]]:
    """After an iteration in which each of so many requests drafted c candidates and had the first few accepted."""
    depths = range(candidates)
    return observation(
        drafted=tuple(float(requests) if depth <= accepted_each else 0.0 for depth in depths),
        accepted=tuple(float(requests) if depth < accepted_each else 0.0 for depth in depths),
        iterations=1.0,
        last_num_decodes=requests,
        last_candidates=candidates,
        num_decodes=requests,
        **load,
    )


def linear_plant(base_s: float, row_s: float, kv_s: float, step_s: float, grid: ActionGrid | None = None) -> Plant:
    """A plant that predicts base + row_s x (B (1 + c) + n) + kv_s x cached tokens + step_s x c."""
    grid = grid or ActionGrid()
    axes = (np.array([0.0, 8.0, 64.0]), np.array([0.0, 1e4, 1e5]), grid.candidates, np.append(0, grid.budgets))
    batch, kv, candidates, prefill = np.meshgrid(*axes, indexing="ij")
    seconds = base_s + row_s * (batch * (1 + candidates) + prefill) + kv_s * kv + step_s * candidates * (batch > 0)
    table = LookupTable(LookupGrid(*axes, np.ascontiguousarray(seconds)), {})
    return Plant(grid=grid, predict=lambda: table)
