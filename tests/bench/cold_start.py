"""Seconds from starting Python to the first result, compiled code cached: `python -m tests.bench.cold_start`."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from tests.bench import measure

STARTS = {
    "fixed: import, load, run 100 requests": """
from controllers.fixed import Fixed
from tests.bench.plant import plant, simulator
engine = simulator(requests=100)
controller = Fixed()
controller.reset(plant(engine))
engine.run_to_end(engine.loop(controller.current, 0.0))
""",
    "analytic: import, load, lookup table, run 100 requests": """
from controllers.analytic import Analytic
from tests.bench.plant import plant, simulator
engine = simulator(requests=100)
controller = Analytic()
controller.reset(plant(engine))
engine.run_to_end(engine.loop(controller.current, 0.0))
""",
    "environment: import, make one, reset, step": """
import gymnasium
import envs
env = gymnasium.make(envs.SERVING_ID)
env.reset(seed=0)
env.step(env.action_space.sample())
""",
}


def main() -> None:
    """Each start in a process of its own; the first one, which may compile, is not counted."""
    measure.title("Cold start, compiled code from the cache")
    for name, program in STARTS.items():
        seconds = measure.median_reported(lambda code=program: _start(code), runs=3)
        measure.duration(name, seconds, 5.0)


def _start(program: str) -> float:
    """Wall-clock seconds of a fresh interpreter that runs `program`."""
    begin = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], check=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
