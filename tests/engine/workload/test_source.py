"""Claims about workload sources: one seed, one workload; the same luck at every load; every config draws."""

from __future__ import annotations

import gzip
import json
import re
import time
from pathlib import Path

import numpy as np
import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from pydantic import ValidationError

from engine.workload.agreement import IidAgreement
from engine.workload.arrivals import PoissonArrivals, SinusoidArrivals
from engine.workload.lengths import FileLengths, FixedLengths, NamedLengths
from engine.workload.source import AcceptanceLogSource, SyntheticSource, TraceSource
from engine.workload.workload import WorkloadError

CONF = Path(__file__).resolve().parents[3] / "conf"
WORKLOADS = sorted(path.stem for path in (CONF / "workload").glob("*.yaml") if path.stem != "prompts")
"""Prompts are drawn for a tokenizer: tests/engine/workload/test_prompts.py."""


@pytest.fixture
def trace(tmp_path):
    path = tmp_path / "made.csv"
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(size=300))
    rows = [
        f"{t:.6f},{p},{o}" for t, p, o in zip(arrival, rng.integers(1, 900, 300), rng.integers(1, 99, 300), strict=True)
    ]
    path.write_text("arrival_s,prompt_tokens,output_tokens\n" + "\n".join(rows))
    return path


@pytest.fixture
def log(tmp_path):
    path = tmp_path / "log.jsonl"
    row = {"question_id": 1, "turn": 0, "new_tokens": 6, "n_accepted": [2, 0, 1], "k_drafted": [2, 4, 3]}
    path.write_text("\n".join(json.dumps({**row, "question_id": i}) for i in range(3)))
    return path


def synthetic(**more):
    return SyntheticSource(
        **{
            "arrivals": SinusoidArrivals(mean_rate=5.0, amplitude=0.5, period_s=10.0),
            "lengths": NamedLengths(name="specbench"),
            "num_requests": 50,
            **more,
        }
    )


def luck(workload) -> dict[int, list[int]]:
    return {
        int(row): workload.rank[workload.offset[r] : workload.offset[r + 1]].tolist()
        for r, row in enumerate(workload.source_row)
    }


def test_the_same_seed_gives_the_same_workload_and_another_seed_does_not(trace):
    for source in (TraceSource(path=trace), synthetic()):
        assert source.draw(3).digest == source.draw(3).digest
        assert source.draw(3).digest != source.draw(4).digest


def test_a_trace_s_seed_draws_agreement_only(trace):
    first, second = (TraceSource(path=trace).draw(seed) for seed in (0, 1))
    assert (first.arrival == second.arrival).all()
    assert (first.output_tokens == second.output_tokens).all()
    assert (first.rank != second.rank).any()


@pytest.mark.parametrize(
    "options",
    [
        {"rate_scale": 0.5},
        {"rate_scale": 0.4, "rate_mode": "thin"},
        {"start_s": 50.0, "duration_s": 100.0},
        {"max_requests": 7},
        {"max_output_tokens": 50, "too_long": "drop"},
    ],
)
def test_a_request_of_a_trace_has_the_same_luck_at_every_load_and_window(trace, options):
    whole = luck(TraceSource(path=trace).draw(0))
    part = luck(TraceSource(path=trace, **options).draw(0))
    assert part
    assert all(whole[row] == ranks for row, ranks in part.items())


def test_a_clipped_output_keeps_the_luck_of_its_first_tokens(trace):
    whole = luck(TraceSource(path=trace).draw(0))
    part = luck(TraceSource(path=trace, max_output_tokens=20, too_long="clip").draw(0))
    assert all(whole[row][:20] == ranks for row, ranks in part.items())


def test_synthetic_requests_are_the_same_at_every_rate_scale():
    full, half = synthetic().draw(0), synthetic(rate_scale=0.5).draw(0)
    assert half.arrival == pytest.approx(2 * full.arrival)
    assert (half.prompt_tokens == full.prompt_tokens).all()
    assert (half.rank == full.rank).all()


def test_changing_the_arrivals_leaves_lengths_and_luck_alone():
    other = synthetic(arrivals=PoissonArrivals(rate=1.0)).draw(0)
    assert (other.output_tokens == synthetic().draw(0).output_tokens).all()
    assert (other.rank == synthetic().draw(0).rank).all()


def test_a_log_is_repeated_in_order_or_at_random(log):
    options = {
        "path": log,
        "arrivals": PoissonArrivals(rate=1.0),
        "lengths": FixedLengths(prompt_tokens=9, output_tokens=1),
    }
    assert AcceptanceLogSource(**options).draw(0).source_row.tolist() == [1, 2, 3]
    cyclic = AcceptanceLogSource(**options, num_requests=7).draw(0)
    assert cyclic.source_row.tolist() == [1, 2, 3, 1, 2, 3, 1]
    assert set(AcceptanceLogSource(**options, num_requests=60, order="random").draw(0).source_row) == {1, 2, 3}


def test_scenarios_tell_settings_apart_but_not_seeds(trace):
    assert re.fullmatch("made@[0-9a-f]{6}", TraceSource(path=trace).scenario)
    assert TraceSource(path=trace, rate_scale=0.5, duration_s=9.0).scenario.endswith(" duration_s=9.0 x0.5")
    assert synthetic(rate_scale=2).scenario != synthetic().scenario


def test_files_of_one_name_in_two_folders_are_two_scenarios(tmp_path):
    paths = [tmp_path / day / "azure.2023-11-16.csv.gz" for day in ("day1", "day2")]
    for seconds, path in enumerate(paths):
        path.parent.mkdir()
        path.write_bytes(gzip.compress(f"arrival_s,prompt_tokens,output_tokens\n{seconds},5,5\n".encode()))
    first, second = (TraceSource(path=path).scenario for path in paths)
    assert first != second
    assert all(scenario.startswith("azure.2023-11-16@") for scenario in (first, second))


def test_an_edited_file_is_another_workload(trace):
    for source in (TraceSource(path=trace), synthetic(lengths=FileLengths(path=trace))):
        before = source.contents
        assert list(before) == [str(trace)]
        trace.write_text(trace.read_text() + "\n9999,5,5")
        assert source.contents != before


def test_lengths_are_drawn_from_a_file_with_or_without_times(tmp_path):
    path = tmp_path / "lengths.csv"
    path.write_text("num_prefill_tokens,num_decode_tokens\n10,1\n20,2\n30,0\n40,4\n")
    drawn = synthetic(lengths=FileLengths(path=path), num_requests=200).draw(0)
    pairs = set(zip(drawn.prompt_tokens.tolist(), drawn.output_tokens.tolist(), strict=True))
    assert pairs == {(10, 1), (20, 2), (40, 4)}
    json.dumps(drawn.provenance)
    assert re.fullmatch("synthetic of lengths@[0-9a-f]{6}", synthetic(lengths=FileLengths(path=path)).scenario)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda trace: TraceSource(path=trace, time_unit="min"), "time_unit"),
        (lambda trace: TraceSource(path=trace, spread_ticks=3.0), "spread_ticks"),
        (lambda trace: TraceSource(path=trace, rate_scle=1), "rate_scle"),
        (lambda trace: TraceSource(path=trace, rate_scale=0), "rate_scale"),
        (lambda trace: TraceSource(path=trace, rate_scale=2, rate_mode="thin"), "rate_mode=stretch"),
        (lambda trace: TraceSource(path=trace, too_long="cut"), "too_long"),
        (lambda trace: TraceSource(path=trace, max_requests="all"), "max_requests"),
        (lambda trace: synthetic(num_requests=None), "num_requests or duration_s"),
        (lambda trace: synthetic(lengths=PoissonArrivals(rate=1.0)), "lengths"),
        (lambda trace: synthetic(agreement=IidAgreement(alpha=2.0)), "alpha"),
    ],
)
def test_a_wrong_setting_is_refused_by_name(trace, make, message):
    with pytest.raises(ValidationError, match=message):
        make(trace)


def test_a_negative_seed_is_refused():
    with pytest.raises(WorkloadError, match="seed=-1"):
        synthetic().draw(-1)


def configured(overrides):
    with initialize_config_dir(str(CONF), version_base=None):
        return instantiate(compose(overrides=overrides).workload, _convert_="all")


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_workload_config_composes_and_draws(name, trace, log):
    path = {"trace": [f"workload.path={trace}"], "acceptance_log": [f"workload.path={log}"]}.get(name, [])
    workload = configured([f"+workload={name}", "workload.rate_scale=0.5", *path]).draw(0)
    assert workload.num_requests >= 3
    json.dumps(workload.provenance)


@pytest.mark.parametrize(
    "group", [f"{path.parent.name}={path.stem}" for path in sorted((CONF / "workload").glob("*/*.yaml"))]
)
def test_every_part_of_a_synthetic_workload_can_be_chosen(group, trace):
    path = [f"workload.lengths.path={trace}"] if group == "lengths=file" else []
    source = configured(["+workload=synthetic", f"workload/{group}", "workload.num_requests=20", *path])
    assert source.draw(0).num_requests == 20


@pytest.mark.parametrize(("name", "bound"), [("conv", 0.03), ("code", 0.12)])
def test_the_azure_stand_ins_carry_the_load_of_the_traces(data_dir, name, bound):
    real = TraceSource(path=data_dir / "requests" / f"azure2023_{name}_0-30min.csv").draw(0)
    drawn = [configured([f"+workload=azure_{name}_like"]).draw(seed) for seed in range(5)]
    for tokens in ("prompt_tokens", "output_tokens"):
        per_request = np.mean([getattr(one, tokens).mean() for one in drawn])
        assert per_request == pytest.approx(getattr(real, tokens).mean(), rel=bound)
    assert np.mean([one.num_requests for one in drawn]) == pytest.approx(real.num_requests, rel=bound)


def test_ten_thousand_azure_requests_are_ready_in_a_fraction_of_a_second(data_dir):
    source = TraceSource(path=data_dir / "requests" / "azure2023_conv_0-30min.csv")
    source.draw(0)
    began = time.process_time()
    source.draw(1)
    assert time.process_time() - began < 0.6
