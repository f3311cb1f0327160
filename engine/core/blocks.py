"""KV block accounting of one instance, compiled.

A request holds blocks for every slot it was given since its last admission: slots of rejected candidates are written
again by its next iteration, so they are kept and not freed.
"""

from engine.compiled import kernel


@kernel
def blocks_for(tokens, block_size):
    """Blocks that hold `tokens` tokens."""
    return (tokens + block_size - 1) // block_size


@kernel
def take(state, i, request, count):
    """Move `count` free blocks of instance `i` to `request`; the caller has checked that they are free."""
    instance = state.instances[i]
    totals = state.totals[i]
    request.blocks += count
    instance.free_blocks -= count
    if instance.free_blocks < totals.lowest_free_blocks:
        totals.lowest_free_blocks = instance.free_blocks


@kernel
def give_back(state, i, request):
    """Free all blocks of `request`."""
    state.instances[i].free_blocks += request.blocks
    request.blocks = 0
