"""The governor's action: how many candidate tokens each request speculates, how many prompt tokens are prefilled."""

from itertools import pairwise
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, field_validator

from engine.core.state import MAX_CANDIDATES

CANDIDATE_CHOICES = (0, 1, 2, 3, 4, 5, 6, 7, 8)
BUDGET_CHOICES = (32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 4096)
MAX_TOKEN_BUDGET = 65536


class ActionError(ValueError):
    """An action is not one of the choices, or the choices themselves are impossible."""


def check_action(candidates: int, token_budget: int) -> None:
    """Refuse a (c, n) that no engine can run; ActionError names the key."""
    if not 0 <= candidates <= MAX_CANDIDATES:
        raise ActionError(f"candidates={candidates} must be between 0 and {MAX_CANDIDATES} tokens per request")
    if not 1 <= token_budget <= MAX_TOKEN_BUDGET:
        raise ActionError(
            f"token_budget={token_budget} must be between 1 and {MAX_TOKEN_BUDGET} prompt tokens per iteration; "
            "with less than 1 no prompt would ever be prefilled"
        )


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
        if any(b <= a for a, b in pairwise(choices)):
            raise ValueError(f"{info.field_name}={list(choices)} must be strictly increasing")
        for choice in choices:
            if info.field_name == "candidate_choices":
                check_action(choice, 1)
            else:
                check_action(0, choice)
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
        """Indices of an exact (c, n); ActionError says which of the two is off the grid and what is on it."""
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
