"""Runs the jobs of a sweep in worker processes of this machine, several a second."""

import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from hydra.core.singleton import Singleton
from hydra.core.utils import JobReturn, JobStatus, setup_globals
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

# Hydra loads plugin files itself, except those whose names begin with an underscore: there a worker's state is safe.
from hydra_plugins.governor._jobs import INTERRUPTED, Jobs, begin, work

SECONDS_PER_NOTE = 10.0
MOST_PER_SHARE = 16
REAL_ENGINES = ("engine.backends.torch.", "engine.backends.vllm.")
"""Where the classes of engines that run in real time are."""


class ProcessLauncher(Launcher):
    """Worker processes that keep what the jobs share: imports, compiled code, workloads, composed configurations.

    Args:
        workers: processes; None: one per available core, or one in all where a job runs a real engine, whose times
            would be those of its neighbours. 1 runs the jobs in this process.

    The first job that fails ends the sweep with its exit status; what has finished stays.
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
        """Run all jobs; exits with a job's status when one fails."""
        assert self.jobs is not None
        setup_globals()
        jobs = {initial_job_idx + i: list(overrides) for i, overrides in enumerate(job_overrides)}
        finished: list[JobReturn] = []
        try:
            workers = self.workers or (1 if self._any_real(jobs) else available_cores())
            with _notes(len(jobs)) as note, _results(self.jobs, list(jobs.items()), workers) as results:
                for number, status in results:
                    if status != 0:
                        print(f"job {number} failed: {' '.join(jobs[number])}", file=sys.stderr)
                        sys.exit(status)
                    finished.append(JobReturn(overrides=jobs[number], status=JobStatus.COMPLETED))
                    note(len(finished))
        except KeyboardInterrupt:
            print(f"interrupted: {len(finished)} of {len(jobs)} jobs have finished", file=sys.stderr)
            sys.exit(INTERRUPTED)
        return finished

    def _any_real(self, jobs: Mapping[int, list[str]]) -> bool:
        """Whether a job's engine runs in real time."""
        assert self.jobs is not None
        # Engines are told apart by the choices of their group, each of which is looked at once.
        choices = {tuple(text for text in job if text.startswith("engine=")): number for number, job in jobs.items()}
        engines = (self.jobs.compose(number, jobs[number]).get("engine") for number in choices.values())
        return any(str((engine or {}).get("_target_", "")).startswith(REAL_ENGINES) for engine in engines)


@contextmanager
def _results(jobs: Jobs, numbered: list[tuple[int, list[str]]], workers: int) -> Iterator[Iterator[tuple[int, int]]]:
    """Yields (number, exit status) of jobs as they finish; leaving early stops the workers."""
    workers = min(workers, len(numbered))
    if workers <= 1:
        yield map(jobs.run, numbered)
        return
    # A forked worker inherits what is imported and compiled; elsewhere than on Linux forking is not safe.
    method = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    with method.Pool(workers, begin, (jobs, Singleton.get_state())) as pool:
        yield (result for results in pool.imap_unordered(work, _shares(numbered, workers)) for result in results)


def _shares(numbered: list[tuple[int, list[str]]], workers: int) -> list[list[tuple[int, list[str]]]]:
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
