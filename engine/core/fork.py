"""A small copy of an instance in mid-run that can be run further: its requests and those that arrive soon."""

import math

from engine.compiled import kernel
from engine.core.deadlines import enter_deadline
from engine.core.state import NOBODY


@kernel
def fork(state, i, feed, copy, copy_feed, until):
    """Copy instance `i` to the only instance of `copy`, with unfinished requests and those that arrive by `until`.

    `until` in s. Rows are renumbered: the running list, then the queue, then the feed, in order. Returns the prompt
    tokens of waiting and coming requests.
    """
    copy.limits[0] = state.limits[i]
    copy.instances[0] = state.instances[i]
    copy.batches[0] = state.batches[i]
    copy.totals[0] = state.totals[i]
    instance = copy.instances[0]
    instance.first_due = NOBODY
    instance.last_due = NOBODY
    work = instance.waiting_tokens
    rows = 0
    for position in range(instance.num_running):
        copy.running[0, position] = rows
        copy.requests[rows] = state.requests[state.running[i, position]]
        rows += 1
    instance.head = rows if instance.num_waiting > 0 else NOBODY
    r = state.instances[i].head
    while r != NOBODY:
        copy.requests[rows] = state.requests[r]
        copy.requests[rows].previous = rows - 1
        copy.requests[rows].next = rows + 1
        r = state.requests[r].next
        rows += 1
    if instance.num_waiting > 0:
        copy.requests[instance.head].previous = NOBODY
        copy.requests[rows - 1].next = NOBODY
        instance.tail = rows - 1
    for row in range(rows):
        request = copy.requests[row]
        request.instance = 0
        request.due_before = NOBODY
        request.due_after = NOBODY
        if math.isnan(request.first_token) and request.late == 0:
            enter_deadline(copy, 0, row)
    copy_feed.first[0] = 0
    copy_feed.next[0] = rows
    for r in range(feed.next[i], feed.end[i]):
        if state.requests[r].arrival > until:
            break
        copy.requests[rows] = state.requests[r]
        work += state.requests[r].prompt
        rows += 1
    copy_feed.end[0] = rows
    return work


@kernel
def fork_telemetry(state, i, seen, copy, copy_seen):
    """Set the observer of a `fork` to the state of the observer of instance `i`."""
    copy_seen.now[0] = seen.now[i]
    copy_seen.totals[0] = seen.totals[i]
    for depth in range(state.stopped.shape[1]):
        copy.stopped[0, depth] = state.stopped[i, depth]
        copy.exhausted[0, depth] = state.exhausted[i, depth]
        copy_seen.stopped[0, depth] = seen.stopped[i, depth]
        copy_seen.exhausted[0, depth] = seen.exhausted[i, depth]
