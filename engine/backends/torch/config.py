"""What a torch engine is configured with, validated."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self, get_args

from pydantic import Field, field_validator

from engine.backends.clock import Clock
from engine.backends.real import EMBEDDED, tokenizer_of
from engine.backends.real_config import RealEngineConfig, refuse_sharing
from engine.limits import EngineLimits, Prefill
from engine.models.shapes import shape_named
from engine.speculation.allocation import CHAINS, Speculation
from engine.workload.agreement import Share
from engine.workload.markov import FittedDrafter

if TYPE_CHECKING:
    from engine.backends.torch.engine import TorchEngine


DrafterKind = Literal["model", "ngram", "none"]
Sharing = Literal["uniform", "local", "global"]
DeviceKind = Literal["auto", "cpu", "cuda"]
Dtype = Literal["auto", "float64", "float32", "bfloat16", "float16"]


class TorchEngineConfig(RealEngineConfig):
    """A Hugging Face model with its drafter, run for real on this machine.

    Args:
        name, max_num_seqs, max_model_len, block_size, profile, trust_remote_code: see `RealEngineConfig`.
        target: a local folder, a hub id, `embedded` for the target that ships with the project, or `shape:NAME` for an
            architecture of `engine.models.shapes` with random weights (`engine.models.bigram`).
        layers: deepen the target to this many layers, which change its cost and not its output (`engine.models.deepen`
            says how); a shape is built with so many in place of its own. None: as it is.
        drafter: who proposes candidate tokens: `model`, `ngram` (prompt lookup) or `none`.
        drafter_model: folder, hub id, `embedded` or `shape:NAME`; of the target's vocabulary. Read with `drafter=model`
            only.
        agreement: whose fitted `MarkovChain` a drafter that is a shape has with a target that is one.
        mean_agreement: how often they agree on average; None: as fitted.
        weights_seed: of the weights of shapes, and so of their text.
        ngram_shortest, ngram_longest: tokens of the n-grams that prompt lookup matches.
        allocation: who gets how many of an action's candidates: `uniform`, `local` or `global`.
        branching: most children of a candidate; 1 for chains.
        draft_depth: most drafter steps in an iteration; None: see `Speculation`.
        device: `cpu`, `cuda`, or `auto` for CUDA where there is one.
        dtype: of weights and cache; `auto` keeps the weights' own, which is bfloat16 for shapes.
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
    drafter: DrafterKind = "model"
    drafter_model: Annotated[str, Field(min_length=1)] = EMBEDDED
    agreement: FittedDrafter = "draft68m"
    mean_agreement: Share | None = None
    weights_seed: Annotated[int, Field(ge=0)] = 0
    ngram_shortest: Annotated[int, Field(ge=1)] = 1
    ngram_longest: Annotated[int, Field(ge=1)] = 3
    allocation: Sharing = "uniform"
    branching: Annotated[int, Field(ge=1, le=32)] = 1
    draft_depth: Annotated[int, Field(ge=1, le=32)] | None = None
    device: DeviceKind = "auto"
    dtype: Dtype = "float32"
    threads: Annotated[int, Field(ge=1)] = 1
    fused: bool = True
    exact: bool = False
    watermark: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.01
    num_kv_blocks: Annotated[int, Field(ge=0)] = 0
    prefill: Prefill = "chunked"

    @field_validator("target", "drafter_model")
    @classmethod
    def _shape_is_known(cls, source: str) -> str:
        shape_named(source)
        return source

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

    def tokenizer(self) -> Any:
        """The target's tokenizer."""
        return tokenizer_of(self.target, self.trust_remote_code)

    def build(
        self, *, ttft_target: float, queue_rows: int = 64, clock: Clock | None = None, record: bool = False
    ) -> TorchEngine:
        """See `engine.backends.torch.build.build`."""
        from engine.backends.torch.build import build

        return build(self, ttft_target=ttft_target, queue_rows=queue_rows, clock=clock, record=record)
