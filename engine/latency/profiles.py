"""Readers for the raw profile folders: third-party operator timings in, tidy arrays in seconds out.

These files are not shipped: the project ships only tables that `engine.latency.compose` derives from them. Every reader
raises `ProfileError` naming the file and the column of invalid data.

Known traps handled here:
  * Vidur's grids repeat token counts, so rows are grouped and the median is taken.
  * `attn_kv_cache_save` of prefill rows is an artefact of the profiler (3.3 ms a layer at 4,096 tokens), so it is
    read for decode rows only.
  * LLMServingSim writes microseconds, everybody else milliseconds.
  * aiconfigurator counts `step` cached tokens before the new one, so the context is `step + 1`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from numpy.typing import NDArray

MILLISECOND = 1e-3
MICROSECOND = 1e-6

VIDUR_LAYER_OPERATORS = (
    "input_layernorm",
    "attn_pre_proj",
    "attn_rope",
    "attn_post_proj",
    "post_attention_layernorm",
    "mlp_up_proj",
    "mlp_act",
    "mlp_down_proj",
    "add",
)
"""Per-token operators of one layer in Vidur's files; `add` is timed once and used twice (both residuals)."""

LLMSERVINGSIM_LAYER_OPERATORS = ("layernorm", "qkv_proj", "rotary_emb", "o_proj", "gate_up_proj", "act_fn", "down_proj")
"""Per-token operators of one layer in LLMServingSim's files; `layernorm` (with the residual fused) runs twice."""


class ProfileError(ValueError):
    """A profile file is missing, lacks a column, or holds a value that cannot be a time."""


@dataclass(frozen=True)
class DenseProfile:
    """Time of the per-token operators against the number of tokens in the batch.

    `tokens` (T,) ascending; `layer_s` (T,) one layer's operators without attention; `once_s` (T,) operators that run
    once an iteration (embedding, final norm). Seconds.
    """

    tokens: NDArray[np.int64]
    layer_s: NDArray[np.float64]
    once_s: NDArray[np.float64]


@dataclass(frozen=True)
class AttentionProfile:
    """Attention kernel time of one layer, one row a measurement; seconds, tokens.

    `requests` decoding requests with `decode_kv` cached tokens each, and one prompt `chunk` after `context` cached
    tokens. Rows with chunk 0 are pure decode; rows with requests 0 are pure prefill.
    """

    requests: NDArray[np.int64]
    decode_kv: NDArray[np.int64]
    chunk: NDArray[np.int64]
    context: NDArray[np.int64]
    seconds: NDArray[np.float64]

    def where(self, mask: NDArray[np.bool_]) -> "AttentionProfile":
        """The rows at which `mask` holds."""
        return AttentionProfile(
            self.requests[mask], self.decode_kv[mask], self.chunk[mask], self.context[mask], self.seconds[mask]
        )


def read_table(path: Path, columns: Sequence[str]) -> pd.DataFrame:
    """The named columns of a CSV; ProfileError naming the file and column if one is missing or not a number."""
    if not path.is_file():
        raise ProfileError(f"{path}: no such profile file; point --profiles at the folder that holds PROFILES.md")
    frame = pd.read_csv(path)
    for column in columns:
        if column not in frame.columns:
            raise ProfileError(
                f"{path}: column {column!r} is missing; it has {', '.join(map(str, frame.columns[:12]))}"
            )
    return frame[list(columns)]


def _positive_times(path: Path, column: str, values: "pd.Series[float]") -> NDArray[np.float64]:
    times = pd.to_numeric(values, errors="coerce").to_numpy(np.float64)
    bad = ~np.isfinite(times) | (times < 0.0)
    if bad.any():
        row = int(np.flatnonzero(bad)[0]) + 2
        raise ProfileError(f"{path}: line {row}: column {column!r} is not a time >= 0; remove or repair the row")
    return times


def read_vidur_dense(path: Path, tensor_parallel: int = 1) -> DenseProfile:
    """Vidur's mlp.csv for one tensor-parallel degree: medians by token count, all-reduce not included."""
    operators = ("emb", *VIDUR_LAYER_OPERATORS)
    columns = {operator: f"time_stats.{operator}.median" for operator in operators}
    frame = read_table(path, [*columns.values(), "num_tokens", "num_tensor_parallel_workers"])
    frame = frame[frame["num_tensor_parallel_workers"] == tensor_parallel]
    if frame.empty:
        raise ProfileError(f"{path}: column 'num_tensor_parallel_workers' never equals {tensor_parallel}")
    for column in columns.values():
        _positive_times(path, column, frame[column])
    medians = frame.groupby("num_tokens").median().sort_index()
    layer = medians[[columns[operator] for operator in VIDUR_LAYER_OPERATORS]].sum(axis=1) + medians[columns["add"]]
    return DenseProfile(
        medians.index.to_numpy(np.int64),
        layer.to_numpy(np.float64) * MILLISECOND,
        medians[columns["emb"]].to_numpy(np.float64) * MILLISECOND,
    )


def read_vidur_elementwise(path: Path, tensor_parallel: int) -> tuple[NDArray, NDArray, NDArray]:
    """Vidur's operators that are no GEMM: (tokens, seconds of one layer, seconds of the embedding)."""
    operators = ("input_layernorm", "attn_rope", "post_attention_layernorm", "mlp_act", "add", "emb")
    columns = {operator: f"time_stats.{operator}.median" for operator in operators}
    frame = read_table(path, [*columns.values(), "num_tokens", "num_tensor_parallel_workers"])
    frame = frame[frame["num_tensor_parallel_workers"] == tensor_parallel]
    if frame.empty:
        raise ProfileError(f"{path}: column 'num_tensor_parallel_workers' never equals {tensor_parallel}")
    medians = frame.groupby("num_tokens").median().sort_index()
    layer = medians[[columns[operator] for operator in operators[:-1]]].sum(axis=1) + medians[columns["add"]]
    return (
        medians.index.to_numpy(np.int64),
        layer.to_numpy(np.float64) * MILLISECOND,
        medians[columns["emb"]].to_numpy(np.float64) * MILLISECOND,
    )


def read_vidur_attention(path: Path, cache_write: bool = True) -> AttentionProfile:
    """An attention.csv in Vidur's format (Vidur, Frontier), one layer.

    With `cache_write` the write of new keys and values (`attn_kv_cache_save`, where the file has it) is added to decode
    rows only: on prefill rows the column is an artefact.
    """
    prefill, decode = "time_stats.attn_prefill.median", "time_stats.attn_decode.median"
    save = "time_stats.attn_kv_cache_save.median"
    columns = [prefill, decode, "batch_size", "prefill_chunk_size", "kv_cache_size", "is_prefill"]
    frame = read_table(path, columns).copy()
    is_prefill = frame["is_prefill"].astype(bool).to_numpy()
    frame["seconds"] = np.where(is_prefill, frame[prefill], frame[decode])
    header = pd.read_csv(path, nrows=0).columns
    if cache_write and save in header:
        saved = pd.read_csv(path, usecols=[save])[save].to_numpy(np.float64)
        frame["seconds"] += np.where(is_prefill, 0.0, saved)
    frame["seconds"] = _positive_times(path, f"{prefill} / {decode}", frame["seconds"]) * MILLISECOND
    frame["requests"] = np.where(is_prefill, 0, frame["batch_size"])
    frame["chunk"] = np.where(is_prefill, frame["prefill_chunk_size"], 0)
    frame["context"] = np.where(is_prefill, frame["kv_cache_size"], 0)
    frame["decode_kv"] = np.where(is_prefill, 0, frame["kv_cache_size"])
    return _tidy(frame)


def _tidy(frame: pd.DataFrame) -> AttentionProfile:
    keys = ["requests", "decode_kv", "chunk", "context"]
    medians = frame.groupby(keys)["seconds"].median().reset_index().sort_values(keys)
    requests, decode_kv, chunk, context = (medians[key].to_numpy(np.int64) for key in keys)
    return AttentionProfile(requests, decode_kv, chunk, context, medians["seconds"].to_numpy(np.float64))


def read_vidur_points(path: Path) -> AttentionProfile:
    """The hand-transcribed hold-out points of Vidur's A100 Llama-2-7b attention profile, one layer."""
    frame = read_table(path, ["kind", "batch_size", "prefill_chunk_size", "kv_cache_size", "median_ms"]).copy()
    prefill = (frame["kind"] == "prefill").to_numpy()
    frame["seconds"] = _positive_times(path, "median_ms", frame["median_ms"]) * MILLISECOND
    frame["requests"] = np.where(prefill, 0, frame["batch_size"])
    frame["chunk"] = np.where(prefill, frame["prefill_chunk_size"], 0)
    frame["context"] = np.where(prefill, frame["kv_cache_size"], 0)
    frame["decode_kv"] = np.where(prefill, 0, frame["kv_cache_size"])
    return _tidy(frame)


def read_gemm(path: Path) -> dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.float64]]]:
    """aiconfigurator's GEMM table: (n, k) -> (m ascending, seconds), the median where a query is repeated."""
    frame = read_table(path, ["m", "n", "k", "latency"])
    _positive_times(path, "latency", frame["latency"])
    medians = frame.groupby(["n", "k", "m"])["latency"].median() * MILLISECOND
    table = {}
    for (n, k), rows in medians.groupby(level=["n", "k"]):
        table[(int(n), int(k))] = (rows.index.get_level_values("m").to_numpy(np.int64), rows.to_numpy(np.float64))
    return table


def read_decode_attention(path: Path, heads: int, kv_heads: int) -> AttentionProfile:
    """aiconfigurator's generation attention for one head count: one new token after `step` cached ones."""
    frame = read_table(path, ["num_heads", "num_key_value_heads", "batch_size", "step", "latency"])
    frame = frame[(frame["num_heads"] == heads) & (frame["num_key_value_heads"] == kv_heads)].copy()
    if frame.empty:
        raise ProfileError(f"{path}: columns 'num_heads', 'num_key_value_heads' never equal {heads}, {kv_heads}")
    frame["seconds"] = _positive_times(path, "latency", frame["latency"]) * MILLISECOND
    frame = frame.rename(columns={"batch_size": "requests"})
    frame["decode_kv"] = frame["step"] + 1
    frame["chunk"] = frame["context"] = 0
    return _tidy(frame)


def read_prefill_attention(path: Path, heads: int, kv_heads: int) -> AttentionProfile:
    """aiconfigurator's context attention for one head count, batch 1, nothing cached before the chunk."""
    frame = read_table(path, ["num_heads", "num_key_value_heads", "batch_size", "isl", "step", "latency"])
    keep = (frame["num_heads"] == heads) & (frame["num_key_value_heads"] == kv_heads) & (frame["batch_size"] == 1)
    frame = frame[keep & (frame["step"] == 0)].copy()
    if frame.empty:
        raise ProfileError(f"{path}: columns 'num_heads', 'num_key_value_heads' never equal {heads}, {kv_heads}")
    frame["seconds"] = _positive_times(path, "latency", frame["latency"]) * MILLISECOND
    frame["chunk"] = frame["isl"]
    frame["requests"] = frame["decode_kv"] = frame["context"] = 0
    return _tidy(frame)


def read_all_reduce(path: Path, num_gpus: int, backend: str = "vllm_graph") -> tuple[NDArray, NDArray]:
    """aiconfigurator's all-reduce: (message bytes ascending, seconds) for one GPU count and launch mode.

    `message_size` counts 16-bit values, as upstream's bandwidths show; returned in bytes.
    """
    frame = read_table(path, ["backend", "num_gpus", "message_size", "latency"])
    frame = frame[(frame["num_gpus"] == num_gpus) & (frame["backend"] == backend)]
    if frame.empty:
        raise ProfileError(f"{path}: columns 'backend', 'num_gpus' never equal {backend!r}, {num_gpus}")
    _positive_times(path, "latency", frame["latency"])
    medians = frame.groupby("message_size")["latency"].median().sort_index()
    return 2.0 * medians.index.to_numpy(np.float64), medians.to_numpy(np.float64) * MILLISECOND


def read_llmservingsim_dense(path: Path) -> DenseProfile:
    """LLMServingSim's dense.csv: per-token operators of vLLM, one layer, in microseconds upstream."""
    frame = read_table(path, ["layer", "tokens", "time_us"])
    _positive_times(path, "time_us", frame["time_us"])
    times = frame.pivot_table(index="tokens", columns="layer", values="time_us", aggfunc="median").sort_index()
    for operator in (*LLMSERVINGSIM_LAYER_OPERATORS, "embedding", "final_layernorm"):
        if operator not in times.columns:
            raise ProfileError(f"{path}: column 'layer' never equals {operator!r}")
    layer = times[list(LLMSERVINGSIM_LAYER_OPERATORS)].sum(axis=1) + times["layernorm"]
    once = times["embedding"] + times["final_layernorm"]
    return DenseProfile(
        times.index.to_numpy(np.int64), layer.to_numpy(np.float64) * MICROSECOND, once.to_numpy() * MICROSECOND
    )


def read_llmservingsim_rows(path: Path, layer: str) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """LLMServingSim's per_sequence.csv: (rows, seconds) of `lm_head` or `sampler`."""
    frame = read_table(path, ["layer", "sequences", "time_us"])
    frame = frame[frame["layer"] == layer]
    if frame.empty:
        raise ProfileError(f"{path}: column 'layer' never equals {layer!r}")
    _positive_times(path, "time_us", frame["time_us"])
    medians = frame.groupby("sequences")["time_us"].median().sort_index()
    return medians.index.to_numpy(np.int64), medians.to_numpy(np.float64) * MICROSECOND


def read_llmservingsim_attention(path: Path) -> AttentionProfile:
    """LLMServingSim's attention.csv: true mixed batches, one layer, microseconds upstream."""
    frame = read_table(path, ["prefill_chunk", "kv_prefill", "n_decode", "kv_decode", "time_us"])
    frame = frame.rename(
        columns={"prefill_chunk": "chunk", "kv_prefill": "context", "n_decode": "requests", "kv_decode": "decode_kv"}
    )
    frame["seconds"] = _positive_times(path, "time_us", frame["time_us"]) * MICROSECOND
    return _tidy(frame)
