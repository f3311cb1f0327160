"""Validated configuration of a serving engine."""

from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.core.state import MAX_CANDIDATES
from engine.latency.model import LatencyModel
from engine.limits import EngineLimits, Prefill
from engine.speculation.allocation import CHAINS, Allocation, Score, Speculation


class EngineConfig(BaseModel):
    """A model with its drafter on a GPU.

    Args:
        name: name in reports.
        latency: name of a table shipped in `engine/latency/tables`, or a path to one.
        max_num_seqs: most requests in one batch.
        max_model_len: most prompt + output tokens of one request.
        block_size: tokens per KV block.
        watermark: share of KV blocks kept free when a new request is admitted.
        gpu_memory_utilization: share of GPU memory for weights, activations and KV cache.
        num_kv_blocks: KV blocks; 0 derives them from GPU memory and weights.
        prefill: batching of prompts with decodes: `chunked` beside them (Sarathi-Serve), `whole` beside them (Orca),
            `first` and alone (vLLM before chunked prefill), or chunks in `turns` with them (see
            `engine.core.scheduler`). Controllers that predict iteration times predict those of `chunked`.
        measured: the iterations that `runs.profile` measured on a real engine, a `.parquet`; controllers then predict
            from these, as they would on that engine, and not from samples of the latency table.
        timing_error, timing_seed: error of the engine's true times against those of `latency`, with which controllers
            still predict: a factor from 1 - error to 1 + error for each group of operators, drawn from the seed
            (`LatencyModel.mistimed`).
        allocation, branching, draft_depth, score, cost_aware, tpot_target: allocation of an action's candidates
            (`Speculation`).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: str
    latency: str
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 256
    max_model_len: Annotated[int, Field(ge=2)] = 16384
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    watermark: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] = 0.9
    num_kv_blocks: Annotated[int, Field(ge=0)] = 0
    prefill: Prefill = "chunked"
    measured: Path | None = None
    timing_error: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    timing_seed: Annotated[int, Field(ge=0)] = 0
    allocation: Allocation = CHAINS.allocation
    branching: Annotated[int, Field(ge=1, le=32)] = CHAINS.branching
    draft_depth: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] | None = CHAINS.draft_depth
    score: Score = CHAINS.score
    cost_aware: bool = CHAINS.cost_aware
    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = CHAINS.tpot_target

    @model_validator(mode="after")
    def _speculates(self) -> Self:
        self.speculation  # noqa: B018 - refuses inconsistent settings
        return self

    @property
    def speculation(self) -> Speculation:
        """Allocation of an action's candidates."""
        return Speculation(**{field.name: getattr(self, field.name) for field in fields(Speculation)})

    def governed_by(self, speculation: Speculation | None) -> Self:
        """The same engine with the allocation that a controller asks for; None: as it is configured."""
        return self if speculation is None else self.model_copy(update=asdict(speculation))

    @property
    def variant(self) -> str:
        """`name` and the settings that distinguish engines of that name; runs of equal labels used the same engine."""
        mistimed = f" timing_error={self.timing_error:g}#{self.timing_seed}" if self.timing_error > 0.0 else ""
        return self.name + ("" if self.prefill == "chunked" else f" prefill={self.prefill}") + mistimed

    def true_latency(self) -> LatencyModel:
        """True iteration times: the latency table with the configured error.

        Raises:
            LatencyTableError: no such table, or a broken one.
        """
        return LatencyModel.load(self.latency).mistimed(self.timing_error, self.timing_seed)

    def limits(self, latency: LatencyModel) -> EngineLimits:
        """Scheduler limits on the hardware that `latency` describes.

        Raises:
            ValueError: when weights leave no room for KV blocks.
        """
        blocks = self.num_kv_blocks
        if blocks == 0:
            blocks = int(latency.kv_capacity_tokens(self.gpu_memory_utilization)) // self.block_size
        if blocks < 1:
            raise ValueError(
                f"engine.gpu_memory_utilization={self.gpu_memory_utilization} leaves no KV blocks beside the weights "
                f"of {self.name}; raise it, or set engine.num_kv_blocks"
            )
        return EngineLimits(
            total_blocks=blocks,
            block_size=self.block_size,
            watermark_blocks=int(self.watermark * blocks),
            max_num_seqs=self.max_num_seqs,
            max_model_len=self.max_model_len,
            prefill=self.prefill,
        )
