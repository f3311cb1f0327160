"""Serving prompts on a real engine: the model computes, and the clock is the wall's."""

from __future__ import annotations

import logging
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from controllers.controller import Controller
from engine.backends.clock import Clock, WallClock
from engine.backends.real import RealEngine, submit_beginnings, warm_up
from engine.backends.real_config import RealEngineConfig
from engine.core.action import ActionGrid
from engine.core.choices import ActionError
from engine.core.telemetry import as_dict
from engine.plant import Plant
from engine.simulator.loop import ITERATION, log_iteration
from engine.workload.prompts import Prompts
from runs.serving import NO_ITERATIONS, Progress, Served, decide

log = logging.getLogger(__name__)

SECONDS_PER_PROGRESS = 0.2


@dataclass(frozen=True)
class Output:
    """What a request got: its number, where its prompt is from, the generated token ids, and the text they spell."""

    request: int
    prompt: str
    tokens: list[int]
    text: str


class Decision(NamedTuple):
    """What was chosen before an iteration: c, n, and the seconds it took to choose."""

    candidates: int
    token_budget: int
    seconds: float


class Strict:
    """Asks a controller, and refuses what the engine cannot run with the key to set."""

    def __init__(self, controller: Controller, max_candidates: int) -> None:
        self._controller, self._most = controller, max_candidates

    def __call__(self, view: dict[str, Any], decoding: int) -> Decision:
        """The controller's decision. Raises ActionError."""
        decision = Decision(*decide(self._controller, view, decoding))
        if decision.candidates > self._most:
            raise ActionError(
                f"{self._controller.label()} chose candidates={decision.candidates}, and this engine's drafter "
                f"proposes at most {self._most}: set controller.candidates={self._most}, or another engine.drafter"
            )
        return decision


class Governed:
    """A real engine whose every iteration is decided on just before it.

    Args:
        engine: to be stepped by nobody else.
        choose: gets the observation and how many requests are decoding.
    """

    def __init__(self, engine: RealEngine, choose: Callable[[dict[str, Any], int], Decision]) -> None:
        self._engine, self._choose = engine, choose
        self.observation = engine.new_observation()
        """What the latest decision was made on."""
        self._view = as_dict(self.observation)

    def step(self) -> Decision:
        """Observe, choose, run one iteration; the engine has something to do (`RealEngine.poll`)."""
        engine = self._engine
        engine.observe(self.observation)
        decision = self._choose(self._view, int(engine.state.instances["num_decoding"][0]))
        engine.step(decision.candidates, decision.token_budget)
        return decision


def serve(
    engine: RealEngine,
    prompts: Prompts,
    controller: Controller,
    plant: Plant,
    recording: bool = False,
    on_progress: Progress | None = None,
    clock: Callable[[], Clock] = WallClock,
) -> Served:
    """Serve the prompts as they arrive, to the last; engine and controller begin anew, warmed up.

    A decision takes the time it takes: nothing is charged, the clock runs on.

    Args:
        engine: built; it serves nobody else.
        prompts: each fits the engine.
        controller: reset here.
        plant: what the controller may know of the engine.
        recording: keep ITERATION rows.
        on_progress: called now and then.
        clock: makes the clock that the run begins with.

    Raises:
        ActionError: the controller asks for what this engine cannot run.
        RequestError: a prompt does not fit.
    """
    prepare(engine, prompts, controller, plant)
    for i, tokens in enumerate(prompts.tokens):
        engine.submit(
            tokens,
            int(prompts.max_tokens[i]),
            prompts.sampling[i],
            stop=prompts.stop,
            arrival=float(prompts.arrival[i]),
        )
    rows: list[NDArray[np.void]] = []
    row = np.zeros(1, dtype=ITERATION)
    spent: list[float] = []
    failed = 0
    shown = begin = time.perf_counter()
    engine.clock = clock()

    def after(decision: Decision) -> None:
        nonlocal shown, failed
        failed += len(engine.failed)
        spent.append(decision.seconds)
        if recording:
            log_iteration(engine.state, 0, row, 0)
            rows.append(row.copy())
        if on_progress is not None and time.perf_counter() - shown > SECONDS_PER_PROGRESS:
            shown = time.perf_counter()
            on_progress(int(engine.state.totals["finished"][0]), prompts.num_requests)

    _drive(engine, controller, after)
    wall_s = time.perf_counter() - begin
    if failed:
        log.warning("%d requests were dropped: the model's logits for them are not finite", failed)
    return Served(
        engine.state, engine.requests, np.concatenate(rows) if rows else NO_ITERATIONS, wall_s, np.array(spent)
    )


def outputs(engine: RealEngine, prompts: Prompts, tokenizer: Any) -> list[Output]:
    """What every request got, after `serve`."""
    generated = [engine.output(number) for number in range(prompts.num_requests)]
    return [
        Output(number, prompts.origin[number], tokens, str(tokenizer.decode(tokens)))
        for number, tokens in enumerate(generated)
    ]


def grid_within(actions: ActionGrid, engine: RealEngine) -> ActionGrid:
    """The choices that this engine's drafter can serve. Raises ActionError when no choice of c is left."""
    choices = [c for c in actions.candidate_choices if c <= engine.max_candidates]
    if not choices:
        raise ActionError(
            f"actions.candidate_choices={list(actions.candidate_choices)}: this engine's drafter proposes at most "
            f"{engine.max_candidates} candidate tokens; include 0"
        )
    return ActionGrid(candidate_choices=tuple(choices), budget_choices=actions.budget_choices)


def describe(config: RealEngineConfig, engine: RealEngine) -> dict[str, Any]:
    """On what and with what settings the engine runs, and how busy the machine is (1-minute load); JSON-able."""
    about = engine.about()
    return {
        **config.model_dump(mode="json", exclude={"name"}),
        **about,
        "device_name": about["device_name"] or _processor(),
        "cores": os.cpu_count(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "python": platform.python_version(),
    }


def _processor() -> str:
    return platform.processor() or platform.machine()


def prepare(engine: RealEngine, prompts: Prompts, controller: Controller, plant: Plant) -> None:
    """Begin anew, warmed up: first calls compile, and first touch memory, which is not the engine's speed."""
    controller.reset(plant)
    _warm_up(engine, prompts, controller)
    controller.reset(plant)
    engine.reset()


def _warm_up(engine: RealEngine, prompts: Prompts, controller: Controller) -> None:
    """Serve the beginnings of the first prompts: without candidates, with some, and as the controller says."""
    warm_up(engine, prompts)
    submit_beginnings(engine, prompts)
    _drive(engine, controller, lambda _: None)


def _drive(engine: RealEngine, controller: Controller, after: Callable[[Decision], None]) -> None:
    """Observe, choose, step until no request is left, waiting where none has arrived; `after` gets the decisions."""
    governed = Governed(engine, Strict(controller, engine.max_candidates))
    while True:
        if engine.poll():
            after(governed.step())
            continue
        arrival = engine.next_arrival
        if arrival is None:
            return
        engine.clock.wait_until(arrival)
