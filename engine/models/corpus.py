"""Text to train on and to prompt with: the running CPython's standard library, and files that the user gives.

The corpus is every `.py` source under the interpreter's standard library folder. Excluded are third-party packages
(`site-packages`), tests (half of the bytes, and mostly data), `encodings` and `pydoc_data` (generated tables) and the
build's own settings (`_sysconfigdata*`, `config-*`). A file is held out by a hash of its path relative to that folder.
The split is therefore the same on every machine, and a held-out file stays held out in another version of Python.
"""

from __future__ import annotations

import difflib
import hashlib
import math
import os
import sysconfig
import tokenize
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from engine.workload.records import ending, read_json, shown, text_lines

HELD_OUT_ONE_IN = 10

_LEFT_OUT_FOLDERS = frozenset(
    {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__", "encodings", "pydoc_data"}
)
_LENGTHS = ("max_tokens", "output_tokens")
_KEYS = ("prompt", *_LENGTHS, "arrival_s")
_MAX_TOKENS = 1 << 24


class CorpusError(ValueError):
    """A corpus, prompt file or request for prompts that cannot be used; the message names file and line."""


class Tokenizer(Protocol):
    """The part of a Hugging Face tokenizer's interface that is used."""

    def __call__(self, text: str, *, add_special_tokens: bool = ..., verbose: bool = ...) -> Any: ...

    def decode(self, token_ids: Any) -> Any: ...


@dataclass(frozen=True)
class Prompt:
    """A prompt as the user wrote it.

    `max_tokens`, `arrival_s` (seconds) and `answer`, whose length is the output's, are None where the file has none.
    """

    name: str
    text: str
    max_tokens: int | None = None
    arrival_s: float | None = None
    answer: str | None = None


@dataclass(frozen=True)
class TokenPrompt:
    """A prompt cut to an exact number of tokens: `tokens` (length,) int32, and the text they spell."""

    name: str
    text: str
    tokens: NDArray[np.int32]


def library_folder() -> Path:
    """Standard library folder of the running interpreter."""
    return Path(sysconfig.get_paths()["stdlib"])


def is_held_out(name: str) -> bool:
    """Return True if this relative path (with forward slashes) is held out from training: one in ten, by hash."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") % HELD_OUT_ONE_IN == 0


def library_files(held_out: bool, folder: Path | None = None) -> list[str]:
    """Relative paths of the training files, or of the held-out ones, in sorted order. Raises CorpusError if none."""
    root = folder or library_folder()
    chosen = sorted(name for name in _source_names(root) if is_held_out(name) == held_out)
    if not chosen:
        raise CorpusError(
            f"{root}: no {'held-out' if held_out else 'training'} Python sources here; an interpreter installed "
            "without its standard library's sources has none: give a file of prompts instead"
        )
    return chosen


def library_texts(held_out: bool, folder: Path | None = None) -> Iterator[tuple[str, str]]:
    """Yields (relative path, text) of the training or the held-out files; a file that is no valid source is skipped."""
    root = folder or library_folder()
    for name in library_files(held_out, root):
        try:
            with tokenize.open(root / name) as source:
                text = source.read()
        except (SyntaxError, UnicodeDecodeError):
            continue
        if text.strip():
            yield name, text


def cut_prompts(
    texts: Iterable[tuple[str, str]], tokenizer: Tokenizer, lengths: Sequence[int], rng: np.random.Generator
) -> list[TokenPrompt]:
    """Cut one prompt of each length (tokens) from the texts, in the order of `lengths`.

    Each prompt starts at a line of a text drawn among those long enough for it, texts being used equally often before
    any is used again. Raises CorpusError for a length below 1 or longer than every text.
    """
    encoded = [(name, _token_ids(tokenizer, text)) for name, text in texts]
    if not encoded:
        raise CorpusError("there is no text to cut prompts from")
    sizes = np.array([tokens.size for _, tokens in encoded])
    line_starts = _line_start_tokens(tokenizer, np.unique(np.concatenate([tokens for _, tokens in encoded])))
    uses = np.zeros(len(encoded))
    tie_break = rng.permutation(len(encoded))
    prompts = []
    for length in lengths:
        if length < 1:
            raise CorpusError(f"a prompt of {length} tokens cannot be cut; prompts have at least one token")
        enough = np.flatnonzero(sizes >= length)
        if not enough.size:
            longest = int(sizes.argmax())
            raise CorpusError(
                f"no text has {length} tokens; the longest, {encoded[longest][0]}, has {sizes[longest]}: "
                "ask for shorter prompts or give a longer text"
            )
        pick = enough[np.lexsort((tie_break[enough], uses[enough]))[0]]
        uses[pick] += 1
        name, tokens = encoded[pick]
        starts = np.flatnonzero(np.isin(tokens[: tokens.size - length + 1], line_starts))
        start = int(rng.choice(starts)) if starts.size else 0
        cut = tokens[start : start + length]
        prompts.append(TokenPrompt(f"{name}+{start}", str(tokenizer.decode(cut.tolist())), cut))
    return prompts


def held_out_prompts(tokenizer: Tokenizer, lengths: Sequence[int], seed: int = 0) -> list[TokenPrompt]:
    """Prompts of these token lengths from the standard library's held-out files, the same for the same seed."""
    return cut_prompts(library_texts(held_out=True), tokenizer, lengths, np.random.default_rng(seed))


def read_prompts(path: str | Path) -> list[Prompt]:
    """Prompts of a user's file: a `.jsonl` or `.json` of prompts or conversations, or any other text file as one.

    An object with `prompt` has optionally its output's length, as `max_tokens` or as vLLM's `output_tokens`, and
    `arrival_s` (seconds, on every row or on none, non-decreasing); other keys are ignored unless they look like a typo
    of these. An object with `conversations` is ShareGPT's: its first turn is the prompt, its second the answer; it is
    left out with fewer than two, as `vllm bench serve` does.

    Raises:
        ValueError: `CorpusError` or `WorkloadError`, naming file and row.
    """
    file = Path(path)
    if not file.is_file():
        raise CorpusError(f"{file}: cannot be read: no such file; give a text file or a .jsonl of prompts")
    if ending(file) in (".csv", ".tsv"):
        raise CorpusError(
            f"{file}: a table is no text to cut prompts from; as a trace it is workload=trace workload.path={file}, "
            f"its arrival times alone are workload.arrivals_path={file}"
        )
    if ending(file) not in (".jsonl", ".json"):
        text = "".join(text_lines(file))
        if not text.strip():
            raise CorpusError(f"{file}: the file is empty; a prompt needs at least one character")
        return [Prompt(file.name, text)]
    numbered = [
        (row, _conversation(entry, file, row) if "conversations" in entry else _prompt(entry, file, row))
        for row, entry in read_json(file)
    ]
    found = [(row, prompt) for row, prompt in numbered if prompt is not None]
    if not found:
        raise CorpusError(f'{file}: the file has no prompts; write one {{"prompt": "..."}} a line')
    _check_arrivals(found, file)
    return [prompt for _, prompt in found]


def _source_names(root: Path) -> Iterator[str]:
    # Excluded folders are not walked: an environment's third-party packages may be a hundred times the library.
    for folder, folders, files in os.walk(root):
        folders[:] = [name for name in folders if name not in _LEFT_OUT_FOLDERS and not _is_build_setting(name)]
        for name in files:
            if name.endswith(".py") and not _is_build_setting(name):
                yield (Path(folder) / name).relative_to(root).as_posix()


def _is_build_setting(name: str) -> bool:
    return name.startswith(("_sysconfigdata", "config-"))


def _token_ids(tokenizer: Tokenizer, text: str) -> NDArray[np.int32]:
    # Whole files exceed a model's context as expected, so the tokenizer's warning about it is off.
    return np.asarray(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"], np.int32)


def _line_start_tokens(tokenizer: Tokenizer, token_ids: NDArray[np.int32]) -> NDArray[np.int32]:
    return token_ids[[str(tokenizer.decode([int(token)])).startswith("\n") for token in token_ids]]


def _conversation(entry: dict[str, Any], file: Path, row: int) -> Prompt | None:
    turns = entry["conversations"]
    if not isinstance(turns, list) or len(turns) < 2:
        return None
    prompt, answer = (turn.get("value") if isinstance(turn, dict) else None for turn in turns[:2])
    if not isinstance(prompt, str) or not isinstance(answer, str):
        raise CorpusError(f"{file}, row {row}: the first two 'conversations' must be objects whose 'value' is text")
    _check_characters(prompt + answer, f"{file}, row {row}")
    return Prompt(f"{file.name}:{row}", prompt, answer=answer)


def _prompt(entry: dict[str, Any], file: Path, row: int) -> Prompt:
    where = f"{file}, row {row}"
    for key in entry.keys() - set(_KEYS):
        near = difflib.get_close_matches(key, _KEYS, n=1, cutoff=0.85)
        if near and near[0] not in entry:
            raise CorpusError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
    text = entry.get("prompt")
    if not isinstance(text, str) or not text:
        hint = (
            ""
            if "prompt" in entry
            else f"; found {', '.join(entry)[:200]}: a trace is workload=trace workload.path={file}"
        )
        raise CorpusError(f"{where}: 'prompt' must be text of at least one character, not {shown(text)}{hint}")
    _check_characters(text, where)
    lengths = {key: _whole(entry[key], key, where) for key in _LENGTHS if entry.get(key) is not None}
    if len(set(lengths.values())) > 1:
        raise CorpusError(f"{where}: 'max_tokens' and 'output_tokens' differ; give one of them")
    arrival = entry.get("arrival_s")
    if arrival is not None and (type(arrival) not in (int, float) or not 0 <= arrival < math.inf):
        raise CorpusError(f"{where}: 'arrival_s' must be seconds, 0 or more, not {shown(arrival)}")
    return Prompt(
        f"{file.name}:{row}",
        text,
        next(iter(lengths.values()), None),
        None if arrival is None else float(arrival),
    )


def _whole(value: Any, key: str, where: str) -> int:
    # vLLM takes the number as text too.
    number = int(value) if isinstance(value, str) and value.strip().isdecimal() and len(value) < 20 else value
    if type(number) is float and number.is_integer():
        number = int(number)
    if type(number) is not int or not 1 <= number <= _MAX_TOKENS:
        raise CorpusError(f"{where}: {key!r} must be a whole number from 1 to {_MAX_TOKENS}, not {shown(value)}")
    return number


def _check_characters(text: str, where: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise CorpusError(f"{where}: the text has half of a surrogate pair; escape the whole character or write it out")


def _check_arrivals(numbered: list[tuple[int, Prompt]], file: Path) -> None:
    first_arrives = numbered[0][1].arrival_s is not None
    latest = 0.0
    for number, prompt in numbered:
        if (prompt.arrival_s is not None) != first_arrives:
            raise CorpusError(f"{file}, row {number}: 'arrival_s' must be on every row or on none")
        if prompt.arrival_s is not None:
            if prompt.arrival_s < latest:
                raise CorpusError(
                    f"{file}, row {number}: arrives {latest - prompt.arrival_s:g} s before the row above it; "
                    "sort the file by 'arrival_s'"
                )
            latest = prompt.arrival_s
