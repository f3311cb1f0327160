"""`LatencyModel`: time of one engine iteration, composed from measured operator times.

The simulator takes these times as the truth. The two kernels read plain arrays (`LatencyTables`), so compiled engine
loops call them without returning to Python. The class, for Python callers, loads a shipped table and computes memory.
"""

from copy import copy
from pathlib import Path
from typing import Any

import numpy as np

from engine.compiled import kernel
from engine.files import FileFaultError, read_json
from engine.latency.table_file import (
    KV_STEP_TOKENS,
    MAX_BATCH_TOKENS,
    MAX_CONTEXT_TOKENS,
    MAX_REQUESTS,
    LatencyTableError,
    LatencyTables,
    read_key,
    read_number,
    tables_from_document,
)

TABLES_FOLDER = Path(__file__).parent / "tables"

OPERATOR_GROUPS = {
    "per token": ("linear_s", "linear_slope_s", "head_s", "head_slope_s"),
    "decode attention": ("decode_s",),
    "prefill attention": ("fresh_s", "extra_s", "context_s"),
    "drafter": ("draft_step_s", "unread_s", "draft_kv_token_s", "draft_prefill_s", "draft_prefill_token_s"),
    "overheads": (
        "fixed_s",
        "per_request_s",
        "speculation_s",
        "speculation_request_s",
        "idle_drafter_s",
        "idle_drafter_request_s",
    ),
}
"""Fields of `LatencyTables` that are in seconds, by group of operators."""


@kernel
def prefill_attention_time(tables, chunk, context):
    """Seconds that the attention of one request's prompt chunk takes over all layers.

    `chunk` new prompt tokens after `context` cached ones. A chunk beyond the table costs as many full chunks plus the
    rest, each seeing the ones before it as context.
    """
    last = tables.fresh_s.shape[0] - 1
    seconds = 0.0
    while chunk > last:
        seconds += tables.fresh_s[last]
        if context > 0:
            seconds += tables.extra_s[last] + tables.context_s[last] * context
        context += last
        chunk -= last
    if chunk > 0:
        seconds += tables.fresh_s[chunk]
        if context > 0:
            seconds += tables.extra_s[chunk] + tables.context_s[chunk] * context
    return seconds


@kernel
def decode_attention_time(tables, num_decodes, kv_tokens, mixed):
    """Seconds that attention takes over all layers for one new token in each of `num_decodes` requests.

    `kv_tokens` is the sum of their cached tokens, unequal requests are taken at their mean; `mixed` is 1 if the batch
    also holds a prompt chunk, else 0.
    """
    surface = tables.decode_s
    row = min(max(num_decodes, 1), surface.shape[1] - 1)
    # Past the table's batch sizes the last one is scaled: there the kernel is bound by bytes.
    seconds_per_request = 1.0 / row
    position = kv_tokens / max(num_decodes, 1) * (1.0 / KV_STEP_TOKENS)
    last = surface.shape[2] - 2
    column = min(int(position), last)
    low = surface[mixed, row, column]
    if column < last:
        low += (position - column) * (surface[mixed, row, column + 1] - low)
    else:
        low += (position - column) * KV_STEP_TOKENS * surface[mixed, row, last + 1]
    return low * (num_decodes * seconds_per_request)


@kernel
def unread_time(tables, tokens):
    """Drafter seconds for `tokens` tokens that it has not read when it first drafts after them."""
    curve = tables.unread_s
    last = curve.shape[0] - 1
    if tokens <= last:
        return curve[tokens]
    return curve[last] + (tokens - last) * (curve[last] - curve[last - 1])


@kernel
def iteration_time(
    tables,
    num_decodes,
    decode_tokens,
    candidate_steps,
    decode_kv_tokens,
    num_prefills,
    prefill_tokens,
    prefill_attention_s,
    sampled_rows,
):
    """Seconds of one engine iteration: draft, then verify and prefill in one forward, then sample (PerIterExecTime).

    Args:
        tables: `LatencyTables`.
        num_decodes: B, decoding requests.
        decode_tokens: sum over them of 1 + c_i.
        candidate_steps: max c_i, the drafter's steps; 0 = no drafting.
        decode_kv_tokens: cached tokens summed over the decoding requests before the iteration.
        num_prefills: requests with a prompt chunk in the batch.
        prefill_tokens: sum of the chunks.
        prefill_attention_s: sum of `prefill_attention_time` over the chunks.
        sampled_rows: decode_tokens plus prompts that complete.

    The staircase of the GEMMs is kept, so the time may fall where a faster kernel takes over (as measured). It never
    falls with cached tokens, prefill attention, or drafter steps.
    """
    tokens = decode_tokens + prefill_tokens
    last = tables.linear_s.shape[0] - 1
    seconds = tables.fixed_s + tables.per_request_s * (num_decodes + num_prefills)
    if tokens <= last:
        seconds += tables.linear_s[tokens]
    else:
        seconds += tables.linear_s[last] + (tokens - last) * tables.linear_slope_s
    last = tables.head_s.shape[0] - 1
    if sampled_rows <= last:
        seconds += tables.head_s[sampled_rows]
    else:
        seconds += tables.head_s[last] + (sampled_rows - last) * tables.head_slope_s
    attention = 0.0
    # With candidates the drafter's first step carries the prompt tokens; without, they need a pass of their own.
    drafting = candidate_steps > 0 and num_decodes > 0
    prompt_pass_s = 0.0 if drafting else tables.draft_prefill_s
    if prefill_tokens > 0:
        seconds += prompt_pass_s + tables.draft_prefill_token_s * prefill_tokens
    if num_decodes > 0:
        mixed = 1 if prefill_tokens > 0 else 0
        attention = decode_attention_time(tables, num_decodes, decode_kv_tokens, mixed)
        attention *= 1.0 + tables.verify_row_fraction * (decode_tokens - num_decodes) / num_decodes
        row = min(num_decodes, tables.draft_step_s.shape[0] - 1)
        step = tables.draft_step_s[row] * (num_decodes / row) + tables.draft_kv_token_s * decode_kv_tokens
        if drafting:
            seconds += tables.speculation_s + tables.speculation_request_s * num_decodes + candidate_steps * step
        else:
            seconds += tables.idle_drafter_s + tables.idle_drafter_request_s * num_decodes
    return seconds + attention + prefill_attention_s


def available_tables() -> list[str]:
    """Names of the tables that ship with the project."""
    return sorted(path.stem for path in TABLES_FOLDER.glob("*.json"))


class LatencyModel:
    """Iteration time and memory of one target model, its drafter and its GPUs.

    Make one with `LatencyModel.load("vicuna_7b_a100")` (a shipped table or a path), or `LatencyModel.linear` for a
    closed form. `tables` is for the kernels; `provenance` gives the source of every figure; `drafter_model` names the
    timed drafter, None where the table does not name one.
    """

    def __init__(
        self,
        name: str,
        tables: LatencyTables,
        *,
        gpu_memory_bytes: float,
        tensor_parallel: int,
        weight_bytes: float,
        drafter_weight_bytes: float,
        activation_reserve_bytes: float,
        kv_bytes_per_token: int,
        provenance: dict[str, Any],
        drafter_model: str | None = None,
    ) -> None:
        self.name = name
        self.tables = tables
        self.gpu_memory_bytes = gpu_memory_bytes
        self.tensor_parallel = tensor_parallel
        self.weight_bytes = weight_bytes
        self.drafter_weight_bytes = drafter_weight_bytes
        self.activation_reserve_bytes = activation_reserve_bytes
        self.kv_bytes_per_token = kv_bytes_per_token
        self.provenance = provenance
        self.drafter_model = drafter_model

    @classmethod
    def load(cls, name_or_path: str | Path, **overrides: float) -> "LatencyModel":
        """Load a shipped table by name, or a table file by path.

        `overrides` replaces scalar fields of `LatencyTables` (for example `idle_drafter_s=2e-3`).

        Raises:
            LatencyTableError: unknown name, unreadable file, wrong schema, missing or impossible key.
        """
        path = Path(name_or_path)
        if path.suffix != ".json":
            path = TABLES_FOLDER / f"{name_or_path}.json"
        if not path.is_file():
            raise LatencyTableError(
                f"no latency table {str(name_or_path)!r}; give a .json path or one of {', '.join(available_tables())}"
            )
        try:
            document = read_json(path, "rebuild it")
        except FileFaultError as error:
            raise LatencyTableError(str(error)) from error
        if not isinstance(document, dict):
            raise LatencyTableError(f"{path}: must hold a JSON object")
        return cls.from_document(document, str(path), **overrides)

    @classmethod
    def from_document(cls, document: dict[str, Any], source: str, **overrides: float) -> "LatencyModel":
        """A model from a table file's content; `source` is named in errors."""
        tables = tables_from_document(document, source)
        for field, value in overrides.items():
            if field not in LatencyTables._fields or not isinstance(getattr(tables, field), float):
                scalars = [f for f in LatencyTables._fields if isinstance(getattr(tables, f), float)]
                raise LatencyTableError(f"{source}: cannot override {field!r}; scalar fields: {', '.join(scalars)}")
            if not np.isfinite(value) or value < 0:
                raise LatencyTableError(f"{source}: override {field!r} must be a finite number >= 0, got {value!r}")
            values: dict[str, Any] = {field: float(value)}
            tables = tables._replace(**values)
        return cls(
            str(read_key(document, "name", source)),
            tables,
            gpu_memory_bytes=read_number(document, "memory.gpu_memory_bytes", source),
            tensor_parallel=int(read_number(document, "tensor_parallel", source)),
            weight_bytes=read_number(document, "memory.weight_bytes", source),
            drafter_weight_bytes=read_number(document, "memory.drafter_weight_bytes", source),
            activation_reserve_bytes=read_number(document, "memory.activation_reserve_bytes", source),
            kv_bytes_per_token=int(read_number(document, "memory.kv_bytes_per_token", source)),
            provenance=read_key(document, "provenance", source),
            drafter_model=document.get("drafter_model"),
        )

    @classmethod
    def linear(
        cls,
        base_s: float,
        per_token_s: float = 0.0,
        *,
        per_request_s: float = 0.0,
        per_draft_step_s: float = 0.0,
        kv_capacity_tokens: int = 1 << 22,
    ) -> "LatencyModel":
        """A closed form for tests and queueing limits: exact, no attention, no LM head, no speculation overhead.

        T = base_s + per_token_s * (decode_tokens + prefill_tokens) + per_request_s * (decodes + prefills)
            + per_draft_step_s * candidate_steps. `kv_capacity_tokens` is the value of `kv_capacity_tokens(1.0)`.
        """
        for key, value in (("base_s", base_s), ("per_token_s", per_token_s), ("per_request_s", per_request_s)):
            if not np.isfinite(value) or value < 0:
                raise ValueError(f"{key} must be a finite number of seconds >= 0, got {value!r}")
        none = np.zeros(2)
        tables = LatencyTables(
            linear_s=np.arange(MAX_BATCH_TOKENS + 1, dtype=np.float64) * per_token_s,
            linear_slope_s=float(per_token_s),
            head_s=none,
            head_slope_s=0.0,
            decode_s=np.zeros((2, 2, 3)),
            fresh_s=np.zeros(MAX_CONTEXT_TOKENS + 1),
            extra_s=np.zeros(MAX_CONTEXT_TOKENS + 1),
            context_s=np.zeros(MAX_CONTEXT_TOKENS + 1),
            draft_step_s=np.full(MAX_REQUESTS * 64 + 1, float(per_draft_step_s)),
            unread_s=none,
            draft_kv_token_s=0.0,
            draft_prefill_s=0.0,
            draft_prefill_token_s=0.0,
            verify_row_fraction=0.0,
            padding=0.0,
            fixed_s=float(base_s),
            per_request_s=float(per_request_s),
            speculation_s=0.0,
            speculation_request_s=0.0,
            idle_drafter_s=0.0,
            idle_drafter_request_s=0.0,
        )
        return cls(
            "linear",
            tables,
            gpu_memory_bytes=float(kv_capacity_tokens),
            tensor_parallel=1,
            weight_bytes=0.0,
            drafter_weight_bytes=0.0,
            activation_reserve_bytes=0.0,
            kv_bytes_per_token=1,
            provenance={"source": "closed form", "base_s": base_s, "per_token_s": per_token_s},
        )

    def mistimed(self, error: float, seed: int) -> "LatencyModel":
        """The same engine with each group of operators off by a factor of its own, drawn from 1 - error to 1 + error.

        A controller's predictions then have the kind of error that a profile of another GPU, driver or day has: the
        groups (`OPERATOR_GROUPS`: per-token operators, decode attention, prefill attention, drafter, overheads) change
        relative to one another, and so does the best action. ValueError for an error outside [0, 1).
        """
        if not 0.0 <= error < 1.0:
            raise ValueError(f"timing_error={error!r} must be at least 0 and below 1")
        if error == 0.0:
            return self
        factors = np.random.default_rng([seed, len(OPERATOR_GROUPS)]).uniform(
            1.0 - error, 1.0 + error, len(OPERATOR_GROUPS)
        )
        changed = {
            name: getattr(self.tables, name) * factor
            for names, factor in zip(OPERATOR_GROUPS.values(), factors.tolist(), strict=True)
            for name in names
        }
        twin = copy(self)
        twin.tables = self.tables._replace(**changed)
        return twin

    def kv_capacity_tokens(self, gpu_memory_utilization: float = 0.9) -> int:
        """Tokens whose keys and values fit beside weights, drafter and activations, over all GPUs of the engine.

        Each GPU holds its share of the target's weights and KV cache, and a whole drafter with its cache.

        Raises:
            ValueError: utilization outside (0, 1], or nothing left for the cache.
        """
        if not 0.0 < gpu_memory_utilization <= 1.0:
            raise ValueError(f"gpu_memory_utilization must be in (0, 1], got {gpu_memory_utilization!r}")
        share = self.weight_bytes / self.tensor_parallel + self.drafter_weight_bytes + self.activation_reserve_bytes
        free = gpu_memory_utilization * self.gpu_memory_bytes - share
        tokens = int(free * self.tensor_parallel // self.kv_bytes_per_token)
        if tokens <= 0:
            raise ValueError(
                f"{self.name}: no memory is left for the KV cache at gpu_memory_utilization="
                f"{gpu_memory_utilization}; weights and reserve take {share / 2**30:.1f} GiB of "
                f"{self.gpu_memory_bytes / 2**30:.0f} GiB a GPU"
            )
        return tokens

    def time(
        self,
        num_decodes: int = 0,
        candidates: int = 0,
        decode_kv_tokens: float = 0,
        prefills: list[tuple[int, int]] | None = None,
        prompts_completed: int = 0,
        unread_tokens: int = 0,
    ) -> float:
        """Seconds of an iteration in which every decode has `candidates`; `prefills` lists (chunk, context).

        `unread_tokens` of the decoding requests' tokens the drafter reads only now.
        """
        chunks = prefills or []
        attention = sum(float(prefill_attention_time(self.tables, chunk, context)) for chunk, context in chunks)
        decode_tokens = num_decodes * (1 + candidates)
        drafting = num_decodes > 0 and candidates > 0
        return float(unread_time(self.tables, unread_tokens) if drafting else 0.0) + float(
            iteration_time(
                self.tables,
                num_decodes,
                decode_tokens,
                candidates if num_decodes else 0,
                decode_kv_tokens,
                len(chunks),
                sum(chunk for chunk, _ in chunks),
                float(attention),
                decode_tokens + prompts_completed,
            )
        )
