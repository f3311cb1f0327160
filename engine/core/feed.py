"""Requests whose arrivals are known in advance, by instance and in order of arrival.

The scheduler knows a request once it is submitted. The arrivals of a recorded workload, or of a client that schedules
its requests, are known earlier; the code that drives an instance keeps them here and submits each in time.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel
from engine.core.deadlines import advance_clock
from engine.core.membership import submit
from engine.core.scheduler import has_work
from engine.core.state import CANCELLED


class Feed(NamedTuple):
    """Rows of the request table by instance, each array (N,): those from `first` to `end` are meant for it, sorted by
    arrival, and those from `next` on are still to be submitted."""

    first: NDArray[np.int64]
    next: NDArray[np.int64]
    end: NDArray[np.int64]


def new_feed(num_instances: int) -> Feed:
    """A feed without requests."""
    return Feed(*(np.zeros(num_instances, dtype=np.int64) for _ in Feed._fields))


def feed_from(feed: Feed, i: int, first: int, count: int) -> None:
    """Assign the `count` rows from `first` on to instance `i`, all still to be submitted."""
    feed.first[i] = feed.next[i] = first
    feed.end[i] = first + count


@kernel
def deliver(state, i, feed):
    """Submit every request that has arrived by the clock of instance `i`."""
    now = state.instances[i].now
    while feed.next[i] < feed.end[i]:
        r = feed.next[i]
        request = state.requests[r]
        if request.arrival > now:
            break
        feed.next[i] += 1
        if request.phase != CANCELLED:
            submit(state, i, r)


@kernel
def arrive(state, i, feed, now):
    """Move the clock to `now` (s) and submit arrived requests; returns `has_work`."""
    advance_clock(state, i, now)
    deliver(state, i, feed)
    return has_work(state, i)


@kernel
def settle(state, i, feed):
    """Submit arrivals and, if idle, jump to the next one; returns False when no request is left."""
    deliver(state, i, feed)
    while not has_work(state, i):
        if feed.next[i] >= feed.end[i]:
            return False
        advance_clock(state, i, state.requests[feed.next[i]].arrival)
        deliver(state, i, feed)
    return True
