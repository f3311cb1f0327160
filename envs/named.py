"""Workloads by the names that the apps' `workload=NAME` has: the choices of `conf/workload`, read without Hydra."""

from importlib import import_module
from typing import Any

from conf.plain import read_choice
from engine.workload.source import WorkloadSource

MISSING = "???"
"""Value of a setting that has no default."""


def named_workload(name: str) -> WorkloadSource:
    """The source that `conf/workload/NAME.yaml`, or a yaml file of one's own, describes.

    Raises:
        ValueError: no such name, or a source with a setting that must be given.
    """
    settings = read_choice("workload", name)
    wanted = [key for key, value in settings.items() if value == MISSING]
    if wanted:
        kind = str(settings["_target_"]).rpartition(".")[2]
        raise ValueError(f"workload={name!r} has no default for {', '.join(wanted)}: give a {kind}({wanted[0]}=...)")
    made = _made(settings)
    if not isinstance(made, WorkloadSource):
        raise ValueError(f"workload={name!r} describes a {type(made).__name__}, which is no workload")
    return made


def _made(value: Any) -> Any:
    """The object that nested mappings with `_target_` describe."""
    if isinstance(value, list):
        return [_made(entry) for entry in value]
    if not isinstance(value, dict):
        return value
    settings = {key: _made(entry) for key, entry in value.items() if key != "_target_"}
    if "_target_" not in value:
        return settings
    module, _, kind = str(value["_target_"]).rpartition(".")
    return getattr(import_module(module), kind)(**settings)
