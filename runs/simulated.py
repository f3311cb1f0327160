"""Serving a workload on the simulator, compiled where the controller is."""

import time
from collections.abc import Callable
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from controllers.bounds.clairvoyant import PeekingController
from controllers.compiled import KernelController
from controllers.controller import Controller
from engine.core.telemetry import as_dict
from engine.plant import Plant
from engine.simulator.loop import ITERATION, log_iteration
from engine.simulator.simulator import Simulator
from engine.workload.workload import Workload
from runs.serving import NO_ITERATIONS, Progress, Served, decide

Charge = Literal["constant", "measured", "off"]
"""What a decision costs on the simulated clock: the controller's own bound, the time it took, or nothing."""

WARMUP_DECISIONS = 20
TIMED_DECISIONS = 200
STEPS_PER_PROGRESS = 2_000


def serve(
    simulator: Simulator,
    workload: Workload,
    controller: Controller,
    plant: Plant,
    charge: Charge = "constant",
    recording: bool = False,
    on_progress: Progress | None = None,
) -> Served:
    """Serve a workload; the controller begins anew. The decisions of one that peeks are neither timed nor charged.

    Raises:
        ActionError: the controller asks for what no engine can run.
    """
    controller.reset(plant)
    charged_s = controller.decision_s if charge == "constant" else 0.0
    compiled = isinstance(controller, KernelController | PeekingController)
    stepwise = not compiled or (charge == "measured" and not controller.peeks)
    if stepwise or not controller.peeks:
        # First decisions compile, which is neither the controller's nor the simulator's speed.
        _step(simulator, controller, charged_s, lambda _: None, most=WARMUP_DECISIONS)
        simulator.load(0, workload)
        controller.reset(plant)
    if stepwise or not isinstance(controller, KernelController | PeekingController):
        return _serve_stepwise(
            simulator, controller, None if charge == "measured" else charged_s, recording, on_progress
        )
    decision_s = np.zeros(0) if controller.peeks else _time_decisions(simulator, controller, charged_s)
    simulator.load(0, workload)
    controller.reset(plant)
    if isinstance(controller, KernelController):
        loop = simulator.loop(controller.current, charged_s)
    else:
        loop = controller.loop(simulator, charged_s)
    # Running no iteration compiles the loop, which is not the simulator's speed.
    loop(0, NO_ITERATIONS)
    iterations, wall_s = simulator.run_to_end(loop, record_iterations=recording, on_progress=on_progress)
    return Served(simulator.state, simulator.requests(), iterations, wall_s, decision_s)


def _serve_stepwise(
    simulator: Simulator,
    controller: Controller,
    charged_s: float | None,
    recording: bool,
    on_progress: Progress | None,
) -> Served:
    """Decide in Python before every iteration, as an engine would call a controller."""
    begin = time.perf_counter()
    rows: list[NDArray[np.void]] = []
    row = np.zeros(1, dtype=ITERATION)
    spent: list[float] = []
    totals, requests = simulator.state.totals[0], len(simulator.requests())

    def after(seconds: float) -> None:
        spent.append(seconds)
        if recording:
            log_iteration(simulator.state, 0, row, 0)
            rows.append(row.copy())
        if on_progress is not None and len(spent) % STEPS_PER_PROGRESS == 0:
            on_progress(int(totals["finished"]), requests)

    _step(simulator, controller, charged_s, after, most=None)
    wall_s = time.perf_counter() - begin
    return Served(
        simulator.state,
        simulator.requests(),
        np.concatenate(rows) if rows else NO_ITERATIONS,
        wall_s,
        np.array(spent),
    )


def _time_decisions(simulator: Simulator, controller: Controller, charged_s: float) -> NDArray[np.float64]:
    """Seconds of each of the first decisions of a run, taken step by step.

    Inside compiled code a decision cannot be timed, so `choose` is, from Python, on the observations that the run's
    beginning makes; the call from Python is part of the figure.
    """
    spent: list[float] = []
    _step(simulator, controller, charged_s, spent.append, most=TIMED_DECISIONS)
    return np.array(spent)


def _step(
    simulator: Simulator,
    controller: Controller,
    charged_s: float | None,
    after: Callable[[float], None],
    most: int | None,
) -> None:
    """Observe, choose, step, until no request is left or `most` iterations ran; `after` gets each decision's time.

    `charged_s` None charges the time that a decision took.
    """
    observation = simulator.new_observation()
    view = as_dict(observation)
    instance = simulator.state.instances[0]
    more = True
    count = 0
    while more and (most is None or count < most):
        simulator.observe(0, observation)
        candidates, token_budget, seconds = decide(controller, view, int(instance["num_decoding"]))
        more = simulator.step(0, candidates, token_budget, seconds if charged_s is None else charged_s)
        after(seconds)
        count += 1
