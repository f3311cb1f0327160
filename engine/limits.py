"""What a scheduler knows of an engine before it runs."""

from dataclasses import dataclass
from typing import Literal

Prefill = Literal["chunked", "whole", "first", "turns"]
"""How prompts are scheduled beside decodes; `engine.core.scheduler` says what each means."""


@dataclass(frozen=True)
class EngineLimits:
    """What the scheduler needs to know: KV blocks, batch slots, context, and how prompts are scheduled."""

    total_blocks: int
    block_size: int
    watermark_blocks: int
    max_num_seqs: int
    max_model_len: int
    prefill: Prefill = "chunked"
