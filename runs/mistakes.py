"""Turns what a user got wrong into one message that names the key and the fix."""

import difflib
import json
import logging
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from runs import endings
from runs.endings import MistakeError, named, one_line

__all__ = ["JobError", "MistakeError", "ending", "explain", "in_sweep", "instantiate", "named"]

T = TypeVar("T")

FAILURE = "failure.json"
"""What a failed job of a sweep leaves in its folder: its overrides, and the error."""

_FULL_KEY = re.compile(r"full_key: (\S+)")


class JobError(RuntimeError):
    """A job of a sweep has failed and said so; launchers of all kinds pass it on, and the other jobs go on."""


def in_sweep() -> bool:
    """Whether this run is one job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks: HYDRA_FULL_ERROR=1 or hydra.verbose=true."""
    return endings.wants_traceback() or bool(HydraConfig.get().verbose)


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
        raise MistakeError(f"{key}: {one_line(cause)}" if key else one_line(cause)) from error
    except OmegaConfBaseException as error:
        raise MistakeError(one_line(error)) from error
    if not isinstance(made, kind):
        raise MistakeError(f"_target_ must be a {kind.__name__}, not {type(made).__name__}")
    return made


@contextmanager
def ending(log: logging.Logger, interrupted: str) -> Iterator[None]:
    """`endings.ending` of a Hydra app. In a sweep any error is logged, left in `FAILURE` and raised as a JobError."""
    if not in_sweep():
        with endings.ending(log, interrupted, wants_traceback):
            _refuse_folder_of_a_sweep()
            yield
        return
    record = Path(HydraConfig.get().runtime.output_dir, FAILURE)
    record.unlink(missing_ok=True)
    try:
        yield
    except KeyboardInterrupt:
        log.error("%s", interrupted)
        sys.exit(130)
    except Exception as error:
        expected = isinstance(error, MistakeError) and not wants_traceback()
        log.error("%s", error, exc_info=None if expected else error)
        with suppress(OSError):
            left = {"overrides": list(HydraConfig.get().overrides.task), "error": one_line(error)}
            record.write_text(json.dumps(left, indent=1) + "\n", encoding="utf-8")
        raise JobError(one_line(error)) from None


def _refuse_folder_of_a_sweep() -> None:
    for text in HydraConfig.get().overrides.hydra:
        key, _, value = text.lstrip("+").partition("=")
        if key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
            raise MistakeError(f"{key}={value} is of a sweep, and this is one run: set hydra.run.dir, or sweep with -m")


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
