"""Requests joining and leaving an instance: `submit`, `withdraw`, `adopt`, `cancel`, and preemption.

An instance's requests are in its queue, a list linked through the request table, or in its running list: decodes first,
in the order in which they began to decode, then the prompts in progress, in order of admission. The queue is served
from its head, and a preempted request returns to it.
"""

import math

from engine.compiled import kernel
from engine.core.blocks import blocks_for, give_back, take
from engine.core.deadlines import unwatch, watch
from engine.core.state import CANCELLED, DECODING, FINISHED, NOBODY, NOT_ADMITTED, PREEMPTED, PREFILLING


@kernel
def _link(state, i, r, before, after):
    """Insert request `r` into the queue of instance `i` between two neighbours."""
    instance = state.instances[i]
    request = state.requests[r]
    request.previous = before
    request.next = after
    if before == NOBODY:
        instance.head = r
    else:
        state.requests[before].next = r
    if after == NOBODY:
        instance.tail = r
    else:
        state.requests[after].previous = r
    instance.num_waiting += 1


@kernel
def unlink(state, i, r):
    """Remove request `r` from the queue of instance `i`."""
    instance = state.instances[i]
    request = state.requests[r]
    if request.previous == NOBODY:
        instance.head = request.next
    else:
        state.requests[request.previous].next = request.next
    if request.next == NOBODY:
        instance.tail = request.previous
    else:
        state.requests[request.next].previous = request.previous
    request.previous = NOBODY
    request.next = NOBODY
    instance.num_waiting -= 1


@kernel
def submit(state, i, r):
    """Append request `r` to the queue of instance `i`; it counts there at once.

    It must belong to no instance and not be finished. A request that was withdrawn elsewhere without its KV cache
    recomputes its prompt and its generated tokens.
    """
    instance = state.instances[i]
    totals = state.totals[i]
    request = state.requests[r]
    request.instance = i
    request.phase = PREEMPTED if request.generated > 0 else NOT_ADMITTED
    request.context = request.prompt + request.generated
    request.computed = 0
    _link(state, i, r, instance.tail, NOBODY)
    watch(state, i, r)
    instance.waiting_tokens += request.context
    totals.arrivals += 1
    totals.arrived_tokens += request.prompt


@kernel
def withdraw(state, i, r):
    """Remove request `r` from instance `i`, in any phase, and free its blocks there.

    Returns False, doing nothing, when it does not belong to this instance. While an iteration runs, only a request
    outside its batch may be withdrawn. `computed` is kept, for an instance that adopts it with its KV cache.
    """
    instance = state.instances[i]
    request = state.requests[r]
    phase = request.phase
    if request.instance != i or phase == FINISHED:
        return False
    unwatch(state, i, r)
    request.instance = NOBODY
    request.left = instance.now
    request.phase = NOT_ADMITTED
    if phase == DECODING:
        instance.kv_tokens -= request.computed
    else:
        instance.waiting_tokens -= request.context - request.computed
    if phase in (DECODING, PREFILLING):
        give_back(state, i, request)
        drop_finished(state, i)
    else:
        unlink(state, i, r)
    return True


@kernel
def adopt(state, i, r):
    """Add decoding request `r` to the decodes of instance `i`, with a KV cache transferred from elsewhere.

    Returns False, doing nothing, when no slot or not enough KV blocks are free there.
    """
    instance = state.instances[i]
    limits = state.limits[i]
    request = state.requests[r]
    need = blocks_for(request.computed, limits.block_size)
    reserve = limits.watermark_blocks if instance.num_running > 0 else 0
    if instance.num_running >= limits.max_num_seqs or need + reserve > instance.free_blocks:
        return False
    request.instance = i
    request.phase = DECODING
    take(state, i, request, need)
    for position in range(instance.num_running, instance.num_decoding, -1):
        state.running[i, position] = state.running[i, position - 1]
    state.running[i, instance.num_decoding] = r
    instance.num_running += 1
    instance.num_decoding += 1
    instance.kv_tokens += request.computed
    watch(state, i, r)
    return True


@kernel
def cancel(state, i, r):
    """Cancel request `r` of instance `i`, submitted or not; returns False when it was already over.

    Call it between `commit` and the next `plan`. Emitted tokens and costs charged so far (`tpot_cost`, `lateness`, a
    violated deadline) stay; no further cost is charged.
    """
    request = state.requests[r]
    if request.phase in (FINISHED, CANCELLED):
        return False
    withdraw(state, i, r)
    request.phase = CANCELLED
    state.totals[i].cancelled += 1
    return True


@kernel
def admit(state, i, r):
    """Admit request `r` from the queue to the batch; it gets the blocks of its whole context."""
    instance = state.instances[i]
    request = state.requests[r]
    unlink(state, i, r)
    if math.isnan(request.admitted):
        request.admitted = instance.now
    take(state, i, request, blocks_for(request.context, state.limits[i].block_size))
    request.phase = PREFILLING
    state.running[i, instance.num_running] = r
    instance.num_running += 1


@kernel
def preempt(state, i, position):
    """Preempt the request at this place of the running list; it recomputes its context when it returns."""
    instance = state.instances[i]
    r = state.running[i, position]
    request = state.requests[r]
    instance.num_running -= 1
    for place in range(position, instance.num_running):
        state.running[i, place] = state.running[i, place + 1]
    if request.phase == DECODING:
        instance.num_decoding -= 1
        instance.kv_tokens -= request.computed
        remaining = 0
    else:
        remaining = request.context - request.computed
    request.context = request.prompt + request.generated
    instance.waiting_tokens += request.context - remaining
    request.computed = 0
    request.phase = PREEMPTED
    request.preemptions += 1
    give_back(state, i, request)
    _link(state, i, r, NOBODY, instance.head)
    state.totals[i].preemptions += 1


@kernel
def latest_arrival(state, i):
    """Place in the running list of the request that arrived last; of several at one time, the last of them."""
    latest = 0
    for position in range(1, state.instances[i].num_running):
        arrival = state.requests[state.running[i, position]].arrival
        if arrival >= state.requests[state.running[i, latest]].arrival:
            latest = position
    return latest


@kernel
def drop_finished(state, i):
    """Remove finished requests from the running list, keeping its order."""
    instance = state.instances[i]
    kept = 0
    decoding = 0
    for position in range(instance.num_running):
        r = state.running[i, position]
        phase = state.requests[r].phase
        if phase in (DECODING, PREFILLING):
            state.running[i, kept] = r
            kept += 1
            decoding += phase == DECODING
    instance.num_running = kept
    instance.num_decoding = decoding
