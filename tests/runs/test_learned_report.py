"""Learned controllers in reports: paired with analytic, intervals over both kinds of seeds, the target spelt out."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from controllers.analytic import Analytic
from engine.core.action import ActionGrid
from runs import learned as app
from runs.reporting import learned, policy_map
from runs.reporting.collate import ReportError
from runs.reporting.palette import png
from tests.controllers.observed import linear_plant


def _run(
    scenario: str, label: str, seed: int, tpot_s: float, attained: float = 0.9, objective: float = 1.0
) -> dict[str, Any]:
    return {
        "engine": "e",
        "scenario": scenario,
        "label": label,
        "seed": seed,
        "workload_digest": f"{scenario}{seed}",
        "tpot_mean_s": tpot_s,
        "ttft_attainment": attained,
        "objective": objective,
    }


def _runs(gain: dict[str, float]) -> pd.DataFrame:
    """Two scenarios, two workload seeds, two training seeds whose TPOT is `gain` and a per cent more of analytic's."""
    rows = []
    for scenario, factor in gain.items():
        for seed, base in ((0, 0.02), (1, 0.03)):
            rows.append(_run(scenario, "analytic", seed, base))
            for trained in (0, 1):
                rows.append(_run(scenario, f"ppo seed={trained}", seed, base * factor * (1.0 + 0.01 * trained), 0.9))
            rows.append(_run(scenario, "goodput", seed, base * 1.5, 0.5, 2.0))
    return pd.DataFrame(rows)


def test_runs_are_paired_on_the_same_requests_and_labels_split_into_kind_and_seed() -> None:
    paired = learned.pairs(_runs({"7b/a": 0.9, "unseen/b": 1.0}))
    assert set(paired["family"]) == {"ppo", "goodput"}
    assert set(paired["group"]) == {"7b", "unseen"}
    ours = paired[(paired["family"] == "ppo") & (paired["scenario"] == "e 7b/a") & (paired["training_seed"] == 1)]
    np.testing.assert_allclose(ours["tpot_ratio"], 0.9 * 1.01)
    assert len(ours) == 2
    np.testing.assert_allclose(paired[paired["family"] == "goodput"]["objective_ratio"], 2.0)


def test_means_are_geometric_over_scenarios_and_intervals_cover_both_kinds_of_seeds() -> None:
    a, b = np.array([[0.8, 0.8], [0.8, 0.8]]), np.array([[1.25, 1.25], [1.25, 1.25]])
    assert learned.estimate([a, b], ratio=True) == pytest.approx((1.0, 1.0, 1.0))
    value, low, high = learned.estimate([np.array([[0.8, 1.0], [1.0, 1.2]])], ratio=False)
    assert value == pytest.approx(1.0)
    # The same seed of one kind may be drawn twice: the means then range from 0.8 to 1.2.
    assert low == pytest.approx(0.8)
    assert high == pytest.approx(1.2)
    assert math.isnan(learned.estimate([np.array([[0.8]])], ratio=True)[1])


def test_the_target_is_reached_only_with_less_tpot_everywhere_and_as_many_on_time() -> None:
    def said(runs: pd.DataFrame) -> str:
        return next(line for line in learned.markdown(runs).splitlines() if line.startswith("* `ppo`"))

    assert "is reached" in said(_runs({"7b/a": 0.9, "7b/b": 0.92}))
    assert "is missed" in said(_runs({"7b/a": 0.97, "7b/b": 0.97}))
    worse = said(_runs({"7b/a": 0.7, "7b/b": 1.03}))
    assert "is missed" in worse
    assert "above 1.02 times it in 1" in worse
    late = _runs({"7b/a": 0.9, "7b/b": 0.9})
    late.loc[late["label"].str.startswith("ppo") & (late["scenario"] == "7b/a"), "ttft_attainment"] = 0.88
    assert "more than 1 point fewer on time in 1" in said(late)


def test_holes_and_a_missing_rival_are_refused() -> None:
    runs = _runs({"7b/a": 0.9, "7b/b": 0.9})
    with pytest.raises(ReportError, match="no runs of 'analytic'"):
        learned.pairs(runs[runs["label"] != "analytic"])
    hole = runs[~((runs["label"] == "ppo seed=1") & (runs["seed"] == 1))]
    with pytest.raises(ReportError, match="not every training seed was run on every seed"):
        learned.markdown(hole)


def test_the_app_names_what_is_wrong(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert app.main([str(tmp_path), "--out", str(tmp_path / "out.md")]) == 2
    assert str(tmp_path) in capsys.readouterr().err
    assert not (tmp_path / "out.md").exists()


def test_a_map_shows_the_choice_in_every_situation() -> None:
    grid = ActionGrid(candidate_choices=(0, 1, 2, 4), budget_choices=(64, 256, 1024))
    # Every candidate row costs: the more requests decode, the less speculation pays.
    plant = linear_plant(0.01, 1e-4, 0.0, 1e-3, grid)
    chosen = policy_map.choices(Analytic(), plant, 1.0)
    assert chosen.shape == (len(policy_map.BATCHES), len(policy_map.QUEUES), 2)
    assert set(np.unique(chosen[..., 0])) <= set(grid.candidate_choices)
    alone, crowded = policy_map.BATCHES.index(1), policy_map.BATCHES.index(128)
    assert chosen[alone, 0, 0] > 0
    assert chosen[crowded, 0, 0] < chosen[alone, 0, 0]
    assert png(policy_map.draw({"analytic": chosen, "again": chosen}, plant)).startswith(b"\x89PNG")
