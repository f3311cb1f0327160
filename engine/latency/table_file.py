"""The table file: JSON nodes of every curve on disk, dense arrays for the kernels in memory.

Layout (schema 1): `linear`, `head`, `decode_attention`, `prefill_attention`, `drafter` hold nodes and seconds of all
layers; `attention` and `overhead` hold scalars; `memory` bytes; `provenance` where everything comes from. Tables of
engines that were measured whole also have `drafter.unread_tokens` and `.unread_seconds`, `attention.padding`, and
`overhead.speculation_request_seconds`; without them these cost nothing.
"""

import json
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

SCHEMA = 1
"""Version of the table files' layout."""

MAX_CONTEXT_TOKENS = 16384
MAX_BATCH_TOKENS = MAX_CONTEXT_TOKENS + 256 * 17
MAX_REQUESTS = 512
KV_STEP_TOKENS = 128
MAX_KV_PER_REQUEST_TOKENS = 4096


class LatencyTables(NamedTuple):
    """Everything the kernels need; arrays are dense by their index, times in seconds.

    linear_s (T+1,): all per-token operators of all layers, by tokens in the batch; beyond it `linear_slope_s` a token.
    head_s (H+1,): LM head and sampler by sampled rows; beyond it `head_slope_s` a row.
    decode_s (2, B+1, K+2): attention of all layers, by decoding requests and cached tokens a request in steps of
        `KV_STEP_TOKENS`; the last column is the slope (a cached token of each request) past the one before it. First
        index 0: the batch only decodes; 1: it also holds a prompt chunk. Engines that run prefill and decode as
        separate kernels have the same figures in both; one kernel over a mixed batch decodes more slowly.
    fresh_s, extra_s, context_s (C+1,): prefill attention of all layers by chunk with nothing cached; time added when
        anything is cached; and time added per cached token.
    draft_step_s (B+1,): one drafter step by decoding requests; `draft_kv_token_s` a cached token a step;
        `draft_prefill_token_s` a prompt token, and `draft_prefill_s` if no first step carries the prompt.
    unread_s (U+1,): drafter time by tokens it has not read, where it reads a prompt only when it first drafts for it;
        beyond it the last cell's slope. Zero where it reads with the target.
    padding: attention cost counts a decode's cached tokens plus this share of the difference to the batch's longest.
    """

    linear_s: NDArray[np.float64]
    linear_slope_s: float
    head_s: NDArray[np.float64]
    head_slope_s: float
    decode_s: NDArray[np.float64]
    fresh_s: NDArray[np.float64]
    extra_s: NDArray[np.float64]
    context_s: NDArray[np.float64]
    draft_step_s: NDArray[np.float64]
    unread_s: NDArray[np.float64]
    draft_kv_token_s: float
    draft_prefill_s: float
    draft_prefill_token_s: float
    verify_row_fraction: float
    padding: float
    fixed_s: float
    per_request_s: float
    speculation_s: float
    speculation_request_s: float
    idle_drafter_s: float
    idle_drafter_request_s: float


class LatencyTableError(ValueError):
    """A latency table file is unreadable, of another schema, or holds an impossible value."""


def read_key(document: dict[str, Any], path: str, source: str) -> Any:
    value: Any = document
    for part in path.split("."):
        if not isinstance(value, dict) or part not in value:
            raise LatencyTableError(
                f"{source}: key {path!r} is missing; rebuild the table with `python -m engine.latency.build`"
            )
        value = value[part]
    return value


def read_number(document: dict[str, Any], path: str, source: str) -> float:
    value = read_key(document, path, source)
    if isinstance(value, bool) or not isinstance(value, int | float) or not np.isfinite(value) or value < 0:
        raise LatencyTableError(f"{source}: key {path!r} must be a finite number >= 0, got {value!r}")
    return float(value)


def read_array(document: dict[str, Any], path: str, source: str, ndim: int = 1) -> NDArray[np.float64]:
    value = read_key(document, path, source)
    try:
        array = np.array(value, dtype=np.float64)
    except (TypeError, ValueError):
        array = np.array(np.nan)
    if array.ndim != ndim or array.size == 0 or not np.isfinite(array).all() or (array < 0).any():
        raise LatencyTableError(f"{source}: key {path!r} must hold finite numbers >= 0 in {ndim} dimension(s)")
    return array


def read_curve(document: dict[str, Any], section: str, nodes: str, values: str, source: str) -> tuple[NDArray, NDArray]:
    x = read_array(document, f"{section}.{nodes}", source)
    y = read_array(document, f"{section}.{values}", source)
    if x.shape != y.shape:
        raise LatencyTableError(f"{source}: keys '{section}.{nodes}' and '{section}.{values}' differ in length")
    if (np.diff(x) <= 0).any():
        raise LatencyTableError(f"{source}: key '{section}.{nodes}' must be strictly increasing")
    return x, y


def tail_slope(nodes: NDArray, values: NDArray) -> float:
    """Slope over the upper half of a curve's range, which steps do not disturb."""
    middle = float(np.interp(nodes[-1] / 2.0, nodes, values))
    return max(0.0, (float(values[-1]) - middle) / (float(nodes[-1]) / 2.0))


def _optional(document: dict[str, Any], section: str, key: str) -> bool:
    return isinstance(document.get(section), dict) and key in document[section]


def _expand_unread(document: dict[str, Any], source: str) -> NDArray[np.float64]:
    if not _optional(document, "drafter", "unread_tokens"):
        return np.zeros(2)
    tokens, seconds = read_curve(document, "drafter", "unread_tokens", "unread_seconds", source)
    return _extended(np.arange(MAX_CONTEXT_TOKENS + 1, dtype=np.float64), tokens, seconds, zero_first=True)


def _extended(index: NDArray, nodes: NDArray, values: NDArray, zero_first: bool = False) -> NDArray[np.float64]:
    """Linear interpolation at `index`, flat below the first node and with `tail_slope` past the last."""
    dense = np.interp(index, nodes, values)
    beyond = index > nodes[-1]
    dense[beyond] = values[-1] + (index[beyond] - nodes[-1]) * tail_slope(nodes, values)
    if zero_first:
        dense[0] = 0.0
    return dense


def _expand_decode(document: dict[str, Any], source: str, key: str) -> NDArray[np.float64]:
    requests = read_array(document, "decode_attention.requests", source)
    kv = read_array(document, "decode_attention.kv_tokens_per_request", source)
    seconds = read_array(document, f"decode_attention.{key}", source, ndim=2)
    if seconds.shape != (requests.size, kv.size):
        raise LatencyTableError(
            f"{source}: key 'decode_attention.{key}' must be {requests.size} x {kv.size}, got {seconds.shape}"
        )
    columns = np.arange(0, MAX_KV_PER_REQUEST_TOKENS + KV_STEP_TOKENS, KV_STEP_TOKENS, dtype=np.float64)
    rows = np.arange(MAX_REQUESTS + 1, dtype=np.float64)
    by_kv = np.stack([_extended(columns, kv, row) for row in seconds])
    slope = np.array([tail_slope(kv, row) for row in seconds])
    decode = np.stack([_extended(rows, requests, column) for column in by_kv.T], axis=1)
    slopes = _extended(rows, requests, slope)
    surface = np.concatenate([decode, slopes[:, None]], axis=1)
    surface[0] = 0.0
    return surface


def tables_from_document(document: dict[str, Any], source: str) -> LatencyTables:
    """Dense kernel tables from a table file's content; LatencyTableError names the source and the key."""
    schema = read_key(document, "schema", source)
    if schema != SCHEMA:
        raise LatencyTableError(f"{source}: key 'schema' is {schema!r}, this version reads {SCHEMA}; rebuild the table")
    tokens, linear = read_curve(document, "linear", "tokens", "seconds", source)
    rows, head = read_curve(document, "head", "rows", "seconds", source)
    chunk, fresh = read_curve(document, "prefill_attention", "fresh_chunk", "fresh_seconds", source)
    extra_chunk, extra = read_curve(document, "prefill_attention", "chunk", "extra_seconds", source)
    _, context = read_curve(document, "prefill_attention", "chunk", "context_token_seconds", source)
    drafts, draft = read_curve(document, "drafter", "requests", "step_seconds", source)
    decode = _expand_decode(document, source, "seconds")
    section = read_key(document, "decode_attention", source)
    mixed = decode
    if isinstance(section, dict) and "mixed_seconds" in section:
        mixed = _expand_decode(document, source, "mixed_seconds")
    chunks = np.arange(MAX_CONTEXT_TOKENS + 1, dtype=np.float64)
    head_rows = MAX_REQUESTS * 9
    return LatencyTables(
        linear_s=_extended(np.arange(MAX_BATCH_TOKENS + 1, dtype=np.float64), tokens, linear, zero_first=True),
        linear_slope_s=tail_slope(tokens, linear),
        head_s=_extended(np.arange(head_rows + 1, dtype=np.float64), rows, head, zero_first=True),
        head_slope_s=tail_slope(rows, head),
        decode_s=np.stack([decode, mixed]),
        fresh_s=_extended(chunks, chunk, fresh, zero_first=True),
        extra_s=_extended(chunks, extra_chunk, extra, zero_first=True),
        context_s=_extended(chunks, extra_chunk, context, zero_first=True),
        draft_step_s=_extended(np.arange(MAX_REQUESTS + 1, dtype=np.float64), drafts, draft),
        unread_s=_expand_unread(document, source),
        draft_kv_token_s=read_number(document, "drafter.kv_token_seconds", source),
        draft_prefill_s=read_number(document, "drafter.prefill_seconds", source),
        draft_prefill_token_s=read_number(document, "drafter.prefill_token_seconds", source),
        verify_row_fraction=read_number(document, "attention.verify_row_fraction", source),
        padding=read_number(document, "attention.padding", source)
        if _optional(document, "attention", "padding")
        else 0.0,
        fixed_s=read_number(document, "overhead.fixed_seconds", source),
        per_request_s=read_number(document, "overhead.per_request_seconds", source),
        speculation_s=read_number(document, "overhead.speculation_seconds", source),
        speculation_request_s=(
            read_number(document, "overhead.speculation_request_seconds", source)
            if _optional(document, "overhead", "speculation_request_seconds")
            else 0.0
        ),
        idle_drafter_s=read_number(document, "overhead.idle_drafter_seconds", source),
        idle_drafter_request_s=read_number(document, "overhead.idle_drafter_request_seconds", source),
    )


def rounded(values: Any, digits: int = 4) -> list[Any]:
    """Nested lists of floats at `digits` significant digits, so that files can be compared line by line."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim > 1:
        return [rounded(row, digits) for row in array]
    return [float(f"{value:.{digits}g}") for value in array]


def dump(content: dict[str, Any]) -> str:
    """JSON with one line per list of numbers: small, and a diff shows which curve moved."""

    def render(value: Any, indent: int) -> str:
        pad = "  " * (indent + 1)
        if isinstance(value, dict):
            rows = [f"{pad}{json.dumps(key)}: {render(item, indent + 1)}" for key, item in value.items()]
            return "{\n" + ",\n".join(rows) + "\n" + "  " * indent + "}"
        if isinstance(value, list) and value and isinstance(value[0], list | str):
            rows = [f"{pad}{json.dumps(item)}" for item in value]
            return "[\n" + ",\n".join(rows) + "\n" + "  " * indent + "]"
        return json.dumps(value)

    return render(content, 0) + "\n"
