"""A server's configuration, and what it is made of: engine, controller, worker, HTTP."""

from __future__ import annotations

import asyncio
import hashlib
import logging
import signal
import socket
from collections.abc import Callable, Coroutine, Generator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Annotated, Any

import numpy as np
import uvicorn
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_validator

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.backends.real import WARMUP_OUTPUT_TOKENS
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.core.action import ActionGrid
from engine.core.metrics import request_table, summarize
from engine.models.corpus import cut_prompts, library_texts
from engine.signals import handled
from engine.speculation.sampling import GREEDY
from engine.workload.prompts import Prompts
from runs import live
from runs.code import code_digest
from runs.evaluation import LookupFit, Targets, plant_of, profile_of
from runs.server.connections import ACCEPTED_AT_ONCE, BACKLOG, Exhausted, connections, most_connections
from runs.server.guard import Guarded
from runs.server.ledger import Ledger
from runs.server.metrics import Metrics
from runs.server.routes import Api
from runs.server.text import Language, read_template
from runs.server.worker import Worker
from runs.serving import decision_times

log = logging.getLogger(__name__)

WARMUP_PROMPTS = 8
WARMUP_TOKENS = 128
SECONDS_TO_CLOSE = 10.0
"""Longest that answers which are complete are waited for to be read, at the end."""
SECONDS_KEPT_ALIVE = 60


class Service(BaseModel):
    """Everything a server depends on; a key that is unknown, mistyped or out of range is refused with its name.

    Args:
        engine: the model and its drafter; one that runs for real.
        controller: who chooses c and n.
        actions, lookup: as in an evaluation (`runs.evaluation.Evaluation`).
        slo: the targets that attainment and goodput are counted against.
        host, port: where it listens; 0 takes any free port.
        model_name: what clients call the model; None: the engine's name.
        api_key: clients must send it as a bearer token under /v1; None: none is wanted.
        max_waiting: most requests that are accepted beyond the `engine.max_num_seqs` of a batch; more get a 429.
        max_body_bytes: of one HTTP request.
        max_connections: open at a time, cut to what the process has descriptors for; one more takes the place of one
            that waits for a request, or gets a 503.
        chat_template: file of a Jinja template for chats; None: the model's own, or a plain one (`PLAIN_CHAT`).
        fallback: c and n when the controller raises, overruns or asks for the impossible.
        decision_limit_s: longest that a decision is waited for.
        most_failures: failed decisions in a row that switch the controller off.
        drain_s: longest that accepted requests are worked on after SIGTERM.
        seed: of requests that bring none.
        access_log: log every HTTP request.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, arbitrary_types_allowed=True)

    engine: TorchEngineConfig
    controller: Controller
    actions: ActionGrid = ActionGrid()
    lookup: LookupFit = LookupFit()
    slo: Targets = Targets()
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    model_name: Annotated[str, Field(min_length=1)] | None = None
    api_key: SecretStr | None = None
    max_waiting: Annotated[int, Field(ge=0)] = 256
    max_body_bytes: Annotated[int, Field(ge=1024)] = 1024**2
    max_connections: Annotated[int, Field(ge=1, le=65536)] = 1024
    chat_template: Path | None = None
    fallback: Fixed = Fixed(candidates=0, token_budget=512)
    decision_limit_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.1
    most_failures: Annotated[int, Field(ge=1)] = 100
    drain_s: Annotated[float, Field(ge=0.0, allow_inf_nan=False)] = 120.0
    seed: Annotated[int, Field(ge=0)] = 0
    access_log: bool = False

    @field_validator("engine", mode="before")
    @classmethod
    def _runs_for_real(cls, engine: Any) -> Any:
        if not isinstance(engine, TorchEngineConfig | dict):
            raise ValueError("only an engine that runs a model can serve: engine=torch_tiny or engine=torch_small")
        return engine

    @field_validator("api_key")
    @classmethod
    def _says_something(cls, key: SecretStr | None) -> SecretStr | None:
        if key is None:
            return None
        # Files and shells leave a newline behind, which no client can send.
        plain = key.get_secret_value().strip()
        if not plain:
            raise ValueError("an empty key keeps nobody out; set one, or null")
        if any(letter.isspace() or not letter.isprintable() for letter in plain):
            raise ValueError("a key cannot have spaces or control characters within: no client can send it")
        return SecretStr(plain)

    @property
    def model(self) -> str:
        """What clients call the model."""
        return self.model_name or self.engine.name

    def listen(self) -> socket.socket:
        """A listening socket. Raises ValueError naming the key."""
        try:
            return socket.create_server((self.host, self.port), backlog=BACKLOG, reuse_port=False)
        except OSError as error:
            raise ValueError(
                f"host={self.host} port={self.port}: {error.strerror or error}; choose others (port=0: any free one)"
            ) from error

    def open(self, out: Path) -> Server:
        """Load the models, warm up, and make the parts of a server; rows of finished requests are kept in `out`.

        Raises:
            ValueError: engine, controller or actions do not go together; the message names the key.
            OSError: no such model.
        """
        predicted = profile_of(self.engine, self.controller, self.actions)
        template = read_template(self.chat_template)
        config = self.engine.governed_by(self.controller.speculation)
        tokenizer = config.tokenizer()
        engine = config.build(ttft_target=self.slo.ttft_target)
        grid = live.grid_within(self.actions, engine)
        plant = plant_of(predicted, config.limits, grid, self.lookup)
        live.prepare(engine, _warm_up_prompts(tokenizer, config), self.controller, plant)
        metrics = Metrics(self.model, config.max_model_len, config.limits.total_blocks, config.block_size)
        guard = Guarded(
            self.controller, self.fallback, engine.max_candidates, self.decision_limit_s, self.most_failures
        )
        worker = Worker(engine, guard, config.max_num_seqs + self.max_waiting, Ledger(out), metrics)
        metrics.watch(worker)
        language = Language(tokenizer, template)
        api = Api(worker, metrics, language, config.limits, self.model, _end_tokens(engine, tokenizer), self.seed)
        return Server(self, config, worker, metrics, api)


@dataclass(frozen=True)
class Outcome:
    """What a server did until it ended."""

    summary: dict[str, Any]
    requests: dict[str, NDArray[Any]]
    clean: bool
    """Whether every accepted request was finished, or left by its client."""


class Server:
    """Made by `Service.open`."""

    def __init__(self, service: Service, config: TorchEngineConfig, worker: Worker, metrics: Metrics, api: Api) -> None:
        self._service, self._config, self._worker, self._metrics, self._api = service, config, worker, metrics, api
        self._drained = False
        self._http: _Http | None = None

    @property
    def worker(self) -> Worker:
        """Its engine's thread."""
        return self._worker

    def run(self, listening: socket.socket) -> Outcome:
        """Serve until SIGTERM or SIGINT, finish what was accepted, and sum up."""
        try:
            asyncio.run(self._serve(listening))
        finally:
            self._worker.close()
            self._api.close()
        return self._outcome()

    def stop(self) -> None:
        """End as SIGTERM does; from any thread, while it runs."""
        assert self._http is not None
        self._http.handle_exit(signal.SIGTERM, None)

    async def _serve(self, listening: socket.socket) -> None:
        key = self._service.api_key
        asyncio.get_running_loop().set_exception_handler(Exhausted())
        self._http = http = _Http(
            uvicorn.Config(
                self._api.app(None if key is None else key.get_secret_value(), self._service.max_body_bytes),
                http=connections(most_connections(self._service.max_connections)),
                backlog=ACCEPTED_AT_ONCE,
                log_config=None,
                access_log=self._service.access_log,
                lifespan="off",
                timeout_keep_alive=SECONDS_KEPT_ALIVE,
                timeout_graceful_shutdown=int(SECONDS_TO_CLOSE),
                server_header=False,
            ),
            self._drain,
            self._worker.hurry,
        )
        self._worker.on_broken = http.end
        self._worker.start(asyncio.get_running_loop())
        await http.serve([listening])

    async def _drain(self) -> None:
        log.info("draining: %d requests are open, new ones get a 503", self._worker.num_open)
        self._drained = await self._worker.drain(self._service.drain_s)
        if not self._drained:
            log.warning("drain_s=%g is over, or a second signal came: the rest is dropped", self._service.drain_s)

    def _outcome(self) -> Outcome:
        worker, service, config = self._worker, self._service, self._config
        rows = worker.history()
        requests = request_table(rows)
        over = self._metrics.counted("vllm:request_success")
        guard, controller = worker.guard, service.controller
        summary: dict[str, Any] = summarize(
            worker.engine.state, rows, ttft_target=service.slo.ttft_target, prices=service.slo.prices
        )
        summary |= decision_times(np.array(worker.decision_s))
        summary["server"] = {
            "finished": over["stop"] + over["length"],
            "cancelled": over["abort"],
            "failed": over["error"],
            "refused": self._metrics.counted("governor_requests_refused"),
            "decision_faults": guard.faults,
            "fallback_decisions": guard.fallbacks,
            "requests_lost_from_this_file": worker.lost,
            "drained": self._drained and not worker.broken and not worker.num_open,
        }
        summary["run"] = {
            "engine": config.variant,
            "workload": "served",
            "scenario": "served",
            "workload_digest": _digest(requests),
            "controller": type(controller).__name__.lower(),
            "label": controller.label(),
            "peeks": controller.peeks,
            "speculation": config.speculation.variant or "chains",
            "candidates": getattr(controller, "candidates", None),
            "token_budget": getattr(controller, "token_budget", None),
            "seed": service.seed,
            "request_rate_rps": summary["request_rate_rps"],
            "rate_scale": 1.0,
            "ttft_target_s": service.slo.ttft_target,
            "tpot_target_s": service.slo.tpot_target,
            "code": code_digest(),
            "backend": live.describe(config, worker.engine),
        }
        return Outcome(summary, requests, summary["server"]["drained"] and not over["error"])


class _Http(uvicorn.Server):
    """Ends after `drain` when a signal comes; a second one calls `hurry`, a third one ends it at once."""

    def __init__(
        self, config: uvicorn.Config, drain: Callable[[], Coroutine[Any, Any, None]], hurry: Callable[[], None]
    ) -> None:
        super().__init__(config)
        self._drain, self._hurry = drain, hurry
        self._draining: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._signals = 0

    async def serve(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """See uvicorn, for which what is accepted at once and what the system may keep are one number."""
        await super().startup(sockets)
        for one in sockets or ():
            one.listen(BACKLOG)

    @contextmanager
    def capture_signals(self) -> Generator[None, None, None]:
        """See uvicorn, which would heed a signal that the process was started to ignore."""
        with handled(self.handle_exit, signal.SIGINT, signal.SIGTERM):
            yield

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Called in the main thread by the signal, wherever that was."""
        self._signals += 1
        assert self._loop is not None
        if self._signals == 1:
            self._loop.call_soon_threadsafe(self._begin, signal.Signals(sig).name)
        elif self._signals == 2:
            self._loop.call_soon_threadsafe(self._hurry)
        else:
            self.should_exit = self.force_exit = True

    def end(self) -> None:
        """Close when the answers under way are out."""
        self.should_exit = True

    def _begin(self, name: str) -> None:
        log.info("%s", name)
        self._draining = asyncio.ensure_future(self._end_drained())

    async def _end_drained(self) -> None:
        await self._drain()
        self.end()


def _warm_up_prompts(tokenizer: Any, config: TorchEngineConfig) -> Prompts:
    length = max(1, min(WARMUP_TOKENS, config.max_model_len // 2, config.limits.total_blocks * config.block_size // 4))
    cut = cut_prompts(library_texts(held_out=True), tokenizer, [length] * WARMUP_PROMPTS, np.random.default_rng(0))
    most = np.full(WARMUP_PROMPTS, min(WARMUP_OUTPUT_TOKENS, config.max_model_len - length), dtype=np.int64)
    tokens = [one.tokens for one in cut]
    return Prompts(
        "warm-up", np.zeros(WARMUP_PROMPTS), tokens, most, [GREEDY] * WARMUP_PROMPTS, [one.name for one in cut]
    )


def _end_tokens(engine: TorchEngine, tokenizer: Any) -> frozenset[int]:
    """Tokens that the model or its tokenizer end a text with."""
    generation = getattr(engine.model.model, "generation_config", None)
    ends = getattr(generation, "eos_token_id", None)
    of_model = ends if isinstance(ends, list) else [ends]
    return frozenset(int(end) for end in (*of_model, tokenizer.eos_token_id) if end is not None)


def _digest(requests: dict[str, NDArray[Any]]) -> str:
    """sha256 over who came when and wanted what."""
    sha = hashlib.sha256(b"served")
    for name in ("arrival_s", "prompt_tokens", "output_tokens"):
        sha.update(np.ascontiguousarray(requests[name]).tobytes())
    return sha.hexdigest()
