"""A recorded run of a real engine, and the shared scheduler run again with its times and acceptances.

The replay is the simulator with recorded durations, drafts, acceptances, stop tokens and cancellations. It must give
the timeline of the real run, request by request; any deviation is a difference between the two backends.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.feed import arrive, new_feed
from engine.core.live import append, for_limits, stop_after
from engine.core.membership import cancel
from engine.core.redistribute import redistribute
from engine.core.scheduler import commit, plan
from engine.core.state import State
from engine.files import read_arrays, write_arrays
from engine.limits import EngineLimits

REQUEST = np.dtype([("arrival", np.float64), ("prompt", np.int64), ("output", np.int64)])
ITERATION = np.dtype(
    [
        ("start", np.float64),  # s
        ("elapsed", np.float64),  # s
        ("candidates", np.int64),
        ("token_budget", np.int64),
        ("num_decodes", np.int64),
    ]
)
DECODE = np.dtype([("tokens", np.int64), ("accepted", np.int64), ("reach", np.int64)])
STOP = np.dtype([("iteration", np.int64), ("request", np.int64), ("tokens", np.int64)])
CANCELLATION = np.dtype([("iteration", np.int64), ("request", np.int64)])


_TABLES = {
    "requests": REQUEST,
    "iterations": ITERATION,
    "decodes": DECODE,
    "stops": STOP,
    "cancellations": CANCELLATION,
}


class ReplayError(ValueError):
    """A recording does not match the engine it is replayed on; the message names the first difference."""


@dataclass
class Recording:
    """Events of a run, in order.

    requests: with the requested output limit · iterations · decodes: (tokens verified, candidates accepted,
    `state.reach`) of every decode of every iteration · stops: the tokens a request emitted in the iteration that ended
    it · cancellations: before which iteration.
    """

    requests: list[tuple[float, int, int]] = field(default_factory=list)
    iterations: list[tuple[float, float, int, int, int]] = field(default_factory=list)
    decodes: list[tuple[int, int, int]] = field(default_factory=list)
    stops: list[tuple[int, int, int]] = field(default_factory=list)
    cancellations: list[tuple[int, int]] = field(default_factory=list)

    def save(self, path: str | Path) -> None:
        """Write a compressed `.npz`."""
        tables: dict[str, Any] = {name: np.array(getattr(self, name), dtype) for name, dtype in _TABLES.items()}
        write_arrays(Path(path), tables)

    @classmethod
    def load(cls, path: str | Path) -> Recording:
        """Read a file written by `save`. Raises FileFaultError."""
        return cls(**{name: column.tolist() for name, column in read_arrays(Path(path), _TABLES).items()})


def replay(
    recording: Recording,
    limits: EngineLimits,
    ttft_target: float,
    on_plan: Callable[[State], Any] | None = None,
) -> State:
    """Return the scheduler's state after the recorded run; its request table holds the recorded requests in order.

    `on_plan` sees the state of every iteration once its batch is planned, before a drafter proposed its candidates.

    Raises `ReplayError` when the engine plans another batch than the one recorded, which means that `limits` are not
    those of the recorded engine.
    """
    state = for_limits(limits, max(1, len(recording.requests)), ttft_target)
    feed = new_feed(1)
    for arrival, prompt, output in recording.requests:
        append(state, feed, arrival, prompt, output)
    decodes: NDArray[np.int64] = np.array(recording.decodes, dtype=np.int64).reshape(-1, 3)
    stops, cancellations = list(recording.stops), list(recording.cancellations)
    used = 0
    for iteration, (start, elapsed, candidates, token_budget, num_decodes) in enumerate(recording.iterations):
        while cancellations and cancellations[0][0] == iteration:
            cancel(state, 0, cancellations.pop(0)[1])
        arrive(state, 0, feed, start)
        if not plan(state, 0, candidates, token_budget) or state.batches["num_decodes"][0] != num_decodes:
            raise ReplayError(
                f"iteration {iteration} at {start:.6f} s: the recorded engine decoded {num_decodes} requests, the "
                f"replay plans {state.batches['num_decodes'][0]}; replay with the recorded engine's limits"
            )
        if on_plan is not None:
            on_plan(state)
        rows = decodes[used : used + num_decodes]
        used += num_decodes
        redistribute(state, 0, rows[:, 0])
        state.accepted[0, :num_decodes] = rows[:, 1]
        state.reach[0, :num_decodes] = rows[:, 2]
        while stops and stops[0][0] == iteration:
            stop_after(state, 0, *stops.pop(0)[1:])
        commit(state, 0, elapsed)
    for _, request in cancellations:
        cancel(state, 0, request)
    return state
