"""Clients that open connections and do not use them keep nobody out."""

from __future__ import annotations

import asyncio
import errno
import logging
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from serving_client import PROMPT, Running, eventually, running

from runs.server import connections
from runs.server.connections import RESERVED_DESCRIPTORS, Exhausted, most_connections
from runs.server.pace import SHARE, Pace

MOST = 4
HALF_A_HEAD = b"GET /health HTTP/1.1\r\nHost: he"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("connections"), max_connections=MOST) as server:
        yield server


@contextmanager
def connected(server: Running, sent: bytes = b"") -> Iterator[socket.socket]:
    address = httpx.URL(server.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.settimeout(600)
        client.sendall(sent)
        yield client


def transports(server: Running) -> list[Any]:
    http = server.server._http
    assert http is not None
    return [one.transport for one in list(http.server_state.connections)]


def is_closed(client: socket.socket) -> bool:
    try:
        return client.recv(1) == b""
    except ConnectionResetError:
        return True


def test_what_is_written_is_sent_at_once(served: Running) -> None:
    with connected(served, HALF_A_HEAD):
        eventually(lambda: len(transports(served)) > 0)
        for transport in transports(served):
            assert transport.get_extra_info("socket").getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_those_that_wait_longest_for_their_request_give_way(served: Running) -> None:
    with ExitStack() as stack:
        halves = [stack.enter_context(connected(served, HALF_A_HEAD)) for _ in range(3 * MOST)]
        for _ in range(3):
            with connected(served, HALF_A_HEAD + b"re\r\nConnection: close\r\n\r\n") as client:
                assert client.recv(1024).startswith(b"HTTP/1.1 200")
        assert all(is_closed(half) for half in halves[: 2 * MOST])
    eventually(lambda: len(transports(served)) <= MOST)


def test_a_connection_that_is_answered_gives_way_to_none(served: Running) -> None:
    options = {"max_tokens": 2000, "extra_body": {"ignore_eos": True}, "stream": True}
    served.http.close()
    served.http = httpx.Client(base_url=served.url)
    with ExitStack() as stack:
        streams = [stack.enter_context(served.complete(PROMPT, **options)) for _ in range(MOST)]
        for stream in streams:
            next(stream)
        with connected(served, HALF_A_HEAD) as client:
            assert client.recv(1024).startswith(b"HTTP/1.1 503")
            assert is_closed(client)
        for stream in streams:
            next(stream)
    eventually(lambda: served.num_open() == 0)


@pytest.mark.parametrize("sent", [b"", HALF_A_HEAD, HALF_A_HEAD + b"re\r\nContent-Length: 10\r\n\r\n{"], ids=len)
def test_a_request_that_does_not_arrive_in_time_is_dropped(
    served: Running, monkeypatch: pytest.MonkeyPatch, sent: bytes
) -> None:
    monkeypatch.setattr(connections, "SECONDS_TO_ARRIVE", {"head": 0.05, "body": 0.05})
    with connected(served, sent) as client:
        assert is_closed(client)
    assert served.http.get("/health").status_code == 200


def test_a_body_of_very_small_chunks_is_read_bit_by_bit_and_whole(served: Running) -> None:
    body = b'{"prompt": "def f", "max_tokens": 1, "temperature": 0}' + b" " * 3000
    head = b"POST /v1/completions HTTP/1.1\r\nHost: here\r\nConnection: close\r\nContent-Type: application/json\r\n"
    head += b"Transfer-Encoding: chunked\r\n\r\n"
    with connected(served, head + b"".join(b"1\r\n%c\r\n" % byte for byte in body) + b"0\r\n\r\n") as client:
        assert client.recv(1024).startswith(b"HTTP/1.1 200")


def test_the_limit_of_descriptors_is_raised_and_then_kept_to(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    resource = pytest.importorskip("resource")
    asked: list[Any] = []
    monkeypatch.setattr(resource, "setrlimit", lambda _, limits: asked.append(limits))
    for soft, hard, wanted, expected in (
        (256, 10_000, 1000, 1000), (256, 512, 1000, 512 - RESERVED_DESCRIPTORS), (4096, 4096, 1000, 1000),
        (256, resource.RLIM_INFINITY, 1000, 1000),
    ):  # fmt: skip
        monkeypatch.setattr(resource, "getrlimit", lambda _, pair=(soft, hard): pair)
        assert most_connections(wanted) == expected
    needed = 1000 + RESERVED_DESCRIPTORS
    assert asked == [(needed, 10_000), (512, 512), (needed, resource.RLIM_INFINITY)]
    assert caplog.text.count("512 descriptors suffice for") == 1


def test_a_connection_that_cannot_be_accepted_is_said_now_and_then(caplog: pytest.LogCaptureFixture) -> None:
    handler, others = Exhausted(), []
    loop: Any = SimpleNamespace(default_exception_handler=others.append)
    failure = {"message": "socket.accept() out of system resource", "exception": OSError(errno.EMFILE, "too many")}
    with caplog.at_level(logging.WARNING):
        for _ in range(1000):
            handler(loop, dict(failure))
    assert len(caplog.records) == 1
    assert len(caplog.text) < 1000
    assert not others
    for context in ({"message": "a task failed", "exception": OSError(errno.EMFILE, "")}, {"message": "accept"}):
        handler(loop, context)
    assert len(others) == 2


def test_long_pieces_of_work_are_spread_and_short_ones_are_free() -> None:
    pace = Pace(0.01)
    assert pace.pause(0.009) == 0.0
    first, second = pace.pause(0.1), pace.pause(0.1)
    rest = 0.1 * (1 / SHARE - 1)
    assert first == pytest.approx(rest, rel=0.01)
    assert rest < second <= 2 * rest


def test_the_event_loop_hears_of_other_errors_as_usual(caplog: pytest.LogCaptureFixture) -> None:
    async def fail() -> None:
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(Exhausted())
        loop.call_soon(lambda: 1 / 0)
        await asyncio.sleep(0)
        await asyncio.sleep(0)

    asyncio.run(fail())
    assert "ZeroDivisionError" in caplog.text
