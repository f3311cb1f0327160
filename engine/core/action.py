"""Validated action grid of a governor: an action is a pair of indices into the choices of c and n."""

from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.core.choices import BUDGET_CHOICES, CANDIDATE_CHOICES, ActionError, check_choices


class ActionGrid(BaseModel):
    """The choices of c and n that a controller picks from; an action is a pair of indices into them.

    Args:
        candidate_choices: candidate tokens per decoding request, strictly increasing.
        budget_choices: prompt tokens per iteration, strictly increasing.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidate_choices: Annotated[tuple[int, ...], Field(min_length=1)] = CANDIDATE_CHOICES
    budget_choices: Annotated[tuple[int, ...], Field(min_length=1)] = BUDGET_CHOICES

    @field_validator("candidate_choices", "budget_choices")
    @classmethod
    def _increasing(cls, choices: tuple[int, ...], info: Any) -> tuple[int, ...]:
        check_choices(info.field_name, choices)
        return choices

    @property
    def candidates(self) -> NDArray[np.int64]:
        """The candidate choices as an array."""
        return np.array(self.candidate_choices, dtype=np.int64)

    @property
    def budgets(self) -> NDArray[np.int64]:
        """The budget choices as an array."""
        return np.array(self.budget_choices, dtype=np.int64)

    def action(self, candidates: int, token_budget: int) -> NDArray[np.int64]:
        """Indices of an exact (c, n); ActionError names the value that is off the grid and lists the choices."""
        if candidates not in self.candidate_choices:
            raise ActionError(f"candidates={candidates} is not one of candidate_choices={list(self.candidate_choices)}")
        if token_budget not in self.budget_choices:
            raise ActionError(f"token_budget={token_budget} is not one of budget_choices={list(self.budget_choices)}")
        return np.array(
            [self.candidate_choices.index(candidates), self.budget_choices.index(token_budget)], dtype=np.int64
        )

    def floor(self, candidates: int, token_budget: int) -> NDArray[np.int64]:
        """Indices of the largest choices not above (c, n), or of the smallest choices."""
        c = max(0, int(np.searchsorted(self.candidates, candidates, side="right")) - 1)
        n = max(0, int(np.searchsorted(self.budgets, token_budget, side="right")) - 1)
        return np.array([c, n], dtype=np.int64)

    def values(self, action: Any) -> tuple[int, int]:
        """(c, n) of a pair of indices; ActionError when the action is not a pair of indices into the choices."""
        array = np.asarray(action)
        if array.shape != (2,) or array.dtype.kind not in "iu":
            raise ActionError(f"an action is two integers (index of c, index of n), got {action!r}")
        c, n = int(array[0]), int(array[1])
        if not (0 <= c < len(self.candidate_choices) and 0 <= n < len(self.budget_choices)):
            raise ActionError(
                f"action {action!r} is off the grid: {len(self.candidate_choices)} candidate choices and "
                f"{len(self.budget_choices)} budget choices"
            )
        return self.candidate_choices[c], self.budget_choices[n]
