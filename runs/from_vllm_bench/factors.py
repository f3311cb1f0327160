"""A few factors on a latency table: how another GPU, model or engine differs from the one that was measured."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import least_squares

from engine.latency.model import LatencyModel
from engine.latency.table_file import rounded
from runs.from_vllm_bench.replay import Replay

FITTED = ("tpot_mean_s", "tpot_p50_s", "ttft_mean_s", "ttft_p50_s")
"""What is compared; percentiles further out hang on single requests."""

NOISE = 0.03
"""Relative error of a reported figure that counts 1 in the fit."""
PRIOR = 0.7
"""Distance of a factor's logarithm from 0 that counts 1: what the runs do not tell apart stays near the base."""
CLIENT_PRIOR_S = 0.02
LARGEST = 20.0
STEP = 0.05
MOST_STEPS = 25


@dataclass(frozen=True)
class Factors:
    """By what the base table's times are multiplied.

    weights: what GEMMs and LM head take however few tokens there are, which is reading the weights · compute: what they
    take beyond that for more tokens, and attention of prompts · attention: reading cached tokens while decoding ·
    overhead: around the forward · drafter: everything of the drafter. client_s: seconds between client and engine that
    every TTFT has besides; no part of the engine.
    """

    weights: float = 1.0
    compute: float = 1.0
    attention: float = 1.0
    overhead: float = 1.0
    drafter: float = 1.0
    client_s: float = 0.0


SCALED = ("weights", "compute", "attention", "overhead", "drafter")


def scaled_document(base: dict[str, Any], factors: Factors) -> dict[str, Any]:
    """The base table's document with every time multiplied by the factor of what it measures."""
    document = copy.deepcopy(base)
    for section in ("linear", "head"):
        seconds = np.array(base[section]["seconds"], dtype=np.float64)
        floor = seconds.min()
        document[section]["seconds"] = rounded(factors.weights * floor + factors.compute * (seconds - floor), 6)
    for key in ("seconds", "mixed_seconds"):
        if key in base["decode_attention"]:
            document["decode_attention"][key] = _times(base["decode_attention"][key], factors.attention)
    for key in ("fresh_seconds", "extra_seconds", "context_token_seconds"):
        document["prefill_attention"][key] = _times(base["prefill_attention"][key], factors.compute)
    for key, value in base["overhead"].items():
        drafter = key.startswith("idle_drafter")
        document["overhead"][key] = value * (factors.drafter if drafter else factors.overhead)
    for key, value in base["drafter"].items():
        if "seconds" in key:
            document["drafter"][key] = _times(value, factors.drafter)
    return document


def without_drafter(document: dict[str, Any]) -> dict[str, Any]:
    """The same engine with no drafter loaded, as a server runs that was started without speculation."""
    idle = {key: 0.0 for key in document["overhead"] if key.startswith("idle_drafter")}
    silent = dict.fromkeys(("prefill_seconds", "prefill_token_seconds"), 0.0)
    return {
        **document,
        "overhead": document["overhead"] | idle,
        "drafter": document["drafter"] | silent,
    }


def predicted(
    base: dict[str, Any], factors: Factors, replays: Sequence[Replay], total_budget: int
) -> list[dict[str, float]]:
    """What the client would measure of each run on the scaled engine; keys as in `BenchRun.observed`."""
    document = scaled_document(base, factors)
    drafting = LatencyModel.from_document(document, document["name"])
    alone = LatencyModel.from_document(without_drafter(document), document["name"])
    found = []
    for replay in replays:
        figures = replay.serve(drafting if replay.run.candidates else alone, total_budget)
        found.append({key: value + factors.client_s * key.startswith("ttft") for key, value in figures.items()})
    return found


def fit_factors(
    base: dict[str, Any], replays: Sequence[Replay], total_budget: int, start: Factors | None = None
) -> Factors:
    """The factors under which the simulated runs come nearest to what the client reported.

    Least squares over the logarithms of simulated / reported (`FITTED`), errors counted by `NOISE` and far ones more
    mildly (soft L1: a mean TTFT in overload hangs on when requests came), plus a weak pull of every factor towards 1
    (`PRIOR`): figures of a few loads cannot tell all factors apart. The drafter's factor stays 1 where no run drafted.
    """
    names = [name for name in SCALED if name != "drafter" or any(replay.run.candidates for replay in replays)]
    start = start or Factors()

    def factors_of(point: NDArray[np.float64]) -> Factors:
        values = dict(zip(names, np.exp(point[:-1]).tolist(), strict=True))
        return replace(start, **values, client_s=float(point[-1]) * CLIENT_PRIOR_S)

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        simulated = predicted(base, factors_of(point), replays, total_budget)
        errors = [
            np.log(figures[key] / replay.run.observed[key]) / NOISE
            for figures, replay in zip(simulated, replays, strict=True)
            for key in FITTED
            if key in replay.run.observed
        ]
        return np.array([*errors, *(point[:-1] / PRIOR), point[-1]])

    def slopes(point: NDArray[np.float64]) -> NDArray[np.float64]:
        # Wide steps: simulated figures jump a little wherever another request joins a batch.
        steps = STEP * np.eye(point.size)
        return np.stack([(residuals(point + step) - residuals(point - step)) / (2 * STEP) for step in steps], axis=1)

    first = np.array([*np.log([getattr(start, name) for name in names]), start.client_s / CLIENT_PRIOR_S])
    span = np.log(LARGEST)
    low = np.array([-span] * len(names) + [0.0])
    high = np.array([span] * len(names) + [1.0 / CLIENT_PRIOR_S])
    point = np.clip(first, low + 0.1, high - 0.1)
    # A mild loss has nearly no slope far from the solution: least squares leads there first.
    for loss in ("linear", "soft_l1"):
        solved = least_squares(
            residuals, point, jac=slopes, bounds=(low, high), loss=loss, max_nfev=MOST_STEPS, xtol=1e-3, ftol=1e-4
        )
        point = np.clip(solved.x, low + 1e-6, high - 1e-6)
    return factors_of(point)


def factor_table(factors: Factors) -> dict[str, float]:
    """Name -> value, for files."""
    return {name: round(value, 5) for name, value in asdict(factors).items()}


def _times(values: Any, factor: float) -> Any:
    if isinstance(values, list):
        return rounded(np.array(values, dtype=np.float64) * factor, 6)
    return values * factor
