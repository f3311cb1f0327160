"""Tables: the median decision of every cell, the nearest cell's where there is none, and files that are refused."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from controllers.policy import PolicyError
from controllers.tabulated import (
    DECODES,
    KV_TOKENS,
    WAITING_TOKENS_EDGES,
    TableHeader,
    Tabulated,
    cell,
    load_table,
    save_table,
    tabulate,
)
from engine.core.action import ActionGrid
from tests.controllers.observed import linear_plant, observation

GRID = ActionGrid(candidate_choices=(0, 1, 2, 4), budget_choices=(64, 256, 1024))
EDGES = ((0.0, 4.0), (0.0, 1000.0), (0.0, 100.0, 200.0))


@given(value=st.floats(0.0, 1e6))
def test_a_value_falls_into_the_last_edge_that_is_not_above_it(value: float) -> None:
    for edges in (DECODES, KV_TOKENS, WAITING_TOKENS_EDGES):
        found = cell(np.array(edges, dtype=np.float64), value)
        assert edges[found] <= value
        assert found == len(edges) - 1 or value < edges[found + 1]


def test_an_entry_is_the_median_of_its_cell_and_else_that_of_the_nearest() -> None:
    places = np.array([[1, 10, 0], [2, 20, 0], [3, 30, 50], [9, 5000, 300]], dtype=np.float64)
    chosen = np.array([[3, 0], [1, 0], [3, 2], [0, 1]])
    table = tabulate(places, chosen, GRID, EDGES)
    assert table.candidates.shape == (2, 2, 3)
    # Indices 3, 1, 3 and 0, 0, 2.
    assert (table.candidates[0, 0, 0], table.budgets[0, 0, 0]) == (4, 64)
    assert (table.candidates[1, 1, 2], table.budgets[1, 1, 2]) == (0, 256)
    # One step from the first cell, three from the other.
    assert (table.candidates[0, 0, 1], table.budgets[0, 0, 1]) == (4, 64)
    assert (table.candidates[1, 1, 1], table.budgets[1, 1, 1]) == (0, 256)


def test_a_saved_table_governs_and_is_refused_for_other_choices(tmp_path: Path) -> None:
    places = np.array([[0, 0, 0], [9, 5000, 300]], dtype=np.float64)
    table = tabulate(places, np.array([[1, 2], [0, 1]]), GRID, EDGES)
    path = tmp_path / "table.npz"
    save_table(path, TableHeader(name="mine", actions=GRID, made_of={"controller": "analytic"}), table)
    header, again = load_table(str(path))
    assert header.made_of == {"controller": "analytic"}
    np.testing.assert_array_equal(again.budgets, table.budgets)
    controller = Tabulated(path=str(path))
    controller.reset(linear_plant(0.01, 0, 0, 0, GRID))
    assert controller.label() == "mine"
    assert controller.choose(observation(num_decodes=2.0)) == (1, 1024)
    assert controller.choose(observation(num_decodes=64.0, decode_kv_tokens=9e4, waiting_tokens=1e4)) == (0, 256)
    with pytest.raises(PolicyError, match=r"actions\.candidate_choices"):
        controller.reset(linear_plant(0.01, 0, 0, 0))
    path.write_bytes(b"nothing")
    with pytest.raises(PolicyError, match="is no table"):
        load_table(str(path))
    with pytest.raises(PolicyError, match="no table 'elsewhere'"):
        load_table("elsewhere")
