"""The log of a training run: a row once, whatever happened on the way."""

from __future__ import annotations

import csv
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from runs.learning.record import METRICS, STEP, Metrics, Row
from runs.tracking import Tracking

BLOCK = 32768
HEADER = struct.Struct("<IHB")
WHOLE_OR_LAST = (1, 4)


def records(path: Path) -> Iterator[Any]:
    """What a .wandb file holds: LevelDB's log format behind seven bytes."""
    content, at, record = path.read_bytes(), 7, b""
    while at + HEADER.size <= len(content):
        if BLOCK - at % BLOCK < HEADER.size:
            at += BLOCK - at % BLOCK
            continue
        _, size, kind = HEADER.unpack_from(content, at)
        at += HEADER.size
        record += content[at : at + size]
        at += size
        if kind in WHOLE_OR_LAST:
            yield Record.FromString(record)
            record = b""


def told(folder: Path) -> list[tuple[int, float]]:
    """Step and return of every row in W&B's files."""
    rows = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        for record in records(path):
            if record.WhichOneof("record_type") == "history":
                values = {item.key or ".".join(item.nested_key): item.value_json for item in record.history.item}
                rows.append((int(values["_step"]), json.loads(values["train/return"])))
    return rows


def summed_up(folder: Path) -> dict[str, Any]:
    """W&B's summary, as its updates add up to."""
    (path,) = folder.glob("wandb/offline-run-*/*.wandb")
    summary = {}
    for record in records(path):
        if record.WhichOneof("record_type") == "summary":
            for item in record.summary.update:
                summary[item.key or ".".join(item.nested_key)] = json.loads(item.value_json)
    return summary


def row(step: int) -> Row:
    return {STEP: float(step), "train/return": -0.5 * step, "train/nothing": float("nan")}


def test_a_run_gone_on_with_has_every_row_once_in_the_csv_and_in_wandb(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    tracking = Tracking(mode="offline")
    killed = Metrics(tmp_path, tracking, "drill", {"seed": 0})
    for step in (0, 10, 20, 30):
        killed.add(row(step))
    # Of the last rows nobody knows what W&B had written when the process was killed.
    killed._run.finish()
    checkpointed = killed.rows[:2]
    again = Metrics(tmp_path, tracking, "drill", {"seed": 0})
    again.resume(checkpointed)
    for step in (20, 30, 40):
        again.add(row(step))
    again.finish({"objective_ratio": 1.0})
    wandb.teardown()
    assert told(tmp_path) == [(step, -0.5 * step) for step in (0, 10, 20, 30, 40)]
    with (tmp_path / METRICS).open(encoding="utf-8") as file:
        assert [int(line[STEP]) for line in csv.DictReader(file)] == [0, 10, 20, 30, 40]


def test_the_summary_in_wandb_is_the_result_and_not_the_last_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    metrics = Metrics(tmp_path, Tracking(mode="offline"), "drill", {"seed": 0})
    for step, ratio in ((0, 1.443), (10, 1.574)):
        metrics.add({STEP: float(step), "eval/objective_ratio": ratio, "train/return": -float(step)})
    result = {"eval/objective_ratio": 1.443, "best_at_step": 0, "steps": 10}
    metrics.finish(result)
    wandb.teardown()
    summary = summed_up(tmp_path)
    assert {key: summary[key] for key in result} == result
    assert summary["train/return"] == -10.0


def test_the_summary_of_a_served_run_in_wandb_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    arrival, ttft = np.array([0.0, 31.0]), np.array([0.5, 2.0])
    requests = {"arrival_s": arrival, "first_token_s": arrival + ttft, "ttft_s": ttft, "tpot_s": np.array([0.02, 0.04])}
    figures = {"tpot_mean_s": 0.03, "ttft_attainment": 0.5}
    identity = {"label": "fixed", "scenario": "drill", "engine": "small", "seed": 0, "ttft_target_s": 1.0}
    Tracking(mode="offline").record(tmp_path, {}, figures | {"run": identity}, requests, np.zeros(0))
    wandb.teardown()
    summary = summed_up(tmp_path)
    assert {key: summary[key] for key in figures} == figures
    assert summary["serving/tpot_s"] == 0.04, "the last window of the curves"
