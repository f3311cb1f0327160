"""Iterations and requests per CPU second of the whole loop: `python -m tests.bench.simulator`."""

from __future__ import annotations

import os
import time

from controllers.analytic import Analytic
from controllers.compiled import KernelController
from controllers.fixed import Fixed
from controllers.poster import Poster
from controllers.sarathi import Sarathi
from engine.simulator.simulator import Simulator
from tests.bench import measure
from tests.bench.plant import RATE, REQUESTS, plant, simulator
from tests.engine.core.cases import Figures

CONTROLLERS: tuple[tuple[KernelController, float | None, float | None], ...] = (
    (Fixed(candidates=3, token_budget=512), 1e6, 1e5),
    (Fixed(candidates=0, token_budget=512), None, None),
    (Sarathi(total_budget=512), None, None),
    (Poster(), 3e5, None),
    (Analytic(), 3e5, None),
)


def _measure(
    engine: Simulator, controller: KernelController, iterations_goal: float | None, requests_goal: float | None
) -> None:
    def run() -> float:
        engine.load(0, engine.workloads[0])
        controller.reset(shared)
        loop = engine.loop(controller.current, controller.decision_s)
        begin = time.process_time()
        engine.run_to_end(loop)
        return time.process_time() - begin

    shared = plant(engine)
    seconds = measure.median_reported(run)
    row = Figures(engine.state)
    batch = row["batched_requests"] / row["iterations"]
    name = f"{controller.label()}, mean batch {batch:.1f}"
    measure.rate(f"{name}: iterations", row["iterations"] / seconds, iterations_goal)
    measure.rate(f"{name}: requests", row["finished"] / seconds, requests_goal)


def main() -> None:
    """Every compiled controller over the same requests."""
    measure.title(f"Whole loop, {REQUESTS:,} LMSYS-like requests at {RATE:g} /s, Vicuna-7B on an A100")
    engine = simulator()
    for controller, iterations_goal, requests_goal in CONTROLLERS:
        _measure(engine, controller, iterations_goal, requests_goal)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
