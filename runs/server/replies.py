"""What clients get: whole answers and streams of chunks, of completions and of chats."""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any, NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from engine.backends.torch.logprobs import TokenLogprob
from runs.server.bodies import Body, StreamOptions
from runs.server.errors import ApiError
from runs.server.text import Language, Places, TextStream
from runs.server.worker import Emission, Ticket

CLIENT_GONE = 499
"""Status of an answer that nobody reads."""

LEAST_LOGPROB = -9999.0
"""In place of minus infinity and of what is no number, which JSON has no word for."""

Leave = Callable[[Ticket], None]


class Scored(NamedTuple):
    """A token of an answer with its log probability, that of a prompt's first token being None."""

    token: int
    place: int
    """Characters before it."""
    logprob: float | None
    top: list[tuple[int, float]]


class Part(NamedTuple):
    """Text that became certain with one emission."""

    text: str
    tokens: list[int]
    """Generated ones that are sent back."""
    scored: list[Scored]
    """Those with log probabilities, of an echoed prompt too."""
    finish: str | None
    """`stop` or `length`, of the last part."""


class Choice:
    """One of an answer's texts.

    Args:
        ticket: accepted.
        language: of the model.
        body: what was asked for.
        lead: text that the output is put behind.
    """

    def __init__(self, ticket: Ticket, language: Language, body: Body, lead: str) -> None:
        self.ticket, self._language, self._lead = ticket, language, lead
        self._silent, self._keeps_stop = body.returns_prompts_only, bool(body.include_stop_str_in_output)
        skip = body.skip_special_tokens is not False
        self._text = text_stream(language, body, ticket.prompt)
        self._places = Places(language, skip)
        self._stop_tokens = frozenset(ticket.stop)
        self.tokens = 0
        """Generated and sent back."""
        self.begun = False

    def part(self, emission: Emission) -> Part:
        """What an emission adds; the last one has `finish`."""
        last = emission.finish is not None
        tokens = [] if self._silent else emission.tokens
        self.tokens += len(tokens)
        # The token that ends an output, such as the end of the text, is counted and not spelt.
        ends = emission.finish == "stop" and bool(tokens) and tokens[-1] in self._stop_tokens and not self._keeps_stop
        text = self._text.feed(tokens[:-1] if ends else tokens, last)
        finish = "stop" if last and self._text.stopped else emission.finish
        if self._silent and last:
            finish = "length"
        scored = self._scored(emission.logprobs or [], len(tokens))
        if not self.begun:
            text = self._lead + text
        self.begun = True
        return Part(text, tokens, scored, finish)

    def _scored(self, found: list[TokenLogprob], generated: int) -> list[Scored]:
        """The tokens with their places, a prompt's first one before the others; without what is not sent back."""
        scored = []
        if not self.begun and self.ticket.prompt_logprobs:
            first = self.ticket.prompt[0]
            scored.append(Scored(first, self._places.next(first), None, []))
            found = found[: len(self.ticket.prompt) - 1 + generated]
        elif not generated:
            return []
        return scored + [Scored(one.token, self._places.next(one.token), one.logprob, one.top) for one in found]


class Answer:
    """The texts of the accepted requests that answer one HTTP request, and how they are put into JSON.

    Args:
        choices: in order, their tickets numbered so and with one queue of emissions.
        language: of the model.
        body: what was asked for.
        chat: in the shape of chats, not of completions.
        model: its name.
        leave: called when the client goes.
    """

    def __init__(
        self, choices: Sequence[Choice], language: Language, body: Body, chat: bool, model: str, leave: Leave
    ) -> None:
        self._choices, self._language, self._body, self._chat, self._leave = choices, language, body, chat, leave
        self._prompt_tokens = sum(len(choice.ticket.prompt) for choice in choices[:: body.n or 1])
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": f"{'chatcmpl' if chat else 'cmpl'}-{uuid.uuid4().hex}",
            "object": kind,
            "created": int(time.time()),
            "model": model,
        }

    async def parts(self) -> AsyncIterator[tuple[int, Part]]:
        """(choice, part) for every emission. Raises ApiError when one of the requests failed."""
        unfinished = len(self._choices)
        while unfinished:
            index, emission = await self._choices[0].ticket.emissions.get()
            if emission.finish in ("error", "abort"):
                raise _failure(emission)
            yield index, self._choices[index].part(emission)
            unfinished -= emission.finish is not None

    async def whole(self, request: Request) -> Response:
        """The answer when it is complete. The requests are dropped when the client goes."""
        gone = asyncio.ensure_future(_disconnected(request))
        done = asyncio.ensure_future(self._collected())
        try:
            await asyncio.wait((gone, done), return_when=asyncio.FIRST_COMPLETED)
            return done.result() if done.done() else Response(status_code=CLIENT_GONE)
        finally:
            gone.cancel()
            done.cancel()
            self._leave_all()

    def stream(self, usage: StreamOptions) -> Response:
        """The answer as server-sent events. The requests are dropped when the client goes."""
        return _Events(self._events(usage), self._leave_all)

    def _leave_all(self) -> None:
        for choice in self._choices:
            self._leave(choice.ticket)

    async def _collected(self) -> Response:
        parts: list[list[Part]] = [[] for _ in self._choices]
        try:
            async for index, part in self.parts():
                parts[index].append(part)
        except ApiError as error:
            return error.response
        choices = []
        for index, (choice, got) in enumerate(zip(self._choices, parts, strict=True)):
            text = "".join(part.text for part in got)
            said = {"message": {"role": "assistant", "content": text}} if self._chat else {"text": text}
            tokens = [token for part in got for token in part.tokens]
            scored = [one for part in got for one in part.scored]
            choices.append(self._choice(index, said, scored, got[-1].finish, tokens, choice.ticket.prompt))
        content = {**self._head, "choices": choices, "usage": self._usage}
        if self._body.return_token_ids and self._chat:
            content["prompt_token_ids"] = list(self._choices[0].ticket.prompt)
        return JSONResponse(content)

    async def _events(self, usage: StreamOptions) -> AsyncIterator[bytes]:
        begun: set[int] = set()
        try:
            async for index, part in self.parts():
                if self._chat:
                    role = {} if index in begun else {"role": "assistant"}
                    said: dict[str, Any] = {"delta": {**role, "content": part.text}}
                else:
                    said = {"text": part.text}
                prompt = None if index in begun else self._choices[index].ticket.prompt
                content: dict[str, Any] = {
                    "choices": [self._choice(index, said, part.scored, part.finish, part.tokens, prompt)]
                }
                if self._body.return_token_ids and self._chat and not begun:
                    content["prompt_token_ids"] = list(self._choices[0].ticket.prompt)
                begun.add(index)
                yield self._chunk(content, usage, self._usage if usage.continuous_usage_stats else None)
            if usage.include_usage:
                yield self._chunk({"choices": []}, usage, self._usage)
        except ApiError as error:
            yield _event(error.content)
        yield b"data: [DONE]\n\n"

    def _choice(
        self,
        index: int,
        said: dict[str, Any],
        scored: list[Scored],
        finish: str | None,
        tokens: list[int],
        prompt: Sequence[int] | None,
    ) -> dict[str, Any]:
        choice = {"index": index, **said, "logprobs": self._logprobs(scored), "finish_reason": finish}
        if self._body.return_token_ids:
            choice["token_ids"] = tokens
            if prompt is not None and not self._chat:
                choice["prompt_token_ids"] = list(prompt)
        return choice

    def _logprobs(self, scored: list[Scored]) -> dict[str, Any] | None:
        if self._body.num_logprobs is None:
            return None
        if self._chat:
            return {"content": [self._chat_logprob(one) for one in scored], "refusal": None}
        return {
            "tokens": [self._name(one.token) for one in scored],
            "token_logprobs": [_finite(one.logprob) for one in scored],
            "top_logprobs": [self._named(one) for one in scored],
            "text_offset": [one.place for one in scored],
        }

    def _named(self, one: Scored) -> dict[str, float | None] | None:
        """The most probable tokens by their text, the token itself among them."""
        if one.logprob is None:
            return None
        return {self._name(token): _finite(logprob) for token, logprob in [(one.token, one.logprob), *one.top]}

    def _chat_logprob(self, one: Scored) -> dict[str, Any]:
        own, *top = (
            {"token": self._name(token), "logprob": _finite(logprob), "bytes": list(self._language.bytes_of(token))}
            for token, logprob in [(one.token, one.logprob), *one.top]
        )
        return {**own, "top_logprobs": top}

    def _name(self, token: int) -> str:
        return f"token_id:{token}" if self._body.return_tokens_as_token_ids else self._language.name_of(token)

    def _chunk(self, content: dict[str, Any], options: StreamOptions, usage: dict[str, int] | None) -> bytes:
        content = {**self._head, **content}
        if self._chat:
            content["object"] = "chat.completion.chunk"
        if options.include_usage or usage is not None:
            content["usage"] = usage
        return _event(content)

    @property
    def _usage(self) -> dict[str, int]:
        prompt, generated = self._prompt_tokens, sum(choice.tokens for choice in self._choices)
        return {"prompt_tokens": prompt, "completion_tokens": generated, "total_tokens": prompt + generated}


def text_stream(language: Language, body: Body, prompt: Sequence[int]) -> TextStream:
    """The text of an output as a client asked for it, up to its stop strings."""
    decode = language.decoder(body.skip_special_tokens is not False)
    return TextStream(decode, body.stops, bool(body.include_stop_str_in_output), body.min_tokens or 0, prompt)


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


def _finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if logprob > LEAST_LOGPROB else LEAST_LOGPROB


def _failure(emission: Emission) -> ApiError:
    if emission.finish == "abort":
        return ApiError(503, "the server ended before the request was finished", code="aborted")
    return ApiError(500, emission.failure or "the engine failed; the server's log says why", code="engine_error")


def _event(content: dict[str, Any]) -> bytes:
    return f"data: {json.dumps(content, ensure_ascii=False, separators=(',', ':'))}\n\n".encode()


async def _disconnected(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
