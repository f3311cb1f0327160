"""The engine's thread: takes requests in, runs iterations, hands out what they emit.

Everything but `_run` and what it calls is called from the event loop's thread. The two share an inbox, whose lock is
held for as long as it takes to add or to take entries; results go back one call an iteration.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import threading
import time
from array import array
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backends.real import RequestError
from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.generation import Ending
from engine.backends.torch.logprobs import TokenLogprob
from engine.speculation.constraints import FREE, Constraints
from engine.speculation.sampling import Sampling
from runs.live import Decision, Governed
from runs.server.guard import Guarded
from runs.server.ledger import Ledger

log = logging.getLogger(__name__)

Finish = Literal["stop", "length", "abort", "error"]

NOT_FINITE = "the model's logits for this request are not finite numbers (NaN or infinity): there is no next token"
RETIRE_AT = 1024
"""Rows of the request table at which those of finished requests are taken out first."""
SECONDS_TO_END = 30.0
SECONDS_TO_DROP = 5.0
"""Longest that the engine is waited for when what was not finished in time is dropped: an iteration."""
MOST_DECISIONS = 100_000
"""Latest decision times that a summary speaks of."""


class Refused(Exception):  # noqa: N818 - it is an answer, not a fault
    """A request that is not accepted now; `retry_s` says when one may be."""

    def __init__(self, reason: Literal["full", "draining", "broken"], retry_s: int) -> None:
        super().__init__(reason)
        self.reason, self.retry_s = reason, retry_s


class Times(NamedTuple):
    """When a request that is over was where, in s on the engine's clock; NaN where it never was."""

    arrival: float
    admitted: float
    first_token: float
    last_token: float


class Emission(NamedTuple):
    """What one iteration gave one request."""

    tokens: list[int]
    at: float
    """s, on the engine's clock."""
    finish: Finish | None
    times: Times | None
    """With `finish`, of a request that the engine knew."""
    failure: str | None = None
    """With `finish` "error", the reason where it lies in this request alone."""
    logprobs: list[TokenLogprob] | None = None
    """Of the tokens, and with the first ones of the prompt's from the second on, where these are wanted."""


@dataclass(eq=False)
class Ticket:
    """An accepted request, and what it has got so far."""

    prompt: Sequence[int]
    max_tokens: int
    sampling: Sampling
    stop: Collection[int]
    ending: Ending | None
    received: float
    """s, on the engine's clock, when the HTTP request was there."""
    constraints: Constraints = FREE
    logprobs: int | None = None
    prompt_logprobs: bool = False
    """See `TorchEngine.submit`."""
    index: int = 0
    """Its place among the tickets that share `emissions`."""
    emissions: asyncio.Queue[tuple[int, Emission]] = field(default_factory=asyncio.Queue)
    number: int | None = None
    """The engine's; its thread sets it."""
    over: bool = False
    """Whether the last emission has been handed out."""


class Iteration(NamedTuple):
    """What an iteration was, for whoever watches; counts since the one before."""

    decision: Decision
    prompt_tokens: int
    emitted_tokens: int
    preemptions: int
    drafted_tokens: int
    accepted_tokens: int
    drafts: int
    """(request, iteration) pairs that verified candidates; known an iteration late."""
    accepted_by_depth: NDArray[np.float32]
    """How often a candidate at draft depth 1, 2, ... was accepted; known an iteration late."""
    faults: dict[str, int]
    """Of the controller, since the server began."""


class Watcher:
    """Is told what happens, in the event loop's thread; does nothing with it."""

    def emitted(self, ticket: Ticket, emission: Emission) -> None:
        """A request got tokens, or its end."""

    def iterated(self, iteration: Iteration) -> None:
        """The engine ran an iteration."""


class Worker:
    """Serves tickets on an engine of its own until it is closed.

    Args:
        engine: prepared; its clock runs.
        guard: decides.
        most_open: tickets that may be unfinished at a time.
        ledger: keeps what the engine forgets.
        watcher: told what happens.
    """

    def __init__(
        self,
        engine: TorchEngine,
        guard: Guarded,
        most_open: int,
        ledger: Ledger,
        watcher: Watcher,
    ) -> None:
        self._engine, self._guard, self._most_open = engine, guard, most_open
        self._ledger, self._watcher = ledger, watcher
        self.on_broken: Callable[[], None] = lambda: None
        """Called once when the engine has failed and every open ticket has got its `error`."""
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._open: set[Ticket] = set()
        self._empty = asyncio.Event()
        self._hurried = False
        self._finished_at: list[float] = []
        self.draining = False
        self.broken = False

        self._wake = threading.Condition()
        self._inbox: list[tuple[Ticket, bool]] = []
        self._closing = False

        self._tickets: dict[int, Ticket] = {}
        self._retire_at = RETIRE_AT
        self._beat = time.perf_counter()
        self.decision_s = array("d")
        """Seconds of the latest decisions."""

    @property
    def most_open(self) -> int:
        """Tickets that may be unfinished at a time."""
        return self._most_open

    @property
    def num_open(self) -> int:
        """Accepted and unfinished."""
        return len(self._open)

    @property
    def num_running(self) -> int:
        """Of these, in the batch."""
        return min(len(self._open), int(self._engine.state.instances["num_running"][0]))

    @property
    def kv_usage(self) -> float:
        """Share of KV blocks that are held."""
        state = self._engine.state
        return 1.0 - float(state.instances["free_blocks"][0] / state.limits["total_blocks"][0])

    @property
    def engine(self) -> TorchEngine:
        """To be looked at when the worker is closed."""
        return self._engine

    @property
    def guard(self) -> Guarded:
        """Who decides."""
        return self._guard

    def now(self) -> float:
        """s, on the engine's clock."""
        return self._engine.clock.now()

    def start(self, loop: asyncio.AbstractEventLoop) -> None:
        """Begin to serve; results are handed out in this loop."""
        self._loop = loop
        self._beat = time.perf_counter()
        self._thread.start()

    def submit(self, *tickets: Ticket) -> None:
        """Accept requests, all or none. Raises Refused."""
        if self.broken:
            raise Refused("broken", 1)
        if self.draining:
            raise Refused("draining", 1)
        if len(self._open) + len(tickets) > self._most_open:
            raise Refused("full", self._retry_s())
        if not self._open:
            self._beat = time.perf_counter()
        self._open.update(tickets)
        self._put(*tickets, wanted=True)

    def leave(self, ticket: Ticket) -> None:
        """The client is gone: drop the request wherever it is, unless it is over."""
        if not ticket.over:
            self._put(ticket, wanted=False)

    def stalled_s(self) -> float:
        """Seconds since the engine last began an iteration while there are requests; 0 without."""
        return time.perf_counter() - self._beat if self._open else 0.0

    async def drain(self, timeout_s: float) -> bool:
        """Accept nothing more, and finish what was accepted; False: not in time, and the rest was dropped."""
        self.draining = True
        if await self._emptied(0.0 if self._hurried else timeout_s):
            return True
        for ticket in list(self._open):
            self.leave(ticket)
        await self._emptied(SECONDS_TO_DROP)
        return False

    def hurry(self) -> None:
        """Let a drain wait no longer: the rest is dropped."""
        self._hurried = True
        self._empty.set()

    def close(self) -> None:
        """End the thread after its iteration; one that hangs is left to itself."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        if self._thread.ident is not None:
            self._thread.join(SECONDS_TO_END)
            if self._thread.is_alive():
                log.error("the engine's thread hangs: what it was doing is lost")
                self.broken = True
        self._guard.close()

    def history(self) -> NDArray[np.void]:
        """Every request's row, as if none had been taken out of the table; when the worker is closed, and once."""
        rows = self._ledger.whole(self._engine.requests)
        self._ledger.close()
        return rows

    @property
    def lost(self) -> int:
        """Requests that could not be kept for `history`."""
        return self._ledger.lost

    async def _emptied(self, timeout_s: float) -> bool:
        self._empty.clear()
        if not self._open:
            return True
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._empty.wait(), timeout_s)
        return not self._open

    def _put(self, *tickets: Ticket, wanted: bool) -> None:
        with self._wake:
            self._inbox.extend((ticket, wanted) for ticket in tickets)
            self._wake.notify()

    def _retry_s(self) -> int:
        """Seconds in which a quarter of the places will be free, as fast as requests have been finishing."""
        if len(self._finished_at) < 2:
            return 1
        span = self._finished_at[-1] - self._finished_at[0]
        return min(60, max(1, math.ceil(span / (len(self._finished_at) - 1) * self._most_open / 4)))

    def _hand_out(self, emissions: list[tuple[Ticket, Emission]], iteration: Iteration | None) -> None:
        for ticket, emission in emissions:
            if ticket.over:
                continue
            if emission.finish is not None:
                ticket.over = True
                self._open.discard(ticket)
                self._finished_at = [*self._finished_at[-31:], time.perf_counter()]
            self._watcher.emitted(ticket, emission)
            ticket.emissions.put_nowait((ticket.index, emission))
        if iteration is not None:
            self._watcher.iterated(iteration)
        if not self._open:
            self._empty.set()

    def _break(self, at: float) -> None:
        self.broken = True
        self._hand_out([(ticket, Emission([], at, "error", None)) for ticket in self._open], None)
        self.on_broken()

    def _run(self) -> None:
        engine, governed = self._engine, Governed(self._engine, self._guard)
        try:
            while self._take_in():
                self._beat = time.perf_counter()
                if engine.poll():
                    before = engine.state.totals[0].copy()
                    decision = governed.step()
                    self._report(decision, governed, before)
                self._retire()
        except BaseException:
            log.exception("the engine failed; open requests get an error, and the server ends")
            self._call(self._break, engine.clock.now())

    def _take_in(self) -> bool:
        """Submit and cancel what the inbox says, waiting while there is nothing to do; False to end."""
        with self._wake:
            while not (self._inbox or self._tickets or self._closing):
                self._wake.wait()
            if self._closing:
                return False
            entries, self._inbox = self._inbox, []
        dropped = []
        for ticket, wanted in entries:
            if wanted:
                try:
                    self._enter(ticket)
                except RequestError:
                    log.exception("a request was accepted that the engine cannot serve")
                    dropped.append((ticket, Emission([], self.now(), "error", None)))
            elif ticket.number in self._tickets:
                self._engine.cancel(ticket.number)
                dropped.append((ticket, Emission([], self.now(), "abort", self._forget(ticket.number))))
        if dropped:
            self._call(self._hand_out, dropped, None)
        return True

    def _enter(self, ticket: Ticket) -> None:
        ticket.number = self._engine.submit(
            ticket.prompt,
            ticket.max_tokens,
            ticket.sampling,
            stop=ticket.stop,
            ending=ticket.ending,
            arrival=max(ticket.received, self._engine.earliest_arrival),
            constraints=ticket.constraints,
            logprobs=ticket.logprobs,
            prompt_logprobs=ticket.prompt_logprobs,
        )
        self._tickets[ticket.number] = ticket

    def _forget(self, number: int) -> Times:
        """Drop what is kept of a request that is over."""
        row = self._engine.timeline(number)
        self._engine.collect(number)
        del self._tickets[number]
        return Times(*(float(row[name]) for name in Times._fields))

    def _report(self, decision: Decision, governed: Governed, before: np.void) -> None:
        """Hand out what the iteration emitted, and say what it was."""
        engine = self._engine
        after, batch = engine.state.totals[0], engine.state.batches[0]
        at = float(engine.state.instances["now"][0])
        ended = set(engine.finished)
        emissions = []
        for number, tokens in engine.emitted:
            ticket, finish, times = self._tickets[number], None, None
            if number in ended:
                finish = _how_it_ended(engine, number)
                times = self._forget(number)
            emissions.append((ticket, Emission(tokens, at, finish, times, logprobs=engine.logprobs.get(number))))
        for number in engine.failed:
            ticket = self._tickets[number]
            emissions.append((ticket, Emission([], at, "error", self._forget(number), NOT_FINITE)))
        self.decision_s.append(decision.seconds)
        if len(self.decision_s) > 2 * MOST_DECISIONS:
            del self.decision_s[:MOST_DECISIONS]

        def since(name: str) -> int:
            return int(after[name] - before[name])

        observation = governed.observation
        iteration = Iteration(
            decision=decision,
            prompt_tokens=int(batch["prefill_tokens"]),
            emitted_tokens=int(batch["emitted_tokens"]),
            preemptions=since("preemptions"),
            drafted_tokens=since("drafted"),
            accepted_tokens=since("accepted"),
            drafts=int(observation.drafted[0, 0]),
            accepted_by_depth=observation.accepted[0].copy(),
            faults=self._guard.faults,
        )
        self._call(self._hand_out, emissions, iteration)

    def _retire(self) -> None:
        """Move what is over out of the table when it has grown, and rarely enough to cost nothing."""
        if len(self._engine.requests) >= self._retire_at:
            self._ledger.add(self._engine.retire())
            self._retire_at = max(RETIRE_AT, 2 * len(self._engine.requests))

    def _call(self, what: Callable[..., None], *arguments: object) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(what, *arguments)
        except RuntimeError:
            log.debug("the event loop is closed: nobody is left to hear")


def _how_it_ended(engine: TorchEngine, number: int) -> Finish:
    return "stop" if engine.stopped(number) else "length"
