"""Composition of this folder's configurations from Python, as the apps' command lines compose them."""

import difflib
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.utils import JobRuntime
from hydra.errors import HydraException
from hydra.version import VersionBase
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from engine.workload.records import ENDINGS, ending

CONF = Path(__file__).resolve().parent

_NO_CHOICE = re.compile(r"Could not find '([^']+)'")


class ChoiceError(ValueError):
    """A choice of a group cannot be composed; the message is one line that names it and what there is."""


def compose(name: str | None, overrides: Sequence[str]) -> DictConfig:
    """Return `conf/NAME.yaml`, or nothing, with the command line's words applied; `hydra` itself is left out.

    A Hydra job that runs in this process goes on undisturbed.

    Raises:
        HydraException, OmegaConfBaseException: a word that is refused.
    """
    with _own_hydra():
        return hydra.compose(name, list(overrides))


def compose_choice(group: str, choice: str, overrides: Sequence[str] = ()) -> DictConfig:
    """Return a choice of a group, or a yaml file of one's own, with everything that its defaults list names.

    Args:
        group: folder below `conf`.
        choice: name of a file in it, or a path that ends in `.yaml`.
        overrides: words `key=value` for keys of the choice.

    Raises:
        ChoiceError: no such choice, or a file or word that Hydra refuses.
    """
    package = group.replace("/", ".")
    quoted = choice.replace("\\", "\\\\").replace("'", "\\'")
    words = [f"+{group}='{quoted}'", *(f"++{package}.{word}" for word in overrides)]
    try:
        made = OmegaConf.select(compose(None, words), package)
    except (HydraException, OmegaConfBaseException) as error:
        raise ChoiceError(no_choice(error) or " ".join(str(error).split())) from error
    if not isinstance(made, DictConfig):
        raise ChoiceError(f"{group}={choice}: it holds no keys of {group}")
    return made


def no_choice(error: Exception) -> str | None:
    """What Hydra says of a choice that is not there, on one line with the nearest one; None for other errors."""
    found = _NO_CHOICE.search(str(error))
    if found is None:
        return None
    group, choice = _group_and_choice(found.group(1))
    known = sorted(file.stem for file in (CONF / group).glob("*.yaml"))
    near = difflib.get_close_matches(choice, known, n=1)
    if group == "workload" and ending(Path(choice)) in ENDINGS:
        meant = f"a trace is workload=trace workload.path={choice}"
    elif near:
        meant = f"did you mean {near[0]}?"
    else:
        meant = f"there are {', '.join(known)}" if known else "there is no such group"
    return f"{group}={choice}: no such choice; {meant}"


def _group_and_choice(name: str) -> tuple[str, str]:
    """Split GROUP/CHOICE where the groups of this folder end: a choice that is a path has slashes of its own."""
    parts = name.split("/")
    for depth in range(len(parts) - 1, 0, -1):
        if all(parts[:depth]) and (CONF / "/".join(parts[:depth])).is_dir():
            return "/".join(parts[:depth]), "/".join(parts[depth:])
    group, _, choice = name.rpartition("/")
    return group, choice


@contextmanager
def _own_hydra() -> Iterator[None]:
    """A Hydra for this folder; everything global that it replaces is put back."""
    outer, base = GlobalHydra.instance(), VersionBase.instance()
    kept = outer.hydra, base.version_base
    outer.clear()
    try:
        with hydra.initialize_config_dir(str(CONF), JobRuntime.instance().get("name"), version_base=None):
            yield
    finally:
        GlobalHydra.set_instance(outer)
        outer.hydra, base.version_base = kept
