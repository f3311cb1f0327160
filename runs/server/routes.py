"""The HTTP interface: what is served under which path."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np
from fastapi import FastAPI, Request, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from engine.limits import EngineLimits
from engine.speculation.constraints import Constraints
from engine.speculation.sampling import Sampling
from runs.server.bodies import Body, ChatBody, CompletionBody
from runs.server.errors import ApiError, of_exception
from runs.server.gate import Gate
from runs.server.intake import Intake
from runs.server.metrics import Metrics
from runs.server.replies import Answer, Choice, text_stream
from runs.server.text import ChatError, Cut, Language, Reader
from runs.server.worker import Refused, Ticket, Worker

USUAL_COMPLETION_TOKENS = 16
"""`max_tokens` of a completion that does not say, as OpenAI's; a chat gets what the context has room for."""
STALLED_S = 30.0
"""After so long without an iteration, with requests open, /health says no."""

REFUSALS = {
    "full": (429, "all places are taken, in the batch and in the queue", "queue_full"),
    "draining": (503, "the server is shutting down", "draining"),
    "broken": (503, "the engine failed; the server is shutting down", "engine_error"),
}


class Api:
    """The paths and what answers them.

    Args:
        worker: serves.
        metrics: of it.
        language: of the model; a copy is used by the engine's thread.
        limits: of the engine.
        model: its name.
        end_tokens: end an output unless a request ignores them.
        seed: requests without a seed of their own draw one from this.
    """

    def __init__(
        self,
        worker: Worker,
        metrics: Metrics,
        language: Language,
        limits: EngineLimits,
        model: str,
        end_tokens: frozenset[int],
        seed: int,
    ) -> None:
        self._worker, self._metrics, self._language = worker, metrics, language
        self._engine_language = language.copy()
        self._limits, self._model, self._end_tokens = limits, model, end_tokens
        self._most_tokens = min(limits.max_model_len, limits.total_blocks * limits.block_size)
        self._intake = Intake(self._most_tokens)
        self._reader = Reader(language, self._most_tokens)
        self._seeds = np.random.default_rng(seed)
        self._created = int(time.time())

    def app(self, api_key: str | None, most_body_bytes: int) -> Callable[..., Any]:
        """The ASGI application, behind its gate."""
        app = FastAPI(title="Governor", docs_url=None, redoc_url=None, openapi_url=None)
        app.post("/v1/completions", response_model=None)(self.completions)
        app.post("/v1/chat/completions", response_model=None)(self.chat)
        app.get("/v1/models", response_model=None)(self.models)
        app.get("/v1/models/{model:path}", response_model=None)(self.model)
        app.get("/health", response_model=None)(self.health)
        app.get("/metrics", response_model=None)(self.metrics)
        for kind in (ApiError, HTTPException, Exception):
            app.exception_handler(kind)(self._refuse)
        return Gate(app, self._worker.now, api_key, most_body_bytes, self._metrics.refused)

    def close(self) -> None:
        """End what was started for it."""
        self._reader.close()

    async def completions(self, request: Request) -> Response:
        """`POST /v1/completions`."""
        body = await self._intake.read(request, CompletionBody)
        self._check_model(body)
        prompts = body.prompts
        self._check_number(len(prompts), body)
        most = 1 if body.returns_prompts_only else body.max_completion_tokens or body.max_tokens
        cut = self._cut(body, most or USUAL_COMPLETION_TOKENS)
        texts = iter(await self._reader.prompts([prompt for prompt in prompts if isinstance(prompt, str)], cut))
        read = [next(texts) if isinstance(prompt, str) else cut.tokens(prompt) for prompt in prompts]
        leads = [self._echoed(body, *pair) if body.echo else "" for pair in zip(prompts, read, strict=True)]
        for prompt in read:
            self._check_tokens("prompt", prompt)
        usual = [min(USUAL_COMPLETION_TOKENS, max(1, self._most_tokens - len(tokens))) for tokens in read]
        return await self._answer(body, read, [most or one for one in usual], leads, request, chat=False)

    async def chat(self, request: Request) -> Response:
        """`POST /v1/chat/completions`."""
        body = await self._intake.read(request, ChatBody)
        self._check_model(body)
        self._check_number(1, body)
        most = body.max_completion_tokens or body.max_tokens
        chat = body.chat
        try:
            tokens = await self._reader.chat(chat, self._cut(body, most or 1))
        except ChatError as error:
            raise ApiError(400, str(error), "messages", "invalid_value") from error
        last = chat.messages[-1]
        lead = last["content"] if body.echo and last["role"] == "assistant" else ""
        most = most or max(1, self._most_tokens - len(tokens))
        return await self._answer(body, [tokens], [most], [lead], request, chat=True)

    async def models(self) -> Response:
        """`GET /v1/models`."""
        return JSONResponse({"object": "list", "data": [self._card]})

    async def model(self, model: str) -> Response:
        """`GET /v1/models/NAME`."""
        if model != self._model:
            raise self._no_model(model)
        return JSONResponse(self._card)

    async def health(self) -> Response:
        """`GET /health`: 200 while requests are accepted and the engine runs."""
        if self._worker.broken or self._worker.draining:
            raise self._refusal("broken" if self._worker.broken else "draining", 1)
        stalled = self._worker.stalled_s()
        if stalled > STALLED_S:
            raise ApiError(503, f"the engine has not begun an iteration for {stalled:.0f} s", code="stalled")
        return Response()

    async def metrics(self) -> Response:
        """`GET /metrics`."""
        return Response(self._metrics.text(), media_type=CONTENT_TYPE_LATEST)

    async def _answer(
        self,
        body: Body,
        prompts: Sequence[list[int]],
        max_tokens: Sequence[int],
        leads: Sequence[str],
        request: Request,
        chat: bool,
    ) -> Response:
        """`n` answers to each prompt, in order, as one."""
        param, times = "messages" if chat else "prompt", body.n or 1
        for tokens, most in zip(prompts, max_tokens, strict=True):
            self._check_length(tokens, most, param)
        seed = int(self._seeds.integers(2**63)) if body.seed is None else body.seed
        constraints = self._constraints(body)
        emissions: asyncio.Queue[Any] = asyncio.Queue()
        choices: list[Choice] = []
        for tokens, most, lead in zip(prompts, max_tokens, leads, strict=True):
            for i in range(times):
                place = len(choices) if body.seed is None else i
                ticket = Ticket(
                    tokens,
                    most,
                    self._sampling(body, (seed + place) % 2**64),
                    self._ends(body),
                    text_stream(self._engine_language, body, tokens).until_stop if body.stops else None,
                    request.scope["state"]["received"],
                    constraints,
                    body.num_logprobs,
                    bool(body.echo and not chat and body.num_logprobs is not None),
                    len(choices),
                    emissions,
                )
                choices.append(Choice(ticket, self._language, body, lead))
        try:
            self._worker.submit(*(choice.ticket for choice in choices))
        except Refused as refused:
            raise self._refusal(refused.reason, refused.retry_s) from refused
        answer = Answer(choices, self._language, body, chat, self._model, self._worker.leave)
        return answer.stream(body.usage) if body.stream else await answer.whole(request)

    def _check_number(self, prompts: int, body: Body) -> None:
        times, most = body.n or 1, self._worker.most_open
        if prompts * times > most:
            raise ApiError(
                400,
                f"n={times} for {prompts} prompts asks for {prompts * times} answers; at most {most} are worked on at "
                "a time: send several requests",
                "prompt" if prompts > most else "n",
                "invalid_value",
            )

    def _cut(self, body: Body, max_tokens: int) -> Cut:
        most = body.truncate_prompt_tokens
        if most == -1:
            most = max(1, self._most_tokens - max_tokens)
        return Cut(body.add_special_tokens, most, body.truncation_side or "left")

    def _echoed(self, body: Body, prompt: str | list[int], tokens: list[int]) -> str:
        """The text of a prompt: as it was sent, unless it was cut or sent as tokens."""
        if isinstance(prompt, str) and body.truncate_prompt_tokens is None:
            return prompt
        return self._language.decode(tokens, body.skip_special_tokens is not False)

    def _check_tokens(self, param: str, tokens: Iterable[int]) -> None:
        if not all(0 <= token < self._language.num_tokens for token in tokens):
            raise ApiError(400, f"{param}: token ids are 0 to {self._language.num_tokens - 1}", param, "invalid_value")

    def _check_length(self, tokens: Sequence[int], max_tokens: int, param: str) -> None:
        if not tokens:
            raise ApiError(400, f"{param}: the tokenizer makes no token of it", param, "invalid_value")
        if len(tokens) + max_tokens > self._most_tokens:
            raise ApiError(
                400,
                f"{len(tokens)} prompt tokens and {max_tokens} to generate exceed the context of {self._most_tokens} "
                "tokens; shorten the prompt or lower max_tokens",
                param if len(tokens) >= self._most_tokens else "max_tokens",
                "context_length_exceeded",
            )

    def _sampling(self, body: Body, seed: int) -> Sampling:
        return Sampling(
            temperature=1.0 if body.temperature is None else body.temperature,
            top_k=max(0, body.top_k or 0),
            top_p=1.0 if body.top_p is None else body.top_p,
            seed=seed,
        )

    def _ends(self, body: Body) -> frozenset[int]:
        """Tokens that end an output."""
        return frozenset(body.stop_token_ids or ()) | (frozenset() if body.ignore_eos else self._end_tokens)

    def _constraints(self, body: Body) -> Constraints:
        params = {
            "allowed_token_ids": body.allowed_token_ids or (),
            "logit_bias": body.bias,
            "stop_token_ids": body.stop_token_ids or (),
        }
        for param, tokens in params.items():
            self._check_tokens(param, tokens)
        constraints = Constraints(
            allowed=tuple(dict.fromkeys(body.allowed_token_ids or ())),
            bias=body.bias,
            banned=self._language.encode_words(body.bad_words or ()),
            ends=tuple(self._ends(body)),
            min_tokens=body.min_tokens or 0,
        )
        if not constraints.choices_left(self._language.num_tokens):
            raise ApiError(
                400,
                "allowed_token_ids: bad_words and min_tokens may leave none of them to choose from",
                "allowed_token_ids",
                "invalid_value",
            )
        return constraints

    def _check_model(self, body: Body) -> None:
        if body.model is not None and body.model != self._model:
            raise self._no_model(body.model)

    def _no_model(self, model: str) -> ApiError:
        return ApiError(404, f"no model {model[:100]!r} here; this is {self._model!r}", "model", "model_not_found")

    def _refusal(self, reason: str, retry_s: int) -> ApiError:
        status, message, code = REFUSALS[reason]
        return ApiError(status, message, code=code, headers={"retry-after": str(retry_s)})

    async def _refuse(self, request: Request, error: Exception) -> Response:
        answer = of_exception(error)
        self._metrics.refused(answer.status)
        return answer.response

    @property
    def _card(self) -> dict[str, Any]:
        return {
            "id": self._model,
            "object": "model",
            "created": self._created,
            "owned_by": "governor",
            "root": self._model,
            "max_model_len": self._most_tokens,
        }
