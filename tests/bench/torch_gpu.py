"""How near the torch engine comes to what a GPU can do: `python -m tests.bench.torch_gpu --engine torch_vicuna_7b`.

Prints tables and, with `--out`, writes them as JSON: the device's measured peaks, model bandwidth utilisation while one
request decodes, model FLOP utilisation of a prefill, what an iteration spends outside its forwards, decode and verify
iterations over a grid, waits of the host for the device, and ways to attend over the paged cache. docs/gpu.md says how
to read them. Needs torch, transformers, numpy, numba, scikit-learn and this package; on a CPU the same code runs as a
rehearsal whose figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import gc
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.backends.torch.build import build, device_of
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.files import write_whole
from tests.bench import measure
from tests.bench.gpu import device as devices
from tests.bench.gpu import iterations
from tests.bench.gpu.attention import WAYS, Compared, compare
from tests.bench.gpu.device import Peaks
from tests.bench.gpu.engines import but, configured
from tests.bench.gpu.iterations import Steps
from tests.bench.gpu.paged import Case, Heads, PagedBatch
from tests.bench.gpu.sizes import GPU, REHEARSED, Sizes
from tests.bench.gpu.work import Work

BANDWIDTH_GOAL, FLOP_GOAL, OUTSIDE_GOAL = 0.70, 0.50, 0.05
OUTSIDE_GOAL_DECODES = 32

REHEARSAL = "A rehearsal on a CPU: the same code ran, and no figure here says anything about a GPU."


class Bench:
    """The measurements of one engine, in `results` as they are made.

    Args:
        config: the engine; its context is lengthened where the measurements need it, its cache stays as it is.
        sizes: how much is measured.
        peak_bandwidth: bytes/s that the device's data sheet names; None: not compared with.
        peak_flop: FLOP/s likewise.
        ways: to attend that are compared.
        out: written after every part, so that a run that is cut short leaves what it has; None: nowhere.
    """

    def __init__(
        self,
        config: TorchEngineConfig,
        sizes: Sizes,
        *,
        peak_bandwidth: float | None = None,
        peak_flop: float | None = None,
        ways: list[str] | None = None,
        out: Path | None = None,
    ) -> None:
        self.config, self.sizes, self.device = config, sizes, device_of(config)
        self._sheet = {"bandwidth": peak_bandwidth, "flop": peak_flop}
        self._ways, self._out = list(WAYS) if ways is None else ways, out
        self._measured: Peaks | None = None
        self._engine: TorchEngine | None = None
        self._shape: tuple[Heads, torch.dtype] | None = None
        self.results: dict[str, Any] = {
            "note": "" if self.device.type == "cuda" else REHEARSAL,
            "engine": config.model_dump(mode="json"),
            "machine": devices.about(self.device),
            "sizes": asdict(sizes),
            "datasheet": {"bandwidth_bytes_per_s": peak_bandwidth, "flop_per_s": peak_flop},
            "took_s": {},
        }

    def run(self, parts: list[str]) -> dict[str, Any]:
        """Measure these parts, in the order of `PARTS`; returns `results`."""
        if self.results["note"]:
            print(self.results["note"])
        if set(parts) != {"peaks"}:
            print(f"{self.config.name} runs the way of {type(self.engine.model.fused).__name__}")
        for part, do in PARTS.items():
            if part in parts:
                begin = time.perf_counter()
                self.results[part] = do(self)
                self.results["took_s"][part] = round(time.perf_counter() - begin, 1)
                if self._out is not None:
                    write_whole(self._out, (json.dumps(self.results, indent=1) + "\n").encode())
        return self.results

    @property
    def engine(self) -> TorchEngine:
        """The engine, built when it is first needed."""
        if self._engine is None:
            sizes, limits = self.sizes, self.config.limits
            most = iterations.most_tokens(
                (*sizes.kv_tokens, sizes.grid_kv_tokens),
                (*sizes.candidates, *sizes.outside_candidates),
                sizes.prompt_tokens,
                sizes.steps,
            )
            longer = but(self.config, max_model_len=max(limits.max_model_len, most), num_kv_blocks=limits.total_blocks)
            begin = time.perf_counter()
            self._engine = build(longer, ttft_target=60.0)
            self._engine.prepare()
            self.results["took_s"]["build"] = round(time.perf_counter() - begin, 1)
            self.results["memory"] = asdict(self._engine.memory())
            self.results["way"] = type(self._engine.model.fused).__name__
            self._shape = _heads(self._engine), self._engine.model.dtype
        return self._engine

    @property
    def shape(self) -> tuple[Heads, torch.dtype]:
        """How a layer of the target attends, and the type of its cache."""
        if self._shape is None:
            self.engine  # noqa: B018 - building it is what tells
        assert self._shape is not None
        return self._shape

    def release(self) -> None:
        """Let go of the engine: its memory is wanted for other caches."""
        self._engine = None
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def work(self) -> Work:
        """What the target costs."""
        return Work.of(self.engine.model.model, self.engine.memory().kv_bytes_per_token)

    @property
    def peaks(self) -> Peaks:
        """The device's, measured when they are first needed."""
        if self._measured is None:
            dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
            with torch.inference_mode():
                self._measured = devices.measured_peaks(
                    self.device, self.sizes.copy_bytes, self.sizes.matmul_size, dtype
                )
        return self._measured

    def measured_peaks(self) -> dict[str, Any]:
        """A copy's bandwidth and a large product's FLOP/s."""
        measure.title("Measured peaks, random data")
        print(f"  copy, bytes read and written{self.peaks.copy_bytes_per_s / 1e9:>14,.1f} GB/s")
        print(f"  matmul, {self.peaks.matmul_dtype:<20}{self.peaks.matmul_flop_per_s / 1e12:>14,.3f} TFLOP/s")
        return asdict(self.peaks)

    def bandwidth(self) -> list[dict[str, Any]]:
        """Model bandwidth utilisation while one request decodes without candidates."""
        measure.title(f"Model bandwidth utilisation, B = 1, c = 0 (goal: at least {BANDWIDTH_GOAL:.0%} of the peak)")
        headings = (("iteration", 13), ("forward", 13), ("bytes read", 13), ("of the peak", 24), ("forward", 24))
        print(f"  {'cached tokens':>14}" + "".join(f"{name:>{width}}" for name, width in headings))
        rows = []
        for kv_tokens in self.sizes.kv_tokens:
            steps = self._decoding(1, kv_tokens, 0)
            if steps is None:
                continue
            read = self.work.bytes_read(1, steps.kv_tokens)
            whole, forward = (
                self._shares("bandwidth", read, steps.wall_s),
                self._shares("bandwidth", read, steps.forward_s),
            )
            rows.append(asdict(steps) | {"bytes_read": read, "utilisation": whole, "forward_utilisation": forward})
            print(
                f"  {steps.kv_tokens:>14,.0f}{1e3 * steps.wall_s:>10.3f} ms{1e3 * steps.forward_s:>10.3f} ms"
                f"{read / 1e9:>10.3f} GB{_shown(whole):>24}{_shown(forward):>24}"
            )
        return rows

    def prefill(self) -> dict[str, Any]:
        """Model FLOP utilisation of one prompt's prefill."""
        tokens = self.sizes.prompt_tokens
        found = iterations.prefill(self.engine, tokens, self.sizes.prefills, np.random.default_rng(1))
        flop = self.work.prefill_flop(tokens)
        whole, forward = self._shares("flop", flop, found.wall_s), self._shares("flop", flop, found.forward_s)
        measure.title(
            f"Model FLOP utilisation, one prompt of {tokens} tokens (goal: at least {FLOP_GOAL:.0%} of the peak)"
        )
        print(f"  iteration {1e3 * found.wall_s:.2f} ms, {flop / 1e12:.3f} TFLOP: {_shown(whole)}")
        print(f"  forward   {1e3 * found.forward_s:.2f} ms: {_shown(forward)}")
        return asdict(found) | {"flop": flop, "utilisation": whole, "forward_utilisation": forward}

    def outside(self) -> list[dict[str, Any]]:
        """What share of an iteration is spent outside the drafter and the target's forward."""
        measure.title(f"Outside the forwards (goal: at most {OUTSIDE_GOAL:.0%} at B = {OUTSIDE_GOAL_DECODES})")
        print(f"  {'B':>4}{'c':>4}{'iteration':>13}{'drafter':>13}{'forward':>13}{'outside':>10}")
        rows = []
        for candidates, decodes in self._pairs(self.sizes.outside_candidates, self.sizes.outside_decodes):
            steps = self._decoding(decodes, self.sizes.grid_kv_tokens, candidates)
            if steps is not None:
                rows.append(asdict(steps))
                print(
                    f"  {decodes:>4}{candidates:>4}{1e3 * steps.wall_s:>10.3f} ms{1e3 * steps.draft_s:>10.3f} ms"
                    f"{1e3 * steps.forward_s:>10.3f} ms{100 * steps.outside:>8.1f} %"
                )
        return rows

    def grid(self) -> list[dict[str, Any]]:
        """Decode and verify iterations at every B and c."""
        measure.title(f"Iterations, {self.sizes.grid_kv_tokens} tokens cached by each request")
        print(f"  {'B':>4}{'c':>4}{'iteration':>13}{'tokens/iteration':>19}{'tokens/s':>12}")
        rows = []
        for candidates, decodes in self._pairs(self.sizes.candidates, self.sizes.decodes):
            steps = self._decoding(decodes, self.sizes.grid_kv_tokens, candidates)
            if steps is not None:
                rows.append(asdict(steps))
                print(
                    f"  {decodes:>4}{candidates:>4}{1e3 * steps.wall_s:>10.3f} ms{steps.tokens_per_iteration:>19.2f}"
                    f"{steps.tokens_per_s:>12,.0f}"
                )
        return rows

    def syncs(self) -> list[dict[str, Any]]:
        """How often the host waits for the device in one iteration."""
        measure.title("Waits of the host for the device in one iteration (goal: at most 1)")
        rows = []
        for candidates, decodes in self._pairs(self.sizes.outside_candidates, self.sizes.outside_decodes):
            batch = (decodes, self.sizes.grid_kv_tokens, candidates, self.sizes.steps)
            if not iterations.fits(self.engine, *batch):
                continue
            counts = iterations.syncs(self.engine, *batch, np.random.default_rng(3))
            rows.append({"decodes": decodes, "candidates": candidates, "counts": counts})
            shown = "cannot be told without CUDA" if counts is None else f"{min(counts)} to {max(counts)}"
            print(f"  B = {decodes:<4} c = {candidates:<4} {shown}")
        return rows

    def attention(self) -> list[dict[str, Any]]:
        """Ways to attend over the same cache: decode, verify, trees, prefill."""
        heads, dtype = self.shape
        self.release()
        title = f"Attention of one layer, {heads.heads} heads of {heads.width}, {str(dtype).removeprefix('torch.')}"
        measure.title(f"{title}: calls launched, replayed from a graph, KV read, error against float64")
        found: list[Compared] = []
        for block_size in self.sizes.block_sizes:
            for case in self._cases():
                layers = max(1, -(-self.sizes.spread_bytes // _kv_bytes(case, heads, dtype)))
                batch = PagedBatch(case, heads, block_size, layers, dtype, self.device)
                for one in compare(batch, self._ways, self.sizes.repeats):
                    found.append(one)
                    print(_attended(one))
                del batch
                self.release()
        return [asdict(one) for one in found]

    def _cases(self) -> Iterator[Case]:
        sizes = self.sizes
        tree = sizes.verify_rows
        for decodes in sizes.attention_decodes:
            for kv_tokens in sizes.attention_kv_tokens:
                yield Case("decode", decodes, kv_tokens, 1)
            middle = sizes.attention_kv_tokens[len(sizes.attention_kv_tokens) // 2]
            yield Case(f"verify {sizes.verify_rows} rows", decodes, middle, sizes.verify_rows)
            yield Case(f"verify a tree of {tree}", decodes, middle, tree, sizes.tree_branching)
        yield Case(f"prefill {sizes.prompt_tokens}", 1, 0, sizes.prompt_tokens)

    def _pairs(self, candidates: tuple[int, ...], decodes: tuple[int, ...]) -> Iterator[tuple[int, int]]:
        for c in candidates:
            if c > self.engine.max_candidates:
                print(f"  c = {c} is left out: this engine's drafter proposes at most {self.engine.max_candidates}")
                continue
            for b in decodes:
                yield c, b

    def _decoding(self, decodes: int, kv_tokens: int, candidates: int) -> Steps | None:
        batch = (decodes, kv_tokens, candidates, self.sizes.steps)
        if not iterations.fits(self.engine, *batch):
            print(
                f"  B = {decodes}, c = {candidates}, {kv_tokens} cached: left out, more than the engine's cache holds"
            )
            return None
        return iterations.decoding(self.engine, *batch, np.random.default_rng(2))

    def _shares(self, kind: str, amount: float, seconds: float) -> dict[str, float]:
        """An amount done in some seconds as a share of the measured and of the named peak."""
        peak = self.peaks.copy_bytes_per_s if kind == "bandwidth" else self.peaks.matmul_flop_per_s
        sheet = self._sheet[kind]
        found = {"of_measured": amount / seconds / peak}
        return found if sheet is None else found | {"of_datasheet": amount / seconds / sheet}


PARTS: dict[str, Callable[[Bench], Any]] = {
    "peaks": Bench.measured_peaks,
    "bandwidth": Bench.bandwidth,
    "prefill": Bench.prefill,
    "outside": Bench.outside,
    "grid": Bench.grid,
    "syncs": Bench.syncs,
    "attention": Bench.attention,
}
"""By name, in the order in which they are measured; attention last, because it lets go of the engine."""


def _heads(engine: TorchEngine) -> Heads:
    config, pool = engine.model.model.config.get_text_config(), engine.model.pool
    width = pool.keys[0].shape[1] // pool.block_size
    return Heads(config.num_attention_heads, pool.keys[0].shape[0] // pool.num_blocks, width)


def _kv_bytes(case: Case, heads: Heads, dtype: torch.dtype) -> int:
    return 2 * case.requests * (case.kv_tokens + case.rows) * heads.kv_heads * heads.width * dtype.itemsize


def _shown(shares: dict[str, float]) -> str:
    parts = [f"{shares['of_measured']:.1%}"]
    if "of_datasheet" in shares:
        parts.append(f"{shares['of_datasheet']:.1%} (sheet)")
    return ", ".join(parts)


def _attended(one: Compared) -> str:
    name = f"  {one.case:<38}{one.way:<16}{one.block_size:>4}"
    took = one.timed
    if took is None:
        return f"{name}  not tried: {one.reason}"
    graph = "not captured" if took.graph_s is None else f"{1e6 * took.graph_s:.1f} us"
    best = took.graph_s or took.launched_s
    return (
        f"{name}{1e6 * took.launched_s:>10.1f} us{graph:>14}{one.kv_bytes / best / 1e9:>9,.0f} GB/s{took.error:>10.1e}"
        f"  {one.setting}"
    )


def main(arguments: list[str] | None = None) -> None:
    """The command line. Exits with 2 and one message on what the user can fix."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.torch_gpu")
    parser.add_argument("--engine", default="torch_vicuna_7b", help="a configuration of conf/engine")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the engine")
    parser.add_argument("--only", nargs="+", choices=tuple(PARTS), default=list(PARTS), help="parts to measure")
    parser.add_argument("--attention", nargs="+", choices=tuple(WAYS), default=list(WAYS), help="ways to attend")
    parser.add_argument("--peak-bandwidth", type=float, metavar="TB/S", help="of the data sheet: 4.8 for an H200")
    parser.add_argument("--peak-flop", type=float, metavar="TFLOP/S", help="of the data sheet, dense: 989 for an H200")
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    try:
        config = configured(options.engine, *options.set, f"device={options.device}")
        on_gpu = device_of(config).type == "cuda"
    except ValueError as problem:
        parser.error(str(problem))
    torch.set_num_threads(config.threads)
    Bench(
        config,
        GPU if on_gpu else REHEARSED,
        peak_bandwidth=None if options.peak_bandwidth is None else 1e12 * options.peak_bandwidth,
        peak_flop=None if options.peak_flop is None else 1e12 * options.peak_flop,
        ways=options.attention,
        out=options.out,
    ).run(options.only)
    if options.out is not None:
        print(f"\nWritten to {options.out}")


if __name__ == "__main__":
    main()
