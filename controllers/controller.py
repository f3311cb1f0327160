"""Base class of controllers, which choose c and n from telemetry before an iteration."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import field
from typing import Any, ClassVar, TypeVar, cast, dataclass_transform

import numpy as np
from numpy.typing import NDArray
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass as pydantic_dataclass

from engine.core.telemetry import Observation
from engine.plant import Plant
from engine.speculation.allocation import Speculation

T = TypeVar("T")


@dataclass_transform(kw_only_default=True, field_specifiers=(field,))
def configured(cls: type[T]) -> type[T]:
    """Class decorator of a controller: its annotated fields are its configuration.

    An unknown key, a wrong type or a value out of range is refused with the key's name.
    """
    made: Any = pydantic_dataclass(config=ConfigDict(extra="forbid"), kw_only=True)(cls)
    return cast(type[T], made)


class Controller(ABC):
    """Chooses an action from telemetry.

    Subclasses are `configured` and implement `choose`. `reset` begins a run on an engine and must be called before the
    first decision.
    """

    decision_s: ClassVar[float] = 0.0
    """Seconds charged per decision with `charge_decisions=constant`: an upper bound of its time on one core."""
    peeks: ClassVar[bool] = False
    """True for a clairvoyant policy; reports label it as a bound."""
    static: ClassVar[bool] = False
    """True for a constant setting of an engine's configuration; reports compare others with the best of these."""

    _plant: Plant | None = None

    @property
    def speculation(self) -> Speculation | None:
        """Allocation that this controller needs; None: as the engine is configured."""
        return None

    def reset(self, plant: Plant) -> None:
        """Clear all state and begin a run on the engine described by `plant`."""
        self._plant = plant

    @property
    def plant(self) -> Plant:
        """Static information about the engine of the current run."""
        if self._plant is None:
            raise RuntimeError(f"{type(self).__name__}.reset(plant) must be called before its first decision")
        return self._plant

    @abstractmethod
    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
        """(c, n) in tokens for the next iteration, from one engine's observation (see `envs.serving`)."""

    def act(self, observation: Mapping[str, NDArray[np.float32]]) -> NDArray[np.int64]:
        """The environment's action: indices of the choices nearest below what `choose` asks for."""
        return self.plant.grid.floor(*self.choose(observation))

    def label(self) -> str:
        """Label of this controller and its settings in tables and figures."""
        return type(self).__name__.lower()


def batched(observation: Mapping[str, NDArray[np.float32]]) -> Observation:
    """One engine's observation dict as the arrays that compiled controllers read (N = 1, no copy)."""
    return Observation(
        load=observation["load"][None],
        queue=observation["queue"][None],
        drafted=observation["drafted"][None],
        accepted=observation["accepted"][None],
        rates=observation["rates"][None],
    )
