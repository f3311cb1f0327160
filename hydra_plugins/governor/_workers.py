"""Worker processes for the jobs of a sweep. Each has a pipe of its own, so that no lock is shared."""

import multiprocessing
import signal
import sys
from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from hydra.core.singleton import Singleton

from hydra_plugins.governor._jobs import Job, Jobs, Outcome, work

SECONDS_TO_END = 30.0
"""Longest that a process is waited for that has finished, or was told to stop, before it is killed."""


@dataclass
class _Worker:
    process: BaseProcess
    share: deque[Job] = field(default_factory=deque)
    """Jobs that it was given and has not answered; the first is the one it runs."""


class Workers:
    """Processes that run shares of jobs. Used as a context; leaving it ends them, at once where work is left.

    Args:
        jobs: runs a job, in any process.
        shares: jobs that one process runs one after the other.
        count: processes.
    """

    def __init__(self, jobs: Jobs, shares: list[list[Job]], count: int) -> None:
        self._jobs = jobs
        self._shares = deque(shares)
        self._ended: list[BaseProcess] = []
        self._workers: dict[Connection, _Worker] = {}
        # A forked worker inherits what is imported and compiled; elsewhere than on Linux forking is not safe.
        self._context: Any = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
        for _ in range(min(count, len(shares))):
            self._start()

    def __enter__(self) -> "Workers":
        return self

    def __exit__(self, *_: object) -> None:
        stopped = [worker.process for worker in self._workers.values()]
        for process in stopped:
            process.terminate()
        for process in (*self._ended, *stopped):
            process.join(SECONDS_TO_END)
            if process.exitcode is None:
                process.kill()
                process.join()

    def outcomes(self) -> Iterator[Outcome]:
        """The outcome of every job as it finishes; of one whose process dies, the death."""
        while self._workers:
            ready = wait(list(self._workers))
            for pipe in [pipe for pipe in self._workers if pipe in ready]:
                worker = self._workers[pipe]
                try:
                    outcome = pipe.recv()
                except (EOFError, OSError):
                    yield self._bury(pipe)
                    continue
                worker.share.popleft()
                if not worker.share:
                    self._give(pipe)
                yield outcome

    def _start(self) -> None:
        ours, its = self._context.Pipe()
        inherited = [*self._workers, ours] if self._context.get_start_method() == "fork" else []
        process = self._context.Process(
            target=work, args=(self._jobs, Singleton.get_state(), its, inherited), daemon=True
        )
        process.start()
        its.close()
        self._workers[ours] = _Worker(process)
        self._give(ours)

    def _give(self, pipe: Connection) -> None:
        """Give a worker its next share, or let it go."""
        worker = self._workers[pipe]
        if self._shares:
            worker.share = deque(self._shares.popleft())
        # One that has died in the meantime is found dead at the next look.
        with suppress(OSError):
            pipe.send(list(worker.share))
        if not worker.share:
            self._ended.append(self._workers.pop(pipe).process)

    def _bury(self, pipe: Connection) -> Outcome:
        """Replace a worker that has died; its other jobs are anybody's again."""
        worker = self._workers.pop(pipe)
        pipe.close()
        worker.process.join()
        number, _ = worker.share.popleft()
        if worker.share:
            self._shares.appendleft(list(worker.share))
        if self._shares:
            self._start()
        code = worker.process.exitcode or 0
        return Outcome(number, error=f"its process ended with {signal.Signals(-code).name if code < 0 else code}")
