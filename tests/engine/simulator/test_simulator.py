"""Whole runs of the simulator: conservation, Little's law, queueing limits, determinism."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from controllers.analytic import Analytic
from controllers.compiled import KernelController
from controllers.fixed import Fixed, constant
from controllers.sarathi import Sarathi
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.metrics import request_table
from engine.core.state import FINISHED, PREFILL_ORDERS
from engine.latency.lookup import LookupTable
from engine.latency.model import LatencyModel
from engine.limits import Prefill
from engine.plant import Plant
from engine.simulator.loop import ITERATION
from engine.simulator.simulator import Simulator
from engine.workload.agreement import IidAgreement
from engine.workload.source import TraceSource
from engine.workload.workload import Workload, WorkloadError
from tests.engine.core.cases import Figures

A100 = EngineConfig(name="vicuna 7B", latency="vicuna_7b_a100")
TIGHT = EngineConfig(name="tight", latency="vicuna_7b_a100", num_kv_blocks=60, max_num_seqs=8, watermark=0.02)
LINEAR = LatencyModel.linear(0.01, 1e-5, per_request_s=1e-4, per_draft_step_s=1e-3)


def _workload(seed: int, requests: int = 300, rate: float = 10.0, longest: int = 400) -> Workload:
    rng = np.random.default_rng(seed)
    return Workload.build(
        f"random {seed}",
        np.cumsum(rng.exponential(1.0 / rate, requests)),
        rng.integers(1, longest, requests),
        rng.integers(1, longest // 2, requests),
        IidAgreement(alpha=0.7),
        seed,
    )


def _simulator(workload: Workload, config: EngineConfig = A100, latency: LatencyModel | None = None) -> Simulator:
    return Simulator(config, [workload], ttft_target=1.0, latency=latency)


def _run(
    workload: Workload,
    candidates: int = 3,
    token_budget: int = 256,
    config: EngineConfig = A100,
    latency: LatencyModel | None = None,
    decision_s: float = 0.0,
) -> tuple[Simulator, NDArray[np.void]]:
    """A simulator after its last request has finished, and its iteration log."""
    simulator = _simulator(workload, config, latency)
    loop = simulator.loop(constant(candidates, token_budget), decision_s)
    log, _ = simulator.run_to_end(loop, record_iterations=True)
    return simulator, log


def _assert_conserved(simulator: Simulator, log: NDArray[np.void]) -> None:
    """Every request has finished exactly once with its exact tokens, and memory was never over-committed."""
    engine, requests, workload = Figures(simulator.state), simulator.requests(), simulator.workloads[0]
    requests = requests[: workload.num_requests]
    assert engine["finished"] == workload.num_requests
    assert np.all(requests["phase"] == FINISHED)
    assert np.array_equal(requests["generated"], workload.output_tokens)
    assert engine["emitted_tokens"] == workload.num_positions
    assert np.all(requests["first_token"] > requests["arrival"])
    assert np.all(requests["admitted"] >= requests["arrival"])
    assert np.all(requests["last_token"] >= requests["first_token"])
    assert np.all(requests["accepted"] <= requests["drafted"])
    assert engine["lowest_free_blocks"] >= 0
    assert engine["free_blocks"] == engine["total_blocks"]
    assert not requests["blocks"].any()
    if len(log):
        assert log["emitted_tokens"].sum() == workload.num_positions
        prefilled = workload.prompt_tokens.sum()
        assert log["prefill_tokens"].sum() >= prefilled
        assert engine["preemptions"] > 0 or log["prefill_tokens"].sum() == prefilled


def _assert_never_idle_with_work(simulator: Simulator, log: NDArray[np.void]) -> None:
    """Between iterations the clock jumps only over times at which every released request has finished."""
    engine, requests = Figures(simulator.state), simulator.requests()
    requests = requests[: simulator.workloads[0].num_requests]
    begin = np.concatenate([[0.0], log["end_s"][:-1]])
    jumped = log["start_s"] - begin > 1e-9
    finished = np.sort(requests["last_token"])
    for start, end in zip(begin[jumped], log["start_s"][jumped], strict=True):
        arrived = np.searchsorted(requests["arrival"], start, side="right")
        assert arrived == np.searchsorted(finished, start + 1e-9, side="right")
        assert requests["arrival"][arrived] == pytest.approx(end, abs=1e-9)
    idle = (log["start_s"] - begin)[jumped].sum()
    assert engine["busy_s"] + idle == pytest.approx(engine["last_end"], rel=1e-9)
    assert engine["busy_s"] == pytest.approx((log["end_s"] - log["start_s"]).sum(), rel=1e-9)


def _in_system_from_log(workload: Workload, log: NDArray[np.void]) -> float:
    """Integral over time of the number of requests in the system, from batch sizes, waiting counts and arrivals."""
    duration = log["end_s"] - log["start_s"]
    waiting = log["waiting"].astype(float)
    idle_after = np.append(log["start_s"][1:] - log["end_s"][:-1] > 1e-9, True)
    waiting[idle_after] = 0.0
    total = float((duration * (log["num_decodes"] + log["num_prefills"] + waiting)).sum())
    iteration = np.searchsorted(log["end_s"], workload.arrival - 1e-9)
    during = workload.arrival > log["start_s"][iteration] + 1e-9
    # `waiting` is counted at the iteration's end, so it holds those who arrived meanwhile for too long.
    return total - float((workload.arrival - log["start_s"][iteration])[during].sum())


CONFIGS = pytest.mark.parametrize("config", [A100, TIGHT], ids=lambda config: config.name)


@CONFIGS
@pytest.mark.parametrize(("candidates", "token_budget"), [(0, 64), (3, 256), (8, 4096), (1, 1)])
def test_every_request_finishes_exactly_once_with_its_exact_tokens(
    config: EngineConfig, candidates: int, token_budget: int
) -> None:
    workload = _workload(0)
    simulator, log = _run(workload, candidates, token_budget, config)
    _assert_conserved(simulator, log)
    _assert_never_idle_with_work(simulator, log)
    assert (simulator.state.totals["preemptions"][0] > 0) == (config is TIGHT and token_budget > 1)


@CONFIGS
@pytest.mark.parametrize("prefill", PREFILL_ORDERS[1:])
@pytest.mark.parametrize(("candidates", "token_budget"), [(0, 2048), (3, 64)])
def test_however_prompts_are_scheduled_every_request_finishes_exactly_once(
    config: EngineConfig, prefill: Prefill, candidates: int, token_budget: int
) -> None:
    config = config.model_copy(update={"prefill": prefill})
    simulator, log = _run(_workload(0), candidates, token_budget, config)
    _assert_conserved(simulator, log)
    _assert_never_idle_with_work(simulator, log)
    apart = (log["num_decodes"] == 0) | (log["num_prefills"] == 0)
    assert apart.all() == (prefill in ("first", "turns"))
    assert np.all(log["kv_tokens"][log["num_decodes"] == 0] == 0)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 2**32),
    st.integers(1, 60),
    st.floats(0.5, 200.0),
    st.integers(0, 8),
    st.integers(1, 600),
    st.integers(35, 80),
    st.integers(1, 12),
)
def test_conservation_holds_on_random_workloads_and_engines(
    seed: int, requests: int, rate: float, candidates: int, token_budget: int, blocks: int, seqs: int
) -> None:
    config = TIGHT.model_copy(update={"num_kv_blocks": blocks, "max_num_seqs": seqs})
    workload = _workload(seed, requests, rate, 360)
    simulator, log = _run(workload, candidates, token_budget, config, LINEAR)
    _assert_conserved(simulator, log)
    _assert_never_idle_with_work(simulator, log)


@CONFIGS
@pytest.mark.parametrize("rate", [0.5, 8.0, 80.0])
def test_littles_law_holds_from_the_request_table_and_from_the_iteration_log(config: EngineConfig, rate: float) -> None:
    workload = _workload(1, 1000, rate)
    simulator, log = _run(workload, config=config)
    requests = simulator.requests()
    span = float(simulator.state.instances["last_end"][0])
    rate_times_wait = (len(requests) / span) * (requests["last_token"] - requests["arrival"]).mean()
    events = np.concatenate([requests["arrival"], requests["last_token"]])
    steps = np.repeat([1, -1], len(requests))
    order = np.argsort(events, kind="stable")
    in_system_from_table = (np.cumsum(steps[order])[:-1] * np.diff(events[order])).sum() / span
    assert in_system_from_table == pytest.approx(rate_times_wait, rel=0.01)
    assert _in_system_from_log(workload, log) / span == pytest.approx(rate_times_wait, rel=0.01)


def test_littles_law_is_an_identity_of_the_iteration_log() -> None:
    workload = _workload(2, 2000, 20.0)
    simulator, log = _run(workload)
    requests = simulator.requests()
    in_system = (requests["last_token"] - requests["arrival"]).sum()
    assert _in_system_from_log(workload, log) == pytest.approx(in_system, rel=1e-6)


def _single_server(arrival: NDArray[np.float64], prompt: NDArray[np.int64], latency: LatencyModel) -> Simulator:
    """One request at a time, whose service is one prefill of its whole prompt."""
    one = np.ones(len(arrival), dtype=np.int64)
    workload = Workload.build("single server", arrival, prompt, one, IidAgreement(alpha=0.5), 0)
    config = EngineConfig(name="single server", latency="linear", max_num_seqs=1)
    simulator = _simulator(workload, config, latency)
    simulator.run_to_end(simulator.loop(constant(0, 65536)))
    return simulator


def _lindley(arrival: NDArray[np.float64], service: NDArray[np.float64]) -> NDArray[np.float64]:
    """Waiting times of a first-come-first-served single server."""
    wait = np.zeros(len(arrival))
    for i in range(1, len(arrival)):
        wait[i] = max(0.0, wait[i - 1] + service[i - 1] - (arrival[i] - arrival[i - 1]))
    return wait


@pytest.mark.parametrize("utilisation", [0.3, 0.6, 0.8])
def test_one_seat_and_constant_service_is_the_m_d_1_queue(utilisation: float) -> None:
    service_s, requests = 0.05, 400_000
    arrival = np.cumsum(np.random.default_rng(3).exponential(service_s / utilisation, requests))
    simulator = _single_server(arrival, np.ones(requests, dtype=np.int64), LatencyModel.linear(service_s))
    table = simulator.requests()
    np.testing.assert_allclose(table["last_token"] - table["admitted"], service_s, atol=1e-9)
    wait = table["admitted"] - arrival
    np.testing.assert_allclose(wait, _lindley(arrival, np.full(requests, service_s)), atol=1e-5)
    pollaczek_khinchine = utilisation * service_s / (2.0 * (1.0 - utilisation))
    assert wait.mean() == pytest.approx(pollaczek_khinchine, rel=0.03)


@pytest.mark.parametrize("utilisation", [0.3, 0.6])
def test_one_seat_and_geometric_prompts_is_the_m_m_1_queue(utilisation: float) -> None:
    mean_tokens, per_token_s, requests = 500, 1e-4, 400_000
    rng = np.random.default_rng(4)
    prompt = rng.geometric(1.0 / mean_tokens, requests)
    arrival = np.cumsum(rng.exponential(mean_tokens * per_token_s / utilisation, requests))
    simulator = _single_server(arrival, prompt, LatencyModel.linear(0.0, per_token_s))
    table = simulator.requests()
    np.testing.assert_allclose(table["last_token"] - table["admitted"], prompt * per_token_s, atol=1e-8)
    in_system = (table["last_token"] - arrival).mean()
    service_rate = 1.0 / (mean_tokens * per_token_s)
    assert in_system == pytest.approx(1.0 / (service_rate * (1.0 - utilisation)), rel=0.03)


def _table_bytes(simulator: Simulator, i: int = 0) -> bytes:
    return b"".join(column.tobytes() for column in request_table(simulator.requests(i)).values())


@CONFIGS
def test_the_same_workload_twice_gives_identical_bytes(config: EngineConfig) -> None:
    (one, first), (two, second) = (_run(_workload(5), config=config) for _ in range(2))
    assert _table_bytes(one) == _table_bytes(two)
    assert first.tobytes() == second.tobytes()
    assert one.state.totals.tobytes() == two.state.totals.tobytes()


def test_a_used_simulator_repeats_a_run_bit_for_bit() -> None:
    workload = _workload(6)
    simulator, first = _run(workload, config=TIGHT)
    table, engines = _table_bytes(simulator), simulator.state.totals.tobytes()
    simulator.load(0, workload)
    second, _ = simulator.run_to_end(simulator.loop(constant(3, 256)), record_iterations=True)
    assert first.tobytes() == second.tobytes()
    assert _table_bytes(simulator) == table
    assert simulator.state.totals.tobytes() == engines


@CONFIGS
@pytest.mark.parametrize("decision_s", [0.0, 1e-3])
def test_the_loop_is_the_same_stepwise_logged_and_in_chunks(config: EngineConfig, decision_s: float) -> None:
    workload = _workload(7)
    logged, log = _run(workload, config=config, decision_s=decision_s)
    unlogged = _simulator(workload, config)
    unlogged.run_to_end(unlogged.loop(constant(3, 256), decision_s))
    stepwise = _simulator(workload, config)
    while stepwise.step(0, 3, 256, decision_s):
        pass
    chunks = _simulator(workload, config)
    loop, more, rows = chunks.loop(constant(3, 256), decision_s), True, []
    while more:
        part = np.zeros(17, dtype=ITERATION)
        count, more = loop(17, part)
        rows.append(part[:count])
    assert np.concatenate(rows).tobytes() == log.tobytes()
    for other in (unlogged, stepwise, chunks):
        assert _table_bytes(other) == _table_bytes(logged)
        assert other.state.totals.tobytes() == logged.state.totals.tobytes()
        assert np.array_equal(other.state.itl, logged.state.itl)


def test_a_decision_charge_shifts_the_clock_by_exactly_itself_every_iteration() -> None:
    charge = 2.0**-10
    latency = LatencyModel.linear(2.0**-6)
    workload = Workload.build("one", [1.0], [1], [9], IidAgreement(alpha=0.0), 0)
    (free, _), (charged, log) = (_run(workload, 0, 64, A100, latency, decision_s) for decision_s in (0.0, charge))
    iterations = int(free.state.totals["iterations"][0])
    assert iterations == 9
    shift = charged.requests()["last_token"][0] - free.requests()["last_token"][0]
    assert shift == iterations * charge
    assert charged.state.totals["busy_s"][0] == iterations * 2.0**-6
    np.testing.assert_array_equal(log["start_s"] - np.append(1.0, log["end_s"][:-1]), charge)


def test_a_request_that_arrives_while_the_controller_thinks_joins_the_batch() -> None:
    workload = Workload.build("two", [0.0, 0.25], [4, 4], [1, 1], IidAgreement(alpha=0.0), 0)
    _, log = _run(workload, 0, 64, A100, LatencyModel.linear(1.0), decision_s=0.5)
    assert log["num_prefills"].tolist() == [2]
    assert (log["start_s"][0], log["end_s"][0]) == (0.5, 1.5)


def test_a_larger_workload_can_follow_a_smaller_one_and_a_smaller_one_the_larger() -> None:
    small, large = _workload(8, 20), _workload(9, 500)
    simulator, _ = _run(small)
    for workload in (large, small, large):
        simulator.load(0, workload)
        log, _ = simulator.run_to_end(simulator.loop(constant(3, 256)), record_iterations=True)
        _assert_conserved(simulator, log)
        fresh, expected = _run(workload)
        assert log.tobytes() == expected.tobytes()
        assert _table_bytes(simulator) == _table_bytes(fresh)


def test_engines_of_one_simulator_do_not_touch_each_other() -> None:
    workloads = [_workload(10, 40), _workload(11, 80), _workload(12, 10)]
    together = Simulator(A100, workloads, ttft_target=1.0)
    more = [True] * 3
    while any(more):
        more = [running and together.step(e, e, 128) for e, running in enumerate(more)]
    for e, workload in enumerate(workloads):
        alone, _ = _run(workload, e, 128)
        assert _table_bytes(together, e) == _table_bytes(alone)


def test_more_candidates_never_change_what_is_generated_only_when() -> None:
    workload = _workload(13)
    tables = [_run(workload, candidates)[0].state.requests for candidates in (0, 2, 8)]
    for table in tables:
        assert np.array_equal(table["generated"], workload.output_tokens)
    steps = [table["drafted"].sum() for table in tables]
    assert steps[0] == 0 < steps[1] < steps[2]


def test_accepted_candidates_are_the_agreements_of_the_workload() -> None:
    workload = Workload.build("one", [0.0], [8], [200], IidAgreement(alpha=0.7), 3)
    simulator, log = _run(workload, candidates=4)
    position, emitted = 0, []
    while position < 200:
        if position:
            run = 0
            while run < min(4, 199 - position) and workload.rank[position + run] == 0:
                run += 1
            position += run
            emitted.append(run + 1)
        else:
            emitted.append(1)
        position += 1
    assert log["emitted_tokens"].tolist() == emitted
    assert simulator.requests()["accepted"][0] == sum(emitted) - len(emitted)


def test_progress_is_reported_up_to_the_last_request() -> None:
    simulator, seen = _simulator(_workload(14)), []
    simulator.run_to_end(simulator.loop(constant(0, 64)), on_progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (300, 300)


def test_a_request_that_can_never_fit_is_refused_by_row() -> None:
    workload = Workload.build("long", [0.0, 1.0], [10, 2000], [5, 5], IidAgreement(alpha=0.5), 0)
    with pytest.raises(WorkloadError, match="row 2"):
        _simulator(workload, TIGHT)


TRACES = ("azure2023_code_0-30min.csv", "azure2023_conv_0-30min.csv")
ENGINES = ("vicuna_7b_a100", "vicuna_13b_a100", "vicuna_33b_a100")
GOVERNORS: dict[str, KernelController] = {
    "fixed": Fixed(candidates=3, token_budget=512),
    "sarathi": Sarathi(total_budget=512),
    "analytic": Analytic(),
}


@pytest.mark.parametrize("controller", GOVERNORS.values(), ids=GOVERNORS)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("trace", TRACES)
def test_recorded_traffic_is_served_to_the_last_token(
    data_dir: Path, trace: str, engine: str, controller: KernelController
) -> None:
    path = data_dir / "requests" / trace
    if not path.is_file():
        pytest.skip(f"no trace {path}")
    workload = TraceSource(path=path).draw(seed=0)
    simulator = _simulator(workload, EngineConfig(name=engine, latency=engine))
    grid = ActionGrid()
    limits = simulator.limits

    def predict() -> LookupTable:
        capacity = limits.total_blocks * limits.block_size
        choices = (grid.candidate_choices, grid.budget_choices)
        return LookupTable.load_or_fit(simulator.latency, *choices, limits.max_num_seqs, capacity)

    controller.reset(Plant(grid=grid, predict=predict))
    log, _ = simulator.run_to_end(simulator.loop(controller.current, 0.0), record_iterations=True)
    _assert_conserved(simulator, log)
    _assert_never_idle_with_work(simulator, log)
    requests = simulator.requests()
    if log["token_budget"].min() > 0:
        # With a budget of 0 a request in the middle of its prompt is in no batch, so the log does not count it.
        in_system = (requests["last_token"] - requests["arrival"]).sum()
        assert _in_system_from_log(workload, log) == pytest.approx(in_system, rel=0.01)
