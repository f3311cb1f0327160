"""A sweep over alternatives: settings that belong together, such as a controller and its own parameters."""

import itertools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.core.config_loader import ConfigLoader
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from engine.files import locked

Settings = dict[str, str]
"""Sweep by key, in Hydra's syntax: `{"controller": "poster,analytic", "seed": "range(3)"}`."""


MOST_LISTED = 20
"""Failed jobs that are named at the end."""


class AlternativesSweeper(Sweeper):
    """Like Hydra's own sweeper, with unions: a grid of `fixed` settings beside the controllers that have none.

    Args:
        params: swept in every job, as Hydra's own sweeper does.
        alternatives: named axes, each a list of settings; a job takes one entry of every axis.

    The command line narrows a preset. A value given there replaces the preset's. A choice of a config group, say
    `controller=analytic`, keeps the entries of that choice only, with their other settings, and is run without any
    where no entry has it.
    """

    def __init__(
        self,
        params: Mapping[str, Any] | None = None,
        alternatives: Mapping[str, Sequence[Mapping[str, Any]]] | None = None,
    ) -> None:
        self.params = _texts(params or {})
        self.axes = [[_texts(entry) for entry in entries] for entries in (alternatives or {}).values()]
        self.hydra_context: HydraContext | None = None
        self.config: DictConfig | None = None
        self.launcher: Launcher | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `sweep`."""
        self.hydra_context = hydra_context
        self.config = config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> Any:
        """Launch every job; `arguments` are the command line's overrides."""
        assert self.config is not None
        assert self.hydra_context is not None
        assert self.launcher is not None
        # The folder's name may be made of Hydra's own settings.
        HydraConfig.instance().set_config(self.config)
        jobs = combine(self.params, self.axes, arguments, self.hydra_context.config_loader)
        folder = Path(self.config.hydra.sweep.dir)
        _refuse_folder_of_a_run(self.config, len(jobs))
        with locked(folder):
            OmegaConf.save(self.config, folder / "multirun.yaml")
            print(f"{len(jobs)} jobs, into {folder}", file=sys.stderr)
            returned = self.launcher.launch(jobs, initial_job_idx=0)
        failed = [job for job in zip(itertools.count(), returned) if job[1].status == JobStatus.FAILED]
        if failed:
            _list(failed, len(jobs))
            sys.exit(1)
        return returned


def _refuse_folder_of_a_run(config: DictConfig, jobs: int) -> None:
    # A folder may be named after what only a job has.
    given: Any = OmegaConf.to_container(config.hydra.overrides.hydra, resolve=False)
    for text in given:
        key, _, value = text.lstrip("+").partition("=")
        if key == "hydra.run.dir":
            print(
                f"hydra.run.dir={value} is of one run, and this is a sweep of {jobs} jobs: "
                f"set hydra.sweep.dir={value}, which gets a folder for each",
                file=sys.stderr,
            )
            sys.exit(2)


def _list(failed: Sequence[tuple[int, JobReturn]], jobs: int) -> None:
    """Say which jobs failed, and why."""
    print(f"{len(failed)} of {jobs} jobs failed:", file=sys.stderr)
    for number, job in failed[:MOST_LISTED]:
        # The property raises.
        print(f"  {number} ({' '.join(job.overrides or ())}): {job._return_value}", file=sys.stderr)
    if len(failed) > MOST_LISTED:
        print(f"  and {len(failed) - MOST_LISTED} more", file=sys.stderr)


def combine(
    params: Settings, axes: Sequence[Sequence[Settings]], arguments: Sequence[str], loader: ConfigLoader
) -> list[list[str]]:
    """Overrides of every job, the last axis varying fastest, so that jobs on the same requests are neighbours."""
    given = {override.get_key_element(): override for override in _parse(arguments, loader)}
    chosen = {key: _values(f"{key}={_text(o)}", loader) for key, o in given.items() if loader.get_group_options(key)}
    taken: set[str] = set()
    narrowed: list[list[Settings]] = []
    for entries in axes:
        kept, keys = _narrow(entries, chosen, loader)
        taken |= keys
        narrowed.append(kept)
    outer = [override.input_line or "" for key, override in given.items() if key not in taken]
    blocks = [_expand([*(f"{k}={v}" for k, v in params.items() if k not in given), *outer], loader)]
    for kept in narrowed:
        # What the command line gives as a value is in the first block; an axis must not repeat it.
        rows = [{k: v for k, v in entry.items() if k in taken or k not in given} for entry in kept]
        blocks.append([job for row in rows for job in _expand([f"{k}={v}" for k, v in row.items()], loader)])
    jobs = ([text for part in parts for text in part] for parts in itertools.product(*blocks))
    return [list(job) for job in dict.fromkeys(tuple(job) for job in jobs)]


def _narrow(
    entries: Sequence[Settings], chosen: Mapping[str, list[str]], loader: ConfigLoader
) -> tuple[list[Settings], set[str]]:
    """The entries that agree with the group choices of the command line, and the groups that they decide."""
    keys = {key for entry in entries for key in entry} & set(chosen)
    kept: list[Settings] = list(entries)
    for key in sorted(keys):
        agreeing: list[Settings] = []
        missing = list(chosen[key])
        for entry in kept:
            own = _values(f"{key}={entry[key]}", loader) if key in entry else chosen[key]
            common = [value for value in chosen[key] if value in own]
            missing = [value for value in missing if value not in common]
            if common:
                agreeing.append({**entry, key: ",".join(common)})
        kept = [*agreeing, {key: ",".join(missing)}] if missing else agreeing
    return kept, keys


def _parse(texts: Sequence[str], loader: ConfigLoader) -> list[Any]:
    return list(OverridesParser.create(config_loader=loader).parse_overrides(list(texts)))


def _expand(texts: Sequence[str], loader: ConfigLoader) -> list[list[str]]:
    (batch,) = BasicSweeper.split_arguments(_parse(texts, loader), None)
    return batch


def _values(text: str, loader: ConfigLoader) -> list[str]:
    return [job[0].split("=", 1)[1] for job in _expand([text], loader)]


def _text(override: Any) -> str:
    return str(override.input_line).split("=", 1)[1]


def _texts(settings: Mapping[str, Any]) -> Settings:
    """A list is a sweep over its entries; an escaped `\\${slo.ttft_target}` is the job's own, not the preset's."""
    plain = OmegaConf.to_container(settings, resolve=False) if isinstance(settings, DictConfig) else settings
    assert isinstance(plain, Mapping)
    return {
        str(key): ",".join(map(_written, value))
        if isinstance(value, Sequence) and not isinstance(value, str)
        else _written(value)
        for key, value in plain.items()
    }


def _written(value: Any) -> str:
    """A value as Hydra's command line reads it."""
    return "null" if value is None else str(value)
