"""The governor's action: candidate tokens of each request, and prompt tokens to prefill."""

from collections.abc import Sequence
from itertools import pairwise

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


def check_choices(name: str, choices: Sequence[int]) -> None:
    """Refuse `candidate_choices` or `budget_choices` that are not increasing or that no engine can run.

    Raises ActionError naming them.
    """
    if not choices or any(b <= a for a, b in pairwise(choices)):
        raise ActionError(f"{name}={list(choices)} must be strictly increasing, and not empty")
    for choice in choices:
        if name == "candidate_choices":
            check_action(choice, 1)
        else:
            check_action(0, choice)
