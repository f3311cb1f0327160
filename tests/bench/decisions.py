"""How long one decision takes with 64 requests queued: `python -m tests.bench.decisions`."""

from __future__ import annotations

import os
import time
from typing import Any

import numpy as np
from numba import njit

from controllers.analytic import Analytic
from controllers.controller import Controller, as_dict
from controllers.fixed import Fixed
from controllers.mpc import Mpc
from controllers.poster import Poster
from controllers.sarathi import Sarathi
from engine.core.telemetry import (
    DECODE_KV_TOKENS,
    FREE_KV_TOKENS,
    FREE_SEQS,
    INTERVAL_S,
    NUM_DECODES,
    NUM_WAITING,
    TTFT_TARGET_S,
    WAITING_TOKENS,
    Observation,
    allocate_observation,
)
from tests.bench import measure
from tests.bench.plant import plant, simulator

QUEUED = 64
SITUATIONS = 2000
LIMIT_S = 20e-6


def _situations() -> Observation:
    """Random busy engines with a full queue and more behind it; two in five requests are late."""
    rng = np.random.default_rng(0)
    observation = allocate_observation(SITUATIONS, QUEUED, 8)
    decodes = rng.integers(1, 192, SITUATIONS)
    observation.load[:, NUM_DECODES] = decodes
    observation.load[:, DECODE_KV_TOKENS] = decodes * rng.integers(100, 800, SITUATIONS)
    observation.load[:, FREE_KV_TOKENS] = 60000
    observation.load[:, FREE_SEQS] = 256 - decodes
    observation.load[:, INTERVAL_S] = 0.03
    observation.load[:, TTFT_TARGET_S] = 1.0
    observation.queue[:, :, 0] = rng.integers(1, 1500, (SITUATIONS, QUEUED + 1))
    observation.queue[:, :, 1] = np.sort(rng.uniform(-0.8, 1.2, (SITUATIONS, QUEUED + 1)), axis=1)
    observation.load[:, NUM_WAITING] = QUEUED + 1
    observation.load[:, WAITING_TOKENS] = observation.queue[:, :, 0].sum(axis=1)
    observation.drafted[:] = np.minimum.accumulate(rng.integers(1, 200, (SITUATIONS, 8)), axis=1)
    observation.accepted[:] = np.floor(observation.drafted * 0.6)
    return observation


def _compiled_seconds(decide: Any, observation: Observation, rules: Any) -> float:
    """Median seconds of a decision inside compiled code."""

    @njit(error_model="numpy")
    def all_of_them(observation, rules):  # type: ignore[no-untyped-def]
        total = 0
        for e in range(SITUATIONS):
            c, n = decide(observation, e, rules)
            total += c + n
        return total

    return measure.median_seconds(lambda: all_of_them(observation, rules)) / SITUATIONS


def _python_seconds(controller: Controller, observation: Observation) -> np.ndarray:
    """Seconds of every `act` on an observation dict, as an engine in Python pays for it."""
    dicts = [as_dict(observation, e) for e in range(SITUATIONS)]
    seconds = np.empty(SITUATIONS)
    for _ in range(2):
        for e, situation in enumerate(dicts):
            begin = time.perf_counter()
            controller.act(situation)
            seconds[e] = time.perf_counter() - begin
    return seconds


def main() -> None:
    """Each controller called from Python, and those that predict inside compiled code."""
    measure.title(f"One decision with {QUEUED} requests queued")
    observation = _situations()
    shared = plant(simulator(requests=100))
    poster, analytic, mpc = Poster(), Analytic(), Mpc()
    for controller in (Fixed(), Sarathi(), poster, analytic, mpc):
        controller.reset(shared)
        seconds = _python_seconds(controller, observation)
        for quantile in (50, 99):
            name = f"{controller.label()}: act from Python, p{quantile}"
            measure.duration(name, float(np.percentile(seconds, quantile)))
    within = _compiled_seconds(poster.decide, observation, poster.rules)
    measure.duration("poster: compiled, mean of a decision", within, LIMIT_S)
    within = _compiled_seconds(analytic.decide, observation, analytic.rules)
    measure.duration("analytic: compiled, mean of a decision", within, LIMIT_S)
    within = _compiled_seconds(mpc.decide, observation, mpc.rules)
    measure.duration("mpc: compiled, mean of a decision", within, Mpc.decision_s)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
