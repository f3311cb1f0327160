"""Claims about reading traces: three formats, their windows and scales, and an error with file and row for bad ones."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.workload.trace import Trace, prepare_trace, read_trace, spread_ticks
from engine.workload.workload import WorkloadError

HEADER = "arrival_s,prompt_tokens,output_tokens\n"


@pytest.fixture
def file(tmp_path):
    def write(text, name="trace.csv"):
        path = tmp_path / name
        path.write_bytes(gzip.compress(text.encode()) if name.endswith(".gz") else text.encode())
        return path

    return write


def trace_of(arrival, prompt=None, output=None) -> Trace:
    count = len(arrival)
    return Trace(
        "made.csv",
        np.array(arrival, dtype=float),
        np.array(prompt or [10] * count),
        np.array(output or [5] * count),
        np.arange(1, count + 1),
    )


@pytest.mark.parametrize("name", ["trace.csv", "trace.csv.gz"])
def test_plain_csv_is_read_whatever_other_columns_it_has(file, name):
    trace = read_trace(file("client,output_tokens,arrival_s,prompt_tokens\r\n7,5,0.5,100\r\n8,6,1.25,200\r\n", name))
    assert trace.arrival.tolist() == [0.5, 1.25]
    assert trace.prompt_tokens.tolist() == [100, 200]
    assert trace.output_tokens.tolist() == [5, 6]


@pytest.mark.parametrize("suffix", ["", "+00:00"])
def test_azure_timestamps_keep_their_seven_digits(file, suffix):
    trace = read_trace(
        file(
            "TIMESTAMP,ContextTokens,GeneratedTokens\n"
            f"2023-11-16 18:15:46.6805900{suffix},374,44\n2023-11-16 18:15:50.9951690{suffix},396,109\n"
        )
    )
    assert trace.arrival == pytest.approx([0.0, 4.314579], abs=1e-9)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
def test_mooncake_ticks_are_spread_within_the_tick_and_always_alike(file, name):
    records = [
        {"timestamp": 3000 * (i // 4), "input_length": 100 + i, "output_length": 9, "hash_ids": [1]} for i in range(40)
    ]
    path = file("\n".join(json.dumps(record) for record in records), name)
    trace = read_trace(path)
    assert (trace.arrival // 3.0).astype(int).tolist() == [i // 4 for i in range(40)]
    assert np.unique(trace.arrival).size == 40
    assert (np.diff(trace.arrival) >= 0).all()
    assert trace.arrival.tolist() == read_trace(path).arrival.tolist()
    assert trace.prompt_tokens.tolist() == [100 + i for i in range(40)]


def test_arrivals_on_a_fine_clock_are_left_alone():
    arrival = np.array([0.0, 0.001, 0.001, 0.1])
    assert spread_ticks(arrival) is arrival


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "no requests"),
        ("", "found none"),
        ("time,prompt_tokens,output_tokens\n0,1,1\n", "no column arrival_s; found time, prompt_tokens, output_tokens"),
        ("TIMESTAMP,ContextTokens\n", "no column GeneratedTokens"),
        (HEADER + "0,10,5\n1,-3,5\n", "row 2: prompt_tokens = -3 must be"),
        (HEADER + "0,nan,5\n", "row 1: prompt_tokens = nan must be"),
        (HEADER + "0,0,5\n", "row 1: prompt_tokens = 0 must be"),
        (HEADER + "0,10,2.5\n", "row 1: output_tokens = 2.5 must be"),
        (HEADER + "0,10,many\n", "row 1: output_tokens = 'many' is not a number"),
        (HEADER + "0,10,\n", "row 1: output_tokens = '' is not a number"),
        (HEADER + "0,10\n", "row 1: 2 fields where the header has 3"),
        (HEADER + "0,1,1\n2,1,1\n1,1,1\n", "row 3: arrives 1 s before"),
        (HEADER + "inf,1,1\n", "row 1: arrival_s = inf must be finite"),
        (HEADER + "0,1,1\n1,1,0\n", "row 2: 0 output tokens .*workload.zero_output=drop"),
        ("TIMESTAMP,ContextTokens,GeneratedTokens\nyesterday,1,1\n", "row 1: TIMESTAMP = 'yesterday' is not a time"),
    ],
)
def test_a_bad_csv_is_refused_with_file_and_row(file, text, message):
    path = file(text)
    with pytest.raises(WorkloadError, match=message) as error:
        read_trace(path)
    assert str(path) in str(error.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"timestamp": 0, "input_length": 5}\n', "row 1: no field output_length; found timestamp, input_length"),
        ("{oops\n", "row 1: not JSON"),
        ('{"timestamp": 0, "input_length": null, "output_length": 5}', "row 1: input_length = (None|nan)"),
    ],
)
def test_a_bad_jsonl_is_refused_with_file_and_row(file, text, message):
    with pytest.raises(WorkloadError, match=message):
        read_trace(file(text, "trace.jsonl"))


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused(tmp_path, file):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(WorkloadError, match=r"no such trace file"):
            read_trace(path)
    with pytest.raises(WorkloadError, match="unknown kind of trace"):
        read_trace(file("x", "trace.parquet"))
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(WorkloadError, match="cannot be read as CSV"):
        read_trace(broken)


def test_requests_without_output_can_be_dropped(file):
    trace = read_trace(file(HEADER + "0,1,1\n1,1,0\n2,1,3\n"), zero_output="drop")
    assert trace.row.tolist() == [1, 3]


def test_stretching_to_half_the_rate_doubles_every_gap():
    trace = prepare_trace(trace_of([5.0, 6.0, 9.0]), rate_scale=0.5)
    assert trace.arrival.tolist() == [0.0, 2.0, 8.0]


def test_a_window_counts_from_the_first_request_and_is_rebased():
    trace = prepare_trace(trace_of([100.0, 101.0, 102.5, 104.0]), start_s=1.0, duration_s=3.0, rate_scale=2.0)
    assert trace.row.tolist() == [2, 3]
    assert trace.arrival.tolist() == [0.0, 0.75]


def test_an_empty_window_is_refused_with_the_trace_s_span():
    with pytest.raises(WorkloadError, match=r"workload.start_s=50.*from 0 to 9 s"):
        prepare_trace(trace_of([0.0, 9.0]), start_s=50.0)


@settings(max_examples=25, deadline=None)
@given(st.floats(0.05, 1.0), st.floats(0.05, 1.0))
def test_thinning_is_nested_and_keeps_the_times(low, high):
    low, high = sorted((low, high))
    trace = trace_of(list(np.arange(400.0)))
    kept = [prepare_trace(trace, rate_scale=scale, rate_mode="thin") for scale in (low, high)]
    assert set(kept[0].row) <= set(kept[1].row)
    assert (np.diff(kept[1].arrival) == np.diff(kept[1].row)).all()


def test_thinning_keeps_the_share_it_is_asked_for():
    trace = prepare_trace(trace_of(list(np.arange(10_000.0))), rate_scale=0.3, rate_mode="thin")
    assert trace.row.size == pytest.approx(3000, abs=4 * np.sqrt(10_000 * 0.3 * 0.7))


def test_thinning_upwards_is_refused_with_the_fix():
    with pytest.raises(WorkloadError, match=r"workload.rate_mode=stretch"):
        prepare_trace(trace_of([0.0, 1.0]), rate_scale=2.0, rate_mode="thin")


def test_long_requests_are_refused_clipped_or_dropped():
    trace = trace_of([0.0, 1.0, 2.0], prompt=[10, 500, 90], output=[5, 5, 50])
    with pytest.raises(WorkloadError, match=r"row 2: 500 tokens exceed workload.max_prompt_tokens=100.*too_long=clip"):
        prepare_trace(trace, max_prompt_tokens=100)
    clipped = prepare_trace(trace, max_prompt_tokens=100, max_output_tokens=40, max_total_tokens=120, too_long="clip")
    assert clipped.prompt_tokens.tolist() == [10, 100, 80]
    assert clipped.output_tokens.tolist() == [5, 5, 40]
    assert prepare_trace(trace, max_total_tokens=130, too_long="drop").row.tolist() == [1]
    assert prepare_trace(trace, max_requests=2).row.tolist() == [1, 2]
    with pytest.raises(WorkloadError, match="no request is left"):
        prepare_trace(trace, max_total_tokens=2, too_long="drop")


@pytest.mark.parametrize(("name", "rows"), [("conv", 10_108), ("code", 5_740)])
def test_the_azure_traces_are_read_whole(data_dir, name, rows):
    trace = read_trace(data_dir / "requests" / f"azure2023_{name}_0-30min.csv")
    assert trace.row.size == rows
    assert trace.output_tokens.min() >= 1


def test_a_trace_with_client_column_is_read(data_dir):
    assert read_trace(data_dir / "requests" / "servegen_m-large_day3_24h-in-2h.csv").row.size == 29_578
