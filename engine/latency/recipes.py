"""Composition recipes of the shipped tables: the profile behind each part of each engine."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from engine.latency import compose, holdout, profiles
from engine.latency.compose import Curve, PrefillCurves
from engine.latency.shapes import ModelShape, gpu_spec, model_shape

REQUESTS = np.array([1, 2, 4, 6, 8, 12, 16, 24, 32, 40, 48, 64, 80, 96, 112, 128, 160, 192, 256, 384, 512])
KV_TOKENS = np.array([32, 64, 128, 256, 512, 1024, 1536, 2048, 3072, 4032])
HEAD_ROWS = np.array([1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 128, 160, 192, 256, 384, 512, 768, 1024, 2048, 4096])
CHUNKS = np.array([64, 128, 192, 256, 320, 384, 416, 512, 640, 768, 1024, 1280, 1536, 2048])
LONG_CHUNKS = np.array([6144, 8192, 12288, 16384])

VIDUR_LAYER = {"vicuna_7b": "Llama-2-7b-hf", "vicuna_13b": "internlm-20b"}
"""Vidur's profile with the same layer shape; internlm-20b is Vicuna-13B's layer, of which Vicuna has 40."""

AICONFIGURATOR = {"a100_80gb": ("a100_sxm", "0.14.0"), "h100_80gb": ("h100_sxm", "0.24.0")}
LLMSERVINGSIM = {"rtx4090": "RTX4090", "rtxpro6000": "RTXPRO6000"}


@dataclass(frozen=True)
class Engine:
    """A target model, the drafter that is loaded beside it (None: n-gram lookup), and the GPUs."""

    model: ModelShape
    drafter: ModelShape | None
    gpu: str
    tensor_parallel: int = 1


def _vicuna(size: str, drafter: str, gpu: str, tensor_parallel: int = 1) -> Engine:
    return Engine(model_shape(f"vicuna_{size}"), model_shape(drafter), gpu, tensor_parallel)


ENGINES: dict[str, Engine] = {
    "vicuna_7b_a100": _vicuna("7b", "llama_68m", "a100_80gb"),
    "vicuna_13b_a100": _vicuna("13b", "llama_160m", "a100_80gb"),
    "vicuna_33b_a100": _vicuna("33b", "llama_160m", "a100_80gb", 2),
    "vicuna_7b_h100": _vicuna("7b", "llama_68m", "h100_80gb"),
    "vicuna_13b_h100": _vicuna("13b", "llama_160m", "h100_80gb"),
    "vicuna_33b_h100": _vicuna("33b", "llama_160m", "h100_80gb", 2),
    "llama3_8b_rtx4090": Engine(model_shape("llama3_8b"), None, "rtx4090"),
    "llama3_8b_rtxpro6000": Engine(model_shape("llama3_8b"), None, "rtxpro6000"),
}
"""The shipped engines. 7B drafts with 68M, whose acceptance logs are measured; 13B and 33B with 160M (SmartSpec).
33B needs two 80 GB GPUs."""


class Sources:
    """Paths inside one profile folder, and the list of the files that a table was made from."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.used: list[str] = []

    def path(self, relative: str) -> Path:
        """The file's path; remembered as a source of the table."""
        if relative not in self.used:
            self.used.append(relative)
        return self.root / relative

    def aiconfigurator(self, gpu_name: str, kind: str) -> Path:
        """An aiconfigurator table (`gemm`, `context_attention`, ...) of one GPU."""
        folder, version = AICONFIGURATOR[gpu_name]
        head = "_hd128" if "attention" in kind else ""
        return self.path(f"aiconfigurator/{folder}/{kind}_vllm{version}_bf16{head}.csv")

    def llmservingsim(self, gpu_name: str, file: str) -> Path:
        """A file of LLMServingSim's Llama-3.1-8B profile of one GPU."""
        return self.path(f"llmservingsim/perf/{LLMSERVINGSIM[gpu_name]}/Llama-3.1-8B-bf16-tp1/{file}")


@dataclass(frozen=True)
class Attention:
    """Attention of one layer: decode surfaces (REQUESTS, KV_TOKENS), prefill curves, cost of a verified row.

    `mixed` is the decode surface beside a prompt chunk where that was measured, else None.
    """

    decode: NDArray[np.float64]
    mixed: NDArray[np.float64] | None
    prefill: PrefillCurves
    verify_row_fraction: float


def linear_part(sources: Sources, engine: Engine) -> Curve:
    """All per-token operators of all layers by tokens in the batch, without the held-out token counts."""
    if engine.gpu in LLMSERVINGSIM:
        profile = profiles.read_llmservingsim_dense(sources.llmservingsim(engine.gpu, "dense.csv"))
        return compose.with_steps(compose.linear_curve(fitted_dense(profile), engine.model.layers))
    if engine.model.name in VIDUR_LAYER:
        family = engine.gpu.split("_")[0]
        path = sources.path(f"vidur/compute/{family}/{VIDUR_LAYER[engine.model.name]}/mlp.csv")
        profile = profiles.read_vidur_dense(path)
        return compose.with_steps(compose.linear_curve(fitted_dense(profile), engine.model.layers))
    return interpolated_linear_part(sources, engine)


def fitted_dense(profile: profiles.DenseProfile) -> profiles.DenseProfile:
    """The profile without its held-out token counts."""
    keep = ~holdout.heldout_tokens(profile.tokens)
    return profiles.DenseProfile(profile.tokens[keep], profile.layer_s[keep], profile.once_s[keep])


def interpolated_linear_part(sources: Sources, engine: Engine) -> Curve:
    """Per-token operators by interpolating GEMM tables: GEMMs, element-wise operators, all-reduce.

    Element-wise operators are Vidur's internlm-20b ones at the same tensor-parallel degree, scaled with the width they
    touch.
    """
    model, tensor_parallel = engine.model, engine.tensor_parallel
    table = profiles.read_gemm(sources.aiconfigurator(engine.gpu, "gemm"))
    tokens = next(iter(table.values()))[0]
    layer = compose.layer_gemm_time(table, tokens, model, tensor_parallel)
    path = sources.path(f"vidur/compute/{engine.gpu.split('_')[0]}/internlm-20b/mlp.csv")
    nodes, small, once = profiles.read_vidur_elementwise(path, tensor_parallel)
    width = model.hidden / model_shape("vicuna_13b").hidden
    profile = profiles.DenseProfile(
        tokens, layer + np.interp(tokens, nodes, small) * width, np.interp(tokens, nodes, once) * width
    )
    all_reduce = None
    if tensor_parallel > 1:
        message, seconds = profiles.read_all_reduce(sources.aiconfigurator(engine.gpu, "allreduce"), tensor_parallel)
        all_reduce = Curve(message, seconds)
    return compose.with_steps(compose.linear_curve(profile, model.layers, all_reduce, model.hidden))


def attention_part(sources: Sources, engine: Engine) -> Attention:
    """Attention of one layer on one GPU of the engine."""
    if engine.gpu in LLMSERVINGSIM:
        return attention_llmservingsim(sources, engine)
    if engine.gpu == "a100_80gb":
        return attention_a100(sources, engine)
    return attention_h100(sources, engine)


def attention_a100(sources: Sources, engine: Engine) -> Attention:
    """Attention from Frontier's A800 Llama-2-7b profile: A100 silicon with a slower NVLink, unused by attention.

    Other head counts: decode by (request, head) pairs, prefill by aiconfigurator's measured ratio of head counts, which
    also carries chunks past 4,096 tokens.
    """
    profile = profiles.read_vidur_attention(sources.path("frontier/a800/Llama-2-7b-hf/attention.csv"))
    decode = profile.where(profile.chunk == 0)
    prefill = profile.where(profile.chunk > 0)
    nodes = REQUESTS[decode.requests.max() >= REQUESTS]
    surface = compose.decode_surface(decode.where(~holdout.heldout_decode(decode)), nodes, KV_TOKENS)
    one_row = Curve(KV_TOKENS.astype(np.float64), surface[0])
    fitted = prefill.where(~holdout.heldout_prefill(prefill))
    curves = compose.prefill_curves(fitted, one_row, CHUNKS)
    path = sources.aiconfigurator(engine.gpu, "context_attention")
    base = prefill_by_heads(path, 32.0)
    curves = PrefillCurves(compose.extend_fresh(curves.fresh, base, LONG_CHUNKS), curves.extra, curves.context)
    heads = engine.model.heads / engine.tensor_parallel
    if heads != 32:
        curves = compose.scale_prefill(curves, Curve(base.nodes, prefill_by_heads(path, heads).seconds / base.seconds))
    fraction = compose.verify_row_fraction(fitted, one_row)
    return Attention(compose.scale_heads(surface, nodes, REQUESTS, heads / 32), None, curves, fraction)


def attention_h100(sources: Sources, engine: Engine) -> Attention:
    """Attention from aiconfigurator: decode of 8 heads by (request, head) pairs, prefill of chunks with nothing cached.

    The cost of cached tokens in a chunk was not measured; it follows from the area of causal attention. The cost of a
    verified row is that of the A100.
    """
    profile = profiles.read_decode_attention(sources.aiconfigurator(engine.gpu, "generation_attention"), 8, 8)
    heads = engine.model.heads / engine.tensor_parallel
    nodes = np.unique(profile.requests)
    surface = compose.scale_heads(compose.complete_surface(profile, nodes, KV_TOKENS), nodes, REQUESTS, heads / 8)
    one_row = Curve(KV_TOKENS.astype(np.float64), surface[0])
    fresh = prefill_by_heads(sources.aiconfigurator(engine.gpu, "context_attention"), heads)
    a100 = attention_a100(sources, Engine(model_shape("vicuna_7b"), None, "a100_80gb"))
    return Attention(surface, None, compose.area_prefill(fresh, one_row), a100.verify_row_fraction)


def attention_llmservingsim(sources: Sources, engine: Engine) -> Attention:
    """Attention from LLMServingSim's mixed-batch grid: pure decode, pure prefill, and decode beside the shortest chunk.

    vLLM runs a mixed batch in one kernel, in which decoding rows lose the packing of query heads and the split over
    cached tokens. So decode beside a chunk has its own surface: rows with the shortest chunk on nothing cached, minus
    that chunk. Prefill plus this surface predicts all other mixed rows.
    """
    profile = profiles.read_llmservingsim_attention(sources.llmservingsim(engine.gpu, "attention.csv"))
    decode = profile.where(profile.chunk == 0)
    surface = _on_grid(decode)
    one_row = Curve(KV_TOKENS.astype(np.float64), surface[0])
    prefill = profile.where(profile.requests == 0)
    beside = profile.where((profile.chunk > 0) & (profile.requests > 0) & ~holdout.heldout_mixed(profile))
    chunk = prefill.where((prefill.chunk == prefill.chunk.min()) & (prefill.context == 0)).seconds[0]
    alone = profiles.AttentionProfile(
        beside.requests, beside.decode_kv, beside.chunk, beside.context, np.maximum(0.0, beside.seconds - chunk)
    )
    curves = compose.prefill_curves(prefill, one_row, np.unique(prefill.chunk))
    a100 = attention_a100(sources, Engine(model_shape("vicuna_7b"), None, "a100_80gb"))
    return Attention(surface, _on_grid(alone), curves, a100.verify_row_fraction)


def _on_grid(profile: profiles.AttentionProfile) -> NDArray[np.float64]:
    nodes = np.unique(profile.requests)
    return compose.scale_heads(compose.complete_surface(profile, nodes, KV_TOKENS), nodes, REQUESTS, 1.0)


def prefill_by_heads(path: Path, heads: float) -> Curve:
    """aiconfigurator's prefill attention of one layer by chunk; between two profiled head counts, interpolated."""
    known = (8, 12, 16, 24, 32, 40, 48, 64)
    low = max(h for h in known if h <= heads)
    high = min(h for h in known if h >= heads)
    below = profiles.read_prefill_attention(path, low, low)
    above = profiles.read_prefill_attention(path, high, high)
    weight = 0.0 if low == high else (heads - low) / (high - low)
    seconds = (1 - weight) * below.seconds + weight * np.interp(below.chunk, above.chunk, above.seconds)
    return Curve(below.chunk.astype(np.float64), seconds)


def sampler_part(sources: Sources, engine: Engine) -> Curve:
    """The sampler by rows: measured on the RTX cards, elsewhere the RTX PRO 6000's moved over."""
    measured_on = engine.gpu if engine.gpu in LLMSERVINGSIM else "rtxpro6000"
    rows, seconds = profiles.read_llmservingsim_rows(sources.llmservingsim(measured_on, "per_sequence.csv"), "sampler")
    vocabulary = engine.model.vocabulary / model_shape("llama3_8b").vocabulary
    bandwidth = gpu_spec(engine.gpu).bandwidth / gpu_spec(measured_on).bandwidth
    return compose.sampler_curve(rows, seconds, vocabulary, bandwidth)


def head_part(sources: Sources, engine: Engine, sampler: Curve) -> Curve:
    """LM head and sampler by sampled rows."""
    if engine.gpu in LLMSERVINGSIM:
        path = sources.llmservingsim(engine.gpu, "per_sequence.csv")
        rows, seconds = profiles.read_llmservingsim_rows(path, "lm_head")
        keep = np.isin(rows, HEAD_ROWS)
        sampled = np.interp(rows[keep], sampler.nodes, sampler.seconds)
        return Curve(rows[keep].astype(np.float64), seconds[keep] + sampled)
    table = profiles.read_gemm(sources.aiconfigurator(engine.gpu, "gemm"))
    return compose.head_curve(table, engine.model, engine.tensor_parallel, sampler, HEAD_ROWS)
