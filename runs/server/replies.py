"""What clients get: whole answers and streams of chunks, of completions and of chats."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from runs.server.bodies import StreamOptions
from runs.server.errors import ApiError
from runs.server.text import Decode, TextStream
from runs.server.worker import Emission, Ticket

CLIENT_GONE = 499
"""Status of an answer that nobody reads."""

Leave = Callable[[Ticket], None]


class Part(NamedTuple):
    """Text that became certain with one emission."""

    text: str
    finish: str | None
    """`stop` or `length`, of the last part."""
    error: ApiError | None = None


class Answer:
    """The text of one accepted request, and how it is put into JSON.

    Args:
        ticket: accepted.
        decode: tokens to text.
        stops: stop strings.
        chat: in the shape of chats, not of completions.
        model: its name.
        leave: called when the client goes.
    """

    def __init__(
        self, ticket: Ticket, decode: Decode, stops: tuple[str, ...], chat: bool, model: str, leave: Leave
    ) -> None:
        self._ticket, self._chat, self._leave = ticket, chat, leave
        self._text = TextStream(decode, stops)
        self._tokens = 0
        self._stop_tokens = frozenset(ticket.stop)
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    async def parts(self) -> AsyncIterator[Part]:
        """A part for every emission; the last one has `finish` or `error`."""
        while True:
            emission = await self._ticket.emissions.get()
            self._tokens += len(emission.tokens)
            if emission.finish in ("error", "abort"):
                yield Part("", None, _failure(emission))
                return
            last = emission.finish is not None
            # The token that ends an output, such as the end of the text, is counted and not spelt.
            ends = emission.finish == "stop" and emission.tokens[-1] in self._stop_tokens
            text = self._text.feed(emission.tokens[:-1] if ends else emission.tokens, last)
            yield Part(text, "stop" if last and self._text.stopped else emission.finish)
            if last:
                return

    async def whole(self, request: Request) -> Response:
        """The answer when it is complete. The request is dropped when the client goes."""
        gone = asyncio.ensure_future(_disconnected(request))
        done = asyncio.ensure_future(self._collected())
        try:
            await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
            return done.result() if done.done() else Response(status_code=CLIENT_GONE)
        finally:
            gone.cancel()
            done.cancel()
            self._leave(self._ticket)

    def stream(self, usage: StreamOptions) -> Response:
        """The answer as server-sent events. The request is dropped when the client goes."""
        return _Events(self._events(usage), lambda: self._leave(self._ticket))

    async def _collected(self) -> Response:
        text, finish = "", None
        async for part in self.parts():
            if part.error is not None:
                return part.error.response
            text, finish = text + part.text, part.finish
        said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
        choice = {"index": 0, **said, "logprobs": None, "finish_reason": finish}
        return JSONResponse({**self._head, "choices": [choice], "usage": self._usage})

    async def _events(self, usage: StreamOptions) -> AsyncIterator[bytes]:
        first = True
        async for part in self.parts():
            if part.error is not None:
                yield _event(part.error.content)
                break
            if self._chat:
                role = {"role": "assistant"} if first else {}
                said: dict[str, Any] = {"delta": {**role, "content": part.text}}
            else:
                said = {"text": part.text}
            first = False
            choice = {"index": 0, **said, "logprobs": None, "finish_reason": part.finish}
            yield self._chunk([choice], usage, self._usage if usage.continuous_usage_stats else None)
        else:
            if usage.include_usage:
                yield self._chunk([], usage, self._usage)
        yield b"data: [DONE]\n\n"

    def _chunk(self, choices: list[dict[str, Any]], options: StreamOptions, usage: dict[str, int] | None) -> bytes:
        content = {**self._head, "choices": choices}
        if self._chat:
            content["object"] = "chat.completion.chunk"
        if options.include_usage or usage is not None:
            content["usage"] = usage
        return _event(content)

    @property
    def _usage(self) -> dict[str, int]:
        prompt = len(self._ticket.prompt)
        return {"prompt_tokens": prompt, "completion_tokens": self._tokens, "total_tokens": prompt + self._tokens}


class _Events(StreamingResponse):
    """A stream that says when it is over, however it ends and even if it never began."""

    def __init__(self, events: AsyncIterator[bytes], on_end: Callable[[], None]) -> None:
        super().__init__(events, media_type="text/event-stream", headers={"cache-control": "no-cache"})
        self._on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """See ASGI."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._on_end()


def _failure(emission: Emission) -> ApiError:
    if emission.finish == "abort":
        return ApiError(503, "the server ended before the request was finished", code="aborted")
    return ApiError(500, emission.failure or "the engine failed; the server's log says why", code="engine_error")


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
