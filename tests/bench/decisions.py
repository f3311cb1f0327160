"""How long one decision of every controller takes: `python -m tests.bench.decisions`.

64 requests decode and 64 are queued. Each decision is timed by itself, inside compiled code where the controller is
compiled, and through `act` as an engine written in Python would ask it.
"""

from __future__ import annotations

import ctypes
import os
import time
from pathlib import Path
from typing import Any

import numpy as np
from hydra.utils import instantiate
from numba import njit
from numpy.typing import NDArray
from omegaconf import OmegaConf

from controllers.compiled import KernelController
from controllers.controller import Controller
from engine.core.telemetry import (
    DECODE_KV_TOKENS,
    FREE_KV_TOKENS,
    FREE_SEQS,
    INTERVAL_S,
    ITERATIONS,
    LAST_CANDIDATES,
    LAST_DECODE_KV_TOKENS,
    LAST_EMITTED_TOKENS,
    LAST_ITERATION_S,
    LAST_NUM_DECODES,
    LAST_PREFILL_TOKENS,
    NUM_DECODES,
    NUM_WAITING,
    TTFT_TARGET_S,
    WAITING_TOKENS,
    Observation,
    allocate_observation,
    as_dict,
)
from tests.bench import measure
from tests.bench.plant import plant, simulator

CONTROLLERS = Path(__file__).resolve().parents[2] / "conf" / "controller"
DECODING = 64
QUEUED = 64
SITUATIONS = 5000
LIMIT_S = 50e-6
MONOTONIC = 1
"""clock_gettime's CLOCK_MONOTONIC."""

_clock = ctypes.CDLL(None).clock_gettime
_clock.argtypes = [ctypes.c_int, ctypes.c_void_p]
_clock.restype = ctypes.c_int


def situations() -> Observation:
    """Busy engines with a full queue and more behind it, after an iteration; two in five requests are late."""
    rng = np.random.default_rng(0)
    observation = allocate_observation(SITUATIONS, QUEUED, 8)
    load = observation.load
    candidates = rng.integers(0, 9, SITUATIONS)
    load[:, NUM_DECODES] = load[:, LAST_NUM_DECODES] = DECODING
    load[:, DECODE_KV_TOKENS] = load[:, LAST_DECODE_KV_TOKENS] = DECODING * rng.integers(100, 800, SITUATIONS)
    load[:, FREE_KV_TOKENS] = rng.integers(0, 60000, SITUATIONS)
    load[:, FREE_SEQS] = 256 - DECODING
    load[:, INTERVAL_S] = load[:, LAST_ITERATION_S] = rng.uniform(0.01, 0.06, SITUATIONS)
    load[:, ITERATIONS] = 1
    load[:, LAST_CANDIDATES] = candidates
    load[:, LAST_PREFILL_TOKENS] = rng.integers(0, 1024, SITUATIONS)
    load[:, LAST_EMITTED_TOKENS] = DECODING * rng.uniform(1, 3, SITUATIONS)
    load[:, TTFT_TARGET_S] = 1.0
    observation.queue[:, :, 0] = rng.integers(1, 1500, (SITUATIONS, QUEUED + 1))
    observation.queue[:, :, 1] = np.sort(rng.uniform(-0.8, 1.2, (SITUATIONS, QUEUED + 1)), axis=1)
    load[:, NUM_WAITING] = QUEUED + 1
    load[:, WAITING_TOKENS] = observation.queue[:, :, 0].sum(axis=1)
    depths = np.arange(8)
    observation.drafted[:] = np.floor(DECODING * 0.6**depths) * (depths < candidates[:, None])
    observation.accepted[:] = np.floor(observation.drafted * 0.6)
    return observation


def compiled_seconds(controller: KernelController, observation: Observation) -> NDArray[np.float64]:
    """Seconds of every decision inside compiled code; reading the clock is part of them (some 0.03 us)."""
    decide, clock = controller.decide, _clock

    @njit(error_model="numpy")
    def all_of_them(observation: Any, params: Any, memory: Any, nanoseconds: Any, now: Any) -> int:
        total = 0
        for e in range(SITUATIONS):
            clock(MONOTONIC, now.ctypes.data)
            begin = now[0] * 1_000_000_000 + now[1]
            c, n = decide(observation, e, params, memory)
            clock(MONOTONIC, now.ctypes.data)
            nanoseconds[e] = now[0] * 1_000_000_000 + now[1] - begin
            total += c + n
        return total

    policy = controller.policy(controller.plant, SITUATIONS)
    nanoseconds, now = np.zeros(SITUATIONS, dtype=np.int64), np.zeros(2, dtype=np.int64)
    for _ in range(2):
        all_of_them(observation, policy.params, policy.memory, nanoseconds, now)
    return nanoseconds * 1e-9


def python_seconds(controller: Controller, observation: Observation) -> NDArray[np.float64]:
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
    """Every controller in conf/controller as configured there; bounds, which are never asked, are named as such."""
    measure.title(f"One decision with {DECODING} requests decoding and {QUEUED} queued, us")
    observation, shared = situations(), plant(simulator(requests=100))
    print(f"  {'':<18}{'charged':>9}{'compiled p50':>14}{'p99':>8}{'act p50':>10}{'p99':>8}")
    over = []
    for path in sorted(CONTROLLERS.glob("*.yaml")):
        controller: Controller = instantiate(OmegaConf.load(path), _convert_="all")
        if controller.peeks:
            print(f"  {path.stem:<18} a bound: it plans a simulated run and is asked nothing")
            continue
        controller.reset(shared)
        cells = ["–", "–"]
        if isinstance(controller, KernelController):
            within = np.percentile(compiled_seconds(controller, observation), (50, 99))
            cells = [f"{1e6 * value:.2f}" for value in within]
            over += [path.stem] if within[1] > LIMIT_S else []
            controller.reset(shared)
        asked = np.percentile(python_seconds(controller, observation), (50, 99))
        cells += [f"{1e6 * value:.1f}" for value in asked]
        charged = f"{1e6 * controller.decision_s:.0f}"
        print(f"  {path.stem:<18}{charged:>9}{cells[0]:>14}{cells[1]:>8}{cells[2]:>10}{cells[3]:>8}")
    print(f"  compiled p99 above {1e6 * LIMIT_S:.0f} us: {', '.join(over) or 'none'}")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
