"""Runs the jobs of a sweep in worker processes of this machine, several a second."""

import itertools
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.errors import HydraException
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException

from engine.signals import handled

# Hydra loads plugin files itself, except those whose names begin with an underscore: there a worker's state is safe.
from hydra_plugins.governor._jobs import INTERRUPTED, Job, Jobs, Outcome
from hydra_plugins.governor._workers import Workers

SECONDS_PER_NOTE = 10.0
MOST_PER_SHARE = 16
REAL_ENGINES = ("engine.backends.torch.", "engine.backends.vllm.")
"""Where the classes of engines that run in real time are."""


class ProcessLauncher(Launcher):
    """Worker processes that keep what the jobs share: imports, compiled code, workloads, composed configurations.

    Args:
        workers: processes; None: one per available core, or one in all where a job runs a real engine, whose times
            would be those of its neighbours. 1 runs the jobs in this process.

    A job that fails, or whose process dies, is returned as failed; the others go on. Who asked for the sweep is told by
    its sweeper.
    """

    def __init__(self, workers: int | None = None) -> None:
        self.workers = workers
        if workers is not None and workers < 1:
            raise ValueError(f"hydra.launcher.workers={workers} must be at least 1, or null for one per core")
        self.jobs: Jobs | None = None

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Called by Hydra before `launch`."""
        self.jobs = Jobs(hydra_context, task_function, config)

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        """Run all jobs; exits with 130 on Ctrl-C or SIGTERM."""
        assert self.jobs is not None
        setup_globals()
        jobs = {initial_job_idx + i: list(overrides) for i, overrides in enumerate(job_overrides)}
        finished: dict[int, JobReturn] = {}
        try:
            workers = self.workers or (1 if self._any_real(jobs) else available_cores())
            # The workers are there before anything that may begin a thread.
            with (
                handled(signal.default_int_handler, signal.SIGTERM),
                _outcomes(self.jobs, list(jobs.items()), workers) as outcomes,
                _notes(len(jobs)) as note,
            ):
                for outcome in outcomes:
                    finished[outcome.number] = _returned(jobs[outcome.number], outcome)
                    note(len(finished))
        except KeyboardInterrupt:
            folder = self.jobs.config.hydra.sweep.dir
            print(f"interrupted: {len(finished)} of {len(jobs)} jobs have finished, in {folder}", file=sys.stderr)
            if "resume" in self.jobs.config:
                print(f"the same command with hydra.sweep.dir={folder} goes on from there", file=sys.stderr)
            sys.exit(INTERRUPTED)
        return [finished[number] for number in jobs]

    def _any_real(self, jobs: Mapping[int, list[str]]) -> bool:
        """Whether a job's engine runs in real time."""
        # Engines are told apart by the choices that decide their group, each of which is composed once.
        choices = {tuple(text for text in job if text.startswith(("engine=", "experiment="))) for job in jobs.values()}
        return any(self._engine(choice).startswith(REAL_ENGINES) for choice in choices)

    def _engine(self, choice: Sequence[str]) -> str:
        """Class of the engine that these overrides choose; none where there is no such engine, as its jobs will say."""
        assert self.jobs is not None
        try:
            return str((self.jobs.compose(0, list(choice)).get("engine") or {}).get("_target_", ""))
        except (HydraException, OmegaConfBaseException):
            return ""


def _returned(overrides: list[str], outcome: Outcome) -> JobReturn:
    if outcome.error is None:
        return JobReturn(overrides=overrides, _return_value=outcome.value, status=JobStatus.COMPLETED)
    return JobReturn(overrides=overrides, _return_value=RuntimeError(outcome.error), status=JobStatus.FAILED)


@contextmanager
def _outcomes(jobs: Jobs, numbered: list[Job], workers: int) -> Iterator[Iterator[Outcome]]:
    """Yields the jobs' outcomes as they finish; leaving early stops the workers."""
    workers = min(workers, len(numbered))
    if workers <= 1:
        yield map(jobs.run, numbered)
        return
    with Workers(jobs, _shares(numbered, workers), workers) as crew:
        yield crew.outcomes()


def _shares(numbered: list[Job], workers: int) -> list[list[Job]]:
    """The jobs in shares of neighbours, which have requests in common, taken from both ends in turn.

    Where nothing is compiled yet, workers that began side by side would all compile the same controller.
    """
    size = max(1, min(MOST_PER_SHARE, len(numbered) // (4 * workers)))
    shares = [numbered[i : i + size] for i in range(0, len(numbered), size)]
    half = (len(shares) + 1) // 2
    back = [list(reversed(share)) for share in reversed(shares[half:])]
    turns = itertools.zip_longest(shares[:half], back)
    return [share for turn in turns for share in turn if share is not None]


@contextmanager
def _notes(total: int) -> Iterator[Any]:
    """Yields a function of the jobs finished: a progress bar on a terminal, else a line now and then."""
    begin = last = time.monotonic()
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn, TimeRemainingColumn

        columns = ("Jobs", BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bars:
            task = bars.add_task("", total=total)
            yield lambda finished: bars.update(task, completed=finished)
        return

    def note(finished: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last >= SECONDS_PER_NOTE or finished == total:
            last = now
            print(f"{finished} of {total} jobs, {now - begin:.0f} s", file=sys.stderr, flush=True)

    yield note


def available_cores() -> int:
    """Cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
