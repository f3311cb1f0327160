"""Held-out rows of profiles: the rule shared by `build`, which does not fit them, and `validate`, which scores them.

Every second node of a profile's own grid is held out, by value, so that the rule does not depend on row order. Held-out
nodes lie between fitted ones. GEMM tile boundaries (multiples of 64 tokens) stay fitted, because interpolation cannot
locate an unmeasured step.
"""

import numpy as np
from numpy.typing import NDArray

from engine.latency.profiles import AttentionProfile


def heldout_tokens(tokens: NDArray) -> NDArray[np.bool_]:
    """Token counts of a dense profile that are not fitted: odd multiples of its step there (8, 16, 32, ...).

    The step at a token count is the distance to the node before it; 2 stands for the counts below 8, which are flat.
    """
    step = np.maximum(1, np.diff(tokens, prepend=0))
    odd = (tokens // step) % 2 == 1
    return (odd & (tokens > 8) & (tokens % 8 == 0) & (tokens < tokens[-1])) | (tokens == 2)


def heldout_decode(profile: AttentionProfile) -> NDArray[np.bool_]:
    """Decode rows that are not fitted: odd batch sizes above 1, or odd multiples of 32 cached tokens above 64."""
    odd_batch = (profile.requests % 2 == 1) & (profile.requests > 1)
    odd_kv = ((profile.decode_kv // 32) % 2 == 1) & (profile.decode_kv > 64)
    return (profile.chunk == 0) & (odd_batch | odd_kv)


def heldout_prefill(profile: AttentionProfile) -> NDArray[np.bool_]:
    """Prefill rows that are not fitted: odd chunks of the grid (32, above 1,024 64), odd multiples of 64 in context."""
    step = np.where(profile.chunk <= 1024, 32, 64)
    odd_chunk = ((profile.chunk // step) % 2 == 1) & (profile.chunk > 192) & (profile.context == 0)
    odd_context = ((profile.context // 64) % 2 == 1) & (profile.context > 0)
    return (profile.chunk > 0) & (odd_chunk | odd_context)


def heldout_mixed(profile: AttentionProfile) -> NDArray[np.bool_]:
    """Mixed rows that are not fitted: all but those with the shortest chunk and nothing cached before it."""
    mixed = (profile.chunk > 0) & (profile.requests > 0)
    return mixed & ~((profile.chunk == profile.chunk[profile.chunk > 0].min()) & (profile.context == 0))
