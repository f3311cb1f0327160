"""Conversion of an engine's total token budget per iteration to n, its prompt tokens."""

from engine.compiled import kernel


@kernel
def left_for_prompts(total, num_decodes, candidates):
    """n = total - B (1 + c), at least 0, and at least 1 when nothing decodes, so that the engine makes progress."""
    return max(total - num_decodes * (1 + candidates), 0 if num_decodes > 0 else 1)
