"""The compiled event loop: an instance of the engine under a policy, in virtual time.

A policy is two compiled functions and their data: `look(state, i, seen, observation)` writes the observation of
instance i, and `decide(observation, i, params, memory)` returns (c, n). `bind` compiles them into a loop.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import FunctionType
from typing import Any, NamedTuple

import numpy as np

from engine.compiled import kernel
from engine.core.deadlines import advance_clock
from engine.core.feed import Feed, deliver, settle
from engine.core.scheduler import commit, plan
from engine.core.state import State
from engine.core.telemetry import observe
from engine.latency.table_file import LatencyTables
from engine.simulator.candidates import (
    CHAINS,
    AcceptanceTrace,
    Sharing,
    accept_chains,
    accept_shared,
    share_candidates,
)
from engine.simulator.timing import batch_time, reading_time

ITERATION = np.dtype(
    [
        ("start_s", np.float64),
        ("end_s", np.float64),
        ("candidates", np.int32),
        ("token_budget", np.int32),
        ("num_decodes", np.int32),
        ("num_prefills", np.int32),
        ("prefill_tokens", np.int32),
        ("decode_tokens", np.int32),
        ("emitted_tokens", np.int32),
        ("kv_tokens", np.int32),
        ("waiting", np.int32),
    ]
)
"""One row of `iterations.parquet`; `kv_tokens` are the decoding requests' cached tokens before the iteration."""


class System(NamedTuple):
    """A simulated system: scheduler state, future arrivals, latency tables, and acceptance."""

    state: State
    feed: Feed
    tables: LatencyTables
    sharing: Sharing
    trace: AcceptanceTrace


@kernel
def run_iteration(system, i, candidates, token_budget, decision_s):
    """Decide, plan, run and commit one iteration of an instance that has work, then settle.

    `decision_s` is charged to the clock first, and requests that arrive meanwhile can join the batch. Returns False
    when no request is left.
    """
    state, feed, tables = system.state, system.feed, system.tables
    if decision_s > 0.0:
        advance_clock(state, i, state.instances[i].now + decision_s)
        deliver(state, i, feed)
    plan(state, i, candidates, token_budget)
    if system.sharing.kind == CHAINS:
        accept_chains(state, i, system.trace)
    else:
        share_candidates(state, i, system.sharing, system.trace, tables)
        accept_shared(state, i, system.sharing)
    commit(state, i, batch_time(state, i, tables) + reading_time(state, i, tables))
    return settle(state, i, feed)


@kernel
def log_iteration(state, i, log, row):
    """Copy the iteration committed last into `log[row]`."""
    instance = state.instances[i]
    batch = state.batches[i]
    line = log[row]
    line.start_s = instance.last_end - batch.elapsed
    line.end_s = instance.last_end
    line.candidates = batch.candidates
    line.token_budget = batch.token_budget
    line.num_decodes = batch.num_decodes
    line.num_prefills = batch.num_prefills
    line.prefill_tokens = batch.prefill_tokens
    line.decode_tokens = batch.decode_tokens
    line.emitted_tokens = batch.emitted_tokens
    line.kv_tokens = batch.decode_kv_tokens
    line.waiting = instance.num_waiting


def run_instance(system, i, seen, observation, params, memory, decision_s, max_iterations, log):
    """Run instance `i` for at most `max_iterations`; returns (iterations run, whether any work is left).

    A loop for `bind`. An empty `log` records nothing.
    """
    state = system.state
    recording = len(log) > 0
    for row in range(max_iterations):
        look(state, i, seen, observation)  # type: ignore[name-defined]  # noqa: F821
        candidates, token_budget = decide(observation, i, params, memory)  # type: ignore[name-defined]  # noqa: F821
        more = run_iteration(system, i, candidates, token_budget, decision_s)
        if recording:
            log_iteration(state, i, log, row)
        if not more:
            return row + 1, False
    return max_iterations, True


@cache
def bind(loop: Callable[..., Any], *, decide: Any, look: Any = observe) -> Any:
    """Compile a loop of this file with the compiled functions of a policy in it.

    They become globals of a copy of the loop. A function passed as an argument would be recompiled in every process,
    because numba looks up cached code by name and types, and a function's type differs in every process. The copy's
    name therefore contains the names of its functions and a digest of the file of `decide`, so that an edited
    controller is compiled again.
    """
    bound = FunctionType(loop.__code__, {**globals(), "decide": decide, "look": look}, loop.__name__)
    policy = decide.py_func
    bound.__module__ = policy.__module__
    bound.__qualname__ = ".".join(
        (loop.__name__, look.py_func.__qualname__, policy.__module__, policy.__qualname__, _digest(policy))
    )
    return kernel(bound)


def _digest(function: Callable[..., Any]) -> str:
    """Eight digits of the file that holds a function, or of its code where there is none."""
    try:
        content = Path(inspect.getfile(function)).read_bytes()
    except (OSError, TypeError):
        content = function.__code__.co_code
    return hashlib.sha256(content).hexdigest()[:8]
