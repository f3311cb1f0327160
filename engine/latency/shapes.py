"""Shapes of the served models and data of the GPUs, which determine weight bytes, KV bytes and attention work.

Model shapes are the published Hugging Face configurations; GPU figures are the vendors' data sheets (dense BF16).
"""

from dataclasses import dataclass

BYTES_PER_VALUE = 2
"""FP16 / BF16 weights and KV cache."""


@dataclass(frozen=True)
class ModelShape:
    """A decoder-only transformer with gated MLP, as far as iteration time and memory depend on it."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    source: str

    @property
    def head_size(self) -> int:
        """Width of one attention head."""
        return self.hidden // self.heads

    @property
    def layer_parameters(self) -> int:
        """Parameters of one layer: Q, K, V, O, gate, up, down and two norms."""
        attention = self.hidden * self.head_size * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate + 2 * self.hidden

    @property
    def weight_bytes(self) -> int:
        """Bytes of all weights: layers, embedding, separate LM head and the final norm."""
        outside = 2 * self.vocabulary * self.hidden + self.hidden
        return BYTES_PER_VALUE * (self.layers * self.layer_parameters + outside)

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of keys and values that one cached token occupies over all layers."""
        return 2 * BYTES_PER_VALUE * self.layers * self.kv_heads * self.head_size


@dataclass(frozen=True)
class GpuSpec:
    """One GPU: memory in bytes, peak bandwidth in bytes/s, peak dense 16-bit throughput in flop/s.

    Memory is what CUDA reports as total, a little under the nominal size.
    """

    name: str
    memory_bytes: int
    bandwidth: float
    peak_flops: float
    source: str


MODELS: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape("vicuna_7b", 32, 4096, 32, 32, 11008, 32000, "lmsys/vicuna-7b-v1.3 config.json"),
        ModelShape("vicuna_13b", 40, 5120, 40, 40, 13824, 32000, "lmsys/vicuna-13b-v1.3 config.json"),
        ModelShape("vicuna_33b", 60, 6656, 52, 52, 17920, 32000, "lmsys/vicuna-33b-v1.3 config.json"),
        ModelShape("llama3_8b", 32, 4096, 32, 8, 14336, 128256, "meta-llama/Llama-3.1-8B config.json"),
        ModelShape("llama_68m", 2, 768, 12, 12, 3072, 32000, "JackFram/llama-68m config.json (SpecInfer)"),
        ModelShape("llama_160m", 12, 768, 12, 12, 3072, 32000, "JackFram/llama-160m config.json (SpecInfer)"),
    )
}

GPUS: dict[str, GpuSpec] = {
    gpu.name: gpu
    for gpu in (
        GpuSpec("a100_80gb", 85_100_000_000, 2.039e12, 312e12, "NVIDIA A100-SXM4-80GB data sheet"),
        GpuSpec("h100_80gb", 85_000_000_000, 3.35e12, 989e12, "NVIDIA H100-SXM5-80GB data sheet"),
        GpuSpec("rtx4090", 25_250_627_584, 1.008e12, 165e12, "NVIDIA Ada whitepaper, FP32 accumulate"),
        GpuSpec(
            "rtxpro6000", 101_970_000_000, 1.597e12, 503e12, "NVIDIA RTX PRO 6000 Blackwell Server Edition data sheet"
        ),
    )
}


def model_shape(name: str) -> ModelShape:
    """The shape called `name`; ValueError lists the known ones."""
    if name not in MODELS:
        raise ValueError(f"unknown model shape {name!r}; known shapes: {', '.join(sorted(MODELS))}")
    return MODELS[name]


def gpu_spec(name: str) -> GpuSpec:
    """The GPU called `name`; ValueError lists the known ones."""
    if name not in GPUS:
        raise ValueError(f"unknown GPU {name!r}; known GPUs: {', '.join(sorted(GPUS))}")
    return GPUS[name]
