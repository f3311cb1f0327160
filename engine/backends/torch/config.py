"""What a torch engine is configured with, validated, and how the models it names are loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field
from threadpoolctl import threadpool_limits

from engine.backends.clock import Clock
from engine.backends.real import EMBEDDED, RealEngineConfig, refuse_sharing, tokenizer_of
from engine.config import EngineLimits, Prefill
from engine.speculation.allocation import CHAINS, Speculation

if TYPE_CHECKING:
    # Loading torch takes seconds, which a simulated run has no use for: it is imported where a model is.
    import torch

    from engine.backends.torch.engine import TorchEngine
    from engine.backends.torch.model import PagedModel
    from engine.speculation.drafter import Drafter


class TorchEngineConfig(RealEngineConfig):
    """A Hugging Face model with its drafter, run for real on this machine.

    Args:
        name, max_num_seqs, max_model_len, block_size, profile: see `RealEngineConfig`.
        target: a local folder, a hub id, or `embedded` for the target that ships with the project.
        layers: deepen the target to this many layers, which change its cost and not its output (`engine.models.deepen`
            says how); None: as it is.
        drafter: who proposes candidate tokens: `model`, `ngram` (prompt lookup) or `none`.
        drafter_model: folder, hub id or `embedded`; of the target's vocabulary. Read with `drafter=model` only.
        ngram_shortest, ngram_longest: tokens of the n-grams that prompt lookup matches.
        allocation: who gets how many of an action's candidates: `uniform`, `local` or `global`.
        branching: most children of a candidate; 1 for chains.
        draft_depth: most drafter steps in an iteration; None: see `Speculation`.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
        dtype: of weights and cache; `auto` keeps the weights' own.
        threads: torch's threads on CPU.
        fused: take the shorter way through Llama-family models.
        exact: float64 and batch-independent rounding, for tests.
        watermark: share of KV blocks kept free when a new request is admitted.
        num_kv_blocks: KV blocks; 0: enough for `max_num_seqs` requests of `max_model_len` tokens.
        prefill: how prompts meet decodes: `chunked`, `whole`, `first` or `turns`, as in `engine.config.EngineConfig`.
    """

    unnamed = RealEngineConfig.unnamed | {"layers", "watermark", "num_kv_blocks"}

    target: Annotated[str, Field(min_length=1)] = EMBEDDED
    layers: Annotated[int, Field(ge=1)] | None = None
    drafter: Literal["model", "ngram", "none"] = "model"
    drafter_model: Annotated[str, Field(min_length=1)] = EMBEDDED
    ngram_shortest: Annotated[int, Field(ge=1)] = 1
    ngram_longest: Annotated[int, Field(ge=1)] = 3
    allocation: Literal["uniform", "local", "global"] = "uniform"
    branching: Annotated[int, Field(ge=1, le=32)] = 1
    draft_depth: Annotated[int, Field(ge=1, le=32)] | None = None
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float64", "float32", "bfloat16", "float16"] = "float32"
    threads: Annotated[int, Field(ge=1)] = 1
    fused: bool = True
    exact: bool = False
    watermark: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    num_kv_blocks: Annotated[int, Field(ge=0)] = 0
    prefill: Prefill = "chunked"

    @property
    def speculation(self) -> Speculation:
        """How the candidates of an action are shared out."""
        return Speculation(self.allocation, self.branching, self.draft_depth)

    def governed_by(self, speculation: Speculation | None) -> Self:
        """The same engine sharing candidates as a controller asks for; None: as it is configured.

        Raises ValueError for what the real engine cannot do.
        """
        if speculation is None:
            return self
        wanted, known = asdict(speculation), {"allocation", "branching", "draft_depth"}
        simulated = [name for name in wanted.keys() - known if wanted[name] != getattr(CHAINS, name)]
        if wanted["allocation"] not in get_args(type(self).model_fields["allocation"].annotation) or simulated:
            raise refuse_sharing(speculation)
        return self.model_copy(update={name: wanted[name] for name in known})

    @property
    def limits(self) -> EngineLimits:
        """What the scheduler knows of the cache."""
        blocks = self.num_kv_blocks or self.max_num_seqs * -(-self.max_model_len // self.block_size)
        return EngineLimits(
            blocks, self.block_size, int(self.watermark * blocks), self.max_num_seqs, self.max_model_len, self.prefill
        )

    @property
    def torch_device(self) -> torch.device:
        """The device that `device` means here. Raises ValueError when there is none."""
        import torch

        if self.device == "cuda" and not torch.cuda.is_available():
            raise ValueError("device=cuda: torch finds no CUDA device here; set device=cpu, or auto")
        return torch.device("cuda" if self.device != "cpu" and torch.cuda.is_available() else "cpu")

    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return tokenizer_of(self.target)

    def build(
        self, *, ttft_target: float, queue_rows: int = 64, clock: Clock | None = None, record: bool = False
    ) -> TorchEngine:
        """Load the models and return the engine; its clock starts when this returns.

        Raises:
            ValueError: no such device, a drafter of another vocabulary, a model that cannot be run
                (`UnsupportedModelError`).
            OSError: no such model.
        """
        import torch

        from engine.backends.torch.engine import TorchEngine
        from engine.models.load import deepen, load_target

        torch.set_num_threads(self.threads)
        limits = self.limits
        target = self._load(self.target, load_target)
        if self.layers is not None:
            target = deepen(target, self.layers)
        model = self._paged(target, limits)
        # BLAS libraries other than torch's are limited once the model's check has loaded them.
        threadpool_limits(self.threads, user_api="blas")
        return TorchEngine(
            model,
            limits,
            self._drafter(model, limits),
            self.speculation,
            ttft_target=ttft_target,
            queue_rows=queue_rows,
            clock=clock,
            record=record,
        )

    def _load(self, source: str, embedded: Callable[[torch.dtype], Any]) -> Any:
        if source == EMBEDDED:
            import torch

            return embedded(torch.float32 if self.dtype == "auto" else getattr(torch, self.dtype))
        from transformers import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(source, dtype=self.dtype)

    def _paged(self, model: Any, limits: EngineLimits) -> PagedModel:
        from engine.backends.torch.model import PagedModel
        from engine.backends.torch.table import CacheTable

        blocks = CacheTable(limits).num_blocks
        return PagedModel(model.to(self.torch_device), blocks, limits.block_size, fused=self.fused, exact=self.exact)

    def _drafter(self, target: PagedModel, limits: EngineLimits) -> Drafter:
        if self.drafter == "none":
            from engine.speculation.drafter import NoDrafter

            return NoDrafter()
        if self.drafter == "ngram":
            from engine.speculation.ngram import NgramDrafter

            return NgramDrafter(self.ngram_shortest, self.ngram_longest)
        from engine.models.load import load_drafter
        from engine.speculation.model import ModelDrafter

        drafter = self._paged(self._load(self.drafter_model, load_drafter), limits)
        if drafter.vocab_size != target.vocab_size:
            raise ValueError(
                f"drafter_model={self.drafter_model} has {drafter.vocab_size} tokens, the target {self.target} "
                f"{target.vocab_size}; a drafter must share the target's vocabulary, or set drafter=ngram"
            )
        drafter.defer_to(target)
        return ModelDrafter(drafter)
