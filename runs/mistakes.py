"""Turns what a user got wrong into one message that names the key and the fix."""

import difflib
import json
import logging
import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import hydra
import hydra.utils
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from pydantic import BaseModel, ValidationError

from conf.compose import CONF, ChoiceError, compose, compose_choice, no_choice
from engine.files import FileFaultError, locked
from runs import endings, whole
from runs.endings import INTERRUPTED, MistakeError, named, one_line
from runs.progress import compiling

__all__ = ["JobError", "MistakeError", "app", "ending", "explain", "in_sweep", "instantiate", "named", "said"]

Task = Callable[[DictConfig], Any]

T = TypeVar("T")

FAILURE = "failure.json"
"""What a failed job of a sweep leaves in its folder: its overrides, and the error."""

_NO_KEY = re.compile(r"Could not (?:override|delete from config\.) '([^']+)'|is not in struct\s+full_key: (\S+)")

NEAR = 0.5
"""Least likeness of a key that is offered for a mistyped one."""

_FULL_KEY = re.compile(r"full_key: (\S+)")


class JobError(RuntimeError):
    """A job of a sweep has failed and said so; launchers of all kinds pass it on, and the other jobs go on."""


def in_sweep() -> bool:
    """Whether this run is one job of a sweep."""
    return bool(HydraConfig.get().mode == RunMode.MULTIRUN)


def wants_traceback() -> bool:
    """Whether the user asked for tracebacks: HYDRA_FULL_ERROR=1 or hydra.verbose=true."""
    return endings.wants_traceback() or (HydraConfig.initialized() and bool(HydraConfig.get().verbose))


def app(name: str) -> Callable[[Task], Callable[[], None]]:
    """Make a Hydra job the command of the app with the configuration `conf/NAME.yaml`.

    What Hydra refuses of a command line, and what the system refuses before a job begins, are one message that names
    the nearest key or choice, and exit status 2.
    """

    def decorate(job: Task) -> Callable[[], None]:
        main = hydra.main(version_base=None, config_path="../conf", config_name=name)(job)

        def command() -> None:
            # A failing log file would print a traceback at every line.
            logging.raiseExceptions = endings.wants_traceback()
            try:
                with _raising(), endings.stopped_by_sigterm():
                    main()
            except (HydraException, OmegaConfBaseException, OSError, MistakeError, FileFaultError) as error:
                if wants_traceback():
                    raise
                print(f"E {said(error, name, sys.argv[1:])}", file=sys.stderr)
                sys.exit(2)
            except JobError:
                # Sweepers that end with the first failed job pass its error on.
                if wants_traceback():
                    raise
                sys.exit(1)
            except KeyboardInterrupt:
                print("E interrupted", file=sys.stderr)
                sys.exit(INTERRUPTED)

        return command

    return decorate


@contextmanager
def _raising() -> Iterator[None]:
    """Within, Hydra raises what it would print otherwise; programs that are started later are not told so."""
    before = os.environ.get(endings.FULL_ERROR)
    os.environ[endings.FULL_ERROR] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[endings.FULL_ERROR]
        else:
            os.environ[endings.FULL_ERROR] = before


def said(error: Exception, name: str, words: Sequence[str]) -> str:
    """What an error of the app `name` with this command line says, on one line."""
    if isinstance(error, HydraException | OmegaConfBaseException):
        return _refused(error, name, words)
    return endings.of_system(error) if isinstance(error, OSError) else one_line(error)


def _refused(error: Exception, name: str, words: Sequence[str]) -> str:
    """What Hydra or OmegaConf refuses, with what could have been meant instead."""
    said = str(error)
    if found := _NO_KEY.search(said):
        key = found.group(1) or found.group(2)
        return f"{key}: unknown key{_meant(key, _keys(name, words))}"
    if wrong := no_choice(error):
        return wrong
    if found := re.search(r"Error parsing override '(.*)'\n(.*)", said):
        word, reason = found.groups()
        return f"{word}: not of the form key=value ({reason}); quote it as in 'key=\"value\"' if it holds , : {{ [ or ="
    if found := re.search(r"Ambiguous value for argument '(.*)'", said):
        word = found.group(1)
        key, _, value = word.partition("=")
        return f"{word}: several values: add -m to run one job for each, or give a list as '{key}=[{value}]'"
    return " ".join(said.split()).split(" full_key:")[0]


def _meant(wrong: str, known: Sequence[str]) -> str:
    """The end of a message on a key that is not among the known ones."""
    section, _, last = wrong.rpartition(".")
    siblings = [key for key in known if key.rpartition(".")[0] == section]
    near = difflib.get_close_matches(wrong, siblings, n=1, cutoff=0.0) if section in known or not section else []
    if near and difflib.SequenceMatcher(None, last, near[0].rpartition(".")[2]).ratio() < NEAR:
        near = []
    # The right name in another section, or in one whose name is mistyped.
    elsewhere = [key for key in known if key.rpartition(".")[2] == last]
    near = near or difflib.get_close_matches(wrong, elsewhere, n=1, cutoff=NEAR) or elsewhere[:1]
    if not near and section and section not in known:
        near = difflib.get_close_matches(section, [key for key in known if "." not in key], n=1, cutoff=NEAR)
    if near:
        return f"; did you mean {near[0]}?"
    names = [key.rpartition(".")[2] for key in siblings or [key for key in known if "." not in key]]
    return f"; {section if siblings and section else 'the configuration'} has {', '.join(names)}" if names else ""


def _keys(name: str, words: Sequence[str]) -> list[str]:
    """All keys of the configuration that the command line chooses, as far as it can be composed."""
    groups = [word for word in words if (CONF / word.lstrip("+~").partition("=")[0]).is_dir() and "," not in word]
    for overrides in (groups, []):
        try:
            return [*_below(OmegaConf.to_container(compose(name, overrides), resolve=False), "")]
        except (HydraException, OmegaConfBaseException):
            continue
    return []


def _below(section: Any, prefix: str) -> Iterator[str]:
    for key, value in section.items() if isinstance(section, dict) else ():
        if key != "_target_":
            yield f"{prefix}{key}"
            yield from _below(value, f"{prefix}{key}.")


def instantiate(config: DictConfig, kind: type[T]) -> T:
    """The object that a config with `_target_`s describes. Raises MistakeError naming the key of what is refused."""
    try:
        if HydraConfig.initialized():
            whole.replace(config, _overrides("task"))
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
def ending(log: logging.Logger, interrupted: str, out: Path) -> Iterator[None]:
    """`endings.ending` of a Hydra app, during which no other process writes into its folder `out`.

    In a sweep any error is logged, left in `FAILURE` and raised as a JobError.
    """
    if not in_sweep():
        with endings.ending(log, interrupted, wants_traceback), _alone(out):
            _refuse_folder_of_a_sweep()
            yield
        return
    record = out / FAILURE
    try:
        with _alone(out):
            record.unlink(missing_ok=True)
            yield
    except KeyboardInterrupt:
        log.error("%s", interrupted)
        sys.exit(INTERRUPTED)
    except Exception as error:
        expected = isinstance(error, MistakeError) and not wants_traceback()
        log.error("%s", error, exc_info=None if expected else error)
        with suppress(OSError):
            left = {"overrides": _overrides("task"), "error": one_line(error)}
            record.write_text(json.dumps(left, indent=1) + "\n", encoding="utf-8")
        raise JobError(one_line(error)) from None


@contextmanager
def _alone(out: Path) -> Iterator[None]:
    """Within, no other process writes into the folder, and compilation is shown."""
    with ExitStack() as held:
        with named():
            held.enter_context(locked(out))
        held.enter_context(compiling())
        yield


def _overrides(of: str) -> list[str]:
    """The command line's overrides of the `task`, or of `hydra`, as they were given."""
    # Interpolations stay: what they name may be another job's, or not there yet.
    return [str(text) for text in OmegaConf.to_container(HydraConfig.get().overrides, resolve=False)[of]]  # type: ignore[index,call-overload]


def _refuse_folder_of_a_sweep() -> None:
    for text in _overrides("hydra"):
        key, _, value = text.lstrip("+").partition("=")
        if key in ("hydra.sweep.dir", "hydra.sweep.subdir"):
            raise MistakeError(f"{key}={value} is of a sweep, and this is one run: set hydra.run.dir, or sweep with -m")


_OTHER_CLASS = ("model_type", "model_class_type", "dataclass_type", "dataclass_exact_type", "is_instance_of")
"""Pydantic's errors for an object of another class, one for each member of a union."""

_KEY_PART = re.compile(r"(?!(?:int|float|str|bool|none)$)[a-z_]\w*$|\d+$")
"""Parts of a place that are keys; the others say which member of a union was tried."""


def explain(error: ValidationError, prefix: str, config: DictConfig | None = None) -> str:
    """A pydantic error as one line per key: `engine.max_num_seqs=0: Input should be greater than ...`."""
    lines: dict[str, list[str]] = {}
    others: dict[str, list[str]] = {}
    for entry in error.errors():
        key = ".".join([*([prefix] if prefix else []), *_place(entry)])
        if entry["type"] in _OTHER_CLASS and not isinstance(entry["input"], dict | str | int | float | list | None):
            others.setdefault(key, []).append(str(entry.get("ctx", {}).get("class_name") or entry["ctx"]["class"]))
            continue
        line = _line(entry, key, prefix, config)
        if line not in lines.setdefault(key, []):
            lines[key].append(line)
    said = [line for found in lines.values() for line in found]
    for key, kinds in others.items():
        choices = _choices(key, kinds)
        wanted = f"choose {key}={', '.join(choices)}" if choices else f"a {' or '.join(kinds)} is needed"
        said.append(f"{key}: {_chosen(key)}cannot be used here; {wanted}")
    return "\n".join(said)


def _place(entry: Any) -> list[str]:
    return [str(part) for part in entry["loc"] if _KEY_PART.match(str(part))]


def _chosen(group: str) -> str:
    choice = HydraConfig.get().runtime.choices.get(group) if HydraConfig.initialized() else None
    return f"{group}={choice} " if choice else ""


def _choices(group: str, kinds: Sequence[str]) -> list[str]:
    """The choices of a group that are made into one of these classes."""
    found = []
    for path in sorted((CONF / group).glob("*.yaml")):
        try:
            target = str(compose_choice(group, path.stem).get("_target_", ""))
        except ChoiceError:
            continue
        if target.rpartition(".")[2] in kinds:
            found.append(path.stem)
    return found


def _line(entry: Any, key: str, prefix: str, config: DictConfig | None) -> str:
    message = entry["msg"].removeprefix("Value error, ")
    last = str(entry["loc"][-1]) if entry["loc"] else ""
    if entry["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        return f"{key}: unknown key{_known(prefix, last, config)}"
    if entry["type"] == "missing":
        return f"{key}: must be given"
    if last and message.startswith(f"{last}="):
        return key.removesuffix(last) + message
    if last and not isinstance(entry["input"], dict | BaseModel):
        return f"{key}={entry['input']!r}: {message}"
    return f"{key}: {message}" if key else message


def _known(prefix: str, wrong: str, config: DictConfig | None) -> str:
    """What could have been meant, from the model that the section is made into."""
    section = config if config is None or not prefix else OmegaConf.select(config, prefix)
    target = section.get("_target_") if isinstance(section, DictConfig) else None
    model = hydra.utils.get_class(target) if target else None
    keys = list(getattr(model, "__pydantic_fields__", {}))
    near = difflib.get_close_matches(wrong, keys, n=1)
    if near:
        return f"; did you mean {near[0]}?"
    return f"; {model.__name__} has {', '.join(keys)}" if model is not None and keys else ""
