"""Scheduler limits of an engine."""

from dataclasses import dataclass
from typing import Literal

Prefill = Literal["chunked", "whole", "first", "turns"]
"""Prefill modes, explained in `engine.core.scheduler`."""


@dataclass(frozen=True)
class EngineLimits:
    """Limits that the scheduler works within: KV blocks, batch slots, context length, and the prefill mode."""

    total_blocks: int
    block_size: int
    watermark_blocks: int
    max_num_seqs: int
    max_model_len: int
    prefill: Prefill = "chunked"
