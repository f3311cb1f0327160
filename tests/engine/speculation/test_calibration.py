"""Estimates of how often candidates are right move from the drafter's word to what was seen."""

from __future__ import annotations

import numpy as np
import pytest

from engine.speculation.calibration import PRIOR, Calibration
from engine.speculation.tree import Drafts


def _tree(tokens: list[int], parents: list[int]) -> Drafts:
    row = np.array([tokens], dtype=np.int32), np.array([parents], dtype=np.int32)
    return Drafts(*row, np.ones_like(row[0]), np.array([len(tokens)]), [None])


def test_the_drafters_word_is_taken_at_first() -> None:
    calibration = Calibration()
    probabilities = np.array([[0.7, 0.2], [0.31, 0.3]])
    cells = calibration.cells(probabilities, np.array([True, False]))
    np.testing.assert_allclose(calibration.estimate(probabilities, cells), probabilities)
    assert len(np.unique(cells)) == 4, "greedy and sampled, first and other choices are told apart"


def test_every_child_on_the_way_is_counted_once_and_none_beside_it() -> None:
    """The request goes on with 5, 8, 1: both children of the root and of 5 are judged, those of 6 and of 8 are not."""
    calibration = Calibration()
    tree = _tree([5, 6, 7, 8, 9, 3], [-1, -1, 0, 0, 1, 3])
    cells = np.array([[0, 1, 2, 3, 4, 5]])
    calibration.propose([11], [2], tree, cells)
    calibration.learn(11, np.array([1, 2, 5, 8], dtype=np.int32))
    calibration.learn(11, np.array([1, 2, 5, 8, 3], dtype=np.int32))
    p = np.full((1, 6), 0.5)
    right, tried = np.array([1, 0, 0, 1, 0, 0]), np.array([1, 1, 1, 1, 0, 0])
    np.testing.assert_allclose(calibration.estimate(p, cells)[0], (PRIOR * 0.5 + right) / (PRIOR + tried))


def test_what_was_forgotten_is_not_learned_from() -> None:
    calibration = Calibration()
    calibration.propose([0], [0], _tree([5], [-1]), np.array([[0]]))
    calibration.forget(0)
    calibration.learn(0, np.array([5], dtype=np.int32))
    assert calibration.estimate(np.array([0.25]), np.array([0])).tolist() == [0.25]


def test_estimates_approach_the_share_that_was_right() -> None:
    calibration = Calibration()
    random = np.random.default_rng(0)
    for _ in range(2000):
        calibration.propose([0], [0], _tree([5], [-1]), np.array([[7]]))
        calibration.learn(0, np.array([5 if random.random() < 0.8 else 6], dtype=np.int32))
    assert calibration.estimate(np.array([0.4]), np.array([7]))[0] == pytest.approx(0.8, abs=0.04)
