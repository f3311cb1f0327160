"""Fabricated run folders in the exact format that evaluations leave, for tests of the report.

`write_run` writes given per-request numbers; `write_sweep` makes up plausible ones from a small queueing formula. None
of these numbers were measured or simulated.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

FloatArray = NDArray[np.float64]
TTFT_TARGET_S = 1.0
TPOT_TARGET_S = 0.05


def write_run(
    folder: Path,
    *,
    arrival_s: FloatArray,
    tpot_s: FloatArray,
    ttft_s: FloatArray,
    label: str,
    engine: str = "vicuna_7b_a100",
    scenario: str = "azure2023_conv x0.5",
    seed: int = 0,
    digest: str | None = None,
    ttft_target_s: float = TTFT_TARGET_S,
    output_tokens: int = 101,
    identity: Mapping[str, Any] | None = None,
    figures: Mapping[str, float] | None = None,
) -> Path:
    """Writes one run folder and returns it. `label` says what ran: `fixed c=3 n=512`, `analytic`, `sarathi 512`, ...

    `identity` adds to the summary's `run` section, `figures` to the summary.
    """
    controller = label.split()[0]
    setting = dict(part.split("=") for part in label.split()[1:] if "=" in part)
    total = next((int(part) for part in label.split()[1:] if part.isdigit()), None)
    candidates = int(setting["c"]) if "c" in setting else 0 if controller == "sarathi" else None
    finish = arrival_s + ttft_s + np.nan_to_num(tpot_s) * (output_tokens - 1)
    count = len(arrival_s)
    folder.mkdir(parents=True)
    columns: dict[str, Any] = {
        "request": np.arange(count),
        "arrival_s": arrival_s,
        "prompt_tokens": np.full(count, 100, np.int32),
        "output_tokens": np.where(np.isnan(tpot_s), 1, output_tokens).astype(np.int32),
        "finish_s": finish,
        "ttft_s": ttft_s,
        "tpot_s": tpot_s,
        "e2e_s": finish - arrival_s,
    }
    pq.write_table(pa.table(columns), folder / "requests.parquet")
    (folder / "config.yaml").write_text(f"controller: {label}\nseed: {seed}\n")
    duration = float(finish.max())
    attained = ttft_s <= ttft_target_s
    good = attained & ~(tpot_s > TPOT_TARGET_S)
    summary: dict[str, Any] = {
        **_percentiles("tpot", tpot_s[~np.isnan(tpot_s)]),
        **_percentiles("ttft", ttft_s),
        "ttft_attainment": float(attained.mean()),
        "tpot_attainment": float((~(tpot_s > TPOT_TARGET_S)).mean()),
        "slo_attainment": float(good.mean()),
        "objective": float(
            np.nansum(tpot_s / TPOT_TARGET_S + 2.0 * ~attained + np.maximum(ttft_s / ttft_target_s - 1.0, 0.0)) / count
        ),
        "goodput_rps": float(good.sum()) / duration,
        "token_goodput_tps": count * output_tokens / duration,
        "requests_finished": count,
        "requests_total": count,
        "duration_s": duration,
        "run": {
            "engine": engine,
            "workload": "trace",
            "scenario": scenario,
            "workload_digest": digest or hashlib.sha256(arrival_s.tobytes() + bytes([seed])).hexdigest(),
            "controller": controller,
            "label": label,
            "static": controller in ("fixed", "sarathi"),
            "candidates": candidates,
            "token_budget": int(setting["n"]) if "n" in setting else None,
            "total_budget": total,
            "seed": seed,
            "request_rate_rps": count / float(arrival_s.max()) if arrival_s.max() > 0 else float(count),
            "rate_scale": None,
            "ttft_target_s": ttft_target_s,
            "tpot_target_s": TPOT_TARGET_S,
            **(identity or {}),
        },
        **(figures or {}),
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


def write_constant(
    folder: Path, label: str, tpot_s: float, attainment: float = 1.0, count: int = 100, **more: Any
) -> Path:
    """A run whose requests all have one TPOT, and of which the given share attains its TTFT."""
    arrival = np.arange(1, count + 1, dtype=float)
    ttft = np.where(np.arange(count) < round(attainment * count), 0.5, 2.0)
    return write_run(folder, arrival_s=arrival, tpot_s=np.full(count, tpot_s), ttft_s=ttft, label=label, **more)


def write_sweep(
    root: Path,
    *,
    engines: Sequence[str] = ("vicuna_7b_a100",),
    families: Sequence[str] = ("azure2023_conv",),
    scales: Sequence[float] = (0.25, 0.5, 1.0),
    candidates: Sequence[int] = (0, 1, 3, 5),
    budgets: Sequence[int] = (128, 512, 2048),
    seeds: Sequence[int] = (0, 1, 2),
    duration_s: float = 600.0,
    full_rate_rps: float = 12.0,
) -> None:
    """A grid of runs: every fixed (c, n), Sarathi, `poster` and `analytic`, on the same requests of every scenario."""
    grid = [(c, n) for c in candidates for n in budgets]
    for size, engine in enumerate(engines):
        for kind, family in enumerate(families):
            for scale in scales:
                for seed in seeds:
                    rng = np.random.default_rng([kind, seed, round(100 * scale)])
                    rate, arrival, luck = _requests(rng, scale * full_rate_rps, duration_s)
                    timings = [_serve(c, n, rate * (1 + 0.6 * size), luck) for c, n in grid]
                    tpots = np.array([tpot for tpot, _ in timings])
                    ttfts = np.array([ttft for _, ttft in timings])
                    best = np.where(ttfts > 0.9, np.inf, tpots)
                    pick = np.where(np.isfinite(best).any(axis=0), best.argmin(axis=0), ttfts.argmin(axis=0))
                    rows = np.arange(len(arrival))
                    runs = {f"fixed c={c} n={n}": timing for (c, n), timing in zip(grid, timings, strict=True)}
                    runs["sarathi 512"] = _serve(0, budgets[len(budgets) // 2], rate, luck)
                    runs["analytic"] = 0.99 * tpots[pick, rows], 0.9 * ttfts[pick, rows]
                    runs["poster"] = 0.985 * tpots[pick, rows] + 0.001, 0.75 + 0.3 * ttfts[pick, rows] * luck
                    for label, (tpot, ttft) in runs.items():
                        write_run(
                            root / engine / f"{family}-{scale:g}" / f"{label}-{seed}".replace(" ", "_"),
                            arrival_s=arrival,
                            tpot_s=tpot,
                            ttft_s=ttft,
                            label=label,
                            engine=engine,
                            scenario=f"{family} x{scale:g}",
                            seed=seed,
                        )


def _requests(
    rng: np.random.Generator, rate_rps: float, duration_s: float
) -> tuple[FloatArray, FloatArray, FloatArray]:
    arrival = np.sort(rng.uniform(0, duration_s, int(rate_rps * duration_s)))
    # The rate swings by half around its mean, twice in the run.
    rate = rate_rps * (1 + 0.5 * np.sin(4 * np.pi * arrival / duration_s))
    keep = rng.uniform(0, 1.5 * rate_rps, len(arrival)) < rate
    return rate[keep], arrival[keep], rng.lognormal(0, 0.25, int(keep.sum()))


def _serve(c: int, n: int, rate: FloatArray, luck: FloatArray) -> tuple[FloatArray, FloatArray]:
    tokens_per_iteration = sum(0.72**k for k in range(c + 1))
    batch = rate * 1.2
    step = (
        0.011 + 0.0012 * c + 0.00022 * np.maximum(batch * (1 + c) - 14, 0) + 0.000012 * np.minimum(n, 90 * rate) ** 1.1
    )
    tpot = step / tokens_per_iteration * luck**0.5
    used = np.minimum(rate * 300 / (n / step), 0.985)
    return tpot, (0.05 + 250 / (n / step) / (1 - used)) * luck**2


def _percentiles(name: str, values: FloatArray) -> dict[str, float]:
    summary = {f"{name}_mean_s": float(values.mean())}
    for percentile in (50, 90, 99):
        summary[f"{name}_p{percentile}_s"] = float(np.percentile(values, percentile))
    return summary
