"""vLLM itself, on the processor, serving the embedded models under a governor."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this in an environment of its own")

from engine.models.load import TARGET_FOLDER, load_tokenizer
from tests.engine.backends.vllm import made_controllers, serve_tiny
from tests.engine.backends.vllm.fake_engine import controller_file

ROOT = Path(__file__).resolve().parents[4]
MOST_CANDIDATES = 4
ACTIONS = [[0, 32], [4, 64], [1, 128], [2, 256], [3, 48]]
DRAFTERS: dict[str, dict[str, Any]] = {
    "model": {"method": "draft_model", "num_speculative_tokens": MOST_CANDIDATES},
    "lookup": {"method": "ngram", "num_speculative_tokens": MOST_CANDIDATES, "prompt_lookup_max": 3},
}
START_S = 600.0


def _prompts() -> list[list[int]]:
    tokens = load_tokenizer()(Path(json.__file__).read_text(encoding="utf-8"))["input_ids"]
    return [tokens[90 * i : 90 * i + 20 + 15 * i] for i in range(10)]


def _served(**job: Any) -> dict[str, Any]:
    """What `serve_tiny` reports of a job, run in a process of its own."""
    job |= {"prompts": _prompts(), "max_tokens": 32}
    done = subprocess.run(
        [sys.executable, "-m", serve_tiny.__name__, json.dumps(job)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    report: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return report


@cache
def _without_speculation() -> list[list[int]]:
    tokens: list[list[int]] = _served()["tokens"]
    return tokens


@pytest.mark.parametrize("drafter", ["model", "lookup"])
def test_tokens_are_those_without_speculation_whatever_c_and_n(tmp_path: Path, drafter: str) -> None:
    controller = controller_file(tmp_path, f"{made_controllers.__name__}.Scripted", actions=ACTIONS)
    governor = {"controller": str(controller), "time_limit_s": 60.0}
    report = _served(speculation=DRAFTERS[drafter], governor=governor)
    assert report["tokens"] == _without_speculation()
    assert report["failed"] == 0 < report["asked"]
    prefilled = {prompt for prompt, _, _ in report["steps"]}
    assert max(prefilled) <= 256
    assert len(prefilled & {n for _, n in ACTIONS}) >= 3
    if drafter == "model":
        # A model proposes as many as it is asked for, so vLLM's own count of tokens tells c.
        used = {tokens / requests - 1 for _, requests, tokens in report["steps"] if requests}
        assert {c for c in range(MOST_CANDIDATES + 1) if c in used} == {0, 1, 2, 3, 4}


def _free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def _read(url: str, body: dict[str, Any] | None = None) -> str:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=START_S) as answer:
        return str(answer.read().decode())


def test_the_openai_server_runs_governed_by_a_file_that_the_environment_names(tmp_path: Path) -> None:
    controller = controller_file(tmp_path, f"{made_controllers.__name__}.Scripted", actions=ACTIONS)
    port = _free_port()
    log = tmp_path / "log"
    settings = {key.replace("_", "-"): value for key, value in serve_tiny.SETTINGS.items() if key != "enforce_eager"}
    drafter = DRAFTERS["model"] | {"model": str(serve_tiny.WEIGHTS / "drafter")}
    command = [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(TARGET_FOLDER)),
        *(part for key, value in settings.items() for part in (f"--{key}", str(value))),
        *("--enforce-eager", "--no-async-scheduling", "--host", "127.0.0.1", "--port", str(port)),
        *("--scheduler-cls", "engine.backends.vllm.GovernedScheduler"),
        *("--speculative-config", json.dumps(drafter), "--served-model-name", "tiny"),
    ]
    environment = os.environ | {
        "GOVERNOR_CONTROLLER": str(controller),
        "PYTHONPATH": str(ROOT),
        "VLLM_LOGGING_LEVEL": "INFO",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    }
    with log.open("wb") as out:
        server = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=out, stderr=subprocess.STDOUT)
    try:
        url = f"http://127.0.0.1:{port}"
        begin = time.monotonic()
        while True:
            assert server.poll() is None, log.read_text(errors="replace")[-4000:]
            assert time.monotonic() - begin < START_S, log.read_text(errors="replace")[-4000:]
            try:
                _read(f"{url}/health")
                break
            except (urllib.error.URLError, ConnectionError):
                with suppress(subprocess.TimeoutExpired):
                    server.wait(0.5)
        body = {"model": "tiny", "prompt": _prompts(), "max_tokens": 32, "temperature": 0.0, "ignore_eos": True}
        answer = json.loads(_read(f"{url}/v1/completions", body))
        tokenizer = load_tokenizer()
        expected = [tokenizer.decode(tokens) for tokens in _without_speculation()]
        assert [choice["text"] for choice in sorted(answer["choices"], key=lambda c: c["index"])] == expected
        metrics = _read(f"{url}/metrics")
        drafts, drafted = (
            float(re.search(rf"^vllm:spec_decode_{name}_total{{.*}} (\S+)$", metrics, re.MULTILINE)[1])
            for name in ("num_drafts", "num_draft_tokens")
        )
        assert 1.0 < drafted / drafts < MOST_CANDIDATES
        assert "governed by scripted" in log.read_text(errors="replace")
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(START_S)
