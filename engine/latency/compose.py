"""Compose an iteration-time table per model x GPU from measured operator times.

One iteration = per-token operators of all layers (GEMM staircase) + attention + LM head and sampler on the sampled rows
+ drafter + overheads. Each part is reduced here to a few nodes of a curve; `engine.latency.model` expands them.
Quantities that no profile measures are in `engine.latency.estimates`, each with its source.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import nnls

from engine.latency.estimates import Estimates
from engine.latency.profiles import AttentionProfile, DenseProfile
from engine.latency.shapes import BYTES_PER_VALUE, GpuSpec, ModelShape

GemmTable = dict[tuple[int, int], tuple[NDArray[np.int64], NDArray[np.float64]]]

STEP_RATIO = 1.04
"""A rise of more than 4 % between neighbouring measured token counts is a step, not a slope."""


@dataclass(frozen=True)
class Curve:
    """Values (seconds) at ascending nodes."""

    nodes: NDArray[np.float64]
    seconds: NDArray[np.float64]


def linear_curve(profile: DenseProfile, layers: int, all_reduce: Curve | None = None, hidden: int = 0) -> Curve:
    """Per-token operators of all layers and the embedding, by tokens in the batch.

    With tensor parallelism the profile is one GPU's share and `all_reduce` (seconds by message bytes) is added twice a
    layer, after O and after the down projection.
    """
    seconds = profile.layer_s * layers + profile.once_s
    if all_reduce is not None:
        message = profile.tokens * hidden * float(BYTES_PER_VALUE)
        seconds = seconds + 2 * layers * np.interp(message, all_reduce.nodes, all_reduce.seconds)
    return Curve(profile.tokens.astype(np.float64), seconds)


def hat_basis(x: NDArray, nodes: NDArray) -> NDArray[np.float64]:
    """Piecewise-linear basis at `nodes`, (len(x), len(nodes)); constant outside."""
    return np.stack([np.interp(x, nodes, row) for row in np.eye(len(nodes))], axis=1)


def with_steps(curve: Curve, tile: int = 128) -> Curve:
    """Add a node after every node where the time jumps, so that linear interpolation keeps the GEMM staircase.

    GEMM tiles end at multiples of 64 or 128 tokens. Where the time rises by more than `STEP_RATIO` between neighbouring
    nodes, the rise belongs right after a tile's end: after the lower node where the two share a tile, and at every
    multiple of `tile` between them where they do not.
    """
    nodes, seconds = [float(curve.nodes[0])], [float(curve.seconds[0])]
    for low, high, before, after in zip(
        curve.nodes[:-1], curve.nodes[1:], curve.seconds[:-1], curve.seconds[1:], strict=True
    ):
        if after > before * STEP_RATIO and high > low + 1:
            ends = np.arange(low // tile * tile + tile, high, tile)
            ends = ends[ends > low]
            starts = np.concatenate([[low], ends])
            levels = np.interp(np.concatenate([ends, [high]]), [low, high], [before, after])
            for start, end, level in zip(starts, np.concatenate([ends, [high]]), levels, strict=True):
                nodes += [float(start) + 1.0] if end == high else [float(start) + 1.0, float(end)]
                seconds += [float(level)] if end == high else [float(level), float(level)]
        nodes.append(float(high))
        seconds.append(float(after))
    return Curve(np.array(nodes), np.array(seconds))


def decode_surface(profile: AttentionProfile, requests: NDArray, kv_tokens: NDArray) -> NDArray[np.float64]:
    """Bilinear surface through scattered decode rows, least squares in relative error: (requests, kv_tokens).

    The nodes must be covered by the profile's rows, otherwise a node would be free; seconds of one layer.
    """
    by_requests = hat_basis(profile.requests.astype(np.float64), requests.astype(np.float64))
    by_kv = hat_basis(profile.decode_kv.astype(np.float64), kv_tokens.astype(np.float64))
    design = (by_requests[:, :, None] * by_kv[:, None, :]).reshape(len(profile.seconds), -1)
    design /= profile.seconds[:, None]
    solution, _ = nnls(design, np.ones(len(profile.seconds)), maxiter=20 * design.shape[1])
    return solution.reshape(len(requests), len(kv_tokens))


def scale_heads(surface: NDArray, nodes: NDArray, requests: NDArray, heads_ratio: float) -> NDArray[np.float64]:
    """The surface at `requests` for a model with `heads_ratio` times the profile's heads: (len(requests), kv).

    Decode attention treats each (request, head) pair on its own, so B requests with r times the heads take the time of
    r B requests. Past the last profiled batch the growth of the surface's upper half goes on.
    """
    half = len(nodes) // 2
    slope = (surface[-1] - surface[half]) / (nodes[-1] - nodes[half])
    wanted = requests * heads_ratio
    inside = np.stack([np.interp(wanted, nodes, column) for column in surface.T], axis=1)
    return inside + np.maximum(0.0, wanted - nodes[-1])[:, None] * slope


@dataclass(frozen=True)
class PrefillCurves:
    """Prefill attention of one layer by chunk.

    `fresh`: nothing cached. `extra`: time added when anything is cached (another kernel). `context`: time added per
    cached token.
    """

    fresh: Curve
    extra: Curve
    context: Curve


def prefill_curves(profile: AttentionProfile, one_row: Curve, chunk_nodes: NDArray) -> PrefillCurves:
    """Reduce prefill rows to curves over the chunk.

    Fresh chunks keep every measured node and the kernel's tile staircase. Rows with cached tokens are fitted in
    relative least squares by fresh(chunk) + extra(chunk) + slope(chunk) * context. extra and slope are linear between
    `chunk_nodes`, each of which must be near measured chunks. `one_row` is decode attention of one request by cached
    tokens: its slope is that of a chunk of one token.
    """
    fresh_rows = profile.where((profile.requests == 0) & (profile.context == 0))
    cached_rows = profile.where((profile.requests == 0) & (profile.context > 0))
    fresh = with_steps(Curve(fresh_rows.chunk.astype(np.float64), fresh_rows.seconds))
    chunk = cached_rows.chunk.astype(np.float64)
    nodes = chunk_nodes[chunk_nodes <= chunk.max()].astype(np.float64)
    basis = hat_basis(chunk, nodes)
    design = np.concatenate([basis, basis * cached_rows.context[:, None]], axis=1) / cached_rows.seconds[:, None]
    above_fresh = cached_rows.seconds - np.interp(chunk, fresh.nodes, fresh.seconds)
    solution, _ = nnls(design, above_fresh / cached_rows.seconds, maxiter=50 * design.shape[1])
    extra, slope = np.split(solution, 2)
    one_slope = float(one_row.seconds[-1] - one_row.seconds[0]) / float(one_row.nodes[-1] - one_row.nodes[0])
    nodes = np.concatenate([[1.0], nodes])
    return PrefillCurves(
        fresh,
        Curve(nodes, np.concatenate([[0.0], extra])),
        Curve(nodes, np.concatenate([[min(one_slope, slope[0])], slope])),
    )


def scale_prefill(curves: PrefillCurves, ratio: Curve) -> PrefillCurves:
    """Multiply every curve by a ratio that depends on the chunk (another head count's time over the profile's)."""

    def scaled(curve: Curve) -> Curve:
        return Curve(curve.nodes, curve.seconds * np.interp(curve.nodes, ratio.nodes, ratio.seconds))

    return PrefillCurves(scaled(curves.fresh), scaled(curves.extra), scaled(curves.context))


def extend_fresh(fresh: Curve, shape: Curve, chunks: NDArray) -> Curve:
    """Continue `fresh` past its last chunk with the growth of another kernel's curve, joined at that chunk."""
    last = fresh.nodes[-1]
    beyond = chunks[chunks > last].astype(np.float64)
    scale = fresh.seconds[-1] / np.interp(last, shape.nodes, shape.seconds)
    return Curve(
        np.concatenate([fresh.nodes, beyond]),
        np.concatenate([fresh.seconds, np.interp(beyond, shape.nodes, shape.seconds) * scale]),
    )


def gemm_time(table: GemmTable, m: NDArray, n: int, k: int) -> NDArray[np.float64]:
    """Seconds of an (m, k) x (k, n) product, interpolated between the profile's n and k: (len(m),).

    Time per multiply-add is interpolated linearly in log n and log k at each measured m, then the time over m: per
    multiply-add the surface is nearly flat, so a plain average of neighbours is close.
    """
    ns = np.array(sorted({key[0] for key in table}), dtype=np.float64)
    ks = np.array(sorted({key[1] for key in table}), dtype=np.float64)
    n_corners = _bracket(ns, n)
    k_corners = _bracket(ks, k)
    total = np.zeros(len(m))
    for n_node, n_weight in n_corners:
        for k_node, k_weight in k_corners:
            rows, seconds = table[(int(n_node), int(k_node))]
            total += n_weight * k_weight * np.interp(m, rows, seconds) * (n * k) / (n_node * k_node)
    return total


def layer_gemm_time(table: GemmTable, m: NDArray, model: ModelShape, tensor_parallel: int) -> NDArray[np.float64]:
    """QKV, O, gate-up and down of one layer on one GPU of the tensor-parallel group: (len(m),) seconds."""
    qkv = model.head_size * (model.heads + 2 * model.kv_heads) // tensor_parallel
    attention = model.head_size * model.heads // tensor_parallel
    wide = model.intermediate // tensor_parallel
    products = ((qkv, model.hidden), (model.hidden, attention), (2 * wide, model.hidden), (model.hidden, wide))
    return np.sum([gemm_time(table, m, n, k) for n, k in products], axis=0)


def _bracket(nodes: NDArray, value: float) -> list[tuple[float, float]]:
    if value <= nodes[0]:
        return [(float(nodes[0]), 1.0)]
    if value >= nodes[-1]:
        return [(float(nodes[-1]), 1.0)]
    high = int(np.searchsorted(nodes, value))
    if nodes[high] == value:
        return [(float(value), 1.0)]
    low = high - 1
    weight = float(np.log(value / nodes[low]) / np.log(nodes[high] / nodes[low]))
    return [(float(nodes[low]), 1.0 - weight), (float(nodes[high]), weight)]


def head_curve(table: GemmTable, model: ModelShape, tensor_parallel: int, sampler: Curve, rows: NDArray) -> Curve:
    """LM head on sampled rows (interpolated GEMM, vocabulary split over the GPUs) plus the sampler."""
    product = gemm_time(table, rows, model.vocabulary // tensor_parallel, model.hidden)
    return Curve(rows.astype(np.float64), product + np.interp(rows, sampler.nodes, sampler.seconds))


def sampler_curve(rows: NDArray, seconds: NDArray, vocabulary_ratio: float, bandwidth_ratio: float) -> Curve:
    """A measured sampler moved to another vocabulary and GPU.

    One row's time is launch overhead and stays. Further rows add logits read and written, which scales with vocabulary
    and bandwidth.
    """
    launches = float(seconds[0])
    added = np.maximum(0.0, np.maximum.accumulate(seconds) - launches) * vocabulary_ratio / bandwidth_ratio
    return Curve(rows.astype(np.float64), launches + added)


@dataclass(frozen=True)
class DrafterTimes:
    """Drafter times: a step by requests, per cached token and step, and the prompt pass."""

    step: Curve
    kv_token_s: float
    prefill_s: float
    prefill_token_s: float


def drafter_times(
    drafter: ModelShape | None, gpu: GpuSpec, sampler: Curve, requests: NDArray, e: Estimates
) -> DrafterTimes:
    """The drafter's own roofline against its launches.

    step(B) = max(launch, max(weight bytes / bandwidth, flops / throughput) + kernels + sampler(B)). The embedding table
    is looked up, not read, so it is not among the bytes. Without a drafter model candidates come from matching the
    prompt (n-gram lookup): no weights, no cache, one launch-sized cost a step on the CPU divided by ten.
    """
    nodes = requests.astype(np.float64)
    if drafter is None:
        return DrafterTimes(Curve(nodes, np.full(len(nodes), e.draft_launch_s / 10.0)), 0.0, 0.0, 0.0)
    bandwidth = gpu.bandwidth * e.bandwidth_efficiency
    throughput = gpu.peak_flops * e.flops_efficiency
    read_bytes = drafter.weight_bytes - BYTES_PER_VALUE * drafter.vocabulary * drafter.hidden
    kernels = (drafter.layers * e.draft_kernels_per_layer + 3) * e.draft_kernel_s
    # Two flops a 16-bit weight a row: as many flops a row as bytes.
    products = np.maximum(read_bytes / bandwidth, nodes * read_bytes / throughput)
    step = np.maximum(e.draft_launch_s, products + kernels + np.interp(nodes, sampler.nodes, sampler.seconds))
    return DrafterTimes(
        Curve(nodes, step),
        drafter.kv_bytes_per_token / bandwidth,
        max(kernels, e.draft_launch_s),
        2.0 * drafter.layers * drafter.layer_parameters / throughput,
    )


def verify_row_fraction(prefill: AttentionProfile, one_row: Curve) -> float:
    """Extra decode attention per additional query row of a request, as a share of one row's time.

    A verified request is a short chunk on a cached context. The profile's shortest chunk against one decoded row at the
    same context, spread over the rows between them; the median over contexts.
    """
    rows = prefill.where((prefill.requests == 0) & (prefill.context >= 256))
    shortest = int(rows.chunk.min())
    rows = rows.where(rows.chunk == shortest)
    ratio = rows.seconds / np.interp(rows.context, one_row.nodes, one_row.seconds)
    return max(0.0, float(np.median(ratio)) - 1.0) / (shortest - 1)


def area_prefill(fresh: Curve, one_row: Curve) -> PrefillCurves:
    """Prefill curves where only chunks with nothing cached were measured.

    Causal attention over 2c tokens is two triangles of c and one square of c x c. The square is the attention of a
    chunk of c over c cached tokens, so it takes t(2c) - 2 t(c) plus one launch. A chunk's slope is at least that of one
    decoded row.
    """
    nodes = fresh.nodes[(fresh.nodes >= 128) & (2 * fresh.nodes <= fresh.nodes[-1])]
    at = np.interp(nodes, fresh.nodes, fresh.seconds)
    twice = np.interp(2 * nodes, fresh.nodes, fresh.seconds)
    one_slope = float(one_row.seconds[-1] - one_row.seconds[0]) / float(one_row.nodes[-1] - one_row.nodes[0])
    slope = np.maximum.accumulate(np.maximum((twice - 2 * at + fresh.seconds[0]) / nodes, one_slope))
    nodes = np.concatenate([[1.0], nodes])
    return PrefillCurves(fresh, Curve(nodes, np.zeros(len(nodes))), Curve(nodes, np.concatenate([[one_slope], slope])))


def complete_surface(profile: AttentionProfile, requests: NDArray, kv_tokens: NDArray) -> NDArray[np.float64]:
    """Measured decode times on a full grid: (requests, kv_tokens); gaps continue the row's last slope.

    Raises:
        ValueError: a row with fewer than two measured contexts.
    """
    surface = np.empty((len(requests), len(kv_tokens)))
    for i, count in enumerate(requests):
        mask = profile.requests == count
        kv, seconds = profile.decode_kv[mask].astype(np.float64), profile.seconds[mask]
        if len(kv) < 2:
            raise ValueError(f"decode attention at {count} requests has fewer than two contexts")
        slope = max(0.0, (seconds[-1] - seconds[-2]) / (kv[-1] - kv[-2]))
        inside = np.interp(kv_tokens, kv, seconds)
        surface[i] = inside + np.maximum(0.0, kv_tokens - kv[-1]) * slope
    return surface
