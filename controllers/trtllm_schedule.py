"""TensorRT-LLM's draft length schedule: candidate tokens by upper bounds on the batch size."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from controllers.batch_schedule import BatchSchedule, given_whole
from controllers.controller import configured
from engine.core.state import MAX_CANDIDATES


def default_schedule() -> dict[int, int]:
    """Speculate while the batch is small."""
    return {4: 4, 16: 3, 64: 1}


@configured
class TrtllmSchedule(BatchSchedule):
    """`draft_len_schedule` of TensorRT-LLM: {largest batch size: draft length}.

    A batch gets the draft length of the smallest bound that is not below its size; above the last bound there is no
    speculation.

    Source: TensorRT-LLM, `tensorrt_llm/llmapi/llm_args.py` (`draft_len_schedule`).

    Args:
        draft_len_schedule: draft length by the largest batch size it holds for; None: `default_schedule`.
        total_budget: TensorRT-LLM's `max_num_tokens`.
    """

    draft_len_schedule: Annotated[dict[int, int], Field(min_length=1)] = Field(default_factory=default_schedule)

    @field_validator("draft_len_schedule", mode="before")
    @classmethod
    def _whole(cls, schedule: Any) -> Any:
        return default_schedule() if schedule is None else given_whole(schedule)

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
        """Label, for example `trtllm 4:4 16:3 64:1`."""
        bounds = sorted(self.draft_len_schedule.items())
        return "trtllm " + " ".join(f"{bound}:{candidates}" for bound, candidates in bounds)
