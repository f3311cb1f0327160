"""Positions that a model has, against those that an engine can reach."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn

from engine.limits import EngineLimits

log = logging.getLogger(__name__)

_MOST_OFFSET = 8
"""Rows that tables have beside their positions: two in OPT's."""


class PositionsError(ValueError):
    """A request could pass the model's last position; the message says how to prevent it."""


def check_positions(model: Any, limits: EngineLimits, name: str) -> None:
    """Compare the longest request with the positions that the model called `name` was made for.

    Raises `PositionsError` where the model looks positions up in a finite table (GPT-2, OPT, GPT-J). Computed rotary
    positions continue past the model's training length, which gives a warning.
    """
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longest = min(limits.max_model_len, limits.total_blocks * limits.block_size)
    if positions is None or longest <= positions:
        return
    if _is_table(model, positions):
        raise PositionsError(
            f"max_model_len={limits.max_model_len}: {name} has a table of {positions} positions, and a request of more "
            f"tokens would read past its end; set max_model_len={positions} or less"
        )
    log.warning(
        "max_model_len=%d: %s was made for %d positions, and what it says past them may be worth little",
        limits.max_model_len, name, positions,
    )  # fmt: skip


def _is_table(model: Any, positions: int) -> bool:
    """Return True for a module with one row per position: learned embeddings, or precomputed sines."""
    tokens = model.get_input_embeddings()
    rows = range(positions, positions + _MOST_OFFSET + 1)
    if any(isinstance(part, nn.Embedding) and part is not tokens and part.num_embeddings in rows
           for part in model.modules()):  # fmt: skip
        return True
    return any("embed_positions" in name and len(table) in rows for name, table in model.named_buffers() if table.dim())
