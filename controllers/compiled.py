"""Controllers whose decision is a compiled function, and the simulator's loop around it."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from controllers.controller import CompiledController, batched
from engine.backends.simulator import CompiledLoop, Simulator, log_iteration, run_iteration
from engine.compiled import kernel
from engine.core.telemetry import observe

Decide = Callable[..., tuple[int, int]]
"""A kernel `decide(observation, e, rules) -> (c, n)` in tokens; `rules` is a tuple that holds settings and memory."""


def _governed(state, tables, draws, observation, rules, decision_s, max_iterations, log):
    recording = len(log) > 0
    for row in range(max_iterations):
        observe(state, 0, observation)
        candidates, token_budget = decide(observation, 0, rules)  # type: ignore[name-defined]  # noqa: F821
        more = run_iteration(state, 0, tables, draws, candidates, token_budget, decision_s)
        if recording:
            log_iteration(state, 0, log, row)
        if not more:
            return row + 1, False
    return max_iterations, True


@cache
def governed(decide: Any) -> Any:
    """The compiled run loop that asks `decide` before every iteration.

    `decide` is bound as a global of a function of its own, named after its module: a function passed as an argument
    would be compiled anew in every process, because numba finds compiled code on disk by name and by types, and a
    function's type is never the same twice.
    """
    template = {**globals(), "decide": decide}
    loop = FunctionType(_governed.__code__, template, "governed")
    loop.__module__ = decide.py_func.__module__
    loop.__qualname__ = f"governed.{decide.py_func.__qualname__}"
    return kernel(loop)


class KernelController(CompiledController):
    """A controller whose decision is one kernel, which `choose` and the compiled loop share.

    Subclasses set `decide` and give `rules`.
    """

    decide: ClassVar[Any]
    """The compiled decision (see `Decide`), in a `staticmethod`."""

    @property
    @abstractmethod
    def rules(self) -> Any:
        """What `decide` reads and keeps: a tuple of numbers and arrays, the same arrays through a run."""

    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
        """The compiled decision, called from Python."""
        candidates, token_budget = self.decide(batched(observation), 0, self.rules)
        return int(candidates), int(token_budget)

    def loop(self, simulator: Simulator, decision_s: float) -> CompiledLoop:
        """See `CompiledController.loop`."""
        observation = simulator.new_observation()
        run = governed(self.decide)

        def loop(max_iterations: int, log: NDArray[np.void]) -> tuple[int, bool]:
            more: tuple[int, bool] = run(
                simulator.state,
                simulator.latency.tables,
                simulator.draws,
                observation,
                self.rules,
                decision_s,
                max_iterations,
                log,
            )
            return more

        return loop
