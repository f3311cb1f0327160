"""Between text and tokens: prompts and chats to token ids, and tokens to text as they come."""

from __future__ import annotations

import asyncio
import codecs
import copy
import os
import re
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, TypeVar

import jinja2
from transformers.convert_slow_tokenizer import bytes_to_unicode

from engine.files import reading
from runs.server.errors import ApiError

PLAIN_CHAT = (
    "{% for message in messages %}{{ message['role'] }}: {{ message['content'] }}"
    "{% for call in message['tool_calls'] or [] %}{{ '\\n' if message['content'] or not loop.first }}"
    "{{ call['function'] | tojson }}{% endfor %}{{ '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)
"""Chat template of a model that has none: `role: content` and a blank line for every message, then `assistant:`.

Calls of tools follow the content, each as JSON in a line of its own.
"""

INLINE_CHARACTERS = 4096
"""A longer text is made into tokens in a thread of its own, so that streams flow on meanwhile."""
READERS = max(1, min(4, (os.cpu_count() or 1) // 2))
"""Threads that do so; fast tokenizers compute without Python's lock, on cores that the engine may want."""

UNFINISHED = "\ufffd"
"""What tokenizers decode bytes to that are no whole character."""

CONTEXT_TOKENS = 5
"""Tokens before an output that are decoded with it: some tokens spell less at the beginning of a text."""

BYTE_OF = {letter: byte for byte, letter in bytes_to_unicode().items()}
"""Bytes by the letters that byte-level tokenizers write them as."""

Decode = Callable[[Sequence[int]], str]
Side = Literal["left", "right"]
Tokens = TypeVar("Tokens")


class ChatError(ValueError):
    """The chat template refuses the messages; the message says why."""


@dataclass(frozen=True)
class Chat:
    """A conversation, and how its template is rendered.

    Args:
        messages: as chat templates take them.
        add_generation_prompt: end with what the assistant's turn begins with.
        continue_final_message: leave the last message open, to be continued.
        variables: further ones of the template.
    """

    messages: Sequence[dict[str, Any]]
    add_generation_prompt: bool = True
    continue_final_message: bool = False
    variables: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Cut:
    """Special tokens of a prompt, and the most tokens that are kept of it.

    Args:
        special: put in the special tokens that the tokenizer begins a text with; None: as usual.
        most: tokens that are kept; None: all.
        side: where a longer prompt loses tokens.
    """

    special: bool | None = None
    most: int | None = None
    side: Side = "left"

    def tokens(self, tokens: list[int]) -> list[int]:
        """What is kept of a prompt that came as tokens."""
        if self.most is None:
            return tokens
        return tokens[-self.most :] if self.side == "left" else tokens[: self.most]


UNCUT = Cut()


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
        self._special = frozenset(tokenizer.all_special_ids)
        self._bytes: dict[int, bytes] = {}
        self._letter: list[int] = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])

    @property
    def num_tokens(self) -> int:
        """Token ids are below this."""
        return len(self._tokenizer)

    @property
    def longest_token(self) -> int:
        """Characters of the longest token: a text of n times as many has n tokens or more."""
        return max(map(len, self._tokenizer.get_vocab()), default=1)

    def encode(self, text: str, cut: Cut = UNCUT) -> list[int]:
        """Token ids of a prompt, with the special tokens that the tokenizer puts before it."""
        options: dict[str, Any] = {} if cut.special is None else {"add_special_tokens": cut.special}
        if cut.most is not None:
            self._tokenizer.truncation_side = cut.side
            options |= {"truncation": True, "max_length": cut.most}
        return list(self._tokenizer(text, verbose=False, **options)["input_ids"])

    def encode_chat(self, chat: Chat, cut: Cut = UNCUT) -> list[int]:
        """Token ids of a conversation. Raises ChatError."""
        template = self._chat_template
        try:
            text: Any = self._tokenizer.apply_chat_template(
                list(chat.messages),
                chat_template=template or PLAIN_CHAT,
                tokenize=False,
                add_generation_prompt=chat.add_generation_prompt,
                continue_final_message=chat.continue_final_message,
                **chat.variables,
            )
        except (jinja2.TemplateError, ValueError, TypeError, KeyError) as error:
            raise ChatError(f"the model's chat template refuses these messages: {error}") from error
        # A template writes the special tokens itself, the plain one has none.
        special = template is None if cut.special is None else cut.special
        return self.encode(text, Cut(special, cut.most, cut.side))

    def encode_words(self, words: Iterable[str]) -> tuple[tuple[int, ...], ...]:
        """Token ids of words, each as it is spelt at a beginning and behind a space."""
        spelt = (self.encode(space + word.lstrip(), Cut(special=False)) for word in words for space in ("", " "))
        return tuple(dict.fromkeys(tuple(tokens) for tokens in spelt if tokens))

    def decode(self, tokens: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text that tokens spell."""
        # The library's own wrapper takes three times as long, which every emission of every stream would pay.
        decode = self._tokenizer.decode if self._backend is None else self._backend.decode
        return str(decode(list(tokens), skip_special_tokens=skip_special_tokens))

    def decoder(self, skip_special_tokens: bool) -> Decode:
        """`decode` with or without special tokens."""
        return partial(self.decode, skip_special_tokens=skip_special_tokens)

    def is_special(self, token: int) -> bool:
        """Whether a token is left out of texts."""
        return token in self._special

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text, in UTF-8; possibly a part of a character."""
        if token not in self._bytes:
            self._bytes[token] = self._spell(token)
        return self._bytes[token]

    def name_of(self, token: int) -> str:
        """A token's text; one that is no whole characters as OpenAI writes it: `bytes:` and the bytes."""
        content = self.bytes_of(token)
        try:
            return content.decode()
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in content)

    def copy(self) -> Language:
        """The same for another thread: tokenizers change inside while they are used."""
        return Language(copy.deepcopy(self._tokenizer), self._chat_template)

    def _spell(self, token: int) -> bytes:
        before = self.decode(self._letter, skip_special_tokens=False)
        text = self.decode([*self._letter, token], skip_special_tokens=False)[len(before) :]
        if UNFINISHED not in text:
            return text.encode()
        piece = str(self._tokenizer.convert_ids_to_tokens(token))
        if number := re.fullmatch("<0x([0-9A-Fa-f]{2})>", piece):
            return bytes((int(number[1], 16),))
        if all(letter in BYTE_OF for letter in piece):
            return bytes(BYTE_OF[letter] for letter in piece)
        return text.encode()


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

    async def prompts(self, texts: Sequence[str], cut: Cut = UNCUT) -> list[list[int]]:
        """Token ids of each; see `Language.encode`.

        Raises ApiError for a text that is not to be cut and is longer than any of `most_tokens` tokens.
        """
        lengths = [len(text) for text in texts]
        self._check(max(lengths, default=0), "prompt", cut)
        return await self._read(lambda language: [language.encode(text, cut) for text in texts], sum(lengths))

    async def chat(self, chat: Chat, cut: Cut = UNCUT) -> list[int]:
        """See `Language.encode_chat`. Raises ApiError as `prompts` does."""
        if len(chat.messages) > self._most_tokens:
            raise self._too_long(f"{len(chat.messages)} messages", "messages")
        characters = sum(len(message["content"]) + len(str(message.get("tool_calls", ""))) for message in chat.messages)
        self._check(characters, "messages", cut)
        return await self._read(lambda language: language.encode_chat(chat, cut), characters)

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown(cancel_futures=True)

    def _check(self, characters: int, param: str, cut: Cut) -> None:
        if cut.most is None and characters > self._most_characters:
            raise self._too_long(f"{characters} characters", param)

    async def _read(self, encode: Callable[[Language], Tokens], characters: int) -> Tokens:
        if characters <= INLINE_CHARACTERS:
            return encode(self._inline)
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._read_aside, encode)

    def _read_aside(self, encode: Callable[[Language], Tokens]) -> Tokens:
        language = self._aside.get()
        try:
            return encode(language)
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

    Args:
        decode: tokens to text.
        stops: stop strings.
        keep_stop: the stop string is part of the text.
        min_tokens: a stop string that is complete with one of the first so many tokens is none.
        before: tokens that the text follows.
    """

    def __init__(
        self,
        decode: Decode,
        stops: Sequence[str] = (),
        keep_stop: bool = False,
        min_tokens: int = 0,
        before: Sequence[int] = (),
    ) -> None:
        self._decode, self._stops, self._keep_stop = decode, stops, keep_stop
        self._muted = min_tokens if stops else 0
        self._context: list[int] = list(before[-CONTEXT_TOKENS:])
        if self._context and decode(self._context).endswith(UNFINISHED):
            self._context = []
        self._pending: list[int] = []
        self._held, self._safe = "", 0
        self.stopped = False
        """Whether a stop string was met."""

    def feed(self, tokens: Sequence[int], last: bool = False) -> str:
        """The text that is certain now and was not before; `last`: no tokens follow."""
        if self._muted >= len(tokens) or not self._muted:
            return self._feed(tokens, last)
        first = self._muted
        return self._feed(tokens[:first], False) + self._feed(tokens[first:], last)

    def _feed(self, tokens: Sequence[int], last: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + self._decoded(tokens, last)
        self._held = ""
        if not self._stops:
            return text
        if self._muted:
            self._muted -= len(tokens)
            self._safe = len(text)
        # A stop string may begin in, and not end with, what came before it could be one.
        found = [
            (place + len(stop), place)
            for stop in self._stops
            if (place := text.find(stop, max(0, self._safe + 1 - len(stop)))) >= 0
        ]
        if found:
            self.stopped = True
            end, place = min(found)
            return text[: end if self._keep_stop else place]
        if not last:
            kept = max(_overlap(text, stop) for stop in self._stops)
            text, self._held = text[: len(text) - kept], text[len(text) - kept :]
        self._safe = max(0, self._safe - len(text))
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


class Places:
    """Where tokens begin in the text they spell, one after another; special tokens may be no part of it."""

    def __init__(self, language: Language, skip_special_tokens: bool) -> None:
        self._language, self._skip = language, skip_special_tokens
        self._letters = codecs.getincrementaldecoder("utf-8")("replace")
        self._length = 0

    def next(self, token: int) -> int:
        """Characters before this token."""
        place = self._length
        if not (self._skip and self._language.is_special(token)):
            self._length += len(self._letters.decode(self._language.bytes_of(token)))
        return place


def _overlap(text: str, stop: str) -> int:
    """Most characters at the end of `text` that `stop` begins with, less than all of it."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)


def read_template(path: Path | None) -> str | None:
    """The chat template in a file. Raises ValueError naming the key."""
    if path is None:
        return None
    with reading(f"chat_template={path}"):
        return path.read_text(encoding="utf-8")
