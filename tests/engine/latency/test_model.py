"""Claims about the iteration-time kernels and the table files."""

import copy
import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.latency.model import LatencyModel, available_tables, iteration_time, prefill_attention_time
from engine.latency.table_file import LatencyTableError

MODEL = LatencyModel.load("vicuna_7b_a100")
TABLES = MODEL.tables


def small_document() -> dict[str, Any]:
    """A table small enough to add up by hand (milliseconds as round numbers)."""
    return {
        "schema": 1,
        "name": "by_hand",
        "tensor_parallel": 2,
        "memory": {
            "gpu_memory_bytes": 1000,
            "weight_bytes": 600,
            "drafter_weight_bytes": 50,
            "activation_reserve_bytes": 100,
            "kv_bytes_per_token": 4,
        },
        "overhead": {
            "fixed_seconds": 1.0,
            "per_request_seconds": 0.5,
            "speculation_seconds": 0.25,
            "idle_drafter_seconds": 0.125,
            "idle_drafter_request_seconds": 0.0,
        },
        "attention": {"verify_row_fraction": 0.1},
        "linear": {"tokens": [1, 10, 11, 20], "seconds": [10.0, 10.0, 20.0, 20.0]},
        "head": {"rows": [1, 101], "seconds": [1.0, 2.0]},
        "decode_attention": {
            "requests": [1, 2],
            "kv_tokens_per_request": [128, 256, 4096],
            "seconds": [[1.0, 2.0, 32.0], [2.0, 4.0, 64.0]],
            "mixed_seconds": [[2.0, 4.0, 64.0], [4.0, 8.0, 128.0]],
        },
        "prefill_attention": {
            "fresh_chunk": [1, 11],
            "fresh_seconds": [1.0, 2.0],
            "chunk": [1, 11],
            "extra_seconds": [3.0, 4.0],
            "context_token_seconds": [0.01, 0.02],
        },
        "drafter": {
            "requests": [1, 3],
            "step_seconds": [0.1, 0.3],
            "kv_token_seconds": 0.001,
            "prefill_seconds": 0.7,
            "prefill_token_seconds": 0.07,
        },
        "provenance": {},
    }


def test_a_decode_iteration_is_the_sum_of_its_parts() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    # fixed 1 + 2 x 0.5 + linear(2) 10 + head(2) 1.01 + attention(2, 192 each) 3 + idle drafter 0.125
    assert model.time(num_decodes=2, decode_kv_tokens=384) == pytest.approx(1 + 1 + 10 + 1.01 + 3 + 0.125)


def test_a_verifying_iteration_pays_drafter_steps_and_query_rows() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    # 6 rows; attention 3 x (1 + 0.1 x 2); speculation 0.25; two steps of 0.2 + 384 x 0.001
    expected = 1 + 1 + 10 + 1.05 + 3 * 1.2 + 0.25 + 2 * (0.2 + 0.384)
    assert model.time(num_decodes=2, candidates=2, decode_kv_tokens=384) == pytest.approx(expected)


def test_a_mixed_iteration_decodes_beside_the_chunk_and_prefills_the_drafter() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    # 13 tokens: past the step; attention beside a chunk 6; prefill 11 after 100: 2 + 4 + 2; drafter 0.7 + 11 x 0.07
    expected = 1 + 3 * 0.5 + 20 + 1.02 + 6 + 0.125 + (2 + 4 + 100 * 0.02) + 0.7 + 0.77
    mixed = model.time(num_decodes=2, decode_kv_tokens=384, prefills=[(11, 100)], prompts_completed=1)
    assert mixed == pytest.approx(expected)


def test_the_first_draft_step_carries_the_prompt() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    alone = model.time(num_decodes=2, candidates=1, decode_kv_tokens=384)
    mixed = model.time(num_decodes=2, candidates=1, decode_kv_tokens=384, prefills=[(1, 0)])
    # one more request, fresh prefill, drafter token, and attention (3 x 1.1) at the mixed call's double price
    assert mixed - alone == pytest.approx(0.5 + 1.0 + 0.07 + 3.3)


def test_attention_goes_on_linearly_past_the_last_cached_tokens() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    at = [model.time(num_decodes=1, decode_kv_tokens=kv) for kv in (4096, 5096, 6096)]
    assert at[2] - at[1] == pytest.approx(at[1] - at[0])
    assert at[1] > at[0]


def test_kv_capacity_is_what_weights_drafter_and_reserve_leave() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    # each of two GPUs: 0.9 x 1000 - 300 - 50 - 100 = 450 bytes; together 900 bytes of 4
    assert model.kv_capacity_tokens(0.9) == 225


def test_no_memory_left_for_the_cache_is_an_error() -> None:
    model = LatencyModel.from_document(small_document(), "by hand")
    with pytest.raises(ValueError, match="no memory is left for the KV cache"):
        model.kv_capacity_tokens(0.45)
    with pytest.raises(ValueError, match="gpu_memory_utilization"):
        model.kv_capacity_tokens(1.5)


def test_the_gemm_staircase_survives() -> None:
    steps = TABLES.linear_s[[120, 128, 129, 136, 192]] * 1e3
    assert steps[1] == pytest.approx(12.25, rel=0.02)
    assert steps[2] / steps[1] > 1.4
    assert steps[3] == pytest.approx(17.6, rel=0.02)
    assert steps[0] == pytest.approx(steps[1], rel=0.02)
    assert steps[4] < steps[3]


@pytest.mark.parametrize("name", available_tables())
def test_every_shipped_table_loads_and_has_room_for_requests(name: str) -> None:
    model = LatencyModel.load(name)
    assert model.kv_capacity_tokens(0.9) > 16384
    assert 1e-3 < model.time(num_decodes=1, decode_kv_tokens=500) < 0.1
    assert model.provenance["files"]
    for field, value in zip(model.tables._fields, model.tables, strict=True):
        assert np.isfinite(value).all(), field
        assert (np.asarray(value) >= 0).all(), field


@pytest.mark.parametrize("name", available_tables())
def test_more_of_the_same_work_never_takes_less_time_over_the_whole_range(name: str) -> None:
    tables = LatencyModel.load(name).tables
    doubled = 2 * np.arange(64, len(tables.linear_s) // 2)
    assert (tables.linear_s[doubled] > 0.97 * tables.linear_s[doubled // 2]).all()
    prompts = [float(prefill_attention_time(tables, chunk, 0)) for chunk in (512, 2048, 8192, 16384)]
    assert prompts == sorted(prompts)


def _time(decodes: int, candidates: int, kv: int, chunk: int, context: int) -> float:
    attention = float(prefill_attention_time(TABLES, chunk, context)) if chunk else 0.0
    rows = decodes * (1 + candidates)
    steps = candidates if decodes else 0
    return float(iteration_time(TABLES, decodes, rows, steps, kv, int(chunk > 0), chunk, attention, rows))


@settings(max_examples=150, deadline=None)
@given(
    decodes=st.integers(1, 512),
    candidates=st.integers(0, 8),
    each=st.integers(1, 16000),
    more=st.integers(1, 4000),
    chunk=st.integers(0, 4096),
    context=st.integers(0, 12000),
)
def test_time_never_falls_with_cached_tokens_or_context(
    decodes: int, candidates: int, each: int, more: int, chunk: int, context: int
) -> None:
    kv = decodes * each
    before = _time(decodes, candidates, kv, chunk, context)
    assert before > 0.0
    assert _time(decodes, candidates, kv + decodes * more, chunk, context) >= before * (1 - 1e-9)
    assert _time(decodes, candidates, kv, chunk, context + more) >= before * (1 - 1e-9)


@settings(max_examples=100, deadline=None)
@given(decodes=st.integers(1, 256), each=st.integers(1, 4000), candidates=st.integers(1, 8))
def test_speculation_is_never_free(decodes: int, each: int, candidates: int) -> None:
    kv = decodes * each
    steps = candidates * float(TABLES.draft_step_s[decodes])
    rows = decodes * (1 + candidates)
    verify_only = float(iteration_time(TABLES, decodes, rows, 0, kv, 0, 0, 0.0, rows))
    assert _time(decodes, candidates, kv, 0, 0) >= verify_only + 0.9 * steps - 1e-3


def test_batches_past_the_table_cost_the_last_slope() -> None:
    last = len(TABLES.linear_s) - 1
    near = float(iteration_time(TABLES, 0, 0, 0, 0, 1, last, 0.0, 0))
    far = float(iteration_time(TABLES, 0, 0, 0, 0, 1, last + 1000, 0.0, 0))
    draft = 1000 * TABLES.draft_prefill_token_s
    assert far - near == pytest.approx(1000 * TABLES.linear_slope_s + draft, rel=1e-6)


def test_a_prompt_longer_than_the_context_is_split() -> None:
    last = len(TABLES.fresh_s) - 1
    whole = float(prefill_attention_time(TABLES, last + 100, 0))
    parts = float(prefill_attention_time(TABLES, last, 0)) + float(prefill_attention_time(TABLES, 100, last))
    assert whole == pytest.approx(parts)


def test_the_linear_model_is_its_formula() -> None:
    model = LatencyModel.linear(0.01, 1e-4, per_request_s=1e-3, per_draft_step_s=2e-3, kv_capacity_tokens=5000)
    assert model.time(num_decodes=3, candidates=2, decode_kv_tokens=900, prefills=[(100, 50)]) == pytest.approx(
        0.01 + 1e-4 * (9 + 100) + 1e-3 * 4 + 2e-3 * 2
    )
    assert model.kv_capacity_tokens(1.0) == 5000
    with pytest.raises(ValueError, match="base_s"):
        LatencyModel.linear(-1.0)


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("linear.seconds", [1.0], "'linear.tokens' and 'linear.seconds' differ in length"),
        ("linear.tokens", [1, 10, 10, 20], "'linear.tokens' must be strictly increasing"),
        ("head.seconds", [1.0, float("nan")], "'head.seconds' must hold finite numbers"),
        ("overhead.fixed_seconds", -1.0, "'overhead.fixed_seconds' must be a finite number >= 0"),
        ("decode_attention.seconds", [[1.0]], "'decode_attention.seconds' must be 2 x 3"),
        ("schema", 99, "'schema' is 99"),
        ("drafter", None, "'drafter.requests' is missing"),
    ],
)
def test_a_bad_table_file_is_refused_with_the_key(path: str, value: Any, message: str) -> None:
    document = copy.deepcopy(small_document())
    *parents, leaf = path.split(".")
    section = document
    for parent in parents:
        section = section[parent]
    section[leaf] = value
    with pytest.raises(LatencyTableError, match=message):
        LatencyModel.from_document(document, "bad.json")


def test_an_unknown_or_unreadable_table_is_refused(tmp_path: Any) -> None:
    with pytest.raises(LatencyTableError, match="vicuna_7b_a100"):
        LatencyModel.load("vicuna_8b_a100")
    broken = tmp_path / "broken.json"
    broken.write_text("{")
    with pytest.raises(LatencyTableError, match=r"broken\.json: not readable as JSON"):
        LatencyModel.load(broken)


def test_a_scalar_can_be_overridden_and_a_typo_is_refused(tmp_path: Any) -> None:
    slow = LatencyModel.load("vicuna_7b_a100", idle_drafter_s=5e-3)
    extra = slow.time(1, 0, 500) - MODEL.time(1, 0, 500)
    assert extra == pytest.approx(5e-3 - TABLES.idle_drafter_s)
    with pytest.raises(LatencyTableError, match="idle_drafter_s"):
        LatencyModel.load("vicuna_7b_a100", idle_draft_s=1.0)
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(small_document()))
    assert LatencyModel.load(path).name == "by_hand"
