"""From the budget that engines count in, all of an iteration's tokens, to n, the prompt tokens in it."""

from engine.compiled import kernel


@kernel
def left_for_prompts(total, num_decodes, candidates):
    """n = total - B (1 + c), at least 0, and at least 1 when nothing decodes: an engine must not stand still."""
    return max(total - num_decodes * (1 + candidates), 0 if num_decodes > 0 else 1)
