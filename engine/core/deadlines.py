"""An instance's clock, and the costs charged to requests while it runs: TPOT, violations and lateness.

Requests that wait for their first token are kept in a list sorted by deadline, so that deadlines are charged correctly
for any order of arrivals, targets and submissions. A request whose deadline is no earlier than all others, the usual
case, is inserted in constant time.
"""

import math

from engine.compiled import kernel
from engine.core.state import NOBODY


@kernel
def deadline_of(request):
    """Deadline of the first token, in s."""
    return request.arrival + request.ttft_target


@kernel
def enter_deadline(state, i, r):
    """Insert request `r` into the list of deadlines, after all that are no later."""
    instance = state.instances[i]
    request = state.requests[r]
    deadline = deadline_of(request)
    before = instance.last_due
    after = NOBODY
    while before != NOBODY and deadline_of(state.requests[before]) > deadline:
        after = before
        before = state.requests[before].due_before
    request.due_before = before
    request.due_after = after
    if before == NOBODY:
        instance.first_due = r
    else:
        state.requests[before].due_after = r
    if after == NOBODY:
        instance.last_due = r
    else:
        state.requests[after].due_before = r


@kernel
def _leave_deadlines(state, i, r):
    """Remove request `r` from the list of deadlines."""
    instance = state.instances[i]
    request = state.requests[r]
    if request.due_before == NOBODY:
        instance.first_due = request.due_after
    else:
        state.requests[request.due_before].due_after = request.due_after
    if request.due_after == NOBODY:
        instance.last_due = request.due_before
    else:
        state.requests[request.due_after].due_before = request.due_before
    request.due_before = NOBODY
    request.due_after = NOBODY


@kernel
def _miss(state, i, request, to):
    """Charge a deadline that has passed by the time `to` (s)."""
    request.late = 1
    state.totals[i].violations += 1
    state.totals[i].lateness += to - deadline_of(request)
    state.instances[i].overdue += 1


@kernel
def weight_of(request):
    """TPOT cost per second of a request between its first and last token, 1 / (output - 1)."""
    return 1.0 / (request.output - 1) if request.output > 1 else 0.0


@kernel
def watch(state, i, r):
    """Start charging request `r`, which joins instance `i`, including the time since it left another instance.

    The instance's clock may be behind the time of joining, at the beginning of an iteration. The time that the clock
    will charge again from there is subtracted here.
    """
    instance = state.instances[i]
    request = state.requests[r]
    now = instance.now
    if not math.isnan(request.first_token):
        instance.tpot_weight += weight_of(request)
        if not math.isnan(request.left):
            state.totals[i].tpot_cost += weight_of(request) * (now - request.left)
    elif request.late == 1:
        instance.overdue += 1
        state.totals[i].lateness += now - request.left
    elif deadline_of(request) < now:
        _miss(state, i, request, now)
    else:
        enter_deadline(state, i, r)


@kernel
def unwatch(state, i, r):
    """Stop charging request `r`, which leaves instance `i`."""
    instance = state.instances[i]
    request = state.requests[r]
    if not math.isnan(request.first_token):
        instance.tpot_weight -= weight_of(request)
    elif request.late == 1:
        instance.overdue -= 1
    else:
        _leave_deadlines(state, i, r)


@kernel
def first_token_out(state, i, r):
    """Record the first token of request `r`: its deadline ends, and TPOT is charged from now on."""
    unwatch(state, i, r)
    state.requests[r].first_token = state.instances[i].now
    state.instances[i].tpot_weight += weight_of(state.requests[r])


@kernel
def advance_clock(state, i, to):
    """Advance the clock of instance `i` to `to` (s) and charge the elapsed time to its requests.

    Between its first and last token a request pays 1 / (output - 1) per second, so that the integral over its life is
    its TPOT; past its deadline and without a first token it pays one second of lateness per second.
    """
    instance = state.instances[i]
    totals = state.totals[i]
    elapsed = to - instance.now
    # Rounding of added and removed weights may leave a sum below zero.
    totals.tpot_cost += max(instance.tpot_weight, 0.0) * elapsed
    totals.lateness += instance.overdue * elapsed
    while instance.first_due != NOBODY:
        r = instance.first_due
        request = state.requests[r]
        if not deadline_of(request) < to:
            break
        _leave_deadlines(state, i, r)
        _miss(state, i, request, to)
    instance.now = to
