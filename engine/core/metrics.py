"""Results of a run: one row per request, and the summary that reports compare.

Everything is computed from a `State` after the run, so the simulator and the real backends are measured alike.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.core.objective import Prices, charged
from engine.core.state import FINISHED, ITL_BINS, ITL_BINS_PER_E, ITL_LOWEST_S, State

QUANTILES = (50, 90, 99)


def request_table(rows: NDArray[np.void]) -> dict[str, NDArray[Any]]:
    """Rows of the request table (REQUEST) as columns of equal length; times in s.

    A time that never came (an unfinished request) is NaN. `tpot_s` is (last token - first token) / (output - 1) and
    NaN for requests of one output token; `normalised_latency_s` is end-to-end latency per output token (Orca, Yu et
    al., OSDI 2022, section 6).
    """
    finish = np.where(rows["phase"] == FINISHED, rows["last_token"], np.nan)
    output = rows["output"].astype(np.float64)
    e2e = finish - rows["arrival"]
    gaps = np.where(output > 1, output - 1, np.nan)
    return {
        "request": np.arange(rows.size, dtype=np.int64),
        "arrival_s": rows["arrival"].copy(),
        "prompt_tokens": rows["prompt"].copy(),
        "output_tokens": rows["output"].copy(),
        "generated_tokens": rows["generated"].copy(),
        "admitted_s": rows["admitted"].copy(),
        "first_token_s": rows["first_token"].copy(),
        "finish_s": finish,
        "ttft_s": rows["first_token"] - rows["arrival"],
        "tpot_s": (finish - rows["first_token"]) / gaps,
        "e2e_s": e2e,
        "normalised_latency_s": e2e / output,
        "max_itl_s": rows["max_itl"].copy(),
        "preemptions": rows["preemptions"].copy(),
        "drafted_tokens": rows["drafted"].copy(),
        "accepted_tokens": rows["accepted"].copy(),
    }


def summarize(
    state: State, rows: NDArray[np.void], *, ttft_target: float, prices: Prices, i: int = 0
) -> dict[str, float]:
    """Metrics of a run of instance `i`; a metric without a value (a mean over nothing) is NaN.

    Args:
        rows: its requests, of the request table.
        ttft_target: s; a request attains it when its first token came by `arrival + ttft_target`.
        prices: of the objective; `tpot_target` in s per token, which a request of one output token cannot miss.

    Attainments are shares of all requests, so one that never finished attains nothing. `duration_s` runs from the
    first arrival to the clock at the end; rates are per second of it, except `request_rate_rps`, the offered load.
    `goodput_rps` counts finished requests that attain both targets, `token_goodput_tps` generated tokens (SmartSpec's
    goodput). `mean_batch` is requests per iteration, `tokens_per_iteration` is G: tokens a decoding request emits per
    iteration. ITL is per gap between the emission events of a request; its mean is exact, its quantiles are within
    0.5 % (histogram).
    """
    table = request_table(rows)
    totals = state.totals[i]
    finished = np.isfinite(table["finish_s"])
    attains_ttft = table["first_token_s"] <= table["arrival_s"] + ttft_target
    attains_tpot = finished & ~(table["tpot_s"] > prices.tpot_target)
    attains = attains_ttft & attains_tpot
    duration = float(state.instances["now"][i] - table["arrival_s"][0]) if finished.size else 0.0
    summary: dict[str, float] = {}
    for name in ("tpot", "ttft", "e2e", "normalised_latency"):
        summary |= describe(name, table[f"{name}_s"])
    summary |= itl_summary(state, rows, i)
    summary |= {
        "objective": _ratio(charged(state, i, prices), finished.size),
        "ttft_attainment": _ratio(attains_ttft.sum(), finished.size),
        "tpot_attainment": _ratio(attains_tpot.sum(), finished.size),
        "slo_attainment": _ratio(attains.sum(), finished.size),
        "goodput_rps": _ratio(attains.sum(), duration),
        "token_goodput_tps": _ratio(table["generated_tokens"].sum(), duration),
        "ttft_violations": int(finished.size - attains_ttft.sum()),
        "requests_finished": int(finished.sum()),
        "requests_total": int(finished.size),
        "duration_s": duration,
        "request_rate_rps": _offered_rate(table["arrival_s"], duration),
        "iterations": int(totals["iterations"]),
        "preemptions": int(totals["preemptions"]),
        "mean_batch": _ratio(totals["batched_requests"], totals["iterations"]),
        "utilization": _ratio(totals["busy_s"], duration),
        "peak_kv_share": 1.0 - _ratio(totals["lowest_free_blocks"], state.limits["total_blocks"][i]),
        "acceptance_rate": _ratio(totals["accepted"], totals["drafted"]),
        "tokens_per_iteration": 1.0 + _ratio(totals["accepted"], totals["decode_steps"]),
    }
    return summary


def describe(name: str, values: NDArray[np.float64]) -> dict[str, float]:
    """Mean and p50 / p90 / p99 of the finite values as `<name>_mean_s`, `<name>_p50_s`, ..."""
    finite = values[np.isfinite(values)]
    if finite.size == 0:
        return {f"{name}_{part}_s": math.nan for part in ("mean", *(f"p{q}" for q in QUANTILES))}
    quantiles = np.percentile(finite, QUANTILES)
    return {f"{name}_mean_s": float(finite.mean())} | {
        f"{name}_p{q}_s": float(value) for q, value in zip(QUANTILES, quantiles, strict=True)
    }


def itl_summary(state: State, rows: NDArray[np.void], i: int = 0) -> dict[str, float]:
    """Mean and quantiles of the gaps between token emissions, over the requests of these rows."""
    counts = state.itl[i]
    total = int(counts.sum())
    # A request's gaps add up to the time from its first to its latest token, whatever bins they fell into.
    spans = rows["last_token"] - rows["first_token"]
    summary = {"itl_mean_s": _ratio(float(np.nansum(spans)), total)}
    middle = ITL_LOWEST_S * np.exp((np.arange(ITL_BINS) + 0.5) / ITL_BINS_PER_E)
    cumulative = np.cumsum(counts)
    for q in QUANTILES:
        place = int(np.searchsorted(cumulative, math.ceil(total * q / 100)))
        summary[f"itl_p{q}_s"] = float(middle[place]) if total else math.nan
    return summary


def _offered_rate(arrival: NDArray[np.float64], duration: float) -> float:
    """Requests per second between the first and the last arrival; requests at one instant: per second of the run."""
    span = float(arrival[-1] - arrival[0]) if arrival.size else 0.0
    return (arrival.size - 1) / span if span > 0 else _ratio(arrival.size, duration)


def _ratio(part: Any, whole: Any) -> float:
    return float(part) / float(whole) if whole > 0 else math.nan
