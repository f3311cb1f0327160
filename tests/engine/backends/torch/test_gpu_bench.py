"""The GPU benchmark, rehearsed on a CPU: what it counts is right, and every way to attend attends."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.backends.torch.build import build
from tests.bench import torch_gpu
from tests.bench.gpu import attention, iterations
from tests.bench.gpu.attention import compare
from tests.bench.gpu.device import counted_syncs
from tests.bench.gpu.engines import configured
from tests.bench.gpu.paged import Case, Heads, PagedBatch
from tests.bench.gpu.work import Work
from tests.runs.gpu_box import FINDER, REPOSITORY, refused_packages

CPU = torch.device("cpu")
HEADS = Heads(heads=4, kv_heads=2, width=16)
CASES = (
    Case("decode", 3, 40, 1),
    Case("verify", 2, 50, 5),
    Case("tree", 2, 50, 7, branching=3),
    Case("prefill", 1, 0, 150),
)


def batch_of(case: Case, block_size: int = 16) -> PagedBatch:
    return PagedBatch(case, HEADS, block_size, 1, torch.float32, CPU)


@pytest.mark.filterwarnings(
    "ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy", "ignore:flex_attention called"
)
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_way_attends_as_float64_does(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    # Compiling takes a minute; uncompiled, FlexAttention's mask is the same.
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)
    monkeypatch.setattr(attention, "SPLITS", (1, 2))
    monkeypatch.setattr(attention, "LARGE_TILES", (64,))
    for one in compare(batch_of(case), list(attention.WAYS), repeats=1):
        assert one.timed is not None, f"{one.way}: {one.reason}"
        assert one.timed.error < 1e-5, one.way


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_flexattention_is_told_of_every_block_that_is_seen_and_calls_none_whole_that_is_not(case: Case) -> None:
    batch = batch_of(case)
    mask = attention._block_mask(batch)
    rows, size = attention.FLEX_ROWS, batch.block_size
    for request in range(case.requests):
        seen = ~batch._hidden(request)
        for group in range(-(-case.rows // rows)):
            mine = seen[group * rows : (group + 1) * rows]
            named = [
                set(indices[request, 0, group, : counts[request, 0, group]].tolist())
                for counts, indices in (
                    (mask.kv_num_blocks, mask.kv_indices),
                    (mask.full_kv_num_blocks, mask.full_kv_indices),
                )
            ]
            assert not named[0] & named[1]
            for place, block in enumerate(batch.table.blocks[request, : -(-seen.shape[1] // size)].tolist()):
                part = mine[:, place * size : (place + 1) * size]
                if block in named[1]:
                    assert part.all()
                elif part.any():
                    assert block in named[0]


def test_a_way_that_fails_says_why_and_the_others_are_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    found = {one.way: one for one in compare(batch_of(CASES[0]), ["Triton", "gather + SDPA"], repeats=1)}
    assert found["Triton"].timed is None
    assert "Triton compiles for a GPU" in found["Triton"].reason
    assert found["gather + SDPA"].timed is not None


@pytest.fixture(scope="module")
def untied() -> Any:
    config = transformers.LlamaConfig(
        vocab_size=50, hidden_size=8, intermediate_size=12, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config).to(torch.bfloat16)


def test_work_is_what_a_model_of_known_sizes_costs(untied: Any) -> None:
    work = Work.of(untied, kv_bytes_per_token=3 * 2 * 4 * 2)
    products = 3 * (8 * 8 + 2 * 8 * 4 + 8 * 8 + 3 * 8 * 12)
    norms = (3 * 2 + 1) * 8
    assert work.body_parameters == products
    assert work.bytes_read(1, 10) == 2 * (products + norms) + 2 * 50 * 8 + 2 * 8 + 10 * 48
    # Row i of 5 sees i + 1 positions: 15 pairs of 8 channels in each of 3 layers, scores and weighted sums.
    assert work.prefill_flop(5) == 2 * 5 * products + 2 * 50 * 8 + 4 * 3 * 8 * 15


def test_a_tied_table_is_read_once_as_the_output_projection() -> None:
    engine = build(configured("torch_tiny", "max_num_seqs=1", "num_kv_blocks=8"), ttft_target=1.0)
    work = Work.of(engine.model.model, engine.memory().kv_bytes_per_token)
    tied = engine.model.model.get_input_embeddings().weight is engine.model.model.get_output_embeddings().weight
    everything = engine.memory().weight_bytes + work.row_bytes
    assert work.bytes_read(1, 0) == everything - (0 if tied else work.head_bytes)


def test_the_rehearsal_measures_every_part_and_says_that_it_is_one(tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "gpu.json"
    torch_gpu.main(
        ["--engine", "torch_tiny", "--device", "cpu", "--attention", "gather + SDPA", "--peak-bandwidth", "0.01",
         "--set", "max_num_seqs=8", "--out", str(out)]
    )  # fmt: skip
    results = json.loads(out.read_text())
    assert "says anything about a GPU" in results["note"]
    assert results["note"] in capsys.readouterr().out
    assert set(torch_gpu.PARTS) <= results.keys()
    for row in results["bandwidth"]:
        assert row["utilisation"]["of_datasheet"] == pytest.approx(row["bytes_read"] / row["wall_s"] / 0.01e12)
        assert row["utilisation"]["of_measured"] == pytest.approx(
            row["bytes_read"] / row["wall_s"] / results["peaks"]["copy_bytes_per_s"]
        )
    assert len(results["grid"]) == len(torch_gpu.REHEARSED.decodes) * len(torch_gpu.REHEARSED.candidates)
    for row in results["grid"]:
        assert 0.0 < row["draft_s"] + row["forward_s"] <= 1.01 * row["wall_s"]
        assert (row["draft_s"] > 0.0) == (row["candidates"] > 0)
        assert 1.0 <= row["tokens_per_iteration"] <= 1 + row["candidates"]
        assert row["candidates"] > 0 or row["tokens_per_iteration"] == 1.0
    assert {row["counts"] for row in results["syncs"]} == {None}
    assert all(row["timed"]["error"] < 1e-4 for row in results["attention"])


def test_batches_that_the_cache_cannot_hold_are_left_out_and_named(capsys: Any) -> None:
    config = configured("torch_tiny", "device=cpu", "max_num_seqs=2", "num_kv_blocks=24", "drafter=none")
    bench = torch_gpu.Bench(config, torch_gpu.REHEARSED)
    rows = bench.run(["grid"])["grid"]
    assert [(row["decodes"], row["candidates"]) for row in rows] == [(1, 0)]
    said = capsys.readouterr().out
    assert "B = 4, c = 0, 32 cached: left out" in said
    assert "c = 2 is left out" in said


def test_decoding_begins_with_the_cached_tokens_that_were_asked_for_and_ends_no_request() -> None:
    engine = build(configured("torch_tiny", "device=cpu", "max_num_seqs=3", "num_kv_blocks=64"), ttft_target=60.0)
    steps = iterations.decoding(engine, 3, 20, 0, 4, np.random.default_rng(0))
    first = 20 + iterations.WARMUP_STEPS
    assert steps.kv_tokens == 3 * (first + 1.5)
    assert len(engine.requests) == 0


def test_configurations_are_read_with_what_they_build_on() -> None:
    small = configured("torch_small", "max_num_seqs=2", "drafter=none")
    assert (small.name, small.layers, small.max_num_seqs, small.drafter) == ("torch_small", 24, 2, "none")
    with pytest.raises(ValueError, match="torch_tiny"):
        configured("torch_absent")
    with pytest.raises(ValueError, match=r"engine\.dtypo: unknown key"):
        configured("torch_tiny", "dtypo=bfloat16")
    with pytest.raises(ValueError, match="layers"):
        configured("torch_tiny", "layers")


def test_waits_for_a_device_are_not_told_where_there_is_none() -> None:
    with counted_syncs(CPU) as waits:
        pass
    assert waits.count is None


def test_the_benchmarks_need_no_more_than_the_profile_does(tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(FINDER)
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "REFUSED": ",".join(sorted(refused_packages()))}
    small = ["--engine", "torch_tiny", "--device", "cpu", "--set", "max_num_seqs=4", "num_kv_blocks=64"]
    gpu, trees = tmp_path / "gpu.json", tmp_path / "trees.json"
    for words in (
        ["tests.bench.torch_gpu", *small, "--only", "syncs", "attention", "--attention", "gather + SDPA", "--out", gpu],
        ["tests.bench.torch_trees", *small, "--batches", "1", "--prompts", "2", "--rounds", "1", "--branching", "1",
         "--out", trees],
    ):  # fmt: skip
        ran = subprocess.run(
            [sys.executable, "-m", *map(str, words)], cwd=REPOSITORY, env=environment, capture_output=True, text=True
        )
        assert ran.returncode == 0, ran.stderr
    assert all(row["timed"] is not None for row in json.loads(gpu.read_text())["attention"])
    rows = json.loads(trees.read_text())["rows"]
    assert [row.get("allocation") for row in rows] == [None, "uniform", "local", "global"]
    assert all(row["same_output"] == 2 and row["tokens_per_iteration"] > 1.0 for row in rows[1:])
