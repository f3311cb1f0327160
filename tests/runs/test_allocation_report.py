"""The report on who got the candidates: ratios to chains on the same requests, from run folders."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from runs.reporting import allocation
from runs.reporting.collate import collate
from tests.runs.fake_runs import write_run


def _runs(root: Path) -> Path:
    """Two ways to share in two scenarios over three seeds; tokens per iteration are set by hand."""
    tokens = {"chains": 2.0, "global": 2.2}
    for scenario in ("alike", "differ"):
        for seed in range(3):
            for sharing, value in tokens.items():
                write_run(
                    root / f"{scenario}-{seed}-{sharing}",
                    arrival_s=np.arange(30.0) + seed,
                    tpot_s=np.full(30, 0.010 if sharing == "chains" else 0.015),
                    ttft_s=np.full(30, 0.2),
                    label="fixed c=3 n=512" + ("" if sharing == "chains" else f" {sharing}"),
                    scenario=scenario,
                    seed=seed,
                    identity={"speculation": sharing},
                    figures={"tokens_per_iteration": value + 0.1 * seed, "mean_batch": 7.5},
                )
    return root


def test_ratios_are_to_chains_of_the_same_requests(tmp_path: Path) -> None:
    frame = allocation.allocations(collate([_runs(tmp_path)]).runs)
    assert sorted(frame["family"].unique()) == ["alike", "differ"]
    mine = frame[(frame["sharing"] == "global") & (frame["family"] == "alike")].iloc[0]
    assert mine["tokens"] == pytest.approx(np.mean([2.2 / 2.0, 2.3 / 2.1, 2.4 / 2.2]))
    assert mine["tpot"] == pytest.approx(1.5)
    assert mine["tokens_low"] <= mine["tokens"] <= mine["tokens_high"]
    assert (mine["batch"], mine["seeds"], mine["engine"]) == (7.5, 3, "fixed c=3 n=512")
    assert len(allocation.table(frame).frame) == 2


def test_there_is_no_such_section_without_chains_or_without_another_way(tmp_path: Path) -> None:
    runs = collate([_runs(tmp_path)]).runs
    assert allocation.allocations(runs[runs["speculation"] == "global"]).empty
    assert allocation.allocations(runs[runs["speculation"] == "chains"]).empty


def test_every_way_has_its_line_in_every_panel(tmp_path: Path) -> None:
    figure = allocation.draw(allocation.allocations(collate([_runs(tmp_path)]).runs))
    assert len(figure.axes) == 4
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["global"]
