"""A candidate count for every batch size: common base of the schedules of vLLM and TensorRT-LLM."""

from abc import abstractmethod
from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.total_budget import left_for_prompts
from engine.compiled import kernel
from engine.core.choices import MAX_TOKEN_BUDGET
from engine.core.telemetry import NUM_DECODES
from engine.plant import Plant


def given_whole(entries: Any) -> Any:
    """A setting's entries by number. ValueError for entries that were added one by one.

    A command line's `+controller.slots.8=...` has a string key; a mapping that is given as a whole has numbers.
    """
    if isinstance(entries, dict) and len({type(key) for key in entries}) > 1:
        added = ", ".join(key for key in entries if isinstance(key, str))
        raise ValueError(f"entries of {added} were added to others one by one: give all of them at once, in {{}}")
    return entries


LARGEST_BATCH = 4096
"""Batches above count as this many requests."""


class Params(NamedTuple):
    """candidates: (LARGEST_BATCH + 1,) c by number of decoding requests · total_budget: tokens per iteration ·
    draft_slots: tokens of it that every request takes beside its own."""

    candidates: NDArray[np.int64]
    total_budget: int
    draft_slots: int


@kernel
def _beside_slots(observation, e, left, draft_slots):
    """The prompt tokens in `left` tokens, of which every prompt that is served takes `draft_slots`."""
    prompts = 0
    for i in range(observation.queue.shape[1]):
        waiting = int(observation.queue[e, i, 0])
        room = left - draft_slots
        if waiting <= 0:
            continue
        if room <= 0:
            break
        served = min(waiting, room)
        prompts += served
        left = room - served
    # The rest is for a request that arrives before the iteration begins.
    return prompts + max(left - draft_slots, 0)


@kernel
def decide(observation, i, params, memory):
    """(c of this batch size, the total less the tokens of the decoding requests)."""
    num_decodes = int(observation.load[i, NUM_DECODES])
    candidates = params.candidates[min(num_decodes, params.candidates.shape[0] - 1)]
    left = left_for_prompts(params.total_budget, num_decodes, candidates + params.draft_slots)
    if params.draft_slots > 0:
        left = max(_beside_slots(observation, i, left, params.draft_slots), 0 if num_decodes > 0 else 1)
    return candidates, left


@configured
class BatchSchedule(KernelController):
    """Looks c up by the number of decoding requests; prompts get the rest of a fixed total.

    Args:
        total_budget: tokens per iteration over decodes, candidates and prompt chunks.
    """

    decide = staticmethod(decide)

    total_budget: Annotated[int, Field(ge=1, le=MAX_TOKEN_BUDGET)] = 2048
    draft_slots = 0

    def params(self, plant: Plant) -> Params:
        """The schedule expanded over all batch sizes, and the total."""
        return Params(np.array(self.by_batch_size(LARGEST_BATCH), dtype=np.int64), self.total_budget, self.draft_slots)

    @abstractmethod
    def by_batch_size(self, largest: int) -> Sequence[int]:
        """c for 0, 1, ..., `largest` decoding requests."""
