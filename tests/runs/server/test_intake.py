"""Bodies of any shape are read or refused in little time."""

from __future__ import annotations

import json
import time

import pytest

from runs.server.bodies import Body, ChatBody, CompletionBody
from runs.server.errors import ApiError
from runs.server.intake import Intake

CONTEXT = 2048
LARGE = 1_000_000
CPU_S = 0.15
"""Several times what each takes; a list of all mistakes took some seconds."""


def filled(before: bytes, piece: bytes, after: bytes) -> bytes:
    return before + piece * ((LARGE - len(before) - len(after)) // len(piece)) + after


CHATS = {
    "empty messages": filled(b'{"messages":[', b"{},", b"{}]}"),
    "messages": filled(b'{"messages":[', b'{"role":"user","content":"a"},', b'{"role":"user","content":"a"}]}'),
    "parts": filled(b'{"messages":[{"role":"user","content":[', b"{},", b"{}]}]}"),
    "role": filled(b'{"messages":[{"content":"a","role":"', b"a", b'"}]}'),
}
COMPLETIONS = {
    "nulls": filled(b'{"prompt":[', b"null,", b"null]}"),
    "ids": filled(b'{"prompt":[', b"1,", b"1]}"),
    "ids that are none": filled(b'{"prompt":[', b"-1.5,", b"1]}"),
    "lists": filled(b'{"prompt":[', b"[],", b"[]]}"),
    "a list in a list": filled(b'{"prompt":[[', b"true,", b"1]]}"),
    "nesting": b'{"prompt":' + b"[" * (LARGE // 2) + b"]" * (LARGE // 2) + b"}",
    "objects in objects": filled(b"", b'{"a":', b""),
    "stops": filled(b'{"prompt":"a","stop":[', b'"a",', b'"a"]}'),
    "stops with quotes": filled(b'{"prompt":"a","stop":[', b'"\\"\\\\",', b'"a"]}'),
    "keys": b'{"prompt":"a",' + b",".join(b'"%d":0' % i for i in range(LARGE // 9)) + b"}",
    "unknown": filled(b'{"prompt":"a","other":[', b"{},", b"{}]}"),
    "digits": filled(b'{"prompt":"a","max_tokens":', b"1", b"}"),
    "decimals": filled(b'{"prompt":"a","temperature":0.', b"1", b"}"),
    "long numbers": filled(b'{"prompt":[', b"1" * 4000 + b",", b"1]}"),
    "no JSON": b"[" + b"x" * LARGE,
    "half a surrogate": filled(b'{"prompt":"', b"\\ud800", b'"}'),
}
WELL = {
    "text": filled(b'{"prompt":"', b"a", b'"}'),
    "code": filled(b'{"prompt":"', b"f([1,2],{}),", b'"}'),
    "escapes": filled(b'{"prompt":"', b'\\u00e9\\n\\\\\\"', b'"}'),
    "pairs of surrogates": filled(b'{"prompt":"', b"\\ud83d\\ude00", b'"}'),
}


def parsed(content: bytes, kind: type[Body]) -> Body:
    begin = time.thread_time()
    try:
        return Intake(CONTEXT)._parsed(content, kind)
    finally:
        assert time.thread_time() - begin < CPU_S


@pytest.mark.parametrize("name", [*COMPLETIONS, *CHATS])
def test_a_large_body_that_cannot_be_right_is_refused_in_little_time(name: str) -> None:
    content = COMPLETIONS.get(name) or CHATS[name]
    with pytest.raises(ApiError) as refused:
        parsed(content, ChatBody if name in CHATS else CompletionBody)
    assert refused.value.status == 400
    assert len(refused.value.message) < 300


@pytest.mark.parametrize("name", WELL)
def test_a_large_body_that_may_be_right_is_read(name: str) -> None:
    body = parsed(WELL[name], CompletionBody)
    assert isinstance(body, CompletionBody)
    assert body.prompt == json.loads(WELL[name])["prompt"]


def test_a_prompt_of_the_whole_context_is_read_in_any_spelling() -> None:
    ids = [2047] * CONTEXT
    for content in (json.dumps({"prompt": ids}), json.dumps({"prompt": ids}, indent=4)):
        body = parsed(content.encode(), CompletionBody)
        assert isinstance(body, CompletionBody)
        assert body.prompt == ids


def test_the_first_mistake_is_named() -> None:
    with pytest.raises(ApiError, match=r"^messages\.1\.role: Field required") as refused:
        parsed(b'{"messages": [{"role": "user", "content": "a"}, {}, {}, 5]}', ChatBody)
    assert refused.value.param == "messages"
    with pytest.raises(ApiError, match="stop: 5000 entries; at most 4096") as refused:
        parsed(json.dumps({"prompt": "a", "stop": ["a"] * 5000}).encode(), CompletionBody)
    assert refused.value.param == "stop"
