"""The profile's configuration without Hydra: its YAML files and the words of a command line, composed and checked.

It reads the files that the Hydra app reads and understands of them what they use: `defaults` lists of choices, with
`_self_`, and interpolations of other keys. On the command line: `GROUP=CHOICE`, `GROUP=PATH.yaml`, `key=value`.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from typing import Any

import yaml

from conf.plain import CONF, merged, read, read_choice
from runs.endings import MistakeError

_INTERPOLATION = re.compile(r"\$\{([^${}]*)\}")
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?$")
_KEY = re.compile(r"[A-Za-z_][\w.]*$")

KINDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a word",
    list: "a list",
    dict: "a section, whose keys are given one by one",
    type(None): "one value",
}
"""How a value's type is called to a user."""

HYDRAS_OWN = {"run": {"dir": ""}, "job": {"name": ""}, "runtime": {"output_dir": ""}}
"""Keys below `hydra` that this reader knows."""


def compose(name: str, words: Sequence[str]) -> dict[str, Any]:
    """The configuration `conf/NAME.yaml` with its choices and the command line's words, interpolations resolved.

    Raises MistakeError, or ChoiceError, naming the word or file that cannot be understood.
    """
    given = [_split(word) for word in words]
    root = read(CONF / f"{name}.yaml")
    entries = root.pop("defaults", [])
    groups = dict(_choices(entries))
    for key, text in given:
        if key in groups:
            groups[key] = text
    config: dict[str, Any] = {group: read_choice(group, choice) for group, choice in groups.items()}
    config = merged(config, root)
    config["hydra"] = merged(HYDRAS_OWN, config.get("hydra", {}))
    for key, text in given:
        if key not in groups:
            _set(config, key, text)
    config["hydra"]["run"]["dir"] = resolved(config["hydra"]["run"]["dir"], config)
    config["hydra"]["runtime"]["output_dir"] = config["hydra"]["run"]["dir"]
    made: dict[str, Any] = resolved(config, config)
    return made


def resolved(value: Any, config: dict[str, Any]) -> Any:
    """`value` with every `${key}` replaced by what the configuration has there. Raises MistakeError for others."""
    if isinstance(value, dict):
        return {key: resolved(entry, config) for key, entry in value.items()}
    if isinstance(value, list):
        return [resolved(entry, config) for entry in value]
    if not isinstance(value, str):
        return value
    whole = _INTERPOLATION.fullmatch(value)
    if whole is not None:
        return resolved(_at(config, whole.group(1)), config)
    return _INTERPOLATION.sub(lambda found: str(resolved(_at(config, found.group(1)), config)), value)


def read_logging(config: dict[str, Any]) -> dict[str, Any]:
    """The settings of `logging` that the Hydra app has, for this run's folder."""
    made: dict[str, Any] = resolved(read(CONF / "hydra" / "job_logging" / "plain.yaml"), config)
    return made


def _split(word: str) -> tuple[str, str]:
    key, equals, text = word.partition("=")
    if not equals or not _KEY.match(key):
        raise MistakeError(
            f"{word}: without Hydra a word is key=value (or GROUP=CHOICE); install hydra-core, omegaconf and pydantic "
            "for everything else"
        )
    return key, text


def _choices(entries: Sequence[Any]) -> Iterator[tuple[str, str]]:
    for entry in entries:
        for group, choice in entry.items() if isinstance(entry, dict) else ():
            if not group.startswith("override "):
                yield group, choice


def _at(config: dict[str, Any], key: str) -> Any:
    place: Any = config
    for part in key.split("."):
        if not isinstance(place, dict) or part not in place:
            raise MistakeError(f"${{{key}}}: no such key; without Hydra only other keys can be interpolated")
        place = place[part]
    return place


def _set(config: dict[str, Any], key: str, text: str) -> None:
    """Put a word's value where its key is. Raises MistakeError for an unknown key or a value of another kind."""
    *path, last = key.split(".")
    place: Any = config
    for depth, part in enumerate([*path, last]):
        known = [name for name in place if name != "_target_"] if isinstance(place, dict) else []
        if part not in known:
            near = difflib.get_close_matches(part, known, n=1)
            above = ".".join(path[:depth])
            meant = f"did you mean {near[0]}?" if near else f"{above or 'the configuration'} has {', '.join(known)}"
            raise MistakeError(f"{key}: unknown key; {meant}")
        if depth < len(path):
            place = place[part]
    place[last] = _typed(key, text, place[last])


def _typed(key: str, text: str, default: Any) -> Any:
    """The value that `text` says, of the default's kind; where the default is null, null or a scalar."""
    quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
    if isinstance(default, str) and not quoted:
        return text
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise MistakeError(f"{key}={text}: cannot be read as a value") from error
    if isinstance(value, str) and not quoted and _NUMBER.match(value):
        # YAML takes 1e-3 for a word.
        value = float(value)
    if isinstance(default, float) and type(value) is int:
        value = float(value)
    kind = type(default)
    fits = type(value) is kind if default is not None else value is None or not isinstance(value, dict | list)
    if not fits:
        raise MistakeError(f"{key}={text}: must be {KINDS[kind]}; the default is {default}")
    if isinstance(value, list) and any(type(entry) is not type(default[0]) for entry in value):
        raise MistakeError(f"{key}={text}: every entry must be {KINDS[type(default[0])]}")
    return value
