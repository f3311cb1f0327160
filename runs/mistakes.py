"""Turns what a user got wrong into one message that names the key and the fix."""

import difflib
import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

T = TypeVar("T")

_FULL_KEY = re.compile(r"full_key: (\S+)")


class MistakeError(ValueError):
    """Something the user can fix; the message says what and how."""


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks: HYDRA_FULL_ERROR=1 or hydra.verbose=true."""
    return os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0") or bool(HydraConfig.get().verbose)


def instantiate(config: DictConfig, kind: type[T]) -> T:
    """The object that a config with `_target_`s describes. Raises MistakeError naming the key of what is refused."""
    try:
        made = hydra.utils.instantiate(config, _convert_="all")
    except MissingMandatoryValue as error:
        raise MistakeError(f"{error.full_key} must be given, for example {error.full_key}=VALUE") from error
    except InstantiationException as error:
        found = _FULL_KEY.search(str(error))
        key = found.group(1) if found else ""
        if isinstance(error.__cause__, ValidationError):
            raise MistakeError(explain(error.__cause__, key, config)) from error
        cause = error.__cause__ if error.__cause__ is not None else error
        raise MistakeError(f"{key}: {_one_line(cause)}" if key else _one_line(cause)) from error
    except OmegaConfBaseException as error:
        raise MistakeError(_one_line(error)) from error
    if not isinstance(made, kind):
        raise MistakeError(f"_target_ must be a {kind.__name__}, not {type(made).__name__}")
    return made


@contextmanager
def named() -> Iterator[None]:
    """Passes a ValueError from within on as a MistakeError: the packages' errors already name file, row or key."""
    try:
        yield
    except ValueError as error:
        raise MistakeError(_one_line(error)) from error


@contextmanager
def ending(log: logging.Logger, interrupted: str) -> Iterator[None]:
    """Ends an app: with 2 and one message on what the user can fix, with 130 and `interrupted` on Ctrl-C."""
    try:
        yield
    except MistakeError as mistake:
        if wants_traceback():
            raise
        log.error("%s", mistake)
        sys.exit(2)
    except KeyboardInterrupt:
        log.error("%s", interrupted)
        sys.exit(130)


def explain(error: ValidationError, prefix: str, config: DictConfig | None = None) -> str:
    """A pydantic error as one line per key: `engine.max_num_seqs=0: Input should be greater than ...`."""
    return "\n".join(_line(entry, prefix, config) for entry in error.errors())


def _line(entry: Any, prefix: str, config: DictConfig | None) -> str:
    key = ".".join([*([prefix] if prefix else []), *(str(part) for part in entry["loc"])])
    message = entry["msg"].removeprefix("Value error, ")
    if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key{_known(prefix, str(entry['loc'][-1]), config)}"
    if entry["type"] == "missing":
        return f"{key}: must be given"
    if entry["loc"] and message.startswith(f"{entry['loc'][-1]}="):
        return key.removesuffix(str(entry["loc"][-1])) + message
    if entry["loc"] and not isinstance(entry["input"], dict | BaseModel):
        return f"{key}={entry['input']!r}: {message}"
    return f"{key}: {message}" if key else message


def _known(prefix: str, wrong: str, config: DictConfig | None) -> str:
    """What could have been meant, from the model that the section is made into."""
    from omegaconf import OmegaConf

    section = config if config is None or not prefix else OmegaConf.select(config, prefix)
    target = section.get("_target_") if isinstance(section, DictConfig) else None
    model = hydra.utils.get_class(target) if target else None
    keys = list(getattr(model, "__pydantic_fields__", {}))
    near = difflib.get_close_matches(wrong, keys, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {model.__name__} has {', '.join(keys)}" if model is not None and keys else ""


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
