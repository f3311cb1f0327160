"""Controllers whose decision is a compiled function over parameters and an instance-first memory."""

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from controllers.controller import Controller, batched
from engine.core.telemetry import observe
from engine.plant import Plant
from engine.policy import Policy


class KernelController(Controller):
    """A controller whose decision is one kernel, which `choose` and the simulator's compiled loop share.

    Subclasses set `decide` and override `params`, and `memory` if they keep state.
    """

    decide: ClassVar[Any]
    """The compiled decision (`engine.policy`), in a `staticmethod`."""
    look: ClassVar[Any] = staticmethod(observe)
    """Function that writes its observation of an instance, in a `staticmethod`."""

    _policy: Policy | None = None

    @abstractmethod
    def params(self, plant: Plant) -> Any:
        """Read-only inputs of `decide`: a tuple of numbers and arrays."""

    def memory(self, plant: Plant, instances: int) -> Any:
        """State and scratch memory of `decide`: a fresh tuple of arrays, instance first."""
        return ()

    def policy(self, plant: Plant, instances: int = 1) -> Policy:
        """The controller as data, with fresh memory for `instances` instances."""
        return Policy(self.decide, self.params(plant), self.memory(plant, instances), self.look)

    def reset(self, plant: Plant) -> None:
        """Clear all state and begin a run on the engine described by `plant`."""
        super().reset(plant)
        self._policy = self.policy(plant)

    @property
    def current(self) -> Policy:
        """The policy of the current run, for one instance."""
        if self._policy is None:
            raise RuntimeError(f"{type(self).__name__}.reset(plant) must be called before its first decision")
        return self._policy

    def choose(self, observation: Mapping[str, NDArray[np.float32]]) -> tuple[int, int]:
        """The compiled decision, called from Python."""
        policy = self.current
        candidates, token_budget = self.decide(batched(observation), 0, policy.params, policy.memory)
        return int(candidates), int(token_budget)
