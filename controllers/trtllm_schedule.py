"""TensorRT-LLM's draft length schedule: candidate tokens by upper bounds on the batch size."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated

from pydantic import Field, model_validator

from controllers.batch_schedule import BatchSchedule
from controllers.controller import configured
from engine.core.state import MAX_CANDIDATES


@configured
class TrtllmSchedule(BatchSchedule):
    """`draft_len_schedule` of TensorRT-LLM: {largest batch size: draft length}.

    A batch gets the draft length of the smallest bound that is not below its size; above the last bound there is no
    speculation.

    Source: TensorRT-LLM, `tensorrt_llm/llmapi/llm_args.py` (`draft_len_schedule`).

    Args:
        draft_len_schedule: draft length by the largest batch size it holds for.
        total_budget: TensorRT-LLM's `max_num_tokens`.
    """

    draft_len_schedule: Annotated[dict[int, int], Field(min_length=1)] = Field(
        default_factory=lambda: {4: 4, 16: 3, 64: 1}
    )

    @model_validator(mode="after")
    def _possible(self) -> "TrtllmSchedule":
        for bound, candidates in self.draft_len_schedule.items():
            if bound < 1:
                raise ValueError(f"draft_len_schedule bound {bound} must be a batch size of at least 1")
            if not 0 <= candidates <= MAX_CANDIDATES:
                raise ValueError(
                    f"draft_len_schedule {{{bound}: {candidates}}}: a draft has between 0 and {MAX_CANDIDATES} tokens"
                )
        return self

    def by_batch_size(self, largest: int) -> Sequence[int]:
        """The draft length of the first bound that a batch size does not exceed, 0 past the last."""
        table = [0] * (largest + 1)
        for above, bound in pairwise([-1, *sorted(self.draft_len_schedule)]):
            for size in range(above + 1, min(bound, largest) + 1):
                table[size] = self.draft_len_schedule[bound]
        return table

    def label(self) -> str:
        """For example `trtllm 4:4 16:3 64:1`."""
        bounds = sorted(self.draft_len_schedule.items())
        return "trtllm " + " ".join(f"{bound}:{candidates}" for bound, candidates in bounds)
