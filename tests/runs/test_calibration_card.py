"""The calibration card's statistics by hand, and its files from made-up results."""

import json
import math
from html import escape
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from runs.reporting import calibration_page
from runs.reporting.calibration import (
    METRICS,
    OWN_AGREEMENTS,
    PREDICTED,
    by_batch,
    latencies,
    over_labels,
    over_repeats,
    pair,
    sentences,
)
from runs.reporting.calibration_page import Card


def pairs_of(*cases: tuple[str, str, int, str, float, float], metric: str = "tpot_mean_s") -> pd.DataFrame:
    """Pairs of one metric from (level, label, repeat, way, real, simulated)."""
    return pd.DataFrame(
        [row for *case, real, simulated in cases for row in pair(*case, {metric: real}, {metric: simulated})]
    )


def iterations_of(*rows: tuple[int, int, int, float, float]) -> pd.DataFrame:
    """Iterations from (B, c, prompt tokens, measured s, predicted s)."""
    return pd.DataFrame(rows, columns=["num_decodes", "candidate_steps", "prefill_tokens", "measured_s", "predicted_s"])


def test_latencies_are_mean_and_p99_over_the_requests_that_have_them() -> None:
    found = latencies([1.0, 2.0, 3.0], [0.1, math.nan, 0.3])
    assert found["ttft_mean_s"] == 2.0
    assert found["ttft_p99_s"] == pytest.approx(2.98)
    assert found["tpot_mean_s"] == pytest.approx(0.2)
    assert math.isnan(latencies([1.0], [math.nan])["tpot_mean_s"])


def test_the_ratio_is_the_mean_of_the_repeats_ratios_not_the_ratio_of_their_means() -> None:
    compared = over_repeats(
        pairs_of(("idle", "c=0", 0, PREDICTED, 1.0, 2.0), ("idle", "c=0", 1, PREDICTED, 30.0, 20.0))
    )
    (row,) = compared.to_dict("records")
    assert row["ratio"] == pytest.approx((0.5 + 1.5) / 2)
    assert (row["real"], row["simulated"], row["repeats"]) == (15.5, 11.0, 2)
    # Two repeats one apart, and t at 97.5 % with one degree of freedom is 12.706.
    assert (row["low"], row["high"]) == pytest.approx((1 - 12.7062 / 2, 1 + 12.7062 / 2), abs=1e-4)


def test_one_repeat_has_no_interval_and_a_nil_attainment_on_both_sides_is_agreement() -> None:
    (row,) = over_repeats(pairs_of(("queueing", "c=4", 0, PREDICTED, 0.0, 0.0), metric="ttft_attainment")).to_dict(
        "records"
    )
    assert row["ratio"] == 1.0
    assert math.isnan(row["low"])
    assert math.isnan(row["high"])


def test_a_level_is_the_mean_over_its_controllers_and_names_the_farthest_off() -> None:
    pooled = over_labels(
        pairs_of(
            ("idle", "c=0", 0, PREDICTED, 1.1, 1.0),
            ("idle", "c=4", 0, PREDICTED, 0.8, 1.0),
            ("idle", "c=0", 1, PREDICTED, 1.3, 1.0),
            ("idle", "c=4", 1, PREDICTED, 0.6, 1.0),
        )
    )
    (row,) = pooled.to_dict("records")
    assert row["ratio"] == pytest.approx((1.1 + 0.8 + 1.3 + 0.6) / 4)
    assert (row["low"], row["high"]) == (pytest.approx(0.95), pytest.approx(0.95))
    assert (row["worst_label"], row["worst_ratio"]) == ("c=4", pytest.approx(0.7))


def test_ways_of_simulating_are_never_mixed() -> None:
    compared = over_repeats(
        pairs_of(("idle", "c=4", 0, PREDICTED, 1.2, 1.0), ("idle", "c=4", 0, OWN_AGREEMENTS, 1.2, 1.2))
    )
    assert dict(zip(compared["way"], compared["ratio"], strict=True)) == {PREDICTED: 1.2, OWN_AGREEMENTS: 1.0}


def test_iterations_are_told_apart_by_kind_and_batch_and_weighted_by_their_time() -> None:
    batches = by_batch(
        iterations_of(
            (1, 0, 0, 2.0, 1.0),
            (4, 0, 0, 3.0, 3.0),
            (3, 0, 0, 1.0, 2.0),
            (4, 2, 0, 6.0, 4.0),
            (4, 2, 100, 5.0, 10.0),
            (0, 0, 200, 3.0, 3.0),
        )
    ).set_index(["kind", "num_decodes"])
    assert batches.index.to_list() == [
        ("decode", "1"), ("decode", "3-4"), ("verify", "3-4"), ("mixed", "3-4"), ("prefill", ""), ("all", ""),
    ]  # fmt: skip
    assert batches.loc[("decode", "1"), "ratio"] == 2.0
    assert batches.loc[("decode", "1"), "mape"] == 0.5
    assert batches.loc[("decode", "3-4"), "ratio"] == pytest.approx(4 / 5)
    assert batches.loc[("decode", "3-4"), "median_ratio"] == pytest.approx(0.75)
    assert batches.loc[("decode", "3-4"), "mape"] == pytest.approx((0 + 1) / 2)
    assert batches.loc[("mixed", "3-4"), "share"] == pytest.approx(5 / 20)
    assert batches.loc[("all", ""), "ratio"] == pytest.approx(20 / 23)


def test_a_sentence_says_within_or_outside_the_target() -> None:
    pooled = over_labels(
        pairs_of(("idle", "c=0", 0, PREDICTED, 1.09, 1.0), ("queueing", "c=0", 0, PREDICTED, 0.89, 1.0))
    )
    idle, queueing = sentences(pooled, iterations_of(), {})
    assert idle == "idle: mean TPOT real / simulated 1.090, within 10 %."
    assert queueing == "queueing: mean TPOT real / simulated 0.890, outside 10 %."


@pytest.fixture
def card() -> Card:
    rng = np.random.default_rng(0)
    rows = []
    for level in ("idle", "medium", "queueing"):
        for label in ("fixed c=0 n=256", "fixed c=4 n=256", "analytic"):
            for repeat in range(3):
                for way in (PREDICTED, OWN_AGREEMENTS):
                    real = {metric: 1.0 + rng.random() for metric in METRICS}
                    simulated = {metric: value * (1 + 0.1 * rng.standard_normal()) for metric, value in real.items()}
                    rows += pair(level, label, repeat, way, real, simulated)
    return Card(
        facts={"engine": "made_up", "drafter": "model", "nothing": None},
        levels=pd.DataFrame(
            {"level": ["idle"], "share": [0.2], "request_rate_rps": [1.5], "requests": [30], "repeats": [3]}
        ),
        pairs=pd.DataFrame(rows),
        iterations=iterations_of((1, 0, 0, 2.0, 1.9), (4, 4, 0, 2.0, 2.1), (4, 0, 64, 3.0, 3.3)),
        held_out={"table": {"overall": 0.05, "mixed": 0.06}, "extra-trees": {"overall": 0.04}},
        parity={"runs": 27, "identical": 27},
        cells=pd.DataFrame(
            {
                "order": [0],
                "level": ["idle"],
                "label": ["analytic"],
                "repeat": [0],
                "load_average": [0.5],
                "duration_s": [12.0],
                "between_share": [0.01],
                "identical": ["yes"],
                "folder": ["runs/idle-analytic-0"],
            }
        ),
        notes=["one real run <failed>"],
    )


def test_a_card_leaves_json_figures_and_one_page_that_say_the_same(card: Card, tmp_path: Path) -> None:
    calibration_page.write(card, tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {
        "calibration.json", "calibration.html", "ratios.png", "iteration_times.png",
    }  # fmt: skip
    written = json.loads((tmp_path / "calibration.json").read_text())
    html = (tmp_path / "calibration.html").read_text()
    assert len(written["compared"]) == 3 * 3 * 2 * len(METRICS)
    assert written["facts"]["nothing"] is None
    assert written["replay_parity"] == {"runs": 27, "identical": 27}
    assert written["held_out_mape"]["extra-trees"] == {"overall": 0.04}
    for line in written["said"]:
        assert escape(line) in html
    assert "one real run &lt;failed&gt;" in html
    assert html.count("<img") == 2
    first = written["compared"][0]
    assert f"{first['ratio']:.3f} [{first['low']:.3f}, {first['high']:.3f}]" in html
    assert "http" not in html


def test_a_card_of_nothing_but_recorded_vllm_runs_has_their_table_alone(tmp_path: Path) -> None:
    rows = pair("all requests", "CARD_MODEL", 0, PREDICTED, latencies([2.0], [0.02]), latencies([1.0], [0.01]))
    calibration_page.write(Card(facts={}, vllm=pd.DataFrame(rows).assign(requests=1)), tmp_path)
    written = json.loads((tmp_path / "calibration.json").read_text())
    assert written["vllm"][0]["ttft_mean_s_ratio"] == 2.0
    assert written["said"] == ["vLLM, CARD_MODEL: mean TPOT / TTFT real / simulated: all requests 2.000 / 2.000."]
    assert "Real runs beside" not in (tmp_path / "calibration.html").read_text()
