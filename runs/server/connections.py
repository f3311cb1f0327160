"""Connections to clients: how many at a time, how long a request may take to arrive, and when descriptors run out."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
import time
from typing import Any, ClassVar, Literal

import h11
from uvicorn.protocols.http.flow_control import FlowControl
from uvicorn.protocols.http.h11_impl import H11Protocol

from runs.server.pace import Pace

log = logging.getLogger(__name__)

SECONDS_TO_ARRIVE = {"head": 10.0, "body": 60.0}
"""Longest that the head of a request may take, from the connection or its first byte on, and then its body."""

BACKLOG = 2048
"""Connections that the system keeps until they are accepted."""
ACCEPTED_AT_ONCE = 16
"""A few turns of the event loop later at most, those beyond the limit are closed again."""

RESERVED_DESCRIPTORS = 64 + 4 * ACCEPTED_AT_ONCE
"""Kept for files, and for connections that are accepted before others are closed."""

READ_BYTES = 4 * 1024
"""Taken from a connection at a time."""
LONG_READ_S = 0.002
"""What takes so long to read as many chunks of a byte is read now and then only."""

SECONDS_BETWEEN_WARNINGS = 10.0

_EXHAUSTED = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)

Phase = Literal["head", "body", "idle"]


class _Flow(FlowControl):
    """uvicorn's, which also lets a connection rest."""

    def __init__(self, transport: asyncio.Transport) -> None:
        super().__init__(transport)
        self._resting, self._paused = False, False

    def rest(self, seconds: float) -> None:
        """Read nothing for a while."""
        if seconds > 0.0 and not self._resting:
            super().pause_reading()
            self._resting = True
            asyncio.get_running_loop().call_later(seconds, self._rested)

    def pause_reading(self) -> None:
        """See uvicorn."""
        self._paused = True
        super().pause_reading()

    def resume_reading(self) -> None:
        """See uvicorn."""
        self._paused = False
        if not self._resting:
            super().resume_reading()

    def _rested(self) -> None:
        self._resting = False
        if not self._paused:
            super().resume_reading()


class Connection(H11Protocol):
    """uvicorn's, which closes requests that do not arrive in time, and itself when others need its place.

    `most` connections are open at a time. One more takes the place of the one that has been waiting longest for (the
    rest of) a request, or gets a 503 when all are being answered.
    """

    most: ClassVar[int] = 1024
    waiting: ClassVar[dict[Connection, None]]
    """Connections without a whole request, those first that have been so longest."""
    pace: ClassVar[Pace]

    _phase: Phase | None = None
    _timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """See asyncio."""
        super().connection_made(transport)
        peer = transport.get_extra_info("socket")
        if peer is not None and peer.family in (socket.AF_INET, socket.AF_INET6):
            # Otherwise the last token of a stream waits for the client's delayed acknowledgement of the one before.
            peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.flow = self._flow = _Flow(transport)
        if hasattr(transport, "max_size"):
            transport.max_size = READ_BYTES
        if len(self.connections) > self.most:
            longest = next(iter(self.waiting), None)
            if longest is None:
                transport.write(b"HTTP/1.1 503 Service Unavailable\r\nconnection: close\r\ncontent-length: 0\r\n\r\n")
                transport.close()
                return
            longest.give_way()
        self._enter("head")

    def connection_lost(self, exc: Exception | None) -> None:
        """See asyncio."""
        self._enter(None)
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """See asyncio."""
        begin = time.thread_time()
        super().data_received(data)
        self._follow()
        self._flow.rest(self.pace.pause(time.thread_time() - begin))

    def on_response_complete(self) -> None:
        """See uvicorn, which closes connections that stay idle."""
        super().on_response_complete()
        self._follow(idle=True)

    def give_way(self) -> None:
        """Close at once, and count as closed."""
        self._enter(None)
        self.connections.discard(self)
        self.transport.abort()

    def _follow(self, idle: bool = False) -> None:
        if self.transport.is_closing():
            self._enter(None)
        elif self.conn.their_state is h11.SEND_BODY:
            self._enter("body")
        elif self.conn.their_state is h11.IDLE:
            self._enter("idle" if idle else "head")
        else:
            self._enter(None)

    def _enter(self, phase: Phase | None) -> None:
        if phase == self._phase:
            return
        self._phase = phase
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self.waiting.pop(self, None)
        if phase is not None:
            self.waiting[self] = None
            if phase in SECONDS_TO_ARRIVE:
                self._timer = self.loop.call_later(SECONDS_TO_ARRIVE[phase], self.give_way)


def connections(most: int) -> type[Connection]:
    """The class of a server's connections, of which `most` are open at a time."""
    return type("Connection", (Connection,), {"most": most, "waiting": {}, "pace": Pace(LONG_READ_S)})


def most_connections(wanted: int) -> int:
    """How many of the wanted connections there are descriptors for; the process' limit is raised as far as it may."""
    try:
        import resource
    except ImportError:
        return wanted
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = wanted + RESERVED_DESCRIPTORS
    if soft != resource.RLIM_INFINITY and soft < needed:
        raised = needed if hard == resource.RLIM_INFINITY else min(hard, needed)
        resource.setrlimit(resource.RLIMIT_NOFILE, (raised, hard))
        soft = raised
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return wanted
    possible = max(1, soft - RESERVED_DESCRIPTORS)
    log.warning("max_connections=%d: %d descriptors suffice for %d (ulimit -n)", wanted, soft, possible)
    return possible


class Exhausted:
    """Exception handler of an event loop that says now and then, not each time, that no connection can be accepted."""

    def __init__(self) -> None:
        self._said = -SECONDS_BETWEEN_WARNINGS

    def __call__(self, loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """See `asyncio.loop.set_exception_handler`."""
        error = context.get("exception")
        if "accept" not in context.get("message", "") or getattr(error, "errno", None) not in _EXHAUSTED:
            loop.default_exception_handler(context)
        elif time.monotonic() - self._said >= SECONDS_BETWEEN_WARNINGS:
            self._said = time.monotonic()
            log.warning("connections cannot be accepted: %s", error)
