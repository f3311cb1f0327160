"""The jobs of one sweep, composed and run inside whichever process is asked to."""

import copy
import signal
import sys
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NamedTuple

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.core.singleton import Singleton
from hydra.core.utils import configure_log, run_job, setup_globals
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runs.endings import INTERRUPTED
from runs.mistakes import said

SUBDIR = "${hydra.job.num}"
Job = tuple[int, list[str]]
"""Number and overrides."""


class Outcome(NamedTuple):
    """A finished job: what it returned, or the error that it ended with."""

    number: int
    value: Any = None
    error: str | None = None


@dataclass
class Jobs:
    """Composes and runs the jobs of one sweep; the same in every process.

    Composing a configuration takes longer than a short run. Jobs that choose the same config groups differ in plain
    values only, so each such choice is composed once and the values are set on a copy.
    """

    context: HydraContext
    task: TaskFunction
    config: DictConfig
    bases: dict[tuple[str, ...], DictConfig] = field(default_factory=dict)
    parsed: dict[str, tuple[Override, bool]] = field(default_factory=dict)

    def run(self, job: Job) -> Outcome:
        """Run one job. Raises KeyboardInterrupt when it was told to stop; any other ending is an outcome."""
        number, overrides = job
        try:
            config = self.compose(number, overrides)
            if _needs_all_of_hydra(config):
                returned = run_job(
                    hydra_context=self.context,
                    task_function=self.task,
                    config=config,
                    job_dir_key="hydra.sweep.dir",
                    job_subdir_key="hydra.sweep.subdir",
                )
                return Outcome(number, returned.return_value)
            return Outcome(number, _run_light(self.task, config))
        except SystemExit as stop:
            if stop.code == INTERRUPTED:
                raise KeyboardInterrupt from None
            return Outcome(number, error=f"ended with exit status {stop.code}")
        except Exception as error:
            return Outcome(number, error=said(error, str(self.config.hydra.job.config_name), overrides))

    def compose(self, number: int, overrides: list[str]) -> DictConfig:
        """The configuration of one job, as Hydra composes it."""
        values = [self._parse(text) for text in overrides]
        # A folder named after the overrides needs Hydra's own account of them.
        shared = OmegaConf.to_container(self.config.hydra.sweep)["subdir"] == SUBDIR  # type: ignore[index,call-overload]
        plain = [override for override, is_plain in values if shared and is_plain]
        rest = tuple(str(override.input_line) for override, is_plain in values if not (shared and is_plain))
        if rest not in self.bases:
            base = self.context.config_loader.load_sweep_config(self.config, list(rest))
            # A job is one entry of the sweep; a long list of all of them would be copied with each.
            if "alternatives" in (base.hydra.get("sweeper") or {}):
                base.hydra.sweeper.alternatives = {}
            self.bases[rest] = base
        config = copy.deepcopy(self.bases[rest])
        for override in plain:
            OmegaConf.update(config, override.key_or_group, override.value(), merge=True)
        with open_dict(config):
            config.hydra.job.id = number
            config.hydra.job.num = number
            config.hydra.overrides.task = list(overrides)
            # Hundreds of jobs would each announce themselves.
            if "console" in config.hydra.job_logging.get("handlers", {}):
                config.hydra.job_logging.handlers.console.level = "WARNING"
        return config

    def _parse(self, text: str) -> tuple[Override, bool]:
        """An override, and whether it sets a plain value of the application's configuration."""
        if text not in self.parsed:
            loader = self.context.config_loader
            (override,) = OverridesParser.create(config_loader=loader).parse_overrides([text])
            key = override.key_or_group
            is_plain = (
                override.type == OverrideType.CHANGE
                and override.package is None
                and not key.startswith("hydra")
                and not loader.get_group_options(key)
            )
            self.parsed[text] = override, is_plain
        return self.parsed[text]


def _needs_all_of_hydra(config: DictConfig) -> bool:
    job = config.hydra.job
    return bool(config.hydra.callbacks or config.hydra.output_subdir or job.chdir or job.env_set)


def _run_light(task: TaskFunction, config: DictConfig) -> Any:
    """Hydra's `run_job` for a job that asks for none of its extras, without its five copies of the configuration."""
    # The folder's name may be made of Hydra's own settings.
    HydraConfig.instance().set_config(config)
    out = Path(config.hydra.sweep.dir, str(config.hydra.sweep.subdir)).resolve()
    with read_write(config.hydra.runtime), open_dict(config.hydra.runtime):
        config.hydra.runtime.output_dir = str(out)
    HydraConfig.instance().set_config(config)
    out.mkdir(parents=True, exist_ok=True)
    configure_log(config.hydra.job_logging, config.hydra.verbose)
    return task(OmegaConf.masked_copy(config, [str(key) for key in config if key != "hydra"]))


def work(jobs: Jobs, singletons: Any, pipe: Connection, others: Iterable[Connection]) -> None:
    """Be a worker: run the shares of jobs that come through `pipe`, answering each job, until an empty one comes.

    Args:
        jobs, singletons: of the sweep; the parent's Hydra state.
        pipe: to the parent.
        others: the parent's ends of pipes, which a forked process has inherited. While one is open here, the worker at
            its other end would not notice that the parent is gone.
    """
    # Ctrl-C reaches every process of a terminal: the parent decides. A worker that it stops unwinds, so that a run that
    # is being written cleans up after itself.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    for other in others:
        other.close()
    setup_globals()
    Singleton.set_state(singletons)
    try:
        # Without a parent there is nobody to work for.
        with suppress(EOFError, OSError):
            while share := pipe.recv():
                for job in share:
                    pipe.send(jobs.run(job))
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
