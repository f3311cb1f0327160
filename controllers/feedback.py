"""Feedback on measured TTFT slack: the token budget follows the queue, without any model of the engine."""

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, model_validator

from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import INTERVAL_S, NO_DEADLINE_S, OVERDUE, TTFT_TARGET_S
from engine.plant import Plant


class Params(NamedTuple):
    """`Feedback`'s fields, for the kernel."""

    aimd: bool
    candidates: int
    ttft_target: float
    lowest_budget: float
    highest_budget: float
    wanted_slack: float
    step_tokens: float
    backoff: float
    proportional: float
    integral_per_s: float


class Memory(NamedTuple):
    """budget: (N,) n in tokens · integral: (N,) of the error, in s."""

    budget: NDArray[np.float64]
    integral: NDArray[np.float64]


@kernel
def _shortage(observation, i, params):
    """Missing slack of the most urgent prompt, as a share of l: 1 and above past its deadline."""
    load = observation.load
    extra = params.ttft_target - load[i, TTFT_TARGET_S]
    least = params.ttft_target
    for row in range(observation.queue.shape[1]):
        slack = observation.queue[i, row, 1] + extra
        if observation.queue[i, row, 0] > 0.0 and slack < 0.5 * NO_DEADLINE_S:
            least = min(least, slack)
    if load[i, OVERDUE] > 0.0:
        least = min(least, 0.0)
    return params.wanted_slack - max(least, -params.ttft_target) / params.ttft_target


@kernel
def decide(observation, i, params, memory):
    """(c as configured, n moved by the latest shortage)."""
    shortage = _shortage(observation, i, params)
    budget = memory.budget[i]
    if params.aimd:
        budget = budget / params.backoff if shortage > 0.0 else budget - params.step_tokens
    else:
        elapsed = min(float(observation.load[i, INTERVAL_S]), 1.0)
        span = math.log(params.highest_budget / params.lowest_budget)
        total = memory.integral[i] + params.integral_per_s * shortage * elapsed
        memory.integral[i] = min(max(total, 0.0), 1.0)
        share = memory.integral[i] + params.proportional * shortage
        budget = params.lowest_budget * math.exp(span * min(max(share, 0.0), 1.0))
    memory.budget[i] = min(max(budget, params.lowest_budget), params.highest_budget)
    return params.candidates, round(memory.budget[i])


@configured
class Feedback(KernelController):
    """n from the remaining slack of the most urgent waiting prompt, c fixed: the classic control baseline.

    The error is `wanted_slack` minus the least slack in the queue as a share of l (with an empty queue the slack is
    all of l). `aimd` applies TCP's rule (Jacobson, SIGCOMM 1988; Chiu and Jain, 1989) to the decodes: their share backs
    off at a congestion signal. So while the error is positive n is divided by `backoff`, and otherwise n falls by
    `step_tokens` an iteration. `pi` sets log n between its bounds to `proportional` x error plus the integral of
    `integral_per_s` x error over time. The integral is clamped to [0, 1] against windup.

    Args:
        kind: `pi` or `aimd`.
        candidates: c.
        ttft_target: l in s.
        lowest_budget, highest_budget: bounds of n in tokens.
        wanted_slack: share of l that the most urgent prompt should have left.
        step_tokens: additive decrease of n per iteration (aimd).
        backoff: factor, below 1, by which n is divided when slack is short (aimd).
        proportional: gain on the error (pi).
        integral_per_s: gain on its integral, per s (pi).
    """

    decide = staticmethod(decide)

    kind: Literal["pi", "aimd"] = "pi"
    candidates: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 3
    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    lowest_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 64
    highest_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 4096
    wanted_slack: Annotated[float, Field(ge=0.0, le=1.0)] = 0.8
    step_tokens: Annotated[float, Field(gt=0.0)] = 32.0
    backoff: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.5
    proportional: Annotated[float, Field(ge=0.0)] = 2.0
    integral_per_s: Annotated[float, Field(ge=0.0)] = 1.0

    @model_validator(mode="after")
    def _ordered(self) -> "Feedback":
        if self.lowest_budget >= self.highest_budget:
            raise ValueError(
                f"lowest_budget={self.lowest_budget} must be below highest_budget={self.highest_budget} tokens"
            )
        return self

    def params(self, plant: Plant) -> Params:
        """The configured settings."""
        return Params(
            self.kind == "aimd",
            self.candidates,
            self.ttft_target,
            float(self.lowest_budget),
            float(self.highest_budget),
            self.wanted_slack,
            self.step_tokens,
            self.backoff,
            self.proportional,
            self.integral_per_s,
        )

    def memory(self, plant: Plant, instances: int) -> Memory:
        """The lowest budget, and no integral."""
        return Memory(np.full(instances, float(self.lowest_budget)), np.zeros(instances))

    def label(self) -> str:
        """Label, for example `feedback pi c=3`."""
        return f"feedback {self.kind} c={self.candidates}"
