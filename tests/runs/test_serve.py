"""The server as clients see it: the OpenAI client, raw HTTP, good and bad requests, many at once."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
import torch
from prometheus_client.parser import text_string_to_metric_families
from serving_client import ENGINE, MODEL, PATIENCE_S, PROMPT, Drill, Running, eventually, expected, running, text_of

from engine.models.load import load_tokenizer
from runs.server.text import Language

LONG = {"max_tokens": 2000, "temperature": 0, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with running(tmp_path_factory.mktemp("served"), max_waiting=300) as server:
        yield server


@pytest.fixture(scope="module")
def narrow(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Two at a time, one may wait, and a key is wanted."""
    engine = ENGINE.model_copy(update={"max_num_seqs": 2, "num_kv_blocks": 256})
    out = tmp_path_factory.mktemp("narrow")
    with running(out, engine=engine, max_waiting=1, api_key="sesame\n") as server:
        yield server


def counters(server: Running) -> dict[str, float]:
    """Every sample of /metrics by name, summed over the labels other than `finished_reason`, `fault` and `status`."""
    found: dict[str, float] = {}
    for family in text_string_to_metric_families(server.http.get("/metrics").text):
        for sample in family.samples:
            kinds = [sample.labels[label] for label in ("finished_reason", "fault", "status") if label in sample.labels]
            name = " ".join((sample.name, *kinds))
            if "le" not in sample.labels:
                found[name] = found.get(name, 0.0) + sample.value
    return found


def streamed(server: Running, prompt: Any = PROMPT, **options: Any) -> tuple[str, str | None, Any]:
    """(text, finish reason, usage) of a stream."""
    text, finish, usage = "", None, None
    for chunk in server.complete(prompt, stream=True, stream_options={"include_usage": True}, **options):
        if chunk.choices:
            assert finish is None
            text, finish = text + chunk.choices[0].text, chunk.choices[0].finish_reason
        else:
            usage = chunk.usage
    return text, finish, usage


def test_greedy_output_is_the_engines_own_streamed_or_not(served: Running) -> None:
    tokens = expected(PROMPT, 20)
    whole = served.complete(max_tokens=20)
    assert (whole.choices[0].text, whole.choices[0].finish_reason) == (text_of(tokens), "length")
    prompt_tokens = len(load_tokenizer()(PROMPT)["input_ids"])
    assert (whole.usage.prompt_tokens, whole.usage.completion_tokens) == (prompt_tokens, 20)
    assert whole.usage.total_tokens == prompt_tokens + 20
    assert streamed(served, max_tokens=20) == (text_of(tokens), "length", whole.usage)


def test_token_ids_are_a_prompt_like_their_text(served: Running) -> None:
    ids = load_tokenizer()(PROMPT)["input_ids"]
    texts = {served.complete(prompt).choices[0].text for prompt in (PROMPT, [PROMPT], ids, [ids])}
    assert texts == {text_of(expected(PROMPT, 12))}


def test_a_chat_is_answered_streamed_or_not(served: Running) -> None:
    messages: Any = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "def f"}, {"type": "text", "text": "(x):"}]},
    ]
    plain = text_of(expected("system: Be brief.\n\nuser: def f(x):\n\nassistant:", 9))
    create = served.client.chat.completions.create
    whole = create(model=MODEL, messages=messages, max_tokens=9, temperature=0)
    assert (whole.choices[0].message.role, whole.choices[0].message.content) == ("assistant", plain)
    chunks = list(create(model=MODEL, messages=messages, max_completion_tokens=9, temperature=0, stream=True))
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == plain
    assert [chunk.choices[0].finish_reason for chunk in chunks] == [None] * (len(chunks) - 1) + ["length"]
    assert all(chunk.usage is None for chunk in chunks)


def test_the_raw_stream_is_server_sent_events_to_the_letter(served: Running) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 5, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True}}  # fmt: skip
    response = served.post("/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    *events, last, rest = response.text.split("\n\n")
    assert (last, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert chunks[-1]["choices"] == []
    counts = [chunk["usage"]["completion_tokens"] for chunk in chunks]
    assert counts == sorted(counts)
    assert counts[-2:] == [5, 5]


def test_output_ends_before_a_stop_string_wherever_it_stands(served: Running) -> None:
    tokens = expected(PROMPT, 20)
    text = text_of(tokens)
    lengths = [len(text_of(tokens[:count])) for count in range(1, 21)]
    across = 0
    for size in (2, 7):
        for start in range(0, len(text) - size, 6):
            stop = text[start : start + size]
            end = text.index(stop)
            needed = next(count for count, length in enumerate(lengths, start=1) if length >= end + size)
            across += any(end < edge < end + size for edge in lengths)
            got = served.complete(max_tokens=20, stop=[stop, "never there"])
            assert (got.choices[0].text, got.choices[0].finish_reason) == (text[:end], "stop"), stop
            assert got.usage.completion_tokens == needed, stop
    assert streamed(served, max_tokens=20, stop=text[8:15])[:2] == (text[: text.index(text[8:15])], "stop")
    assert across > 5, "some stops were to lie across tokens"


def test_the_end_of_the_text_ends_the_output_unless_it_is_ignored(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens = expected(PROMPT, 12)
    end = tokens[6]
    before = tokens[: tokens.index(end)]
    monkeypatch.setattr(served.server._api, "_end_tokens", frozenset((end,)))
    got = served.complete()
    assert (got.choices[0].text, got.choices[0].finish_reason) == (text_of(before), "stop")
    assert got.usage.completion_tokens == len(before) + 1
    assert streamed(served)[:2] == (text_of(before), "stop")
    got = served.complete(extra_body={"ignore_eos": True, "min_tokens": 12})
    assert (got.choices[0].text, got.choices[0].finish_reason) == (text_of(tokens), "length")


def test_a_seed_repeats_and_no_seed_does_not(served: Running) -> None:
    def sample(**options: Any) -> str:
        return str(served.complete(max_tokens=12, temperature=1.0, **options).choices[0].text)

    assert sample(seed=-5) == sample(seed=-5)
    assert len({sample(seed=1), sample(seed=2), sample(seed=3)}) > 1
    assert len({sample(), sample(), sample()}) > 1
    assert sample(extra_body={"top_k": 1}) == sample(top_p=1e-9) == text_of(expected(PROMPT, 12))


def test_a_temperature_next_to_zero_is_greedy(served: Running) -> None:
    for temperature in (5e-324, 1e-308, 1e-30, 9.9e-6):
        whole = served.complete(temperature=temperature, seed=1)
        assert whole.choices[0].text == text_of(expected(PROMPT, 12)), temperature
    assert served.complete(temperature=1e-5, seed=1, top_p=0.5).usage.completion_tokens == 12


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_fail_their_request_alone(
    served: Running, monkeypatch: pytest.MonkeyPatch, temperature: float
) -> None:
    bad, before = 2047, counters(served)
    embedding = served.server.worker.engine.model.model.model.embed_tokens
    spoilt = embedding.weight.detach().clone()
    spoilt[bad] = torch.nan
    with served.complete(stream=True, **LONG) as running_one:
        text = next(running_one).choices[0].text
        monkeypatch.setitem(embedding._parameters, "weight", torch.nn.Parameter(spoilt))
        with pytest.raises(openai.InternalServerError, match="not finite numbers"):
            served.complete([1, bad, 2], temperature=temperature)
        body = {"prompt": [bad], "stream": True, "temperature": temperature}
        event, end, _ = served.post("/v1/completions", body).text.split("\n\n")
        assert json.loads(event.removeprefix("data: "))["error"]["code"] == "engine_error"
        assert end == "data: [DONE]"
        assert served.num_open() == 1
        while len(text) < 60:
            text += next(running_one).choices[0].text
    assert text_of(expected(PROMPT, 60)).startswith(text[:60])
    eventually(lambda: served.num_open() == 0)
    failed = "vllm:request_success_total error"
    assert counters(served)[failed] - before[failed] == 2
    assert served.http.get("/health").status_code == 200


def test_a_text_longer_than_the_context_can_hold_is_not_tokenised(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Language, "encode", lambda *_: pytest.fail("it is tokenised"))
    monkeypatch.setattr(Language, "encode_chat", lambda *_: pytest.fail("it is tokenised"))
    long = "a " * 400_000
    message = {"role": "user", "content": long}
    chats = ([message], [{"role": "user", "content": ""}] * 2049)
    for path, body, param in (
        ("/v1/completions", {"prompt": long}, "prompt"),
        *(("/v1/chat/completions", {"messages": messages}, "messages") for messages in chats),
    ):
        error = served.post(path, body).json()["error"]
        assert (error["param"], error["code"]) == (param, "context_length_exceeded")
        assert "exceed the context of 2048 tokens" in error["message"]


def test_only_json_is_read(served: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 1}).encode()
    for media in (None, "text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        answer = served.http.post("/v1/completions", content=body, headers={"content-type": media} if media else {})
        assert answer.status_code == 415, media
        assert "application/json" in answer.json()["error"]["message"]
    headers = {"content-type": "Application/JSON; charset=utf-8"}
    assert served.http.post("/v1/completions", content=body, headers=headers).status_code == 200


def test_a_target_in_absolute_form_is_its_path(served: Running, narrow: Running) -> None:
    for server, target, status in (
        (served, "http://here/v1/models", 200), (served, "HTTP://here:8000/health?x=1", 200),
        (served, f"http://here/v1/models/{MODEL}", 200), (served, "http://here/v1/nothing", 404),
        (served, "http://here", 404), (narrow, "http://here/v1/models", 401), (narrow, "http://here/health", 200),
    ):  # fmt: skip
        address = httpx.URL(server.url)
        with socket.create_connection((address.host, address.port)) as client:
            client.sendall(f"GET {target} HTTP/1.1\r\nHost: here\r\nConnection: close\r\n\r\n".encode())
            assert client.recv(1024).startswith(b"HTTP/1.1 %d" % status), target


def test_a_stream_of_any_bytes_adds_up_to_the_whole(served: Running) -> None:
    hot = {"max_tokens": 30, "temperature": 2.0, "extra_body": {"ignore_eos": True}}
    for seed in range(2):
        whole = served.complete("é漢🙂", seed=seed, **hot)
        assert streamed(served, "é漢🙂", seed=seed, **hot)[0] == whole.choices[0].text


def test_models_are_listed_and_health_is_good(served: Running) -> None:
    (model,) = served.client.models.list().data
    assert model.id == MODEL
    assert served.client.models.retrieve(MODEL).id == MODEL
    assert served.http.get("/health").status_code == 200
    with pytest.raises(openai.NotFoundError):
        served.client.models.retrieve("another")


BAD: list[tuple[str, Any, int, str | None, str]] = [
    ("/v1/completions", b'{"prompt": ', 400, None, "no JSON"),
    ("/v1/completions", b"\xff\xfe", 400, None, ""),
    ("/v1/completions", b"[" * 100_000, 400, None, ""),
    ("/v1/completions", [], 400, None, "dictionary"),
    ("/v1/completions", {}, 400, "prompt", "required"),
    ("/v1/completions", {"prompt": 5}, 400, "prompt", "prompt: "),
    ("/v1/completions", {"prompt": ""}, 400, "prompt", "no token"),
    ("/v1/completions", {"prompt": ["a", ""]}, 400, "prompt", "no token"),
    ("/v1/completions", {"prompt": [[1], []]}, 400, "prompt", "no token"),
    ("/v1/completions", {"prompt": ["a", [1]]}, 400, "prompt", "prompt"),
    ("/v1/completions", {"prompt": ["a"] * 317}, 400, "prompt", "at most 316"),
    ("/v1/completions", {"prompt": ["a"] * 3, "n": 128}, 400, "n", "asks for 384 answers; at most 316"),
    ("/v1/completions", {"prompt": "a", "n": 129}, 400, "n", "less than or equal to 128"),
    ("/v1/completions", {"prompt": "a", "n": 0}, 400, "n", "n: "),
    ("/v1/completions", {"prompt": [1, 10**6]}, 400, "prompt", "token ids are 0 to 2047"),
    ("/v1/completions", {"prompt": [-1]}, 400, "prompt", "token ids are 0 to 2047"),
    ("/v1/completions", b'{"prompt": "a\\ud800"}', 400, "prompt", "character 1 is half of a surrogate pair"),
    ("/v1/completions", {"prompt": "a " * 4000}, 400, "prompt", "exceed the context of 2048 tokens"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 2048}, 400, "max_tokens", "exceed the context"),
    ("/v1/completions", {"prompt": "a", "model": "gpt-4"}, 404, "model", "no model 'gpt-4' here; this is 'tiny'"),
    ("/v1/completions", {"prompt": "a", "max_tokens": -1}, 400, "max_tokens", "greater than or equal to 0"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ("/v1/completions", {"prompt": "a", "max_tokens": "5"}, 400, "max_tokens", "valid integer"),
    ("/v1/completions", {"prompt": "a", "max_tokens": 10**30}, 400, "max_tokens", ""),
    ("/v1/completions", {"prompt": "a", "temperature": -0.1}, 400, "temperature", ""),
    ("/v1/completions", b'{"prompt": "a", "temperature": NaN}', 400, "temperature", "finite"),
    ("/v1/completions", {"prompt": "a", "top_p": 0}, 400, "top_p", ""),
    ("/v1/completions", {"prompt": "a", "logprobs": 21}, 400, "logprobs", "less than or equal to 20"),
    ("/v1/completions", {"prompt": "a", "min_tokens": 4, "max_tokens": 3}, 400, "min_tokens", "more than max_tokens"),
    ("/v1/completions", {"prompt": "a", "stop": [""]}, 400, "stop", "1 to 256 characters"),
    ("/v1/completions", {"prompt": "a", "stop": ["x"] * 17}, 400, "stop", "at most 16"),
    (
        "/v1/completions",
        {"prompt": "a", "stream_options": {"include_usage": True}},
        400,
        "stream_options",
        "set stream to true",
    ),
    ("/v1/completions", {"prompt": "a", "stream": "yes"}, 400, "stream", "valid boolean"),
    ("/v1/completions", b"x" * 10_000_000, 413, None, "at most 1048576"),
    ("/v1/completions", b'{"prompt": "a", "stop": ["\\udc00"]}', 400, "stop", "half of a surrogate"),
    ("/v1/chat/completions", b'{"messages": [{"role": "user", "content": "\\ud800"}]}', 400, "messages", "half of"),
    ("/v1/chat/completions", {"messages": []}, 400, "messages", "at least 1"),
    ("/v1/chat/completions", {"messages": "hello"}, 400, "messages", "valid list"),
    ("/v1/chat/completions", {"messages": [{"role": "king", "content": "x"}]}, 400, "messages", "messages.0.role"),
    ("/v1/chat/completions", {"messages": [{"role": "user"}]}, 400, "messages", "messages.0: content is missing"),
    (
        "/v1/chat/completions",
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        400,
        "messages",
        "messages.0.content",
    ),
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools", "tools"),
    ("/v1/embeddings", {"input": "x"}, 404, None, "Not Found"),
    ("/health", {}, 405, None, "Not Allowed"),
]


def test_bad_requests_are_named_and_disturb_nobody(served: Running) -> None:
    with served.complete(stream=True, **LONG) as running_one:
        text = next(running_one).choices[0].text
        for path, body, status, param, said in BAD:
            response = served.post(path, body)
            shown = str(body)[:80]
            assert response.status_code == status, (shown, response.text)
            error = response.json()["error"]
            assert set(error) == {"message", "type", "param", "code"}, shown
            assert error["param"] == param, (shown, error)
            assert said in error["message"], (shown, error)
            assert len(response.content) < 1000, "what was sent is not sent back"
        assert served.num_open() == 1
        while len(text) < 60:
            text += next(running_one).choices[0].text
    assert text_of(expected(PROMPT, 60)).startswith(text[:60])
    eventually(lambda: served.num_open() == 0)


def test_two_hundred_streams_at_once_each_get_their_own(served: Running) -> None:
    prompts = [f"def f{i}(x, y{i % 7}):\n" for i in range(200)]
    before = counters(served)

    async def stream(client: httpx.AsyncClient, prompt: str) -> tuple[str, str]:
        body = {"prompt": prompt, "max_tokens": 4, "temperature": 0, "stream": True, "ignore_eos": True}
        text, name = "", set()
        async with client.stream("POST", "/v1/completions", json=body) as response:
            async for line in response.aiter_lines():
                if line.startswith("data: {"):
                    chunk = json.loads(line[6:])
                    text += chunk["choices"][0]["text"]
                    name.add(chunk["id"])
        assert len(name) == 1
        return text, name.pop()

    async def all_at_once() -> list[tuple[str, str]]:
        limits = httpx.Limits(max_connections=None)
        async with httpx.AsyncClient(base_url=served.url, timeout=PATIENCE_S, limits=limits) as client:
            return await asyncio.gather(*(stream(client, prompt) for prompt in prompts))

    got = asyncio.run(all_at_once())
    assert len({name for _, name in got}) == 200
    for prompt, (text, _) in zip(prompts[::20], got[::20], strict=True):
        assert text == text_of(expected(prompt, 4))
    after = counters(served)
    assert after["vllm:request_success_total length"] - before["vllm:request_success_total length"] == 200
    assert after["vllm:generation_tokens_total"] - before["vllm:generation_tokens_total"] == 800


def test_metrics_agree_with_what_was_sent(served: Running) -> None:
    before = counters(served)
    usages = [served.complete(max_tokens=size).usage for size in (1, 5, 9)]
    assert served.post("/v1/completions", {}).status_code == 400
    eventually(lambda: served.num_open() == 0)
    after = counters(served)
    since = {name: after[name] - before.get(name, 0.0) for name in after}
    assert since["vllm:prompt_tokens_total"] == sum(usage.prompt_tokens for usage in usages)
    assert since["vllm:generation_tokens_total"] == sum(usage.completion_tokens for usage in usages) == 15
    assert since["vllm:request_success_total length"] == 3
    assert since["vllm:time_to_first_token_seconds_count"] == since["vllm:e2e_request_latency_seconds_count"] == 3
    assert since["vllm:request_time_per_output_token_seconds_count"] == 2, "one token has no time per token after it"
    assert since["vllm:request_params_max_tokens_sum"] == 15
    assert 0 < since["vllm:time_to_first_token_seconds_sum"] < since["vllm:e2e_request_latency_seconds_sum"]
    iterations = since["governor_iterations_total"]
    assert iterations == since["governor_decision_seconds_count"] == since["vllm:iteration_tokens_total_count"]
    assert since["vllm:inter_token_latency_seconds_count"] == iterations - 3
    assert since["vllm:iteration_tokens_total_sum"] == since["vllm:prompt_tokens_total"] + 15
    assert since["vllm:spec_decode_num_draft_tokens_total"] > since["vllm:spec_decode_num_accepted_tokens_total"] > 0
    assert since["governor_requests_refused_total 400"] == 1
    assert (after["governor_candidates"], after["governor_token_budget"]) == (3, 256)
    for name in ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc"):
        assert after[f"vllm:{name}"] == 0


def test_a_controller_that_fails_costs_no_answer(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    drill = served.server._service.controller
    assert isinstance(drill, Drill)

    def fail() -> Any:
        raise RuntimeError("drill")

    right = text_of(expected(PROMPT, 12))
    for instead, fault in ((fail, "raised"), (lambda: ("many", None), "nonsense"), (lambda: (99, 1), "nonsense")):
        before = counters(served).get(f"governor_decision_faults_total {fault}", 0)
        monkeypatch.setattr(drill, "instead", instead)
        assert served.complete().choices[0].text == right
        eventually(lambda: served.num_open() == 0)
        assert counters(served)[f"governor_decision_faults_total {fault}"] == before + 12, "c = 0: a token an iteration"
    monkeypatch.setattr(drill, "instead", None)
    monkeypatch.setattr(served.server.worker.guard._guard, "_time_limit_s", 0.0)
    assert served.complete().choices[0].text == right
    assert counters(served)["governor_decision_faults_total overran"] >= 1
    assert served.http.get("/health").status_code == 200


def test_without_the_key_nothing_is_served(narrow: Running) -> None:
    for headers in ({}, {"authorization": "Bearer wrong"}, {"authorization": "sesame"}):
        response = narrow.http.post("/v1/completions", json={"prompt": "a"}, headers=headers)
        assert response.status_code == 401
        assert response.json()["error"]["code"] == "invalid_api_key"
        assert narrow.http.get("/v1/models", headers=headers).status_code == 401
    assert narrow.complete(max_tokens=1).usage.completion_tokens == 1
    assert narrow.http.get("/health").status_code == narrow.http.get("/metrics").status_code == 200


def test_a_full_queue_says_when_to_come_back_and_leaving_makes_room(narrow: Running) -> None:
    before = counters(narrow)
    streams = [narrow.complete(stream=True, **LONG) for _ in range(3)]
    with pytest.raises(openai.RateLimitError) as refused:
        narrow.complete()
    assert int(refused.value.response.headers["retry-after"]) >= 1
    assert refused.value.code == "queue_full"
    next(streams[0])
    eventually(lambda: counters(narrow)["vllm:num_requests_waiting"] == 1)
    for stream in streams:
        stream.close()
    eventually(lambda: narrow.num_open() == 0)
    assert narrow.complete(max_tokens=2).usage.completion_tokens == 2
    aborted = "vllm:request_success_total abort"
    assert counters(narrow)[aborted] - before[aborted] == 3


def test_a_client_that_goes_without_a_stream_is_not_worked_for(narrow: Running) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True}).encode()
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer sesame\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    address = httpx.URL(narrow.url)
    with socket.create_connection((address.host, address.port)) as client:
        client.sendall(head.encode() + body)
        eventually(lambda: narrow.num_open() == 1)
    eventually(lambda: narrow.num_open() == 0)
    assert narrow.server.worker.engine.state.instances["free_blocks"][0] == 256


def test_what_was_served_is_summed_up(tmp_path: Path) -> None:
    with running(tmp_path) as server:
        for size in (1, 4):
            server.complete(max_tokens=size)
        server.complete(stream=True, **LONG).close()
        eventually(lambda: server.num_open() == 0)
    assert server.outcome is not None
    assert server.outcome.clean
    summary = server.outcome.summary
    assert summary["server"] | {"refused": None} == {
        "finished": 2, "cancelled": 1, "failed": 0, "refused": None, "decision_faults": {}, "fallback_decisions": 0,
        "requests_lost_from_this_file": 0, "drained": True,
    }  # fmt: skip
    assert (summary["requests_finished"], summary["requests_total"]) == (2, 3)
    assert server.outcome.requests["generated_tokens"][:2].tolist() == [1, 4]
    assert summary["run"]["label"] == "drill"
