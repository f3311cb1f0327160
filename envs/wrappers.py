"""Other forms of the serving environment's action and observation, for learners that need them."""

from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.utils import RecordConstructorArgs
from numpy.typing import NDArray

from engine.core.choices import ActionError
from engine.core.telemetry import LOAD_FIELDS, NO_DEADLINE_S


class DiscreteAction(gymnasium.ActionWrapper[Any, np.int64, NDArray[np.int64]], RecordConstructorArgs):
    """One integer for the pair: action = index of c * number of budget choices + index of n."""

    def __init__(self, env: gymnasium.Env[Any, NDArray[np.int64]]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.ActionWrapper.__init__(self, env)
        assert isinstance(env.action_space, spaces.MultiDiscrete)
        self._budgets = int(env.action_space.nvec[1])
        self._pairs = int(env.action_space.nvec.prod())
        self.action_space = spaces.Discrete(self._pairs)

    def action(self, action: np.int64) -> NDArray[np.int64]:
        """The pair of indices; ActionError when the integer is out of range."""
        number = np.asarray(action)
        if number.shape != () or number.dtype.kind not in "iu" or not 0 <= number < self._pairs:
            raise ActionError(f"action {action!r} must be a whole number from 0 to {self._pairs - 1}")
        return np.array(divmod(int(number), self._budgets), dtype=np.int64)


class BoxAction(gymnasium.ActionWrapper[Any, NDArray[np.float32], NDArray[np.int64]], RecordConstructorArgs):
    """Two numbers in [-1, 1], spread evenly over the candidate choices and the budget choices."""

    def __init__(self, env: gymnasium.Env[Any, NDArray[np.int64]]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.ActionWrapper.__init__(self, env)
        assert isinstance(env.action_space, spaces.MultiDiscrete)
        self._last = env.action_space.nvec - 1
        self.action_space = spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)

    def action(self, action: NDArray[np.float32]) -> NDArray[np.int64]:
        """The indices nearest to the two numbers; beyond [-1, 1] the ends. ActionError for anything else."""
        numbers = np.asarray(action, dtype=np.float64)
        if numbers.shape != (2,) or np.isnan(numbers).any():
            raise ActionError(f"action {action!r} must be two numbers in [-1, 1], for c and for n")
        unit = (np.clip(numbers, -1.0, 1.0) + 1.0) / 2.0
        return np.rint(unit * self._last).astype(np.int64)


class FlatObservation(gymnasium.ObservationWrapper[NDArray[np.float32], Any, Any], RecordConstructorArgs):
    """One flat vector with every entry of order one: log(1 + x) of counts, tokens and times, squashed slack.

    Counts, tokens and durations become log(1 + x / unit) with unit 1 request, 100 tokens, 10 ms; slack becomes
    tanh(slack / ttft_target), which keeps its sign; acceptance counts become the shares accepted / drafted, 0 where
    nothing was drafted.
    """

    def __init__(self, env: gymnasium.Env[Any, Any]) -> None:
        RecordConstructorArgs.__init__(self)
        gymnasium.ObservationWrapper.__init__(self, env)
        assert isinstance(env.observation_space, spaces.Dict)
        size = sum(spaces.flatdim(space) for space in env.observation_space.values())
        self.observation_space = spaces.Box(-1.0, 50.0, shape=(size,), dtype=np.float32)
        units = [0.01 if name.endswith("_s") else 100.0 if "tokens" in name else 1.0 for name in LOAD_FIELDS]
        self._units = np.array(units, dtype=np.float32)
        self._target = LOAD_FIELDS.index("ttft_target_s")

    def observation(self, observation: Any) -> NDArray[np.float32]:
        """The flat vector: load, queue tokens, queue slack, drafted counts, shares accepted, rates."""
        load = observation["load"]
        tokens, slack = observation["queue"][:, 0], observation["queue"][:, 1]
        squashed = np.where(slack >= NO_DEADLINE_S, 1.0, np.tanh(slack / load[self._target]))
        share = observation["accepted"] / np.maximum(observation["drafted"], 1.0)
        parts = [
            np.log1p(load / self._units),
            np.log1p(tokens / 100.0),
            squashed,
            np.log1p(observation["drafted"]),
            share,
            np.log1p(observation["rates"]),
        ]
        return np.concatenate(parts).astype(np.float32)
