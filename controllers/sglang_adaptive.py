"""SGLang's adaptive speculation: draft steps that follow a moving average of accepted lengths, by batch size."""

import math
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from controllers.batch_schedule import given_whole
from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.total_budget import left_for_prompts
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.state import MAX_CANDIDATES
from engine.core.telemetry import ITERATIONS, LAST_NUM_DECODES, NUM_DECODES
from engine.plant import Plant
from engine.policy import stacked


class Slot(BaseModel):
    """One range of batch sizes, from its key up to the next slot's.

    Args:
        candidate_steps: the draft steps to choose from.
        up_hysteresis, down_hysteresis: added to the thresholds of moving up and down, in accepted tokens.
        ceiling_coeff: steps are never above ceil(average accepted x this) after a move down; 0 is no such cap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate_steps: Annotated[list[Annotated[int, Field(ge=0, le=MAX_CANDIDATES)]], Field(min_length=1)]
    up_hysteresis: float = 0.0
    down_hysteresis: float = -0.25
    ceiling_coeff: Annotated[float, Field(ge=0.0)] = 0.0

    @field_validator("candidate_steps")
    @classmethod
    def _ascending(cls, steps: list[int]) -> list[int]:
        return sorted(set(steps))


def default_slots() -> dict[int, Slot]:
    """SGLang's default slots."""
    return {
        1: Slot(candidate_steps=[1, 3, 5, 7]),
        8: Slot(candidate_steps=[0, 1, 3], down_hysteresis=0.0),
        32: Slot(candidate_steps=[0, 1], down_hysteresis=0.0),
        64: Slot(candidate_steps=[0], down_hysteresis=0.0),
    }


class Params(NamedTuple):
    """Slots as arrays, and settings.

    lowest: (S,) batch size a slot begins at · steps: (S, K) draft steps, ascending · sizes: (S,) how many · up, down,
    ceiling: (S,).
    """

    lowest: NDArray[np.int64]
    steps: NDArray[np.int64]
    sizes: NDArray[np.int64]
    up: NDArray[np.float64]
    down: NDArray[np.float64]
    ceiling: NDArray[np.float64]
    weight: float
    update_interval: int
    warmup_batches: int
    total_budget: int


class Memory(NamedTuple):
    """Memory of each slot, for N instances.

    chosen: (N, S) index of the current steps · average: (N, S) accepted tokens · batches: (N, S) verified.
    """

    chosen: NDArray[np.int64]
    average: NDArray[np.float64]
    batches: NDArray[np.int64]


@kernel
def _row(memory, i):
    """Return the memory of instance `i`."""
    return Memory(
        memory.chosen[i],
        memory.average[i],
        memory.batches[i],
    )


@kernel
def _slot_of(lowest, batch):
    slot = 0
    for i in range(1, lowest.shape[0]):
        if lowest[i] <= batch:
            slot = i
    return slot


@kernel
def _move(params, mine, slot):
    """Update the slot's steps from its average: down while it is low enough, else up while it is high enough."""
    steps, average = params.steps[slot], mine.average[slot]
    last = params.sizes[slot] - 1
    before = mine.chosen[slot]
    index = before
    if steps[before] == 0:
        # Nothing was drafted, so acceptance is unknown: try the next steps, assuming all but one accepted.
        index = min(before + 1, last)
        if steps[index] > 0 and average < 0.0:
            mine.average[slot] = steps[index] - 1.0
        mine.chosen[slot] = index
        return
    while index > 0:
        below = steps[index - 1]
        threshold = 0.5 if below == 0 else below - 0.5
        if average > threshold + params.down[slot]:
            break
        index -= 1
    if index == before:
        while index < last and average > steps[index] - 0.5 + params.up[slot]:
            index += 1
    if params.ceiling[slot] > 0.0:
        most = max(1, math.ceil(average * params.ceiling[slot]))
        if steps[index] <= steps[before]:
            while index > 0 and steps[index] > most:
                index -= 1
    mine.chosen[slot] = index


@kernel
def _learn(observation, i, params, mine):
    """Update the slot of the iteration that just ended."""
    load = observation.load
    if load[i, ITERATIONS] <= 0.0 or load[i, LAST_NUM_DECODES] <= 0.0:
        return
    slot = _slot_of(params.lowest, load[i, LAST_NUM_DECODES])
    if observation.drafted[i, 0] > 0.0:
        accepted = 0.0
        for depth in range(observation.accepted.shape[1]):
            accepted += observation.accepted[i, depth]
        mine.average[slot] += params.weight * (accepted / observation.drafted[i, 0] - mine.average[slot])
    mine.batches[slot] += 1
    settled = mine.batches[slot] - params.warmup_batches
    if settled > 0 and settled % params.update_interval == 0:
        _move(params, mine, slot)


@kernel
def decide(observation, i, params, memory):
    """(the steps of this batch size's slot, the total less the tokens of the decoding requests)."""
    mine = _row(memory, i)
    _learn(observation, i, params, mine)
    num_decodes = int(observation.load[i, NUM_DECODES])
    slot = _slot_of(params.lowest, num_decodes)
    candidates = params.steps[slot, mine.chosen[slot]]
    return candidates, left_for_prompts(params.total_budget, num_decodes, candidates)


@configured
class SglangAdaptive(KernelController):
    """Draft steps per range of batch sizes, moved by the average accepted length with hysteresis.

    In every slot the accepted tokens per request and iteration are averaged (weight `ema_alpha`). The steps are updated
    after `warmup_batches` and then every `update_interval` iterations in the slot. They fall to the next lower
    candidate as long as the average is at most that candidate - 0.5 + `down_hysteresis` (0.5 + it for candidate 0).
    Otherwise they rise as long as the average exceeds the current steps - 0.5 + `up_hysteresis`. At 0 steps acceptance
    is not observed, so the next update tries the lowest positive candidate.

    Source: SGLang, `python/sglang/srt/speculative/adaptive_spec_params.py` (`AdaptiveStepSlot`), without its padding
    of batch sizes to those of CUDA graphs.

    Args:
        slots: by the lowest batch size they hold for; None: `default_slots`.
        initial_steps: steps to begin with where a slot has them; elsewhere its middle candidate.
        ema_alpha: weight of the latest iteration in the average.
        update_interval: iterations between two choices.
        warmup_batches: iterations before the first.
        total_budget: tokens per iteration over decodes, candidates and prompt chunks.
    """

    decide = staticmethod(decide)

    slots: Annotated[dict[Annotated[int, Field(ge=1)], Slot], Field(min_length=1)] = Field(
        default_factory=default_slots
    )
    initial_steps: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 3
    ema_alpha: Annotated[float, Field(gt=0.0, le=1.0)] = 0.2
    update_interval: Annotated[int, Field(ge=1)] = 5
    warmup_batches: Annotated[int, Field(ge=0)] = 10
    total_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 2048

    @field_validator("slots", mode="before")
    @classmethod
    def _whole(cls, slots: Any) -> Any:
        return default_slots() if slots is None else given_whole(slots)

    def params(self, plant: Plant) -> Params:
        """The slots and the settings."""
        keys = sorted(self.slots)
        slots = [self.slots[key] for key in keys]
        most = max(len(slot.candidate_steps) for slot in slots)
        steps = [slot.candidate_steps + [0] * (most - len(slot.candidate_steps)) for slot in slots]
        return Params(
            lowest=np.array(keys, dtype=np.int64),
            steps=np.array(steps, dtype=np.int64),
            sizes=np.array([len(slot.candidate_steps) for slot in slots], dtype=np.int64),
            up=np.array([slot.up_hysteresis for slot in slots], dtype=np.float64),
            down=np.array([slot.down_hysteresis for slot in slots], dtype=np.float64),
            ceiling=np.array([slot.ceiling_coeff for slot in slots], dtype=np.float64),
            weight=self.ema_alpha,
            update_interval=self.update_interval,
            warmup_batches=self.warmup_batches,
            total_budget=self.total_budget,
        )

    def memory(self, plant: Plant, instances: int) -> Memory:
        """Every slot at its first steps, with all but one of them assumed accepted."""
        slots = [self.slots[key] for key in sorted(self.slots)]
        chosen = np.array([self._first(slot) for slot in slots], dtype=np.int64)
        steps = np.array([slot.candidate_steps[k] for slot, k in zip(slots, chosen.tolist(), strict=True)])
        one = Memory(chosen=chosen, average=steps.astype(np.float64) - 1.0, batches=np.zeros_like(chosen))
        return stacked(one, instances)

    def _first(self, slot: Slot) -> int:
        """Index of the steps that a slot begins with."""
        steps = slot.candidate_steps
        return steps.index(self.initial_steps) if self.initial_steps in steps else len(steps) // 2

    def label(self) -> str:
        """Label in tables."""
        return "sglang adaptive"
