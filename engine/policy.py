"""A policy as data: two compiled functions, their parameters and their memory.

`decide(observation, i, params, memory)` returns (c, n) in tokens for instance i. It reads `params`, and keeps state and
scratch data in row i of `memory`, whose arrays are instance first: one policy governs one engine or a thousand.
`look(state, i, seen, observation)` writes the observation for `decide` (`engine.core.telemetry.observe`).
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.core.telemetry import observe

T = TypeVar("T", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Policy:
    """A policy, as a compiled loop runs it for an instance."""

    decide: Any
    params: Any
    """A tuple of numbers and arrays, which `decide` does not change."""
    memory: Any = ()
    """A tuple of arrays, instance first."""
    look: Any = observe


def stacked(one: T, instances: int) -> T:
    """Repeat the memory of one instance, a tuple of arrays, for several instances."""
    return type(one)(*(np.repeat(np.asarray(array)[None], instances, axis=0) for array in one))
