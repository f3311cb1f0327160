"""Model predictive control: rollouts by hand, service on traffic, and nothing seen that telemetry does not hold."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from controllers.analytic import Analytic
from controllers.compiled import KernelController
from controllers.fixed import Fixed
from controllers.forecast import Now, predicted_cost, row_of
from controllers.mpc import Mpc
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.metrics import request_table
from engine.core.objective import Prices, charged
from engine.core.telemetry import NO_DEADLINE_S, as_dict
from engine.latency.lookup import LookupTable
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.source import SyntheticSource
from engine.workload.workload import Workload, offsets, run_lengths
from runs.simulated import serve
from tests.controllers.observed import linear_plant, observation

GRID = ActionGrid(candidate_choices=(0, 1, 2, 4), budget_choices=(64, 256, 1024))
LENGTH = 101.0
SECOND = 0.2
REQUEST = 0.3
TOKEN = 0.004
DRAIN_S = 0.0005
SHARE = 1e9
BUDGET = {64: 1, 256: 2, 1024: 3}


def _controller(seconds: float = 0.01, row_s: float = 0.0, **fields: Any) -> Mpc:
    """A controller on an engine whose iterations take `seconds` plus `row_s` per token."""
    controller = Mpc(**fields)
    controller.reset(linear_plant(seconds, row_s, 0.0, 0.0, GRID))
    return controller


def _cost(
    controller: Mpc,
    line: tuple[tuple[float, float, float], ...] = (),
    decodes: float = 0.0,
    budgets: tuple[int, int] = (64, 64),
    free_kv: float = 1e6,
    free_seqs: float = 100.0,
    switch_s: float = 0.0,
) -> float:
    """Predicted cost with (tokens, slack, arrival) in line and L, prices and drain as above; G = 1 everywhere."""
    (grid, settings), memory = controller.current.params, row_of.py_func(controller.current.memory, 0)
    memory.cheapest[:] = 0
    for row, (tokens, slack, arrival) in enumerate(line):
        memory.line.tokens[row], memory.line.slack[row] = tokens, slack
        memory.line.arrival[row], memory.line.requests[row] = arrival, 1.0
    now = Now(
        decodes=decodes,
        kv_tokens=100.0 * decodes,
        free_kv=free_kv,
        free_seqs=free_seqs,
        in_progress=False,
        rows=len(line),
        length=LENGTH,
        decode_cost=SECOND,
        request_cost=REQUEST,
        token_cost=TOKEN,
        drain_s=DRAIN_S,
    )
    first, tail = (BUDGET[n] for n in budgets)
    return float(predicted_cost(grid, settings, memory, now, first, tail, switch_s, SHARE))


def _decoding(seconds: float, requests: float = 1.0) -> float:
    """Cost of requests that decode for so long at 10 ms an iteration, and of what is left of them."""
    stay = math.exp(-seconds / 0.01 / LENGTH)
    return requests * (SECOND * 0.5 * (1.0 + stay) * seconds + REQUEST * stay)


@pytest.mark.parametrize("horizon_s", [0.01, 0.05, 0.2])
def test_one_decode_pays_while_it_fades(horizon_s: float) -> None:
    controller = _controller(horizon_s=horizon_s, switch_s=0.0)
    assert _cost(controller, decodes=1.0) == pytest.approx(_decoding(horizon_s))


def test_a_long_wait_is_taken_in_steps_of_a_quarter_of_the_length() -> None:
    """25 iterations, 25, ... of 10 ms up to a second: each charged at the mean of its two ends."""
    cost, batch = 0.0, 1.0
    for _ in range(4):
        after = batch * math.exp(-25 / LENGTH)
        cost += SECOND * 0.5 * (batch + after) * 0.25
        batch = after
    assert _cost(_controller(horizon_s=1.0), decodes=1.0) == pytest.approx(cost + REQUEST * batch)


@pytest.mark.parametrize(
    ("slack", "late"),
    [
        # The first token comes after two iterations, at 20 ms; 70 % of the slack is free of risk.
        (0.05, 0.0),
        (0.025, 2.0 / 3.0),
        (0.02, 2.0),
        (0.015, 2.0 + 0.005),
        (-0.5, 0.02),
        (1e30, 0.0),
    ],
)
def test_a_prompt_of_two_chunks_then_decodes(slack: float, late: float) -> None:
    controller = _controller(horizon_s=0.04, switch_s=0.0, guard=0.7)
    assert _cost(controller, ((100.0, slack, 0.0),)) == pytest.approx(late + _decoding(0.02))


@pytest.mark.parametrize(("tokens", "iterations"), [(640.0, 10), (641.0, 11)])
def test_the_first_token_comes_after_whole_iterations_however_many_are_one_step(tokens: float, iterations: int) -> None:
    controller = _controller(horizon_s=0.01 * iterations - 0.001, switch_s=0.0)
    end = 0.01 * iterations
    late, just, early = (
        _cost(controller, ((tokens, slack, 0.0),), decodes=1.0) for slack in (end - 0.001, end + 1e-6, end / 0.7 + 1e-6)
    )
    assert late - early == pytest.approx(2.0 + 0.001)
    assert just - early == pytest.approx(2.0, abs=1e-3)


def test_several_prompts_share_an_iteration() -> None:
    controller = _controller(horizon_s=0.01, switch_s=0.0)
    line = ((100.0, 0.5, 0.0), (100.0, 0.5, 0.0), (100.0, 0.5, 0.0))
    assert _cost(controller, line, budgets=(1024, 1024)) == pytest.approx(3.0 * REQUEST)
    # 256 tokens hold two prompts and 56 tokens of the third; 44 are left, and its token is 22 ms later, not late.
    assert _cost(controller, line, budgets=(256, 256)) == pytest.approx(3.0 * REQUEST + 44.0 * TOKEN)


def test_what_is_in_line_at_the_horizon_is_charged_as_a_drained_queue() -> None:
    controller = _controller(horizon_s=0.01, switch_s=0.0)
    line = ((64.0, 1e30, 0.0), (100.0, 0.03, 0.0), (200.0, -1.0, 0.0))
    # First tokens at 10 ms + 100 x 0.5 ms = 60 ms, 30 ms late, and at 160 ms.
    late = 2.0 + 0.03 + 0.16
    assert _cost(controller, line) == pytest.approx(3.0 * REQUEST + 300.0 * TOKEN + late)


def test_a_second_budget_takes_over() -> None:
    """64 tokens in the first iteration, then 256: 320 tokens are done after two."""
    controller = _controller(horizon_s=0.02, switch_s=0.01)
    both = _cost(controller, ((320.0, 1e30, 0.0),), budgets=(64, 256), switch_s=0.01)
    assert both == pytest.approx(REQUEST)
    assert _cost(controller, ((320.0, 1e30, 0.0),), budgets=(64, 64), switch_s=0.01) == pytest.approx(
        REQUEST + 192.0 * TOKEN
    )


@pytest.mark.parametrize("full", [{"free_kv": 50.0}, {"free_seqs": 0.0}], ids=str)
def test_a_prompt_without_room_waits_while_others_decode(full: dict[str, float]) -> None:
    controller = _controller(horizon_s=0.01, switch_s=0.0)
    waits = _decoding(0.01) + REQUEST + 64.0 * TOKEN
    assert _cost(controller, ((64.0, 1e30, 0.0),), decodes=1.0, **full) == pytest.approx(waits)


def test_an_expected_prompt_is_served_when_it_comes() -> None:
    controller = _controller(horizon_s=0.045, switch_s=0.0)
    assert _cost(controller, ((64.0, 1e30, 0.03),)) == pytest.approx(_decoding(0.01))


def test_a_cost_above_the_best_ends_a_rollout_early() -> None:
    controller = _controller(horizon_s=10.0)
    (grid, settings), memory = controller.current.params, row_of.py_func(controller.current.memory, 0)
    _cost(controller)
    now = Now(1000.0, 0.0, 1e6, 1.0, False, 0, 1e6, SECOND, REQUEST, TOKEN, DRAIN_S)
    assert 1.0 < predicted_cost(grid, settings, memory, now, 1, 1, 0.0, 1.0) < 1000.0 * SECOND * 10.0


def test_a_prompt_is_taken_at_once_where_it_costs_nothing_and_waits_where_it_costs_much() -> None:
    """Free tokens: the largest budget, as prompts left have a price. Dear ones: spread thinly over the slack."""
    urgent = observation(((900.0, 0.08),), num_decodes=2, decode_kv_tokens=200, free_kv_tokens=1e5, free_seqs=50)
    relaxed = observation(((900.0, 0.9),), num_decodes=2, decode_kv_tokens=200, free_kv_tokens=1e5, free_seqs=50)
    assert _controller(0.01, 0.0).choose(urgent)[1] == 1024
    assert _controller(0.01, 5e-5).choose(urgent)[1] == 1024
    assert _controller(0.01, 5e-5, prefill_price=0.0).choose(relaxed)[1] == 64


def test_with_nobody_waiting_c_has_the_lowest_time_per_token_and_n_is_the_largest() -> None:
    """10 ms + 2 ms per candidate and G = 1, 1.6, 1.96, 2.3056: 10, 7.5, 7.1, 7.8 ms a token."""
    controller = Mpc()
    controller.reset(linear_plant(0.010, 0.0, 0.0, 0.002, GRID))
    assert controller.choose(observation(num_decodes=8, decode_kv_tokens=300)) == (2, 1024)


def test_a_preempted_request_has_no_deadline() -> None:
    controller = _controller(0.01, 5e-5, prefill_price=0.0)
    load = {"num_decodes": 2.0, "decode_kv_tokens": 200.0, "free_kv_tokens": 1e5, "free_seqs": 50.0}
    assert controller.choose(observation(((900.0, NO_DEADLINE_S),), **load))[1] == 64
    assert controller.choose(observation(((900.0, 0.05),), **load))[1] == 1024


def test_the_controllers_own_target_counts_not_the_telemetrys() -> None:
    load = {"num_decodes": 2.0, "decode_kv_tokens": 200.0, "free_kv_tokens": 1e5, "free_seqs": 50.0}
    told_one = observation(((900.0, 0.08),), ttft_target_s=1.0, **load)
    told_two = observation(((900.0, 1.08),), ttft_target_s=2.0, **load)
    for target in (1.0, 2.0):
        actions = {
            _controller(0.01, 5e-5, prefill_price=0.0, ttft_target=target).choose(seen) for seen in (told_one, told_two)
        }
        assert len(actions) == 1


@pytest.mark.parametrize(
    "fields",
    [
        {"ttft_target": 0.0}, {"tpot_target": 0.0}, {"violation": -1.0}, {"horizon_s": 0.0}, {"switch_s": -0.1},
        {"guard": 0.0}, {"guard": 1.5}, {"prefill_price": -1.0}, {"rate_memory_s": 0.0}, {"switch_s": 1.0},
        {"horizons": 1.0},
    ],
    ids=str,
)  # fmt: skip
def test_an_impossible_setting_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Mpc(**fields)


# On traffic.


def _simulator(workload: Workload) -> Simulator:
    return Simulator(EngineConfig(name="vicuna_7b_a100", latency="vicuna_7b_a100"), [workload], ttft_target=1.0)


def _workload(rate: float, requests: int, seed: int, lengths: str = "azure_conv") -> Workload:
    source = SyntheticSource(
        name="poisson",
        arrivals=PoissonArrivals(rate=rate),
        lengths=NamedLengths(name=lengths),
        num_requests=requests,
    )
    return source.draw(seed)


@lru_cache
def _plant() -> Plant:
    engine, grid = _simulator(_workload(1.0, 1, 0)), ActionGrid()
    limits = engine.limits
    choices = (grid.candidate_choices, grid.budget_choices)
    capacity = limits.total_blocks * limits.block_size
    table = LookupTable.load_or_fit(engine.latency, *choices, limits.max_num_seqs, capacity)
    return Plant(grid=grid, predict=lambda: table)


def _serve(controller: KernelController, simulator: Simulator) -> NDArray[np.void]:
    controller.reset(_plant())
    log, _ = simulator.run_to_end(simulator.loop(controller.current, 50e-6), record_iterations=True)
    return log


def _with_another_future(workload: Workload, after: float) -> Workload:
    """The same until `after` (s), then other arrivals and prompts; outputs twice as long, ending in disagreement."""
    output = workload.output_tokens * 2
    rank = [
        np.concatenate([workload.rank[a:b], np.full(b - a, 3, dtype=np.uint8)])
        for a, b in zip(workload.offset[:-1], workload.offset[1:], strict=True)
    ]
    late = workload.arrival > after
    flat, offset = np.concatenate(rank), offsets(output)
    return Workload(
        name="another future",
        arrival=np.where(late, workload.arrival * 0.5 + 0.5 * after, workload.arrival),
        prompt_tokens=np.where(late, 77, workload.prompt_tokens).astype(np.int32),
        output_tokens=output,
        offset=offset,
        run_length=run_lengths(flat, offset),
        rank=flat,
        confidence=np.full(flat.size, 0.5, dtype=np.float32),
    )


def test_decisions_do_not_depend_on_the_future() -> None:
    """Until the first request ends, only what is to come differs: arrivals, prompts, lengths, agreements."""
    workload = _workload(8.0, 40, 6)
    log = _serve(Mpc(), known := _simulator(workload))
    table = request_table(known.requests())
    # Within 16 tokens of its end a request is cut short by its output limit, which the engine enforces.
    until = float(np.min(table["first_token_s"] + 0.6 * (table["finish_s"] - table["first_token_s"])))
    other = _with_another_future(workload, until)
    assert (other.arrival != workload.arrival).sum() > 5
    changed = _serve(Mpc(), _simulator(other))
    same = int(np.searchsorted(log["start_s"], until)) - 1
    assert same > 20
    assert len({tuple(pair) for pair in log[["candidates", "token_budget"]][:same].tolist()}) > 3
    for name in ("candidates", "token_budget", "start_s"):
        np.testing.assert_array_equal(log[name][:same], changed[name][:same])
    assert len(log) != len(changed)


def test_the_compiled_loop_and_single_decisions_are_the_same_run() -> None:
    workload = _workload(6.0, 60, 1)
    compiled, stepwise = _simulator(workload), _simulator(workload)
    log = _serve(Mpc(), compiled)
    controller = Mpc()
    controller.reset(_plant())
    actions, more = [], True
    while more:
        seen = stepwise.new_observation()
        stepwise.observe(0, seen)
        candidates, budget = controller.choose(as_dict(seen))
        actions.append((candidates, budget))
        more = stepwise.step(0, candidates, budget, 50e-6)
    assert len(set(actions)) > 5
    assert actions == list(zip(log["candidates"].tolist(), log["token_budget"].tolist(), strict=True))


def test_the_same_seed_gives_the_same_bytes_also_from_a_used_controller() -> None:
    used, runs = Mpc(), []
    _serve(used, _simulator(_workload(4.0, 50, 9)))
    for controller in (used, used, Mpc()):
        simulator = _simulator(_workload(6.0, 50, 4))
        _serve(controller, simulator)
        runs.append(b"".join(column.tobytes() for column in request_table(simulator.requests()).values()))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize(("rate", "lengths"), [(0.7, "azure_conv"), (3.0, "azure_conv"), (0.4, "azure_code")])
def test_on_traffic_it_is_about_as_good_as_the_optimizer_and_better_than_the_usual_setting(
    rate: float, lengths: str
) -> None:
    def cost(controller: KernelController) -> float:
        total = 0.0
        for seed in range(3):
            simulator = _simulator(workload := _workload(rate, 200, seed, lengths))
            serve(simulator, workload, controller, _plant())
            total += charged(simulator.state, 0, Prices())
        return total

    mpc = cost(Mpc())
    assert mpc <= 1.03 * cost(Analytic())
    assert mpc < cost(Fixed(candidates=3, token_budget=512))
