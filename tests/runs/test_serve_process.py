"""The server as a process: the documented command, mistakes, SIGTERM under load, and what it leaves."""

from __future__ import annotations

import asyncio
import functools
import json
import os
import re
import signal
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock

import openai
import pandas as pd
import pytest
import uvicorn
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from pydantic import SecretStr
from serving_client import PATIENCE_S

from engine.backends.torch.config import TorchEngineConfig
from runs import folder, serve
from runs.server import service
from runs.server.service import Service

REPOSITORY = Path(__file__).resolve().parents[2]
PIPES: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
STREAMS = 24
TOKENS = 40


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, call_app: Callable[..., int]) -> Callable[..., int]:
    """Calls the app as the command line would; nothing is loaded."""
    monkeypatch.setattr(TorchEngineConfig, "build", lambda *_, **__: pytest.fail("a model is loaded"))
    return functools.partial(call_app, serve.main, "serve")


def started(out: Path, *overrides: str) -> tuple[subprocess.Popen[str], str]:
    """A server process and its address."""
    command = [sys.executable, "-m", "runs.serve", "port=0", *overrides, f"hydra.run.dir={out}"]
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=environment, **PIPES)
    assert process.stderr is not None
    for line in process.stderr:
        if found := re.search(r"at (http://\S+/v1)", line):
            return process, found.group(1)
    raise AssertionError(f"the server ended with {process.wait()}")


async def timed(client: openai.AsyncOpenAI, prompt: str, accepted: asyncio.Semaphore) -> tuple[float, float, int]:
    """(TTFT, TPOT in s, tokens) of a stream, as its client sees them; says when the server has accepted it, or not."""
    begin = time.perf_counter()
    first = last = 0.0
    tokens = 0
    try:
        stream = await client.completions.create(
            model="torch_tiny",
            prompt=prompt,
            max_tokens=TOKENS,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
    finally:
        accepted.release()
    async for chunk in stream:
        last = time.perf_counter()
        first = first or last
        if not chunk.choices:
            tokens = chunk.usage.completion_tokens if chunk.usage else 0
    return first - begin, (last - first) / (TOKENS - 1), tokens


async def turned_away(client: openai.AsyncOpenAI) -> openai.OpenAIError:
    """Ask until the signal has arrived; what the client is told then."""
    while True:
        try:
            await client.completions.create(model="torch_tiny", prompt="late", max_tokens=1)
        except openai.OpenAIError as error:
            return error


def test_sigterm_under_load_finishes_every_stream_and_leaves_what_its_clients_saw(tmp_path: Path) -> None:
    process, url = started(tmp_path, "engine.num_kv_blocks=1024")
    seen: list[tuple[float, float, int]] = []

    async def load() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)
        accepted = asyncio.Semaphore(0)
        streams = [asyncio.ensure_future(timed(client, f"def f{i}(x):\n", accepted)) for i in range(STREAMS)]
        for _ in streams:
            await accepted.acquire()
        process.send_signal(signal.SIGTERM)
        late = await turned_away(client)
        assert getattr(late, "code", None) == "draining" or isinstance(late, openai.APIConnectionError)
        seen.extend(await asyncio.gather(*streams))

    try:
        asyncio.run(load())
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 0, said
    draining = re.search(r"draining: (\d+) requests are open", said)
    assert draining is not None
    assert int(draining.group(1)) > 0, "the signal was to come under load"
    assert [tokens for *_, tokens in seen] == [TOKENS] * STREAMS
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "config.yaml", "requests.parquet", "serve.log", "summary.json"
    ]  # fmt: skip
    requests = pd.read_parquet(tmp_path / folder.REQUESTS)
    served = requests[requests["output_tokens"] == TOKENS]
    assert len(served) == STREAMS
    assert (served["generated_tokens"] == TOKENS).all()
    summary = json.loads((tmp_path / folder.SUMMARY).read_text())
    assert summary["server"]["drained"]
    assert summary["server"]["finished"] == summary["requests_finished"] == len(requests)
    for name, values in (("ttft_s", [ttft for ttft, *_ in seen]), ("tpot_s", [tpot for _, tpot, _ in seen])):
        client, engine = statistics.mean(values), float(served[name].mean())
        print(f"{name}: clients saw {client:.4f}, summary.json has {engine:.4f}")
        # The same quantity in the same unit; a client on a busy machine may see far later what was served.
        assert 0.7 * engine < client < 5.0 * engine + 5.0


def test_a_second_signal_drops_what_is_open_and_says_so(tmp_path: Path) -> None:
    process, url = started(tmp_path)
    heard: list[Any] = []

    async def stream(client: openai.AsyncOpenAI, accepted: asyncio.Semaphore) -> Any:
        options: Any = {"max_tokens": 2000, "stream": True, "extra_body": {"ignore_eos": True}}
        try:
            chunks = await client.completions.create(model="torch_tiny", prompt="def f", **options)
        finally:
            accepted.release()
        try:
            return [chunk async for chunk in chunks]
        except openai.OpenAIError as error:
            return error

    async def load() -> None:
        client = openai.AsyncOpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)
        accepted = asyncio.Semaphore(0)
        streams = [asyncio.ensure_future(stream(client, accepted)) for _ in range(8)]
        for _ in streams:
            await accepted.acquire()
        process.send_signal(signal.SIGTERM)
        await turned_away(client)
        process.send_signal(signal.SIGTERM)
        heard.extend(await asyncio.gather(*streams))

    try:
        asyncio.run(load())
        _, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 1, said
    assert all(isinstance(one, openai.OpenAIError) for one in heard)
    assert any("the server ended before the request was finished" in str(one) for one in heard)
    server = json.loads((tmp_path / folder.SUMMARY).read_text())["server"]
    assert (server["drained"], server["finished"], server["cancelled"]) == (False, 0, 8)


def test_ctrl_c_that_was_ignored_at_the_start_is_ignored_by_a_server(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers: list[Any] = []

    async def serving(*_: Any) -> None:
        handlers.extend(signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM))

    monkeypatch.setattr(uvicorn.Server, "_serve", serving)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        http = service._Http(uvicorn.Config(lambda: None), AsyncMock(), lambda: None)
        asyncio.run(http.serve())
    finally:
        signal.signal(signal.SIGINT, before)
    assert handlers == [signal.SIG_IGN, http.handle_exit]


def test_a_server_that_ends_on_a_full_disk_prints_its_summary(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    if not hasattr(resource, "prlimit"):
        pytest.skip("limits of another process are Linux's")
    process, url = started(tmp_path)
    try:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=PATIENCE_S)
        client.completions.create(model="torch_tiny", prompt="def f", max_tokens=3)
        resource.prlimit(process.pid, resource.RLIMIT_FSIZE, (0, 0))
        client.completions.create(model="torch_tiny", prompt="def f", max_tokens=3)
        process.send_signal(signal.SIGTERM)
        printed, said = process.communicate(timeout=PATIENCE_S)
    finally:
        process.kill()
    assert process.returncode == 2, said
    assert f"{tmp_path} cannot be written" in said
    assert "Traceback" not in said
    assert json.loads(printed)["server"]["finished"] == 2
    assert not (tmp_path / folder.SUMMARY).exists()


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["engine=vicuna_7b_a100"], "engine=torch_tiny"),
        (["controller=analytic"], "python -m runs.profile engine=torch_tiny"),
        (["port=99999"], "port=99999"),
        (["max_wating=3"], "max_wating"),
        (["max_waiting=-1"], "max_waiting=-1"),
        (["fallback.candidates=99"], "candidates=99"),
        (["api_key=''"], "an empty key keeps nobody out"),
        (["api_key='open sesame'"], "a key cannot have spaces"),
        (["max_connections=0"], "max_connections=0"),
        (["chat_template=absent.jinja", "port=0"], "chat_template=absent.jinja"),
        (["host=203.0.113.1"], "host=203.0.113.1"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_named_before_a_model_is_loaded(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], overrides: list[str], said: str
) -> None:
    free = [] if any(text.startswith("port=") for text in overrides) else ["port=0"]
    assert run(*free, *overrides, f"hydra.run.dir={tmp_path}") != 0
    message = capsys.readouterr().err
    assert said in message
    assert "Traceback" not in message


def test_a_port_that_is_taken_is_named(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert run(f"port={port}", f"hydra.run.dir={tmp_path}") == 2
    assert f"port={port}" in capsys.readouterr().err


def test_the_config_lists_every_setting_with_its_default_and_keeps_the_key_to_itself(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base=None):
        config = compose("serve")
        settings: Any = OmegaConf.to_container(config, resolve=True)
        monkeypatch.setenv("GOVERNOR_API_KEY", "sesame")
        assert compose("serve").api_key == "sesame"
    given = {name for name in settings if not name.startswith("_")}
    assert given == set(Service.model_fields)
    for name, field in Service.model_fields.items():
        if not isinstance(settings[name], dict):
            assert settings[name] == field.default, name
    controller = Service.model_fields["fallback"].default
    secret = Service(engine=TorchEngineConfig(name="tiny"), controller=controller, api_key=SecretStr("sesame"))
    assert "sesame" not in repr(secret)
    assert str(secret.api_key) == "**********"
