"""The action grid: exact choices, rounding down, and errors that name the key and the choices."""

from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError

from engine.core.action import ActionGrid
from engine.core.choices import MAX_TOKEN_BUDGET, ActionError, check_action
from engine.core.state import MAX_CANDIDATES

GRID = ActionGrid(candidate_choices=(0, 2, 4), budget_choices=(64, 256))


@pytest.mark.parametrize("c", GRID.candidate_choices)
@pytest.mark.parametrize("n", GRID.budget_choices)
def test_indices_and_values_are_inverse(c: int, n: int) -> None:
    assert GRID.values(GRID.action(c, n)) == (c, n)
    assert GRID.values(GRID.floor(c, n)) == (c, n)


@pytest.mark.parametrize(
    ("asked", "given"),
    [((3, 255), (2, 64)), ((1, 300), (0, 256)), ((99, 99999), (4, 256)), ((0, 0), (0, 64)), ((-1, -5), (0, 64))],
)
def test_floor_never_exceeds_what_was_asked_unless_nothing_is_smaller(asked: tuple, given: tuple) -> None:
    assert GRID.values(GRID.floor(*asked)) == given


def test_an_off_grid_choice_is_refused_with_key_value_and_choices() -> None:
    with pytest.raises(ActionError, match=r"candidates=3 .*candidate_choices=\[0, 2, 4\]"):
        GRID.action(3, 64)
    with pytest.raises(ActionError, match=r"token_budget=100 .*budget_choices=\[64, 256\]"):
        GRID.action(2, 100)


@pytest.mark.parametrize("action", [[3, 0], [0, 2], [-1, 0], [0, -1]])
def test_an_index_off_the_grid_is_refused(action: list[int]) -> None:
    with pytest.raises(ActionError, match="off the grid"):
        GRID.values(np.array(action))


@pytest.mark.parametrize("action", [0, [0], [0, 0, 0], [0.0, 1.0], [True, False], "ab", [[0, 0]], None])
def test_an_action_that_is_not_two_integers_is_refused(action: object) -> None:
    with pytest.raises(ActionError, match="two integers"):
        GRID.values(action)


@pytest.mark.parametrize(
    ("c", "n", "key"),
    [
        (-1, 64, "candidates=-1"),
        (MAX_CANDIDATES + 1, 64, f"candidates={MAX_CANDIDATES + 1}"),
        (0, 0, "token_budget=0"),
        (0, -3, "token_budget=-3"),
        (0, MAX_TOKEN_BUDGET + 1, f"token_budget={MAX_TOKEN_BUDGET + 1}"),
    ],
)
def test_an_impossible_action_is_refused_by_name(c: int, n: int, key: str) -> None:
    with pytest.raises(ActionError, match=key):
        check_action(c, n)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"candidate_choices": ()}, "candidate_choices"),
        ({"budget_choices": ()}, "budget_choices"),
        ({"candidate_choices": (0, 2, 2)}, "strictly increasing"),
        ({"budget_choices": (256, 64)}, "strictly increasing"),
        ({"candidate_choices": (0, MAX_CANDIDATES + 1)}, "candidates"),
        ({"budget_choices": (0, 64)}, "token_budget=0"),
        ({"budget_choices": (64, 64.5)}, "budget_choices"),
        ({"candidates": (0, 1)}, "candidates"),
    ],
)
def test_an_impossible_grid_is_refused_by_name(settings: dict, message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        ActionGrid(**settings)


def test_a_grid_cannot_be_changed_after_it_was_checked() -> None:
    with pytest.raises(ValidationError):
        GRID.budget_choices = (1,)


def test_action_error_is_a_value_error() -> None:
    assert issubclass(ActionError, ValueError)
