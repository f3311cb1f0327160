"""A torch engine of its configuration: its device, and the models that it names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from threadpoolctl import threadpool_limits

from engine.backends.clock import Clock
from engine.backends.real import EMBEDDED
from engine.limits import EngineLimits
from engine.models.shapes import Shape, llama_config, shape_named
from engine.workload.markov import fitted

if TYPE_CHECKING:
    # Loading torch takes seconds, which a simulated run has no use for: it is imported where a model is.
    import torch

    from engine.backends.torch.config import TorchEngineConfig
    from engine.backends.torch.engine import TorchEngine
    from engine.backends.torch.model import PagedModel
    from engine.speculation.drafter import Drafter


def device_of(settings: TorchEngineConfig) -> torch.device:
    """The device that `device` means here. Raises ValueError when there is none."""
    import torch

    if settings.device == "cuda" and not torch.cuda.is_available():
        raise ValueError("device=cuda: torch finds no CUDA device here; set device=cpu, or auto")
    return torch.device("cuda" if settings.device != "cpu" and torch.cuda.is_available() else "cpu")


def build(
    settings: TorchEngineConfig,
    *,
    ttft_target: float,
    queue_rows: int = 64,
    clock: Clock | None = None,
    record: bool = False,
) -> TorchEngine:
    """Load the models and return the engine; its clock starts when this returns.

    Raises:
        ValueError: no such device, a drafter of another vocabulary, a model that cannot be read (`ModelFilesError`)
            or run (`UnsupportedModelError`).
    """
    import torch

    from engine.backends.torch.engine import TorchEngine
    from engine.models.load import deepen, load_target

    torch.set_num_threads(settings.threads)
    limits = settings.limits
    target = _load(settings, settings.target, load_target)
    if settings.layers is not None and shape_named(settings.target) is None:
        target = deepen(target, settings.layers)
    model = _paged(settings, target, limits, settings.target)
    # BLAS libraries other than torch's are limited once the model's check has loaded them.
    threadpool_limits(settings.threads, user_api="blas")
    return TorchEngine(
        model,
        limits,
        _drafter(settings, model, limits),
        settings.speculation,
        ttft_target=ttft_target,
        queue_rows=queue_rows,
        clock=clock,
        record=record,
    )


def _load(
    settings: TorchEngineConfig, source: str, embedded: Callable[[torch.dtype], Any], *, drafts: bool = False
) -> Any:
    import torch

    shape = shape_named(source)
    if shape is not None:
        return _random_weights(settings, shape, drafts)
    if source == EMBEDDED:
        return embedded(torch.float32 if settings.dtype == "auto" else getattr(torch, settings.dtype))
    from engine.models.load import load_pretrained

    return load_pretrained(source, settings.dtype, trust_remote_code=settings.trust_remote_code)


def _random_weights(settings: TorchEngineConfig, shape: Shape, drafts: bool) -> Any:
    import torch

    from engine.models.bigram import bigram_drafter, bigram_target

    dtype = torch.bfloat16 if settings.dtype == "auto" else getattr(torch, settings.dtype)
    seed, device = settings.weights_seed, device_of(settings)
    if drafts:
        law = fitted(settings.agreement, settings.mean_agreement)
        return bigram_drafter(llama_config(shape, settings.max_model_len), seed, law, dtype=dtype, device=device)
    made = llama_config(shape, settings.max_model_len, settings.layers)
    return bigram_target(made, seed, dtype=dtype, device=device)


def _paged(settings: TorchEngineConfig, model: Any, limits: EngineLimits, source: str) -> PagedModel:
    from engine.backends.torch.model import PagedModel
    from engine.backends.torch.positions import check_positions
    from engine.backends.torch.table import CacheTable

    check_positions(model, limits, source)
    blocks = CacheTable(limits).num_blocks
    return PagedModel(
        model.to(device_of(settings)),
        blocks,
        limits.block_size,
        fused=settings.fused,
        exact=settings.exact,
        max_model_len=limits.max_model_len,
    )


def _drafter(settings: TorchEngineConfig, target: PagedModel, limits: EngineLimits) -> Drafter:
    if settings.drafter == "none":
        from engine.speculation.drafter import NoDrafter

        return NoDrafter()
    if settings.drafter == "ngram":
        from engine.speculation.ngram import NgramDrafter

        return NgramDrafter(settings.ngram_shortest, settings.ngram_longest)
    from engine.models.load import load_drafter
    from engine.speculation.model import ModelDrafter

    drafts = _load(settings, settings.drafter_model, load_drafter, drafts=True)
    drafter = _paged(settings, drafts, limits, settings.drafter_model)
    if drafter.vocab_size != target.vocab_size:
        raise ValueError(
            f"drafter_model={settings.drafter_model} has {drafter.vocab_size} tokens, the target {settings.target} "
            f"{target.vocab_size}; a drafter must share the target's vocabulary, or set drafter=ngram"
        )
    drafter.defer_to(target)
    return ModelDrafter(drafter)
