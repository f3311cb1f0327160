"""The YAML files of this folder read without Hydra: a choice of a group, with what its defaults list names."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

CONF = Path(__file__).resolve().parent
SUFFIX = ".yaml"
OVERRIDE = "override "


class ChoiceError(ValueError):
    """A choice that is not there, or a file that cannot be read; the message names it and says what there is."""


def merged(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """A new mapping: `over` on top of `base`, mappings within merged likewise."""
    both = dict(base)
    for key, value in over.items():
        below = both.get(key)
        both[key] = merged(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return both


def read(path: Path) -> dict[str, Any]:
    """A YAML file that holds a mapping. Raises ChoiceError for any other."""
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ChoiceError(f"{path}: cannot be read as a configuration: {error}") from error
    if not isinstance(content, dict):
        raise ChoiceError(f"{path}: it holds no mapping of keys to values")
    return content


def read_choice(group: str, choice: str, chosen: Mapping[str, str] | None = None) -> dict[str, Any]:
    """A group's choice or own file, composed with what its defaults list names of the group and of groups below it.

    Args:
        group: folder below `conf`.
        choice: name of a file in it, or a path that ends in `.yaml`.
        chosen: choices of groups below that replace those of the defaults list.

    Raises:
        ChoiceError: no such choice, or a defaults list that needs Hydra.
    """
    path = Path(choice).expanduser() if choice.endswith(SUFFIX) else CONF / group / f"{choice}{SUFFIX}"
    if not path.is_file():
        known = sorted(file.stem for file in (CONF / group).glob(f"*{SUFFIX}"))
        near = difflib.get_close_matches(choice, known, n=1)
        meant = f"did you mean {near[0]}?" if near else f"give a path to a .yaml file, or one of: {', '.join(known)}"
        raise ChoiceError(f"{group}={choice}: no such file (from {Path.cwd()}); {meant}")
    content = read(path)
    entries = content.pop("defaults", [])
    below = [(key, name) for entry in entries if isinstance(entry, dict) for key, name in entry.items()]
    overrides = {key.removeprefix(OVERRIDE): name for key, name in below if key.startswith(OVERRIDE)}
    chosen = {**overrides, **(chosen or {})}
    made: dict[str, Any] = {}
    for entry in entries:
        if entry == "_self_":
            made = merged(made, content)
        elif isinstance(entry, str):
            made = merged(made, read_choice(group, entry, chosen))
        else:
            for key, name in entry.items():
                if not key.startswith(OVERRIDE):
                    made = merged(made, _read_below(path, group, key, chosen.get(key, name)))
    return merged(made, content)


def _read_below(path: Path, group: str, key: str, choice: str) -> dict[str, Any]:
    """What an entry `GROUP: CHOICE` or `GROUP@KEY: CHOICE` of a defaults list adds."""
    name, _, package = key.partition("@")
    if name.startswith("/") or "." in package:
        raise ChoiceError(f"{path}: defaults: {key}: without Hydra a file may name choices of its own group only")
    return {package or name: read_choice(f"{group}/{name}", choice)}
