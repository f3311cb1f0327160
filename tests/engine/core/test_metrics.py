"""Metrics of a run: requests computed by hand, and the simulator's own counters."""

import math

import numpy as np
import pytest

from engine.config import EngineConfig
from engine.core import state as core
from engine.core.metrics import describe, request_table, summarize
from engine.core.objective import Prices
from engine.latency.model import LatencyModel
from engine.simulator.simulator import Simulator
from engine.workload.agreement import IidAgreement
from engine.workload.workload import Workload


def _finished(state: core.State, request: int, first: float, last: float) -> None:
    row = state.requests[request]
    row["admitted"] = row["arrival"]
    row["first_token"] = first
    row["last_token"] = last
    row["generated"] = row["output"]
    row["phase"] = core.FINISHED


@pytest.fixture
def three_requests() -> core.State:
    """Arrivals 1, 2, 3 s with 5, 1 and 4 output tokens; the clock stands at 4.5 s when the last has finished."""
    state = core.allocate(1, 3, total_blocks=10, block_size=16, watermark_blocks=0, max_num_seqs=4, ttft_target=1.0)
    arrivals, prompts, outputs = np.array([1.0, 2.0, 3.0]), np.array([10, 20, 30]), np.array([5, 1, 4])
    core.enter(state, 0, arrivals, prompts, outputs, np.array([0, 5, 6]), 1.0)
    _finished(state, 0, 1.5, 3.5)
    _finished(state, 1, 3.5, 3.5)
    _finished(state, 2, 4.0, 4.5)
    state.instances["now"] = 4.5
    engine = state.totals
    engine["iterations"] = 10
    engine["batched_requests"] = 25
    engine["busy_s"] = 2.8
    engine["drafted"] = 8
    engine["accepted"] = 2
    engine["decode_steps"] = 5
    engine["lowest_free_blocks"] = 4
    return state


def test_the_request_table_holds_each_latency_as_computed_by_hand(three_requests: core.State) -> None:
    table = request_table(three_requests.requests)
    np.testing.assert_allclose(table["ttft_s"], [0.5, 1.5, 1.0])
    np.testing.assert_allclose(table["tpot_s"], [2.0 / 4, math.nan, 0.5 / 3])
    np.testing.assert_allclose(table["e2e_s"], [2.5, 1.5, 1.5])
    np.testing.assert_allclose(table["normalised_latency_s"], [0.5, 1.5, 0.375])
    assert {column.size for column in table.values()} == {3}


def test_targets_are_met_at_the_very_deadline_and_one_token_cannot_miss_tpot(three_requests: core.State) -> None:
    summary = summarize(three_requests, three_requests.requests, ttft_target=1.0, prices=Prices(tpot_target=0.2))
    assert summary["ttft_attainment"] == pytest.approx(2 / 3)
    assert summary["ttft_violations"] == 1
    assert summary["tpot_attainment"] == pytest.approx(2 / 3)
    assert summary["slo_attainment"] == pytest.approx(1 / 3)
    assert summary["duration_s"] == pytest.approx(3.5)
    assert summary["goodput_rps"] == pytest.approx(1 / 3.5)
    assert summary["token_goodput_tps"] == pytest.approx(10 / 3.5)
    assert summary["request_rate_rps"] == pytest.approx(1.0)


def test_engine_totals_become_ratios(three_requests: core.State) -> None:
    summary = summarize(three_requests, three_requests.requests, ttft_target=1.0, prices=Prices(tpot_target=0.2))
    assert summary["mean_batch"] == pytest.approx(2.5)
    assert summary["utilization"] == pytest.approx(0.8)
    assert summary["acceptance_rate"] == pytest.approx(0.25)
    assert summary["tokens_per_iteration"] == pytest.approx(1.4)
    assert summary["peak_kv_share"] == pytest.approx(0.6)


def test_an_unfinished_request_attains_nothing_and_has_no_end(three_requests: core.State) -> None:
    row = three_requests.requests[2]
    row["phase"], row["first_token"], row["last_token"], row["generated"] = core.PREFILLING, math.nan, math.nan, 0
    summary = summarize(three_requests, three_requests.requests, ttft_target=1.0, prices=Prices(tpot_target=1.0))
    assert summary["requests_finished"] == 2
    assert summary["requests_total"] == 3
    assert summary["ttft_attainment"] == pytest.approx(1 / 3)
    assert summary["slo_attainment"] == pytest.approx(1 / 3)
    assert math.isnan(request_table(three_requests.requests)["finish_s"][2])


def test_a_mean_over_nothing_is_nan_not_zero() -> None:
    assert all(math.isnan(value) for value in describe("tpot", np.array([math.nan])).values())
    described = describe("tpot", np.array([1.0, 2.0, math.nan, 3.0]))
    assert described["tpot_mean_s"] == pytest.approx(2.0)
    assert described["tpot_p50_s"] == pytest.approx(2.0)


def test_itl_is_the_gaps_between_emissions_of_a_simulated_run() -> None:
    rng = np.random.default_rng(3)
    workload = Workload.build(
        "tiny",
        np.sort(rng.uniform(0, 3, 40)),
        rng.integers(5, 300, 40),
        rng.integers(1, 60, 40),
        IidAgreement(alpha=0.6),
        1,
    )
    simulator = Simulator(
        EngineConfig(name="linear", latency="unused"),
        [workload],
        latency=LatencyModel.linear(0.01, 1e-4),
        ttft_target=0.2,
    )
    rows = simulator.state.requests
    last = np.full(40, np.nan)
    gaps: list[float] = []
    more = True
    while more:
        more = simulator.step(0, 2, 64)
        moved = np.flatnonzero(np.isfinite(rows["last_token"]) & (rows["last_token"] != last))
        gaps += list((rows["last_token"] - last)[moved][np.isfinite(last[moved])])
        last[moved] = rows["last_token"][moved]
    summary = summarize(simulator.state, simulator.requests(), ttft_target=0.2, prices=Prices())
    assert summary["itl_mean_s"] == pytest.approx(np.mean(gaps))
    for q in (50, 90, 99):
        exact = float(np.percentile(gaps, q, method="inverted_cdf"))
        assert summary[f"itl_p{q}_s"] == pytest.approx(exact, rel=0.0051)
    assert summary["ttft_violations"] == simulator.state.totals[0]["violations"]
    assert 0 < summary["ttft_violations"] < 40
