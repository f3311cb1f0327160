"""What a controller may know of the engine it will govern before it sees any telemetry."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable


@dataclass(frozen=True)
class Plant:
    """What a controller may know of the engine it will govern: the actions, the predictions, the batch limit.

    `predict` makes the `LookupTable` when it is first asked for, because fitting one takes seconds and a fixed
    setting needs none.
    """

    grid: ActionGrid
    predict: Callable[[], LookupTable]

    @cached_property
    def lookup(self) -> LookupTable:
        """Predicted iteration times over the grid."""
        return self.predict()
