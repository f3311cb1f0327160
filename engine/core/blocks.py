"""KV block accounting of one engine, compiled.

A request holds blocks for every slot it has ever been given since its last admission: slots of rejected candidates
are written again by its next iteration, so they are kept and not handed back.
"""

import numpy as np

from engine.compiled import kernel


@kernel
def blocks_for(tokens, block_size):
    """Blocks that hold `tokens` tokens."""
    return (tokens + block_size - 1) // block_size


@kernel
def take(engine, request, count):
    """Move `count` free blocks to `request`; the caller has checked that they are free."""
    request.blocks = np.int32(request.blocks + count)
    engine.free_blocks -= count
    if engine.free_blocks < engine.lowest_free_blocks:
        engine.lowest_free_blocks = engine.free_blocks


@kernel
def give_back(engine, request):
    """Free all blocks of `request`."""
    engine.free_blocks += request.blocks
    request.blocks = np.int32(0)
