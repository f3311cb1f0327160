"""The same requests, the same luck and the same actions through vLLM's scheduler and through the simulator."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this in an environment of its own")

from engine.backends.guard import View
from engine.backends.vllm import GovernedAsyncScheduler, GovernedScheduler
from engine.config import EngineConfig
from engine.core.telemetry import LOAD_FIELDS, Observation, as_dict
from engine.latency.model import LatencyModel
from engine.simulator.loop import ITERATION, log_iteration
from engine.simulator.simulator import Simulator
from engine.workload.agreement import DrafterAgreement
from engine.workload.workload import Workload
from tests.engine.backends.vllm.fake_engine import FakeEngine, Setup, controller_file, scheduler

TABLE = "vicuna_7b_a100"
LATENCY = LatencyModel.load(TABLE)
TTFT_TARGET_S = 0.3
MOST_STEPS = 20_000
SEQS = 8


@dataclass
class Simulated:
    """What the simulator did, step by step, and what it showed before each step."""

    log: NDArray[np.void]
    seen: list[Observation]
    requests: NDArray[np.void]
    preemptions: int


def _workload(seed: int, requests: int = 60, span_s: float = 4.0) -> Workload:
    rng = np.random.default_rng(seed)
    arrival = np.sort(rng.uniform(0.0, span_s, requests))
    prompt, output = rng.integers(1, 700, requests), rng.integers(1, 60, requests)
    return Workload.build("made", arrival, prompt, output, DrafterAgreement(), seed)


def _actions(seed: int, candidates: tuple[int, ...], budgets: tuple[int, ...]) -> list[tuple[int, int]]:
    """Random pairs; the first iteration decodes nobody, so that its c is 0 in both."""
    rng = np.random.default_rng(seed)
    pairs = zip(rng.choice(candidates, MOST_STEPS).tolist(), rng.choice(budgets, MOST_STEPS).tolist(), strict=True)
    return [(0, 100), *pairs]


def _simulated(workload: Workload, actions: list[tuple[int, int]], blocks: int, watermark: float) -> Simulated:
    config = EngineConfig(name="parity", latency=TABLE, max_num_seqs=SEQS, num_kv_blocks=blocks, watermark=watermark)
    simulator = Simulator(config, [workload], ttft_target=TTFT_TARGET_S, latency=LATENCY)
    rows, seen = np.zeros(MOST_STEPS, dtype=ITERATION), []
    more = True
    while more:
        seen.append(simulator.new_observation())
        simulator.observe(0, seen[-1])
        more = simulator.step(0, *actions[len(seen) - 1])
        log_iteration(simulator.state, 0, rows, len(seen) - 1)
    state = simulator.state
    return Simulated(rows[: len(seen)], seen, state.requests, int(state.totals[0]["preemptions"]))


class _Played:
    """In the place of a guard: decides as the simulator did, c one step ahead, and keeps the telemetry."""

    def __init__(self, actions: list[tuple[int, int]]) -> None:
        self.actions = actions
        self.seen: list[View] = []

    def ask(self, view: View, num_decodes: int) -> tuple[int, int]:
        self.seen.append(view)
        step = len(self.seen)
        return self.actions[step][0], self.actions[step - 1][1]


def _vllm(
    tmp_path: Path,
    workload: Workload,
    actions: list[tuple[int, int]],
    blocks: int,
    watermark: float,
    *,
    cls: Any = GovernedScheduler,
    charge_beyond_output: bool = False,
) -> FakeEngine:
    """A fake engine after the last request. One of vLLM's blocks holds nothing."""
    governor = {"controller": str(controller_file(tmp_path, "controllers.fixed.Fixed")), "ttft_target": TTFT_TARGET_S}
    made = scheduler(
        cls,
        Setup(most_tokens=4096, max_num_seqs=SEQS, num_blocks=blocks + 1, watermark=watermark, governor=governor),
    )
    made.governor.guard = _Played(actions)
    engine = FakeEngine(made, workload, LATENCY, charge_beyond_output=charge_beyond_output)
    engine.run()
    return engine


def _assert_same_steps(simulated: Simulated, engine: FakeEngine) -> None:
    """Batch composition and clock, step by step; candidates past a request's output limit aside."""
    log, steps = simulated.log, engine.steps
    assert len(log) == len(steps)
    for name in ("num_decodes", "num_prefills", "prefill_tokens"):
        assert [getattr(step, name) for step in steps] == log[name].tolist(), name
    assert [step.decode_tokens - step.beyond_output for step in steps] == log["decode_tokens"].tolist()
    assert [step.end_s for step in steps] == pytest.approx(log["end_s"].tolist(), rel=1e-12)


def _assert_same_timelines(simulated: Simulated, engine: FakeEngine) -> None:
    for number in range(engine.workload.num_requests):
        emitted = engine.emitted[str(number)]
        row = simulated.requests[number]
        assert emitted[0][0] == pytest.approx(row["first_token"], rel=1e-12)
        assert emitted[-1][0] == pytest.approx(row["last_token"], rel=1e-12)
        assert sum(tokens for _, tokens in emitted) == row["generated"]


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_with_memory_to_spare_every_step_and_every_request_is_the_same(tmp_path: Path, seed: int) -> None:
    workload, actions = _workload(seed), _actions(seed, (0, 1, 2, 4), (32, 100, 256, 500))
    simulated = _simulated(workload, actions, 4000, 0.01)
    engine = _vllm(tmp_path, workload, actions, 4000, 0.01)
    _assert_same_steps(simulated, engine)
    _assert_same_timelines(simulated, engine)


@pytest.mark.parametrize("seed", [1])
def test_the_telemetry_is_the_simulators_but_for_the_free_memory(tmp_path: Path, seed: int) -> None:
    workload, actions = _workload(seed), _actions(seed, (0, 1, 2, 4), (32, 100, 256, 500))
    simulated = _simulated(workload, actions, 4000, 0.01)
    seen = _vllm(tmp_path, workload, actions, 4000, 0.01).scheduler.governor.guard.seen
    # vLLM takes a prompt's memory chunk by chunk, and takes some for candidates past the output limit.
    free = LOAD_FIELDS.index("free_kv_tokens")
    slack = SEQS * 16
    # Ours counts time from 0, vLLM's observer from the first request.
    since = LOAD_FIELDS.index("interval_s")
    seen[0]["load"][since] = simulated.seen[0].load[0, since]
    assert len(seen) == len(simulated.seen)
    for real, ours in zip(seen, map(as_dict, simulated.seen), strict=True):
        free_here = ours["load"][free]
        assert free_here - slack <= real["load"][free]
        assert real["load"][free] <= free_here + slack + ours["load"][LOAD_FIELDS.index("prefilling_tokens")]
        real["load"][free] = free_here
        for name, array in ours.items():
            np.testing.assert_allclose(real[name], array, rtol=1e-5, atol=1e-5, err_msg=name)


@pytest.mark.parametrize("seed", [1, 2])
def test_without_candidates_and_with_whole_prompts_preemptions_are_the_same(tmp_path: Path, seed: int) -> None:
    workload, actions = _workload(seed), _actions(seed, (0,), (3000,))
    simulated = _simulated(workload, actions, 80, 0.0)
    engine = _vllm(tmp_path, workload, actions, 80, 0.0)
    assert simulated.preemptions > 0
    _assert_same_steps(simulated, engine)
    _assert_same_timelines(simulated, engine)


def test_short_of_memory_vllm_preempts_where_ours_drafts_less(tmp_path: Path) -> None:
    workload, actions = _workload(1), _actions(1, (4,), (3000,))
    simulated = _simulated(workload, actions, 80, 0.0)
    engine = _vllm(tmp_path, workload, actions, 80, 0.0)
    real = sum(int(seen["load"][LOAD_FIELDS.index("preemptions")]) for seen in engine.scheduler.governor.guard.seen)
    assert real > simulated.preemptions


def test_candidates_past_the_output_limit_cost_vllm_time(tmp_path: Path) -> None:
    workload, actions = _workload(0), _actions(0, (4,), (256,))
    simulated = _simulated(workload, actions, 4000, 0.0)
    engine = _vllm(tmp_path, workload, actions, 4000, 0.0, charge_beyond_output=True)
    beyond = sum(step.beyond_output for step in engine.steps)
    assert beyond > 0
    assert simulated.log["end_s"][-1] < engine.now < 1.05 * simulated.log["end_s"][-1]


def test_one_step_ahead_requests_wait_a_step_longer_for_their_first_token(tmp_path: Path) -> None:
    workload, actions = _workload(0, span_s=20.0), _actions(0, (0, 2, 4), (700,))
    same = _vllm(tmp_path, workload, actions, 4000, 0.0)
    ahead = _vllm(tmp_path, workload, actions, 4000, 0.0, cls=GovernedAsyncScheduler)
    wait = [
        np.mean([engine.emitted[str(i)][0][0] - workload.arrival[i] for i in range(workload.num_requests)])
        for engine in (same, ahead)
    ]
    step = np.mean([step.end_s - step.start_s for step in same.steps])
    assert 0.0 < wait[1] - wait[0] < 2.0 * step
