"""A server in a thread of the test, and what its clients ask of it."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import httpx
import openai

from controllers.controller import Controller
from engine.backends.torch.config import TorchEngineConfig
from engine.models.load import load_tokenizer
from runs.server.service import Outcome, Server, Service

MODEL = "tiny"
ENGINE = TorchEngineConfig(name=MODEL, exact=True, dtype="float64", max_num_seqs=16, num_kv_blocks=1024)
"""Float64: what is generated depends on the prompt alone, whoever else is served."""
PATIENCE_S = 600.0
"""Until a test gives up: a machine that is busy with other things is no fault of the server's."""
PROMPT = "def add(a, b):\n    return"


class Drill(Controller):
    """Chooses c = 3, n = 256 until it is told to do something else."""

    def __init__(self) -> None:
        self.instead: Callable[[], Any] | None = None

    def choose(self, observation: Mapping[str, Any]) -> tuple[int, int]:
        return (3, 256) if self.instead is None else self.instead()


class Running:
    """A server that answers at `url`."""

    def __init__(self, server: Server, url: str, key: str | None) -> None:
        self.server, self.url = server, url
        self.outcome: Outcome | None = None
        self.client = openai.OpenAI(base_url=f"{url}/v1", api_key=key or "none", max_retries=0, timeout=PATIENCE_S)
        self.http = httpx.Client(base_url=url, timeout=PATIENCE_S)

    def post(self, path: str, content: Any) -> httpx.Response:
        """Anything at all as a body."""
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        return self.http.post(path, content=body, headers={"content-type": "application/json"})

    def complete(self, prompt: Any = PROMPT, **options: Any) -> Any:
        """A greedy completion, unless the options say otherwise."""
        settings = {"max_tokens": 12, "temperature": 0} | options
        return self.client.completions.create(model=MODEL, prompt=prompt, **settings)

    def num_open(self) -> int:
        """Requests that are accepted and unfinished."""
        return self.server.worker.num_open


@contextmanager
def running(out: Path, **settings: Any) -> Iterator[Running]:
    """A server until the end of the block, then drained."""
    # On a machine that is busy with other things any decision may take long.
    usual = {"engine": ENGINE, "controller": Drill(), "port": 0, "decision_limit_s": 600.0}
    service = Service(**{**usual, **settings})
    with service.listen() as listening:
        server = service.open(out)
        key = None if service.api_key is None else service.api_key.get_secret_value()
        made = Running(server, f"http://127.0.0.1:{listening.getsockname()[1]}", key)

        def run() -> None:
            made.outcome = server.run(listening)

        thread = threading.Thread(target=run)
        thread.start()
        try:
            eventually(lambda: made.http.get("/health").status_code == 200)
            yield made
        finally:
            if thread.is_alive():
                server.stop()
            thread.join(PATIENCE_S)
            assert not thread.is_alive(), "the server hangs"


def eventually(holds: Callable[[], bool], seconds: float = PATIENCE_S) -> None:
    """Wait until something is so."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "it never came to this"
        time.sleep(0.005)


@cache
def _engine() -> Any:
    return ENGINE.build(ttft_target=1.0)


@cache
def expected(prompt: str, max_tokens: int) -> tuple[int, ...]:
    """What an engine of the same kind generates greedily, without a server and without speculation."""
    engine = _engine()
    number = engine.submit(load_tokenizer()(prompt)["input_ids"], max_tokens)
    engine.run(0, 256)
    return tuple(engine.collect(number))


def text_of(tokens: tuple[int, ...]) -> str:
    """What tokens spell."""
    return str(load_tokenizer().decode(tokens, skip_special_tokens=True))
