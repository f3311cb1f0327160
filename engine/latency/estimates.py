"""Quantities that no operator profile measures, each with the source of its value.

They end up in a table file's `overhead`, `attention` and `memory` sections and can be replaced when a model is loaded
(`LatencyModel.load(name, fixed_s=...)`).
"""

from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Estimates:
    """Overheads and efficiencies; seconds, bytes and shares.

    fixed_s, per_request_s: GPU idle time once per iteration, and once per request in the batch. From LLMServingSim's
        real vLLM 0.19 run of Llama-3.1-8B on an RTX PRO 6000: measured decode iterations minus the composed operator
        times are 0.7 ms plus 4 us a request (`engine.latency.validate` prints the comparison).
    draft_launch_s: CPU time of one drafter step (metadata, launches, sampling); the step takes this or its GPU time,
        whichever is longer. vLLM V1 with an EAGLE head at concurrency 1 takes 1.35-1.45 ms more an iteration
        for every draft token, nearly the same under 0.6B and under 8B targets, whose heads differ fourfold in bytes
        (speculators sweep): the step is bound by launches, not by its weights.
    speculation_s: rejection sampling, bonus token and bookkeeping of an iteration with c > 0. The sweep has no k = 0,
        so this is not measured; half a millisecond is a few dozen small launches.
    idle_drafter_s, idle_drafter_request_s: paid at c = 0 with a drafter loaded, because the drafter's KV cache
        has to follow the target's tokens. A backend that skips the drafter's forward pays a few launches: the default.
        vLLM users report 20-30 % of an iteration lost in worse backends; raise it to study those.
    draft_kernel_s, draft_kernels_per_layer: GPU time of a small kernel that moves almost nothing, and kernels of one
        drafter layer (norms, QKV, rotary, cache write, attention, O, gate-up, activation, down).
    bandwidth_efficiency: share of peak bandwidth that skinny GEMMs and KV reads reach (A100 7B layers: 0.72-0.80).
    flops_efficiency: share of peak throughput that a 768 wide model's prompt pass reaches.
    activation_reserve_bytes: activations and workspace of one GPU beside weights and KV cache. vLLM's 41,408 KV tokens
        for Llama-3.1-8B on an RTX 4090 (0.9 of 25.25e9 bytes, weights 16.06e9) leave 1.24e9.
    """

    fixed_s: float = 7e-4
    per_request_s: float = 4e-6
    draft_launch_s: float = 1.35e-3
    speculation_s: float = 5e-4
    idle_drafter_s: float = 1.5e-4
    idle_drafter_request_s: float = 1e-6
    draft_kernel_s: float = 3e-6
    draft_kernels_per_layer: int = 10
    bandwidth_efficiency: float = 0.75
    flops_efficiency: float = 0.25
    activation_reserve_bytes: int = 1_240_000_000

    def provenance(self) -> dict[str, float]:
        """Name -> value, for the table file."""
        return asdict(self)
