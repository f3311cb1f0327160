"""Between text and tokens: prompts and chats to token ids, and tokens to text as they come."""

from __future__ import annotations

import asyncio
import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import jinja2

from runs.server.errors import ApiError

PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}\n\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Chat template of a model that has none: `role: content` and a blank line for every message, then `assistant:`."""

INLINE_CHARACTERS = 4096
"""A longer text is made into tokens in a thread of its own, so that streams flow on meanwhile."""
READERS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Threads that do so; fast tokenizers compute without Python's lock, on cores that the engine may want."""

UNFINISHED = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""

Decode = Callable[[Sequence[int]], str]


class ChatError(ValueError):
    """The chat template refuses the messages; the message says why."""


class Language:
    """What a model's tokenizer is used for. One thread uses an instance.

    Args:
        tokenizer: of Hugging Face.
        chat_template: Jinja; None: the tokenizer's own, or `PLAIN_CHAT` where it has none.
    """

    def __init__(self, tokenizer: Any, chat_template: str | None = None) -> None:
        self._tokenizer = tokenizer
        self._chat_template = chat_template or tokenizer.chat_template
        self._backend = getattr(tokenizer, "backend_tokenizer", None)
        if getattr(tokenizer, "clean_up_tokenization_spaces", False):
            self._backend = None

    @property
    def num_tokens(self) -> int:
        """Token ids are below this."""
        return len(self._tokenizer)

    @property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n times as many has n tokens or more."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts before it."""
        return list(self._tokenizer(text, verbose=False)["input_ids"])

    def encode_chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """Token ids of a conversation that the assistant is to go on with. Raises ChatError."""
        template = self._chat_template
        try:
            text: Any = self._tokenizer.apply_chat_template(
                list(messages), chat_template=template or PLAIN_CHAT, tokenize=False, add_generation_prompt=True
            )
        except jinja2.TemplateError as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error
        # A template writes the special tokens itself, the plain one has none.
        return list(self._tokenizer(text, add_special_tokens=template is None, verbose=False)["input_ids"])

    def decode(self, tokens: Sequence[int]) -> str:
        """The text that tokens spell; special tokens are left out."""
        # The library's own wrapper takes three times as long, which every emission of every stream would pay.
        decode = self._tokenizer.decode if self._backend is None else self._backend.decode
        return str(decode(list(tokens), skip_special_tokens=True))

    def copy(self) -> Language:
        """The same for another thread: tokenizers change inside while they are used."""
        return Language(copy.deepcopy(self._tokenizer), self._chat_template)


class Reader:
    """Makes prompts into tokens for an event loop; long ones in threads, of which each has a copy of the tokenizer.

    Args:
        language: used by the event loop's thread.
        most_tokens: of a prompt.
        threads: most long prompts that are read at a time.
    """

    def __init__(self, language: Language, most_tokens: int, threads: int = READERS) -> None:
        self._inline, self._most_tokens = language, most_tokens
        self._most_characters = most_tokens * language.longest_token
        self._aside: SimpleQueue[Language] = SimpleQueue()
        for _ in range(threads):
            self._aside.put(language.copy())
        self._threads = ThreadPoolExecutor(threads, "tokenizer")

    async def prompt(self, text: str) -> list[int]:
        """See `Language.encode`. Raises ApiError for a text that is longer than any of `most_tokens` tokens."""
        return await self._read(Language.encode, text, len(text), "prompt")

    async def chat(self, messages: Sequence[dict[str, str]]) -> list[int]:
        """See `Language.encode_chat`. Raises ApiError as `prompt` does."""
        if len(messages) > self._most_tokens:
            raise self._too_long(f"{len(messages)} messages", "messages")
        characters = sum(len(message["content"]) for message in messages)
        return await self._read(Language.encode_chat, messages, characters, "messages")

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    async def _read(
        self, encode: Callable[[Language, Any], list[int]], what: Any, characters: int, param: str
    ) -> list[int]:
        if characters > self._most_characters:
            raise self._too_long(f"{characters} characters", param)
        if characters <= INLINE_CHARACTERS:
            return encode(self._inline, what)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read_aside, encode, what)

    def _read_aside(self, encode: Callable[[Language, Any], list[int]], what: Any) -> list[int]:
        language = self._aside.get()
        try:
            return encode(language, what)
        finally:
            self._aside.put(language)

    def _too_long(self, length: str, param: str) -> ApiError:
        message = f"{param}: {length} exceed the context of {self._most_tokens} tokens, whatever they are; shorten it"
        return ApiError(400, message, param, "context_length_exceeded")


class TextStream:
    """The text of tokens that come bit by bit, as soon as it is certain, up to a stop string.

    Bytes of a character that is not whole, and what may be the beginning of a stop string, are held back. The parts add
    up to the text of all tokens, or to what stands before the stop string that is complete first (of two that end at
    the same place, the longer one), however the tokens come.
    """

    def __init__(self, decode: Decode, stops: Sequence[str] = ()) -> None:
        self._decode, self._stops = decode, stops
        self._context: list[int] = []
        self._pending: list[int] = []
        self._held = ""
        self.stopped = False
        """Whether a stop string was met."""

    def feed(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that is certain now and was not before; `last`: no tokens follow."""
        if self.stopped:
            return ""
        text = self._held + self._decoded(tokens, last)
        self._held = ""
        if not self._stops:
            return text
        found = [(place + len(stop), place) for stop in self._stops if (place := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            return text[: min(found)[1]]
        if not last:
            kept = max(_overlap(text, stop) for stop in self._stops)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        return text

    def until_stop(self, tokens: list[int]) -> int | None:
        """How many of the next tokens complete a stop string; None: they do not (`TorchEngine.submit`'s `ending`)."""
        for count, token in enumerate(tokens, start=1):
            self.feed((token,))
            if self.stopped:
                return count
        return None

    def _decoded(self, tokens: Sequence[int], last: bool) -> str:
        """Text of the pending tokens. The ones before are decoded with them: some tokens spell less at a beginning."""
        self._pending += tokens
        if not self._pending:
            return ""
        text = self._decode(self._context + self._pending)
        if text.endswith(UNFINISHED) and not last:
            return ""
        new = text[len(self._decode(self._context)) if self._context else 0 :]
        self._context, self._pending = self._pending, []
        return new


def _overlap(text: str, stop: str) -> int:
    """Most characters at the end of `text` that `stop` begins with, less than all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def read_template(path: Path | None) -> str | None:
    """The chat template in a file. Raises ValueError naming the key."""
    if path is None:
        return None
    try:
        return path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"chat_template={path} cannot be read: {error.strerror}") from error
