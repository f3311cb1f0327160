"""Recorded vLLM runs: read as they are, and the simulator's distance from them."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from engine.latency.model import LatencyModel
from runs import vllm_runs
from runs.vllm_runs import ALL, EMPTY, WAITING, VllmRunError, pairs, read_run, read_runs, simulate

NAME = "RTXPRO6000_Llama-3.1-8B"
EPOCH_S, MONOTONIC_S = 1_700_000_000.0, 4_000.0


def write_run(folder: Path, arrival_s: np.ndarray, ttft_s: np.ndarray, tpot_s: np.ndarray, output: np.ndarray) -> Path:
    """A folder in LLMServingSim's format; the engine takes notice of each request 2 ms after it arrives, or later."""
    folder.mkdir(parents=True)
    rows = []
    for i, (arrival, ttft, tpot, tokens) in enumerate(zip(arrival_s, ttft_s, tpot_s, output, strict=True)):
        first = MONOTONIC_S + 0.002 + arrival + ttft
        rows.append(
            {
                "request_id": f"bench-{i}",
                "input_toks": 100 + i,
                "output_toks": int(tokens),
                "arrival_time": EPOCH_S + arrival,
                "queued_ts": MONOTONIC_S + arrival + 0.002 + 0.001 * i,
                "scheduled_ts": first - 0.01,
                "first_token_ts": first,
                "last_token_ts": first + tpot * (tokens - 1),
            }
        )
    # The file's order need not be that of arrival.
    (folder / "requests.jsonl").write_text("\n".join(json.dumps(row) for row in reversed(rows)))
    (folder / "meta.json").write_text(
        json.dumps({"engine_kwargs": {"max_num_seqs": 4, "max_num_batched_tokens": 256}, "num_requests": len(rows)})
    )
    ticks = pd.DataFrame({"t": [1.0, 2.0, 3.0], "waiting": [0, 5, 0]})
    ticks.to_csv(folder / "timeseries.csv", index=False)
    return folder


def test_a_run_is_read_with_times_from_the_first_arrival_on_one_clock(tmp_path: Path) -> None:
    arrival, output = np.array([0.0, 0.5, 1.5]), np.array([1, 11, 21])
    run = read_run(write_run(tmp_path / NAME, arrival, np.array([0.1, 0.2, 0.3]), np.full(3, 0.01), output))
    np.testing.assert_allclose(run.requests["arrival_s"], arrival, atol=1e-6)
    np.testing.assert_allclose(run.ttft_s, [0.1, 0.2, 0.3], atol=1e-6)
    np.testing.assert_allclose(run.tpot_s, [np.nan, 0.01, 0.01], atol=1e-6)
    assert run.requests["prompt_tokens"].to_list() == [100, 101, 102]
    assert run.requests["waiting"].to_list() == [0, 0, 5]
    assert (run.max_num_seqs, run.total_budget, run.num_kv_blocks) == (4, 256, 0)


def test_a_run_that_the_simulator_made_is_predicted_exactly(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    arrival = np.concatenate(([0.0], np.sort(rng.uniform(0.1, 2.5, 39))))
    output = rng.integers(2, 60, 40)
    made_up = read_run(write_run(tmp_path / "a" / NAME, arrival, np.ones(40), np.ones(40), output))
    simulated = simulate(made_up)
    run = read_run(write_run(tmp_path / "b" / NAME, arrival, simulated["ttft_s"], simulated["tpot_s"], output))
    found = pairs(run)
    assert found["level"].unique().tolist() == [ALL, EMPTY, WAITING]
    np.testing.assert_allclose(found["real"], found["simulated"], rtol=1e-4)
    by_level = found.drop_duplicates("level").set_index("level")["requests"]
    assert by_level[ALL] == 40
    assert by_level[EMPTY] + by_level[WAITING] == 40


def test_vllms_budget_counts_decodes_so_prompts_get_what_they_leave(tmp_path: Path) -> None:
    # One long output decodes while a prompt of 300 tokens needs ceil(300 / (256 - 1)) = 2 iterations.
    arrival, output = np.array([0.0, 1.0]), np.array([400, 2])
    run = read_run(write_run(tmp_path / NAME, arrival, np.ones(2), np.ones(2), output))
    run.requests.loc[1, "prompt_tokens"] = 300
    simulated = simulate(run)
    model = LatencyModel.load(run.table)
    admitted, cached = simulated["admitted_s"][1], 100
    decoded = int((admitted - simulated["first_token_s"][0]) / simulated["tpot_s"][0])
    chunks = [model.time(1, 0, cached + decoded, [(255, 0)]), model.time(1, 0, cached + decoded, [(45, 255)], 1)]
    assert simulated["first_token_s"][1] - admitted == pytest.approx(sum(chunks), rel=0.01)


def test_a_folder_without_runs_or_with_a_broken_one_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(VllmRunError, match=f"vllm={tmp_path}: no folder RTX4090_Llama-3.1-8B or"):
        read_runs(tmp_path)
    (tmp_path / NAME).mkdir()
    with pytest.raises(VllmRunError, match=r"not a recorded vLLM run.*requests\.jsonl"):
        read_runs(tmp_path)


@pytest.fixture(scope="module")
def measured(data_dir: Path) -> pd.DataFrame:
    folder = data_dir / "profiles" / "llmservingsim" / "vllm_measured"
    if not folder.is_dir():
        pytest.skip(f"no recorded vLLM runs at {folder}")
    found = pd.concat([pairs(run) for run in read_runs(folder)])
    found["ratio"] = found["real"] / found["simulated"]
    return found.set_index(["label", "level", "metric"])["ratio"]


# Real / simulated. The RTX 4090's iterations are predicted 5 % too long: the overheads were set from the other card.
@pytest.mark.parametrize(
    ("card", "level", "metric", "low", "high"),
    [
        (NAME, ALL, "tpot_mean_s", 0.96, 1.04),
        (NAME, ALL, "tpot_p99_s", 0.95, 1.05),
        (NAME, ALL, "ttft_mean_s", 0.95, 1.08),
        (NAME, ALL, "ttft_p99_s", 0.95, 1.06),
        (NAME, EMPTY, "tpot_mean_s", 0.96, 1.04),
        (NAME, WAITING, "tpot_mean_s", 0.96, 1.04),
        (NAME, WAITING, "ttft_mean_s", 0.95, 1.08),
        ("RTX4090_Llama-3.1-8B", ALL, "tpot_mean_s", 0.90, 1.02),
        ("RTX4090_Llama-3.1-8B", ALL, "tpot_p99_s", 0.88, 1.02),
        ("RTX4090_Llama-3.1-8B", ALL, "ttft_mean_s", 0.88, 1.02),
        ("RTX4090_Llama-3.1-8B", ALL, "ttft_p99_s", 0.88, 1.02),
        ("RTX4090_Llama-3.1-8B", EMPTY, "tpot_mean_s", 0.93, 1.03),
        ("RTX4090_Llama-3.1-8B", WAITING, "ttft_mean_s", 0.88, 1.02),
    ],
)
def test_the_simulator_is_this_close_to_real_vllm(
    measured: pd.Series, card: str, level: str, metric: str, low: float, high: float
) -> None:
    assert low < measured[card, level, metric] < high


def test_a_request_that_finds_vllm_without_a_queue_waits_an_iteration_longer_than_in_the_simulator(
    data_dir: Path,
) -> None:
    """vLLM schedules a step ahead: what is left of the mean difference is of the order of one iteration."""
    folder = data_dir / "profiles" / "llmservingsim" / "vllm_measured" / NAME
    if not folder.is_dir():
        pytest.skip(f"no recorded vLLM run at {folder}")
    run = read_run(folder)
    empty = (run.requests["waiting"] == 0).to_numpy()
    simulated = simulate(run)
    longer = float((run.ttft_s - simulated["ttft_s"])[empty].mean())
    iteration = float(simulated["tpot_s"][empty].mean())
    assert 0.5 * iteration < longer < 2.5 * iteration


def test_every_table_named_ships() -> None:
    for table in vllm_runs.TABLES.values():
        assert LatencyModel.load(table).kv_capacity_tokens() > 0
