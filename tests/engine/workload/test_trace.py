"""Claims about reading traces: published formats, windows and scales, and an error with file and row for bad ones."""

from __future__ import annotations

import gzip
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.workload.trace import Trace, prepare_trace, read_trace
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


MOONCAKE = {"timestamp": 0, "input_length": 100, "output_length": 9}


def jsonl(*records: dict) -> str:
    return "\n".join(json.dumps(record) for record in records)


def times_of(trace: Trace) -> list[float]:
    return trace.arrival.round(9).tolist()


JITTERED = [0, 3000, 5997, 9000, 12003, 15000, 17999, 24001]
"""Milliseconds of ticks as published traces have them; one tick is empty."""


@pytest.mark.parametrize("keys", [{"hash_ids": [1, 2]}, {}])
def test_ticks_that_jitter_are_spread_without_passing_the_next(file, keys):
    path = file(jsonl(*({**MOONCAKE, **keys, "timestamp": ms} for ms in JITTERED for _ in range(20))), "moon.jsonl")
    trace = read_trace(path)
    begin = np.repeat(np.array(JITTERED) / 1000.0, 20)
    end = np.minimum(begin + 3.0, np.append(begin[20:], [np.inf] * 20))
    assert (trace.arrival >= begin).all()
    assert (trace.arrival <= end).all()
    assert trace.arrival.max() > 26.0
    assert read_trace(path, spread_ticks=False).arrival.tolist() == begin.tolist()


def test_ticks_of_a_csv_are_spread_as_those_of_a_jsonl(file):
    rows = [{**MOONCAKE, "hash_ids": "[1]", "timestamp": ms} for ms in JITTERED for _ in range(3)]
    text = "timestamp,input_length,output_length,hash_ids\n" + "".join(f"{r['timestamp']},100,9,[1]\n" for r in rows)
    assert times_of(read_trace(file(text))) == times_of(read_trace(file(jsonl(*rows), "moon.jsonl")))


@pytest.mark.parametrize(
    "milliseconds", [[0, 60000, 120000], [0, 3000, 6000, 9000], [0, 3000, 60000, 120000]], ids=["minutes", "3 s", "few"]
)
@pytest.mark.parametrize("name", ["waves.jsonl", "waves.csv.gz"])
def test_waves_that_somebody_made_are_left_alone(file, milliseconds, name):
    waves = [ms for ms in milliseconds for _ in range(20)]
    text = jsonl(*({**MOONCAKE, "timestamp": ms} for ms in waves))
    if ".csv" in name:
        text = "timestamp,input_length,output_length\n" + "".join(f"{ms},100,9\n" for ms in waves)
    assert times_of(read_trace(file(text, name))) == [ms / 1000 for ms in waves]


def test_waves_with_hash_ids_far_apart_are_left_alone(file):
    waves = [{**MOONCAKE, "hash_ids": [1], "timestamp": ms} for ms in (0, 60000, 120000) for _ in range(20)]
    assert np.unique(read_trace(file(jsonl(*waves), "waves.jsonl")).arrival).tolist() == [0.0, 60.0, 120.0]


def test_ticks_are_spread_on_demand_whatever_the_format(file):
    path = file(HEADER + "0,1,1\n0,1,1\n10,1,1\n10,1,1\n20,1,1\n")
    assert times_of(read_trace(path)) == [0.0, 0.0, 10.0, 10.0, 20.0]
    arrival = read_trace(path, spread_ticks=True).arrival
    assert np.unique(arrival).size == 5
    assert (arrival // 10).tolist() == [0, 0, 1, 1, 2]


def test_arrivals_on_a_fine_clock_are_left_alone(file):
    path = file(jsonl(*({**MOONCAKE, "hash_ids": [1], "timestamp": ms} for ms in (0, 1, 1, 100, 3000))), "fine.jsonl")
    assert times_of(read_trace(path)) == [0.0, 0.001, 0.001, 0.1, 3.0]


BAILIAN = {
    "chat_id": 1,
    "parent_chat_id": -1,
    "type": "text",
    "turn": 1,
    "hash_ids": [3],
    "input_length": 7,
    "output_length": 5,
}


@pytest.mark.parametrize(
    ("name", "text", "arrival"),
    [
        ("bailian.jsonl", jsonl(*({**BAILIAN, "timestamp": s} for s in (1.5, 2, 9))), [0, 0.5, 7.5]),
        ("bailian.csv", "chat_id,timestamp,input_length,output_length\n1,1.5,7,5\n2,2,7,5\n3,9,7,5\n", [0, 0.5, 7.5]),
        ("no_ids.jsonl", jsonl(*({**MOONCAKE, "timestamp": s} for s in (0.93, 1.08, 1.34))), [0, 0.15, 0.41]),
        ("burst.csv", "Timestamp,Model,Request tokens,Response tokens,Total tokens,Log Type\n"
         "5,ChatGPT,472,18,490,Conversation log\n45,GPT-4,0,0,0,API log\n45,ChatGPT,9,0,9,API log\n"
         "118,GPT-4,417,276,693,Conversation log\n", [0, 113]),
        ("vidur.csv.gz", "arrived_at,num_prefill_tokens,num_decode_tokens\n0.0,374,44\n4.3145,396,109\n", [0, 4.3145]),
        ("splitwise.csv", "request_id,arrival_timestamp,prompt_size,token_size\n0,1.5,374,44\n1,2,396,109\n", [0, 0.5]),
        ("azure2024.csv", "TIMESTAMP,ContextTokens,GeneratedTokens\n2024-05-12 00:00:00+00:00,1452,3\n"
         "2024-05-12 00:00:00.041683+00:00,584,3\n2024-05-12 02:00:01+02:00,584,3\n", [0, 0.041683, 1]),
        ("multimodal.csv", "TIMESTAMP,NumImages,ContextTokens,GeneratedTokens\n2024-10-15T00:00:00Z,1,7,3\n"
         "2024-10-15T00:00:01.5Z,0,7,3\n", [0, 1.5]),
        ("ours.jsonl", jsonl({"arrival_s": 1, "prompt_tokens": 3, "output_tokens": 2}), [0]),
        ("ours.json", json.dumps([{"arrival_s": s, "prompt_tokens": 3, "output_tokens": 2} for s in (4, 6)]), [0, 2]),
        ("excel.csv", "arrival_s;prompt_tokens;output_tokens\r\n1;3;2\r\n\r\n2.5;3;2\r\n", [0, 1.5]),
    ],
)  # fmt: skip
def test_published_formats_are_told_by_their_columns(file, name, text, arrival):
    trace = read_trace(file("\ufeff" + text, name))
    assert times_of(prepare_trace(trace)) == arrival
    assert trace.output_tokens.min() >= 1


@pytest.mark.parametrize(
    ("stamps", "seconds"),
    [
        ([0, 5, 12], [0, 5, 12]),
        ([100, 105, 112], [0, 5, 12]),
        ([0, 5000, 12000], [0, 5, 12]),
        ([1700158546, 1700158550, 1700158560], [0, 4, 14]),
        ([1700158546123, 1700158550123, 1700158560123], [0, 4, 14]),
        ([1700158546123000, 1700158550123000], [0, 4]),
        (["0.0", "4.314579", "90.5"], [0, 4.314579, 90.5]),
        ([7, 7, 7], [0, 0, 0]),
    ],
)
@pytest.mark.parametrize("kind", ["azure.csv", "bare.jsonl"])
def test_numbers_for_times_are_relative_or_since_1970_in_seconds_or_milliseconds(file, stamps, seconds, kind):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{stamp},7,5\n" for stamp in stamps)
    if kind == "bare.jsonl":
        text = jsonl(*({**MOONCAKE, "timestamp": stamp} for stamp in stamps))
    assert times_of(prepare_trace(read_trace(file(text, kind)))) == seconds


@pytest.mark.parametrize(
    ("stamps", "message"),
    [
        ([0, 20, 45], r"0, 20, 45 may count seconds \(0.0444 .*set workload.time_unit=s or workload.time_unit=ms"),
        ([0, 1, 2, 4000000], "may count seconds"),
        ([-5, 0, 3], "row 1: TIMESTAMP = -5 is negative"),
        ([0, "2023-11-16 18:15:46"], "row 2: TIMESTAMP = '2023-11-16 18:15:46' is not a number"),
        (["2023-11-16 18:15:46", 12], "row 2: TIMESTAMP = '12' is not a time"),
        (["2023-11-16 18:15:46", ""], "row 2: TIMESTAMP = '' is not a time"),
    ],
)
def test_times_that_leave_their_unit_open_are_refused(file, stamps, message):
    text = "TIMESTAMP,ContextTokens,GeneratedTokens\n" + "".join(f"{stamp},7,5\n" for stamp in stamps)
    with pytest.raises(WorkloadError, match=message):
        read_trace(file(text))


def test_mooncakes_milliseconds_are_not_believed_at_two_thousand_requests_a_second(file):
    path = file(jsonl(*({**MOONCAKE, "hash_ids": [1], "timestamp": s // 2} for s in range(40))), "whole_seconds.jsonl")
    with pytest.raises(WorkloadError, match=r"milliseconds \(2.05e\+03 requests/s\); set workload.time_unit=s"):
        read_trace(path)
    assert read_trace(path, time_unit="s").arrival[-1] == 19.0


def test_the_unit_can_be_said(file):
    azure = file("TIMESTAMP,ContextTokens,GeneratedTokens\n0,7,5\n20,7,5\n")
    assert times_of(read_trace(azure, time_unit="s")) == [0, 20]
    assert times_of(read_trace(azure, time_unit="ms")) == [0, 0.02]
    bailian = file(jsonl(*({**BAILIAN, "timestamp": ms} for ms in (0, 500))), "b.jsonl")
    assert times_of(read_trace(bailian, time_unit="ms")) == [0, 0.5]
    dates = file("TIMESTAMP,ContextTokens,GeneratedTokens\n2023-11-16 18:15:46,7,5\n", "dates.csv")
    with pytest.raises(WorkloadError, match=r"holds dates; leave workload.time_unit unset"):
        read_trace(dates, time_unit="s")
    with pytest.raises(WorkloadError, match=r"more than a century; set workload.time_unit"):
        read_trace(file(HEADER + "0,1,1\n1e13,1,1\n", "long.csv"))


def test_what_was_read_is_logged(file, caplog):
    caplog.set_level("INFO", "engine.workload.trace")
    read_trace(file(HEADER + "0,100,10\n1,200,20\n4,300,60\n"))
    assert "3 requests over 4 s (0.5 requests/s), on average 200.0 prompt and 30.0 output tokens" in caplog.text
    assert "times are seconds" in caplog.text


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER, "no requests"),
        (HEADER + "0,1,1,7\n", "row 1: 4 fields where the header has 3"),
        (HEADER + "0,1,1e9\n", "row 1: output_tokens = 1e\\+09 must be a whole number from 1 to"),
        (HEADER + "-1,1,1\n", "row 1: arrival_s = -1 is negative"),
        (HEADER + '0,"1,024",1\n', "row 1: prompt_tokens = '1,024' is not a number"),
        ("prompt_tokens,output_tokens\n1,1\n", "no column arrival_s; .*workload/lengths=file workload.lengths.path="),
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
        ('{"timestamp": 0, "input_length": 5}\n', "no column output_length; found timestamp, input_length"),
        (jsonl(MOONCAKE, {"timestamp": 1}), "row 2: no input_length, output_length; found timestamp"),
        (jsonl({**MOONCAKE, "timestamp": [0]}), r"row 1: timestamp = \[0\] is not a number"),
        (jsonl(MOONCAKE, {**MOONCAKE, "output_length": True}), "row 2: output_length = True is not a number"),
        (jsonl({**MOONCAKE, "input_length": 10**400}), "row 1: input_length = a number of more than 40 digits is not"),
        (jsonl({**MOONCAKE, "input_length": 10**30}), "row 1: input_length = 1e\\+30 must be a whole number from 1 to"),
        (jsonl({**MOONCAKE, "timestamp": float("nan")}), "row 1: timestamp = nan must be finite"),
        ("[" * 100_000, "row 1: not JSON"),
        (jsonl(MOONCAKE) + "\n" + "9" * 5000, "row 2: not JSON"),
        (jsonl(MOONCAKE) + "\n[1]", r"row 2: must be a JSON object, not \[1\]"),
        ("", "no requests"),
        ('{"prompt": "x"}', "workload=prompts"),
        ("{oops\n", "row 1: not JSON"),
        ('{"timestamp": 0, "input_length": null, "output_length": 5}', "row 1: input_length = None is not a number"),
    ],
)
def test_a_bad_jsonl_is_refused_with_file_and_row(file, text, message):
    with pytest.raises(WorkloadError, match=message):
        read_trace(file(text, "trace.jsonl"))


def test_a_missing_file_a_folder_and_an_unknown_kind_are_refused(tmp_path, file):
    for path in (tmp_path / "none.csv", tmp_path):
        with pytest.raises(WorkloadError, match=r"no such trace file"):
            read_trace(path)
    with pytest.raises(WorkloadError, match="unknown kind of file"):
        read_trace(file("x", "trace.parquet"))
    broken = tmp_path / "broken.csv.gz"
    broken.write_bytes(b"no gzip")
    with pytest.raises(WorkloadError, match=r"broken.csv.gz: ends in .gz but is not gzipped"):
        read_trace(broken)
    whole = gzip.compress((HEADER + "0,1,1\n" * 9000).encode())
    for damaged in (whole[: len(whole) // 2], whole[:30] + bytes([whole[30] ^ 255]) + whole[31:]):
        broken.write_bytes(damaged)
        with pytest.raises(WorkloadError, match=r"broken.csv.gz, line \d+: cannot be read \(.*damaged"):
            read_trace(broken)
    (tmp_path / "latin.csv").write_bytes(HEADER.encode() + b"0,1,1\n0,\xe9,1\n")
    with pytest.raises(WorkloadError, match=r"latin.csv, line 3: not UTF-8 at byte 3"):
        read_trace(tmp_path / "latin.csv")


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
