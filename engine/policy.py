"""A policy is data: two compiled functions, and what they read and keep.

`decide(observation, i, params, memory)` returns (c, n) in tokens for instance i. It reads `params`, and keeps and works
in row i of `memory`, whose arrays are instance first: one policy governs one engine or a thousand instances.
`look(state, i, seen, observation)` writes what it is shown (`engine.core.telemetry.observe`).
"""

from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from engine.core.telemetry import observe

T = TypeVar("T", bound=tuple[Any, ...])


@dataclass(frozen=True)
class Policy:
    """What a compiled loop runs an instance under."""

    decide: Any
    params: Any
    """A tuple of numbers and arrays, which `decide` does not change."""
    memory: Any = ()
    """A tuple of arrays, instance first."""
    look: Any = observe


def stacked(one: T, instances: int) -> T:
    """The memory of one instance, a tuple of arrays, once for each of several."""
    return type(one)(*(np.repeat(np.asarray(array)[None], instances, axis=0) for array in one))
