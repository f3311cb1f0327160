"""Validated configuration of a vLLM in this process. vLLM is not imported before the engine is built."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from engine.backends.clock import Clock
from engine.backends.real import EMBEDDED, tokenizer_of
from engine.backends.real_config import RealEngineConfig, refuse_sharing
from engine.backends.vllm.missing import require_vllm
from engine.core.state import MAX_CANDIDATES
from engine.limits import EngineLimits
from engine.speculation.allocation import CHAINS, Speculation

if TYPE_CHECKING:
    from engine.backends.vllm.engine import VllmEngine

CPU_CACHE_BYTES = 2**30


class VllmEngineConfig(RealEngineConfig):
    """vLLM serving a model in this process, its scheduler governed from outside.

    Prefix caching and asynchronous scheduling are off: no engine here has the former, and the latter schedules a step
    before the result of the previous one is known.

    Args:
        name, max_num_seqs, max_model_len, block_size, profile, trust_remote_code: see `RealEngineConfig`. On a
            processor `block_size` is a multiple of 32.
        target: a local folder, a hub id, or `embedded` for the target that ships with the project.
        drafter: source of candidate tokens: `model`, `ngram` (vLLM's prompt lookup) or `none`.
        drafter_model: folder, hub id or `embedded`; of the target's vocabulary. Read with `drafter=model` only.
        ngram_shortest, ngram_longest: tokens of the n-grams that prompt lookup matches.
        num_speculative_tokens: vLLM's largest c, an upper limit of all actions.
        max_num_batched_tokens: vLLM's most tokens in a step; it must leave room for the largest n beside the decodes.
        dtype: of weights and cache, as vLLM names it.
        enforce_eager: no compilation and no CUDA graphs; required on a CPU without a C++ compiler.
        threads: torch's threads on a processor.
        watermark: share of KV blocks kept free when a new request is admitted.
        num_kv_blocks: KV blocks; 0: enough for `max_num_seqs` requests of `max_model_len` tokens.
        kv_cache_memory_bytes: the cache memory limit given to vLLM; the cache has `num_kv_blocks` regardless. None:
            vLLM's own rule on a GPU, 1 GiB on a CPU.
    """

    unnamed = RealEngineConfig.unnamed | {"watermark", "num_kv_blocks", "kv_cache_memory_bytes"}

    target: Annotated[str, Field(min_length=1)] = EMBEDDED
    drafter: Literal["model", "ngram", "none"] = "model"
    drafter_model: Annotated[str, Field(min_length=1)] = EMBEDDED
    ngram_shortest: Annotated[int, Field(ge=1)] = 1
    ngram_longest: Annotated[int, Field(ge=1)] = 3
    num_speculative_tokens: Annotated[int, Field(ge=1, le=MAX_CANDIDATES)] = 8
    max_num_batched_tokens: Annotated[int, Field(ge=2)] = 8192
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "float32"
    enforce_eager: bool = True
    threads: Annotated[int, Field(ge=1)] = 1
    block_size: Annotated[int, Field(ge=1, le=1024)] = 32
    watermark: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    num_kv_blocks: Annotated[int, Field(ge=0)] = 0
    kv_cache_memory_bytes: Annotated[int, Field(ge=1)] | None = None

    @model_validator(mode="after")
    def _has_room(self) -> Self:
        if self.ngram_shortest > self.ngram_longest:
            raise ValueError(f"ngram_shortest={self.ngram_shortest} is above ngram_longest={self.ngram_longest}")
        decodes = self.max_num_seqs * (1 + self.most_candidates)
        if self.max_num_batched_tokens <= decodes:
            raise ValueError(
                f"max_num_batched_tokens={self.max_num_batched_tokens} leaves no prompt token beside "
                f"{self.max_num_seqs} decoding requests with {self.most_candidates} candidates each ({decodes} "
                "tokens): raise it, or lower max_num_seqs"
            )
        return self

    @property
    def most_candidates(self) -> int:
        """The largest c: 0 without a drafter."""
        return 0 if self.drafter == "none" else self.num_speculative_tokens

    @property
    def speculation(self) -> Speculation:
        """vLLM drafts a chain of c candidates for every request."""
        return CHAINS

    def governed_by(self, speculation: Speculation | None) -> Self:
        """Return this engine. Raises ValueError for a controller that asks for another allocation."""
        if speculation is not None and speculation != CHAINS:
            raise refuse_sharing(speculation)
        return self

    @property
    def limits(self) -> EngineLimits:
        """Scheduler limits, as they follow from the cache."""
        blocks = self.num_kv_blocks or self.max_num_seqs * -(-self.max_model_len // self.block_size)
        return EngineLimits(
            blocks, self.block_size, int(self.watermark * blocks), self.max_num_seqs, self.max_model_len, "chunked"
        )

    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return tokenizer_of(self.target, self.trust_remote_code)

    def build(self, *, ttft_target: float, queue_rows: int = 64, clock: Clock | None = None) -> VllmEngine:
        """Start vLLM in this process and return the engine; its clock starts when this returns.

        Raises:
            MissingVllmError: vLLM is not installed.
            ValueError: a setting that vLLM refuses.
        """
        # Read when vLLM is imported; its start-up log is 40 lines.
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
        require_vllm()
        from engine.backends.vllm.engine import VllmEngine

        return VllmEngine(self, ttft_target=ttft_target, queue_rows=queue_rows, clock=clock)

    def folders(self) -> tuple[str, str]:
        """Folders from which vLLM loads target and drafter."""
        from engine.models.load import DRAFTER_FOLDER, TARGET_FOLDER

        return (
            str(TARGET_FOLDER) if self.target == EMBEDDED else self.target,
            str(DRAFTER_FOLDER) if self.drafter_model == EMBEDDED else self.drafter_model,
        )

    def arguments(self, on_processor: bool) -> dict[str, Any]:
        """vLLM's own settings (`EngineArgs`), except the scheduler's class."""
        target, drafter = self.folders()
        speculation: dict[str, Any] = {"num_speculative_tokens": self.num_speculative_tokens}
        if self.drafter == "model":
            speculation |= {"method": "draft_model", "model": drafter}
        else:
            lookup = {"prompt_lookup_min": self.ngram_shortest, "prompt_lookup_max": self.ngram_longest}
            speculation |= {"method": "ngram", **lookup}
        cache_bytes = self.kv_cache_memory_bytes or (CPU_CACHE_BYTES if on_processor else None)
        return {
            "model": target,
            "trust_remote_code": self.trust_remote_code,
            "speculative_config": None if self.drafter == "none" else speculation,
            "dtype": self.dtype,
            "enforce_eager": self.enforce_eager,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": self.max_num_batched_tokens,
            "block_size": self.block_size,
            "watermark": self.watermark,
            # vLLM keeps one block for itself.
            "num_gpu_blocks_override": self.limits.total_blocks + 1,
            "kv_cache_memory_bytes": cache_bytes,
            "enable_prefix_caching": False,
            "async_scheduling": False,
        }
