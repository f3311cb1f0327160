"""Parameters of requests: what each changes in the answer, streamed or not, or that it is refused by name."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import openai
import pytest
import torch
from serving_client import ENGINE, MODEL, PROMPT, Running, eventually, expected, running, text_of

from engine.models.load import load_tokenizer

TOKENIZER = load_tokenizer()
PROMPTS = [PROMPT, "import os\n", "class A:\n    def"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    engine = ENGINE.model_copy(update={"max_model_len": 512})
    with running(tmp_path_factory.mktemp("served"), engine=engine, max_waiting=40) as server:
        yield server


def ids(text: str) -> list[int]:
    return list(TOKENIZER(text)["input_ids"])


def raw(server: Running, chat: bool = False, **body: Any) -> dict[str, Any]:
    """The whole answer of a greedy request, which its stream adds up to: texts, tokens, log probabilities, usage."""
    path = "/v1/chat/completions" if chat else "/v1/completions"
    body = {"max_tokens": 12, "temperature": 0, **body}
    response = server.post(path, body)
    assert response.status_code == 200, response.text
    whole: dict[str, Any] = response.json()
    streamed = server.post(path, {**body, "stream": True, "stream_options": {"include_usage": True}}).text
    events = [json.loads(event[6:]) for event in streamed.split("\n\n") if event.startswith("data: {")]
    assert events[-1]["usage"] == whole["usage"]
    for choice in whole["choices"]:
        parts = [one for event in events for one in event["choices"] if one["index"] == choice["index"]]
        assert parts[-1]["finish_reason"] == choice["finish_reason"]
        if chat:
            assert "".join(part["delta"]["content"] for part in parts) == choice["message"]["content"]
        else:
            assert "".join(part["text"] for part in parts) == choice["text"]
        if "token_ids" in choice:
            assert [token for part in parts for token in part["token_ids"]] == choice["token_ids"]
        for name, found in (choice["logprobs"] or {}).items():
            assert found is None or [one for part in parts for one in part["logprobs"][name]] == found
    return whole


def texts(answer: dict[str, Any]) -> list[str]:
    assert [choice["index"] for choice in answer["choices"]] == list(range(len(answer["choices"])))
    return [choice["text"] for choice in answer["choices"]]


def refused(server: Running, chat: bool = False, **body: Any) -> tuple[str, str]:
    """(param, message) of a 400."""
    asked = {"messages": [{"role": "user", "content": "x"}]} if chat else {"prompt": "a"}
    response = server.post("/v1/chat/completions" if chat else "/v1/completions", asked | body)
    assert response.status_code == 400, (body, response.text)
    error = response.json()["error"]
    return error["param"], error["message"]


UNSUPPORTED: dict[str, Any] = {
    "best_of": 2,
    "structured_outputs": {"regex": "a"},
    "guided_json": {"type": "object"},
    "guided_regex": "a",
    "logits_processors": ["x"],
    "prompt_embeds": "AAAA",
    "prompt_logprobs": 1,
    "presence_penalty": 0.5,
    "frequency_penalty": -1.0,
    "repetition_penalty": 1.2,
    "min_p": 0.1,
    "use_beam_search": True,
    "length_penalty": 0.5,
    "response_format": {"type": "json_object"},
    "spaces_between_special_tokens": False,
    "priority": 1,
    "suffix": "x",
    "vllm_xargs": {"a": 1},
    "kv_transfer_params": {"a": 1},
    "thinking_token_budget": 5,
    "temprature": 0.5,
}
CHATS_TOO: dict[str, Any] = {
    "chat_template": "x",
    "documents": [{"text": "x"}],
    "reasoning_effort": "low",
    "tools": [{"type": "function", "function": {"name": "f"}}],
    "tool_choice": "required",
    "functions": [{"name": "f"}],
    "verbosity": "low",
    "audio": {"voice": "x"},
    "prompt": "a",
}


@pytest.mark.parametrize("chat", [False, True], ids=["completions", "chats"])
def test_what_would_change_the_answer_and_is_not_there_is_refused_by_name(served: Running, chat: bool) -> None:
    for name, value in (UNSUPPORTED | (CHATS_TOO if chat else {"messages": []})).items():
        param, message = refused(served, chat, **{name: value})
        assert param == name
        assert f"{name} is not supported" in message


def test_what_asks_for_nothing_or_changes_nothing_is_taken(served: Running) -> None:
    nothing = dict.fromkeys([*UNSUPPORTED, *CHATS_TOO, "logit_bias", "n", "echo", "bad_words", "logprobs"])
    del nothing["prompt"]
    neutral = {"best_of": 1, "presence_penalty": 0.0, "repetition_penalty": 1.0, "length_penalty": 1.0, "n": 1,
               "bad_words": [], "logit_bias": {}, "skip_special_tokens": True, "add_special_tokens": True,
               "use_beam_search": False, "stop_token_ids": [], "suffix": "", "echo": False, "priority": 0}  # fmt: skip
    harmless = {"user": "me", "metadata": {"a": "b"}, "store": True, "service_tier": "auto", "request_id": "7",
                "safety_identifier": "s", "prompt_cache_key": "k", "parallel_tool_calls": False}  # fmt: skip
    for extra in (nothing, neutral, harmless):
        assert texts(raw(served, prompt=PROMPT, **extra)) == [text_of(expected(PROMPT, 12))]


def test_lists_of_prompts_are_answered_in_order(served: Running) -> None:
    right = [text_of(expected(prompt, 12)) for prompt in PROMPTS]
    for prompts in (PROMPTS, [ids(prompt) for prompt in PROMPTS]):
        answer = raw(served, prompt=prompts)
        assert texts(answer) == right
        read = sum(len(ids(prompt)) for prompt in PROMPTS)
        assert answer["usage"] == {"prompt_tokens": read, "completion_tokens": 36, "total_tokens": read + 36}
    assert texts(raw(served, prompt=PROMPTS, n=2, best_of=2)) == [text for text in right for _ in range(2)]
    assert [choice.text for choice in served.complete(PROMPTS).choices] == right


def test_choices_of_a_seed_differ_and_repeat_and_the_first_is_that_of_one_alone(served: Running) -> None:
    hot = {"prompt": PROMPT, "temperature": 1.0, "seed": 11, "ignore_eos": True}
    many = raw(served, n=4, **hot)
    assert len(set(texts(many))) > 1
    assert texts(raw(served, n=4, **hot)) == texts(many)
    assert texts(raw(served, **hot)) == texts(many)[:1]
    assert many["usage"]["prompt_tokens"] == len(ids(PROMPT))
    assert many["usage"]["completion_tokens"] == 48
    assert len(set(texts(served.post("/v1/completions", hot | {"n": 4, "seed": None}).json()))) > 1
    pairs = texts(raw(served, n=2, **{**hot, "prompt": PROMPTS}))
    assert [pairs[::2], pairs[1::2]] == [texts(raw(served, **{**hot, "prompt": PROMPTS, "seed": s})) for s in (11, 12)]
    talk: Any = [{"role": "user", "content": "def f"}]
    chats = raw(served, chat=True, messages=talk, n=3, temperature=1.0, seed=3)["choices"]
    assert len({choice["message"]["content"] for choice in chats}) > 1


def test_all_choices_are_dropped_when_the_client_goes_and_none_is_taken_where_all_do_not_fit(served: Running) -> None:
    long = {"max_tokens": 480, "temperature": 0, "stream": True, "extra_body": {"ignore_eos": True}}
    stream = served.complete(PROMPTS, n=10, **long)
    next(stream)
    assert served.num_open() == 30
    with pytest.raises(openai.RateLimitError):
        served.complete(PROMPTS, n=10, **long)
    assert served.num_open() == 30
    stream.close()
    eventually(lambda: served.num_open() == 0)


def forward(server: Running, tokens: list[int]) -> np.ndarray:
    """(T - 1, V) log-softmax of a plain forward's logits before every token but the first."""
    with torch.inference_mode():
        logits = server.server.worker.engine.model.model(torch.tensor(tokens)[None], use_cache=False).logits[0, :-1]
    return logits.log_softmax(-1).numpy()


@pytest.mark.parametrize("settings", [{}, {"temperature": 1.3, "top_p": 0.9, "seed": 5}], ids=["greedy", "sampled"])
@pytest.mark.parametrize("echo", [False, True], ids=["output", "echo"])
def test_logprobs_of_completions_are_a_forwards(served: Running, settings: dict[str, Any], echo: bool) -> None:
    answer = raw(served, prompt=PROMPTS, logprobs=3, echo=echo, return_token_ids=True, **settings)
    for prompt, choice in zip(PROMPTS, answer["choices"], strict=True):
        found, read = choice["logprobs"], ids(prompt)
        assert choice["prompt_token_ids"] == read
        tokens = read + choice["token_ids"]
        likely = forward(served, tokens)
        first = 0 if echo else len(read)
        names = [TOKENIZER.decode([token]) for token in tokens[first:]]
        assert found["tokens"] == names
        assert "".join(names) == choice["text"]
        assert found["text_offset"] == [len("".join(names[:i])) for i in range(len(names))]
        if echo:
            assert (found["token_logprobs"][0], found["top_logprobs"][0]) == (None, None)
        rest = slice(0 if first else 1, None)
        columns = tokens[max(1, first) :], found["token_logprobs"][rest], found["top_logprobs"][rest]
        for token, logprob, top, row in zip(*columns, likely[max(0, first - 1) :], strict=True):
            assert logprob == pytest.approx(row[token], abs=1e-6)
            best = np.argsort(-row)[:3]
            assert top == pytest.approx({TOKENIZER.decode([each]): row[each] for each in [token, *best]}, abs=1e-6)
    assert served.complete(logprobs=0).choices[0].logprobs.top_logprobs[0].keys() == {
        TOKENIZER.decode(expected(PROMPT, 1))
    }


def test_logprobs_of_chats_are_a_forwards(served: Running) -> None:
    talk: Any = [{"role": "user", "content": "def f(x):"}]
    answer = raw(served, chat=True, messages=talk, logprobs=True, top_logprobs=2, return_token_ids=True)
    choice = answer["choices"][0]
    likely = forward(served, answer["prompt_token_ids"] + choice["token_ids"])[len(answer["prompt_token_ids"]) - 1 :]
    for token, one, row in zip(choice["token_ids"], choice["logprobs"]["content"], likely, strict=True):
        text = TOKENIZER.decode([token])
        assert (one["token"], bytes(one["bytes"])) == (text, text.encode())
        assert one["logprob"] == pytest.approx(row[token], abs=1e-6)
        assert [each["logprob"] for each in one["top_logprobs"]] == pytest.approx(-np.sort(-row)[:2], abs=1e-6)
    parsed = served.client.chat.completions.create(model=MODEL, messages=talk, logprobs=True, max_tokens=3)
    assert len(parsed.choices[0].logprobs.content) == 3
    assert raw(served, chat=True, messages=talk, return_token_ids=True)["choices"][0]["logprobs"] is None
    assert refused(served, chat=True, top_logprobs=2)[0] == "top_logprobs"


def test_tokens_that_are_parts_of_characters_are_told_by_their_bytes(served: Running) -> None:
    read = ids("é漢🙂")
    found = raw(served, prompt=read, echo=True, logprobs=1, max_tokens=0)["choices"][0]
    parts = [bytes(int(part, 16) for part in name[8:].split("\\x")) if name.startswith("bytes:") else name.encode()
             for name in found["logprobs"]["tokens"]]  # fmt: skip
    assert b"".join(parts).decode() == found["text"] == "é漢🙂"
    named = raw(served, prompt=read, echo=True, logprobs=1, max_tokens=0, return_tokens_as_token_ids=True)
    assert named["choices"][0]["logprobs"]["tokens"] == [f"token_id:{token}" for token in read]


def test_echo_puts_the_prompt_before_the_output_and_may_be_all(served: Running) -> None:
    answer = raw(served, prompt=PROMPTS, echo=True)
    assert texts(answer) == [prompt + text_of(expected(prompt, 12)) for prompt in PROMPTS]
    assert texts(raw(served, prompt=ids(PROMPT), echo=True)) == [PROMPT + text_of(expected(PROMPT, 12))]
    only = raw(served, prompt=PROMPTS, echo=True, max_tokens=0, logprobs=1)
    assert texts(only) == PROMPTS
    assert only["usage"]["completion_tokens"] == 0
    assert [len(choice["logprobs"]["tokens"]) for choice in only["choices"]] == [len(ids(one)) for one in PROMPTS]
    assert {choice["finish_reason"] for choice in only["choices"]} == {"length"}
    assert refused(served, max_tokens=0)[0] == "max_tokens"
    turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "def f"}]
    plain = raw(served, chat=True, messages=turns, continue_final_message=True)["choices"][0]["message"]["content"]
    echoed = raw(served, chat=True, messages=turns, continue_final_message=True, echo=True)["choices"][0]["message"]
    assert echoed["content"] == "def f" + plain


def test_min_tokens_hold_ends_and_stop_strings_back(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    tokens = expected(PROMPT, 20)
    end = tokens[4]
    monkeypatch.setattr(served.server._api, "_end_tokens", frozenset((end,)))
    held = raw(served, prompt=PROMPT, max_tokens=20, min_tokens=9, return_token_ids=True)["choices"][0]["token_ids"]
    assert tuple(held[: tokens.index(end)]) == tokens[: tokens.index(end)]
    assert end not in held[:9]
    assert len(held) >= 9
    monkeypatch.undo()
    text = text_of(tokens)
    for least in (0, 1, 3, 6, 11):
        muted = len(text_of(tokens[:least]))
        for stop in (text[2:4], text[6:9], text[20:22]):
            at = text.find(stop, max(0, muted + 1 - len(stop)))
            right = (text, "length") if at < 0 else (text[:at], "stop")
            cut = raw(served, prompt=PROMPT, max_tokens=20, min_tokens=least, stop=stop)
            assert (texts(cut)[0], cut["choices"][0]["finish_reason"]) == right, (least, stop)
            assert cut["usage"]["completion_tokens"] >= least


def test_the_stop_string_is_in_the_output_where_that_is_asked_for(served: Running) -> None:
    text = text_of(expected(PROMPT, 12))
    stop = text[7:10]
    end = text.index(stop) + len(stop)
    assert texts(raw(served, prompt=PROMPT, stop=stop, include_stop_str_in_output=True)) == [text[:end]]


def test_stop_token_ids_end_the_output(served: Running) -> None:
    tokens = expected(PROMPT, 12)
    answer = raw(served, prompt=PROMPT, stop_token_ids=[tokens[5]], ignore_eos=True)
    before = tokens[: tokens.index(tokens[5])]
    assert (texts(answer), answer["choices"][0]["finish_reason"]) == ([text_of(before)], "stop")
    assert answer["usage"]["completion_tokens"] == len(before) + 1
    kept = raw(served, prompt=PROMPT, stop_token_ids=[tokens[5]], include_stop_str_in_output=True)
    assert texts(kept) == [text_of(tokens[: len(before) + 1])]


def test_tokens_are_allowed_banned_and_favoured(served: Running) -> None:
    usual = expected(PROMPT, 12)
    some = sorted(set(usual[:3]) | {5, 300})
    got = raw(served, prompt=PROMPT, allowed_token_ids=some, return_token_ids=True)["choices"][0]["token_ids"]
    assert set(got) <= set(some)
    end = TOKENIZER.eos_token_id
    always = raw(served, prompt=PROMPT, logit_bias={str(some[0]): 100.0, str(end): -100}, return_token_ids=True)
    assert always["choices"][0]["token_ids"] == [some[0]] * 12
    word = text_of(usual)[:4].strip()
    assert word in text_of(usual)
    without = texts(raw(served, prompt=PROMPT, bad_words=[word]))[0]
    assert without != text_of(usual)
    banned = {tuple(ids(word)), tuple(ids(" " + word))}
    made = raw(served, prompt=PROMPT, bad_words=[word], return_token_ids=True)["choices"][0]["token_ids"]
    for sequence in banned:
        assert all(tuple(made[i : i + len(sequence)]) != sequence for i in range(len(made)))
    assert refused(served, allowed_token_ids=[10**6]) == (
        "allowed_token_ids",
        "allowed_token_ids: token ids are 0 to 2047",
    )
    assert refused(served, allowed_token_ids=[])[0] == "allowed_token_ids"
    assert refused(served, allowed_token_ids=[end], min_tokens=3)[0] == "allowed_token_ids"
    assert refused(served, logit_bias={"x": 1})[0] == refused(served, logit_bias={"5": 101})[0] == "logit_bias"
    assert refused(served, logit_bias={"2048": 1})[0] == "logit_bias"
    assert refused(served, bad_words=[""])[0] == "bad_words"


def test_a_long_prompt_is_cut_where_that_is_asked_for(served: Running) -> None:
    prompt = PROMPT + " a + b\n" * 5
    read = ids(prompt)
    for body, kept in (
        ({}, read[-7:]),
        ({"truncation_side": "left"}, read[-7:]),
        ({"truncation_side": "right"}, read[:7]),
    ):
        for sent in (prompt, read):
            answer = raw(served, prompt=sent, truncate_prompt_tokens=7, return_token_ids=True, echo=True, **body)
            assert answer["choices"][0]["prompt_token_ids"] == kept
            assert answer["choices"][0]["text"].startswith(TOKENIZER.decode(kept))
            assert answer["usage"]["prompt_tokens"] == 7
    long = [read[i % len(read)] for i in range(600)]
    room = raw(served, prompt=long, truncate_prompt_tokens=-1, max_tokens=4, return_token_ids=True)["choices"][0]
    assert room["prompt_token_ids"] == long[-508:]
    assert texts(raw(served, prompt=PROMPT, truncate_prompt_tokens=999)) == [text_of(expected(PROMPT, 12))]
    assert refused(served, truncate_prompt_tokens=0)[0] == refused(served, truncate_prompt_tokens=-2)[0]


def test_special_tokens_are_shown_where_that_is_asked_for(served: Running) -> None:
    end = TOKENIZER.eos_token_id
    favoured = {"prompt": PROMPT, "logit_bias": {str(end): 100}, "ignore_eos": True, "max_tokens": 2}
    assert texts(raw(served, **favoured)) == [""]
    assert texts(raw(served, skip_special_tokens=False, **favoured)) == [TOKENIZER.eos_token * 2]
    scored = raw(served, skip_special_tokens=True, logprobs=1, **favoured)["choices"][0]["logprobs"]
    assert (scored["tokens"], scored["text_offset"]) == ([TOKENIZER.eos_token] * 2, [0, 0])
    for special in (False, True):
        answer = raw(served, prompt=PROMPT, add_special_tokens=special, return_token_ids=True)
        right = TOKENIZER(PROMPT, add_special_tokens=special)["input_ids"]
        assert answer["choices"][0]["prompt_token_ids"] == right


HISTORY: list[dict[str, Any]] = [
    {"role": "user", "content": "Weather?"},
    {
        "role": "assistant",
        "content": None,
        "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "look", "arguments": '{"at": "here"}'}},
            {"id": "c2", "type": "function", "function": {"name": "feel", "arguments": ""}},
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
]


def prompt_of(server: Running, messages: list[dict[str, Any]], **body: Any) -> str:
    answer = raw(server, chat=True, messages=messages, return_token_ids=True, max_tokens=1, **body)
    return str(TOKENIZER.decode(answer["prompt_token_ids"]))


def test_tool_messages_of_a_history_are_rendered(served: Running) -> None:
    assert prompt_of(served, HISTORY) == (
        'user: Weather?\n\nassistant: {"name": "look", "arguments": {"at": "here"}}\n{"name": "feel", "arguments": {}}'
        "\n\ntool: rain\n\nassistant:"
    )

    def call(arguments: Any) -> list[dict[str, Any]]:
        return [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": arguments}}]}]

    answered = {"role": "assistant", "content": "x", "refusal": None, "annotations": [], "function_call": None}
    assert prompt_of(served, [answered]) == "assistant: x\n\nassistant:"
    assert prompt_of(served, call({"a": 1})) == prompt_of(served, call('{"a": 1}'))
    for messages, said in (
        (call("{"), "arguments: no JSON"),
        (call("[1]"), "arguments: no JSON object"),
        ([{"role": "tool", "content": None}], "content is missing"),
        ([{"role": "assistant", "content": "x", "function_call": {"name": "f"}}], "function_call is not supported"),
        ([{"role": "user", "content": "x", "tool_calls": [{"function": {"name": "f"}}]}], "of assistant messages"),
    ):
        param, message = refused(served, chat=True, messages=messages)
        assert param == "messages"
        assert said in message


def test_the_chat_template_is_told_how_to_end(served: Running) -> None:
    talk = [{"role": "user", "content": "x"}, {"role": "assistant", "content": "def f"}]
    assert prompt_of(served, talk) == "user: x\n\nassistant: def f\n\nassistant:"
    assert prompt_of(served, talk, add_generation_prompt=False) == "user: x\n\nassistant: def f\n\n"
    for also in ({}, {"add_generation_prompt": False}):
        assert prompt_of(served, talk, continue_final_message=True, **also) == "user: x\n\nassistant: def f"
    both = {"continue_final_message": True, "add_generation_prompt": True}
    assert refused(served, chat=True, **both)[0] == "continue_final_message"
    empty = [{"role": "assistant", "content": ""}]
    assert refused(served, chat=True, messages=empty, continue_final_message=True)[0] == "continue_final_message"


def test_a_clients_variables_reach_the_chat_template(served: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    template = "{{ messages[0].content }}{% if thinking %} {{ thinking }}{% endif %}"
    monkeypatch.setattr(served.server._api._language, "_chat_template", template)
    talk = [{"role": "user", "content": "x"}]
    assert prompt_of(served, talk) == "x"
    assert prompt_of(served, talk, chat_template_kwargs={"thinking": "hard"}) == "x hard"
    for reserved in ("chat_template", "tokenize", "tools"):
        param, message = refused(served, chat=True, chat_template_kwargs={reserved: "x"})
        assert (param, reserved in message) == ("chat_template_kwargs", True)
