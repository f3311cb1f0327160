"""Text out of tokens as they come: nothing is lost or shown too early, and stop strings are found."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engine.models.load import load_tokenizer
from runs.server.errors import ApiError
from runs.server.text import INLINE_CHARACTERS, Chat, ChatError, Language, Reader, TextStream, read_template

LANGUAGE = Language(load_tokenizer())
TOKENS = st.lists(st.integers(0, LANGUAGE.num_tokens - 1), max_size=30)
"""Any tokens at all: most of the vocabulary's bytes are no whole characters."""


def parts(tokens: Sequence[int], cuts: Sequence[int]) -> list[Sequence[int]]:
    edges = [0, *sorted(cut % (len(tokens) + 1) for cut in cuts), len(tokens)]
    return [tokens[a:b] for a, b in pairwise(edges)]


def said(stream: TextStream, tokens: Sequence[int], cuts: Sequence[int]) -> str:
    cut = parts(tokens, cuts)
    return "".join(stream.feed(part, last=i == len(cut) - 1) for i, part in enumerate(cut))


@given(TOKENS, st.lists(st.integers(0, 30), max_size=10))
def test_the_parts_add_up_to_the_text_of_all_tokens(tokens: list[int], cuts: list[int]) -> None:
    assert said(TextStream(LANGUAGE.decode), tokens, cuts) == LANGUAGE.decode(tokens)


def test_a_stop_string_within_a_longer_one_that_began_before_is_met_first() -> None:
    tokens = LANGUAGE.encode("\naa")
    for cuts in ([], [1], [2], [1, 2]):
        assert said(TextStream(LANGUAGE.decode, ["\naa", "a"]), tokens, cuts) == "\n"


@given(st.data())
def test_the_text_ends_before_the_first_stop_string_wherever_tokens_are_cut(data: st.DataObject) -> None:
    text = data.draw(st.text("ab\n é漢", min_size=1, max_size=40))
    stops = data.draw(st.lists(st.text("ab\n é漢", min_size=1, max_size=4), min_size=1, max_size=3))
    tokens = LANGUAGE.encode(text)
    stream = TextStream(LANGUAGE.decode, stops)
    found = [(text.index(stop) + len(stop), text.index(stop)) for stop in stops if stop in text]
    _, first = min(found, default=(len(text), len(text)))
    assert said(stream, tokens, data.draw(st.lists(st.integers(0, 60), max_size=10))) == text[:first]
    assert stream.stopped is any(stop in text for stop in stops)


@given(st.data())
def test_the_token_that_completes_a_stop_string_is_the_last_one(data: st.DataObject) -> None:
    text = data.draw(st.text("ab\n", min_size=1, max_size=30))
    stop = data.draw(st.text("ab\n", min_size=1, max_size=4))
    tokens = LANGUAGE.encode(text)
    found, before = None, 0
    ending = TextStream(LANGUAGE.decode, [stop]).until_stop
    for part in parts(tokens, data.draw(st.lists(st.integers(0, 30), max_size=6))):
        count = ending(list(part))
        if count is not None:
            found = before + count
            break
        before += len(part)
    expected = next((n for n in range(len(tokens) + 1) if stop in LANGUAGE.decode(tokens[:n])), None)
    assert found == expected


def test_what_may_begin_a_stop_string_is_held_back_until_it_does_not() -> None:
    stream = TextStream(lambda tokens: "".join(map(chr, tokens)), ["END", "\n\n"])
    assert [stream.feed([ord(letter)]) for letter in "aENbE"] == ["a", "", "", "ENb", ""]
    assert stream.feed([ord("N")], last=True) == "EN"


def test_half_a_character_is_shown_when_it_is_whole() -> None:
    tokens = LANGUAGE.encode("漢")
    assert len(tokens) > 1, "one character of several tokens"
    stream = TextStream(LANGUAGE.decode)
    assert [stream.feed([token]) for token in tokens] == [""] * (len(tokens) - 1) + ["漢"]


MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]


def test_a_model_without_a_template_gets_the_plain_one() -> None:
    assert LANGUAGE.decode(LANGUAGE.encode_chat(Chat(MESSAGES))) == "system: Be brief.\n\nuser: Hello\n\nassistant:"


def test_a_template_of_ones_own_is_used_and_may_refuse(tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    refusal = "{% if messages|length > 1 %}{{ raise_exception('one turn') }}{% endif %}"
    path.write_text(refusal + "<{{ messages[0].content }}>")
    language = Language(load_tokenizer(), read_template(path))
    assert language.decode(language.encode_chat(Chat(MESSAGES[:1]))) == "<Be brief.>"
    with pytest.raises(ChatError, match="one turn"):
        language.encode_chat(Chat(MESSAGES))
    with pytest.raises(ValueError, match=r"chat_template=.*absent"):
        read_template(tmp_path / "absent")


def test_long_prompts_are_read_beside_each_other() -> None:
    reader, both = Reader(LANGUAGE, 10**6, threads=2), threading.Barrier(2, timeout=600)

    def encode(language: Language, text: str) -> list[int]:
        both.wait()
        return language.encode(text)

    async def one(text: str) -> list[int]:
        return await reader._read(lambda language: encode(language, text), len(text))

    async def read() -> list[list[int]]:
        texts = ("a" * INLINE_CHARACTERS * 2, "b" * INLINE_CHARACTERS * 2)
        return await asyncio.gather(*map(one, texts))

    try:
        first, second = asyncio.run(read())
    finally:
        reader.close()
    assert (LANGUAGE.decode(first)[0], LANGUAGE.decode(second)[0]) == ("a", "b")


def test_a_text_within_the_bound_may_be_all_of_longest_tokens() -> None:
    longest = max(range(LANGUAGE.num_tokens), key=lambda token: len(LANGUAGE.decode([token])))
    text = LANGUAGE.decode([longest])
    reader = Reader(LANGUAGE, 8)
    try:
        assert len(asyncio.run(reader.prompts([text * 8]))[0]) <= 8 * len(text)
        with pytest.raises(ApiError, match="exceed the context of 8 tokens"):
            asyncio.run(reader.prompts(["a" * (8 * LANGUAGE.longest_token + 1)]))
    finally:
        reader.close()


def test_long_prompts_are_read_aside_and_mean_the_same() -> None:
    text = "def f(x):\n" * INLINE_CHARACTERS
    reader = Reader(LANGUAGE, 10**6)

    async def read() -> list[list[int]]:
        reading = asyncio.ensure_future(reader.prompts([text]))
        await asyncio.sleep(0)
        assert not reading.done(), "the loop goes on meanwhile"
        return await reading

    try:
        assert asyncio.run(read()) == [LANGUAGE.encode(text)]
    finally:
        reader.close()
