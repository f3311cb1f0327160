"""vLLM's dynamic speculative decoding: candidate tokens from a hand-written schedule over batch sizes."""

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field, model_validator

from controllers.batch_schedule import BatchSchedule
from controllers.controller import configured
from engine.core.state import MAX_CANDIDATES


@configured
class VllmSchedule(BatchSchedule):
    """`num_speculative_tokens_per_batch_size` of vLLM's speculative config.

    Entries [lowest, highest, K], both ends included, sorted, not overlapping, the first from batch size 1. Sizes
    between two entries and above the last one keep the K of the entry before them; K is cut to
    `num_speculative_tokens`. vLLM counts every request scheduled in a step, those in prefill too, and applies K to the
    step after; here the decoding requests count, and c holds for the iteration that is about to run.

    Source: vLLM, `vllm/v1/spec_decode/dynamic/utils.py`. The default is the example of its documentation's shape:
    speculate while the batch is small.

    Args:
        schedule: [lowest batch size, highest, K] entries.
        num_speculative_tokens: most candidate tokens of a request.
        total_budget: vLLM's `max_num_batched_tokens`.
        draft_slots: tokens of the total that vLLM takes for each request in a step beside its own: 0 for EAGLE, 1 for
            a draft model, K for drafters that propose all K at once.
    """

    schedule: Annotated[list[tuple[int, int, int]], Field(min_length=1)] = Field(
        default_factory=lambda: [(1, 16, 3), (17, 64, 2), (65, 4096, 0)]
    )
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 8
    draft_slots: Annotated[int, Field(ge=0, le=MAX_CANDIDATES)] = 0

    @model_validator(mode="after")
    def _sorted_ranges(self) -> "VllmSchedule":
        end = 0
        for low, high, candidates in self.schedule:
            entry = f"schedule entry {[low, high, candidates]}"
            if end == 0 and low != 1:
                raise ValueError(f"{entry}: the first range must begin at batch size 1")
            if low <= end:
                raise ValueError(f"{entry} begins at or before {end}, the end of the range before it; sort the ranges")
            if high < low:
                raise ValueError(f"{entry}: the range ends before it begins")
            if candidates < 0:
                raise ValueError(f"{entry}: K must be at least 0 candidate tokens")
            end = high
        return self

    def by_batch_size(self, largest: int) -> Sequence[int]:
        """K of the latest range that has begun; an empty batch counts as one request."""
        table = [0] * (largest + 1)
        for low, _, candidates in self.schedule:
            for size in range(0 if low == 1 else low, largest + 1):
                table[size] = min(candidates, self.num_speculative_tokens)
        return table

    def label(self) -> str:
        """Label, for example `vllm 1:3 17:2 65:0`."""
        return "vllm " + " ".join(f"{low}:{candidates}" for low, _, candidates in self.schedule)
