"""Static information about an engine, given to a controller before any telemetry."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable


@dataclass(frozen=True)
class Plant:
    """Static information about the governed engine: actions, predictions and batch limit.

    `predict` makes the `LookupTable` on first use, because fitting one takes seconds and a fixed setting needs none.
    """

    grid: ActionGrid
    predict: Callable[[], LookupTable]

    @cached_property
    def lookup(self) -> LookupTable:
        """Predicted iteration times over the grid."""
        return self.predict()
