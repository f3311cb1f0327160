"""Small random serving cases, and a driver that runs the compiled core over one, iteration by iteration."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import numpy as np
from hypothesis import strategies as st

from engine.core import state as core
from engine.core.feed import Feed, feed_from, new_feed, settle
from engine.core.scheduler import commit, plan
from engine.core.state import NOBODY, PREFILL_ORDERS, State
from tests.engine.core.reference import Engine, Request

TTFT_TARGET_S = 1.0
MOST_ITERATIONS = 5000


@dataclass(frozen=True)
class Case:
    """Limits, requests as (arrival, prompt, output, agrees), and the actions (c, n) that are cycled through."""

    block_size: int
    total_blocks: int
    watermark_blocks: int
    max_num_seqs: int
    requests: tuple[tuple[float, int, int, tuple[bool, ...]], ...]
    actions: tuple[tuple[int, int], ...]
    prefill: str = "chunked"

    @property
    def limits(self) -> dict[str, Any]:
        return {
            "block_size": self.block_size,
            "total_blocks": self.total_blocks,
            "watermark_blocks": self.watermark_blocks,
            "max_num_seqs": self.max_num_seqs,
            "prefill": self.prefill,
        }

    def reference(self) -> Engine:
        return Engine([Request(i, a, p, o, list(g)) for i, (a, p, o, g) in enumerate(self.requests)], **self.limits)

    def system(self) -> tuple[State, Feed]:
        """The compiled core's memory and the requests that will come; output positions are numbered through."""
        state = core.allocate(1, len(self.requests), ttft_target=TTFT_TARGET_S, **self.limits)
        arrival, prompt, output, _ = zip(*self.requests, strict=True)
        first = np.concatenate([[0], np.cumsum(output)])[:-1]
        core.enter(state, 0, np.array(arrival), np.array(prompt), np.array(output), first, TTFT_TARGET_S)
        feed = new_feed(1)
        feed_from(feed, 0, 0, len(self.requests))
        return state, feed

    def elapsed(self, batch_tokens: int, batch_size: int) -> float:
        """Seconds of an iteration; dyadic, so that clocks can be compared exactly."""
        return 0.125 + batch_tokens / 256 + batch_size / 64


@st.composite
def cases(
    draw: st.DrawFn, most_requests: int = 8, most_seqs: int = 4, prefill: tuple[str, ...] = PREFILL_ORDERS
) -> Case:
    """Tight memory, few seats, bursts of arrivals: what makes schedulers fail."""
    block_size = draw(st.integers(1, 4))
    total_blocks = draw(st.integers(3, 12))
    capacity = block_size * total_blocks
    requests = []
    arrival = 0.0
    for _ in range(draw(st.integers(1, most_requests))):
        arrival += draw(st.sampled_from([0.0, 0.0, 0.0, 0.125, 0.5, 1.0, 8.0]))
        prompt = draw(st.integers(1, capacity // 3) | st.integers(1, capacity - 1))
        output = max(1, capacity - prompt - draw(st.integers(0, capacity // 2)))
        agrees = draw(st.lists(st.booleans(), min_size=output, max_size=output))
        requests.append((arrival, prompt, output, tuple(agrees)))
    actions = draw(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 64)), min_size=1, max_size=6))
    return Case(
        block_size=block_size,
        total_blocks=total_blocks,
        watermark_blocks=draw(st.integers(0, 1)),
        max_num_seqs=draw(st.integers(1, most_seqs)),
        requests=tuple(requests),
        actions=tuple(actions),
        prefill=draw(st.sampled_from(prefill)),
    )


class Figures:
    """What an instance's records hold by name, whichever of them has it; always of the present."""

    def __init__(self, state: State, i: int = 0) -> None:
        self._records, self._i = (state.instances, state.totals, state.limits, state.batches), i

    def __getitem__(self, name: str) -> Any:
        record = next(record for record in self._records if name in (record.dtype.names or ()))
        return record[name][self._i]


def wake(state: State, feed: Feed) -> bool:
    """Submit arrivals, jumping to the next one when there is nothing to do; False when nothing is left."""
    return bool(settle(state, 0, feed))


def arrived(state: State, feed: Feed) -> Any:
    """The rows of the requests that have arrived."""
    return state.requests[: feed.next[0]]


def queue(state: State) -> list[int]:
    """The requests that wait to be admitted, in the order in which they will be; both directions of the list agree."""
    instance, rows = state.instances[0], state.requests
    found, r, before = [], int(instance["head"]), NOBODY
    while r != NOBODY:
        assert rows["previous"][r] == before
        found.append(r)
        before, r = r, int(rows["next"][r])
    assert instance["tail"] == before
    assert instance["num_waiting"] == len(found)
    return found


def batch(state: State) -> list[tuple[int, int]]:
    """The planned batch as (request, tokens), decodes first."""
    count = int(state.batches["num_decodes"][0] + state.batches["num_prefills"][0])
    requests, tokens = state.batch_request[0, :count].tolist(), state.batch_tokens[0, :count].tolist()
    return list(zip(requests, tokens, strict=True))


def accept(state: State, case: Case) -> None:
    """Accept every planned candidate up to the first disagreement."""
    for i, (r, tokens) in enumerate(batch(state)[: int(state.batches["num_decodes"][0])]):
        generated = int(state.requests["generated"][r])
        right = [*case.requests[r][3][generated : generated + tokens - 1], False]
        state.accepted[0, i] = right.index(False)


def elapsed(state: State, case: Case) -> float:
    """Seconds that the planned batch takes."""
    planned = batch(state)
    return case.elapsed(sum(tokens for _, tokens in planned), len(planned))


def iterate(state: State, feed: Feed, case: Case) -> Iterator[tuple[str, int, int]]:
    """Run the core to the end, pausing with ("begin" | "planned" | "committed", c, n) in every iteration."""
    for count, (candidates, token_budget) in enumerate(cycle(case.actions)):
        assert count < MOST_ITERATIONS, "the engine makes no progress"
        if not wake(state, feed):
            return
        yield "begin", candidates, token_budget
        assert plan(state, 0, candidates, token_budget)
        yield "planned", candidates, token_budget
        accept(state, case)
        commit(state, 0, elapsed(state, case))
        yield "committed", candidates, token_budget


def run(case: Case) -> State:
    """The core's state after the last request has finished."""
    state, feed = case.system()
    for _ in iterate(state, feed, case):
        pass
    return state
