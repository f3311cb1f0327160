"""Profiles on a machine that has torch, transformers, numpy, numba and scikit-learn, and not what the apps need beside.

The same command, configuration, files and exit codes as the Hydra app's; the same code measures.
"""

from __future__ import annotations

import difflib
import logging
import logging.config
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

from conf.plain import read_choice
from engine.backends.real import tokenizer_of
from engine.backends.torch.build import CHOICES, MAY_BE_ZERO, OPTIONAL_NUMBERS, build
from engine.files import locked
from engine.latency.predictors import Forest
from runs import measuring
from runs.bare_config import KINDS, compose, read_logging
from runs.endings import MistakeError, ending, named, stopped_by_sigterm
from runs.measured_folder import finish
from runs.profile_outcome import say
from runs.progress import progress

log = logging.getLogger("profile")

FINISH = "--finish"
TORCH_ENGINE = "engine.backends.torch.config.TorchEngineConfig"
"""What the engines are made into that can be profiled here."""

COMPLETE = "torch_tiny"
"""The engine whose file lists every setting."""


def main(arguments: Sequence[str]) -> None:
    """Measure as the command line says, or finish a folder. Exits as the Hydra app does."""
    logging.basicConfig(level=logging.INFO, format="%(levelname).1s %(message)s", force=True)
    with stopped_by_sigterm(), ending(log, "interrupted: the same command goes on from here"), named():
        if FINISH in arguments:
            folder = _folder(arguments)
            with locked(folder):
                result = finish(folder)
            say(result, folder, log)
            if result.missing:
                sys.exit(2)
        else:
            _measure(arguments)


def _folder(arguments: Sequence[str]) -> Path:
    if len(arguments) != 2 or arguments[0] != FINISH:
        raise MistakeError(f"{FINISH} FOLDER stands alone: everything else is read from the folder")
    return Path(arguments[1])


def _measure(words: Sequence[str]) -> None:
    config = compose("profile", words)
    out = Path(config["hydra"]["run"]["dir"])
    with locked(out):
        logging.config.dictConfig(read_logging(config))
        subject, wanted = configured(config)
        say(measuring.profile(subject, wanted, out, progress), out, log)


def configured(config: dict[str, Any]) -> tuple[measuring.Subject, SimpleNamespace]:
    """The engine and what is wanted of it. Raises ValueError naming the key of what is refused."""
    subject, wanted = _subject(config["engine"]), _wanted(config)
    measuring.check(wanted, subject.settings["prefill"])
    return subject, wanted


def _subject(section: dict[str, Any]) -> measuring.Subject:
    """The engine of a configuration's `engine` section."""
    if section["_target_"] != TORCH_ENGINE:
        raise MistakeError(
            f"engine: {section['_target_']} cannot be profiled without hydra-core, omegaconf and pydantic: install them"
        )
    made = engine_settings(section)
    return measuring.Subject(
        vars(made),
        partial(tokenizer_of, made.target, made.trust_remote_code),
        partial(build, made, ttft_target=1.0),
    )


def engine_settings(section: dict[str, Any]) -> SimpleNamespace:
    """A torch engine's settings as attributes. Raises MistakeError naming a missing key or an impossible value.

    `torch_tiny` lists every setting, each of its kind.
    """
    settings = {key: value for key, value in section.items() if key not in ("_target_", "profile")}
    listed = read_choice("engine", COMPLETE)
    missing = [key for key in listed if key not in settings and key not in ("_target_", "profile")]
    if missing:
        raise MistakeError(
            f"engine: {', '.join(missing)}: must be given without Hydra; begin the file with "
            f"defaults: [{COMPLETE}, _self_]"
        )
    for key, value in settings.items():
        if key not in listed:
            near = difflib.get_close_matches(key, listed, n=1)
            raise MistakeError(f"engine.{key}: unknown key" + (f"; did you mean {near[0]}?" if near else ""))
        if key in CHOICES and value not in get_args(CHOICES[key]):
            raise MistakeError(f"engine.{key}={value}: must be one of {', '.join(get_args(CHOICES[key]))}")
        kind = OPTIONAL_NUMBERS.get(key)
        if kind is not None and value is not None and type(value) is not kind:
            raise MistakeError(f"engine.{key}={value}: must be {KINDS[kind]} or null")
        may_be_zero = key in MAY_BE_ZERO or listed[key] == 0
        if type(value) in (int, float) and (value < 0 or (value == 0 and not may_be_zero)):
            raise MistakeError(f"engine.{key}={value}: must be above 0")
    return SimpleNamespace(**settings)


def _wanted(config: dict[str, Any]) -> SimpleNamespace:
    """Everything else, as attributes."""
    plain = ("minutes", "points", "seed")
    return SimpleNamespace(
        **{key: config[key] for key in plain},
        predictor=Forest(**_without_target(config["predictor"])),
        actions=SimpleNamespace(**_without_target(config["actions"])),
        speculation=SimpleNamespace(**_without_target(config["speculation"])),
    )


def _without_target(section: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in section.items() if key != "_target_"}
