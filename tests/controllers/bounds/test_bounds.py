"""The bounds: below every fixed setting and every controller, exact about the engine they copy, refused elsewhere."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from controllers.analytic import Analytic
from controllers.bounds.clairvoyant import PeekingController, PeekingError
from controllers.bounds.oracle import Oracle
from controllers.bounds.oracle_grid import OracleGrid, best_fixed_pair
from controllers.bounds.rollout import FORESEEN, UNBOUNDED, Outlook, Plan, Scratch, new_scratch, roll
from controllers.controller import Controller
from controllers.fixed import Fixed, constant
from controllers.mpc import Mpc
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.fork import fork
from engine.core.metrics import request_table
from engine.core.objective import Prices, charged
from engine.latency.lookup import LookupTable
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.source import SyntheticSource
from engine.workload.workload import Workload, offsets, run_lengths
from runs.simulated import Charge, serve
from tests.controllers.observed import observation
from tests.engine.core.cases import Figures

GRID = ActionGrid(candidate_choices=(0, 1, 2, 4, 8), budget_choices=(64, 256, 1024, 4096))


def _workload(rate: float, requests: int, seed: int, lengths: str = "lmsys_chat_1m") -> Workload:
    source = SyntheticSource(
        name="poisson",
        arrivals=PoissonArrivals(rate=rate),
        lengths=NamedLengths(name=lengths),
        num_requests=requests,
    )
    return source.draw(seed)


def _simulator(workload: Workload, ttft_target: float = 1.0, **limits: Any) -> Simulator:
    config = EngineConfig(name="vicuna_7b_a100", latency="vicuna_7b_a100", **limits)
    return Simulator(config, [workload], ttft_target=ttft_target)


@lru_cache
def _plant() -> Plant:
    engine = _simulator(_workload(1.0, 1, 0))
    limits = engine.limits
    choices = (GRID.candidate_choices, GRID.budget_choices)
    capacity = limits.total_blocks * limits.block_size
    table = LookupTable.load_or_fit(engine.latency, *choices, limits.max_num_seqs, capacity)
    return Plant(grid=GRID, predict=lambda: table)


def _cost(controller: Controller, simulator: Simulator, charge: Charge = "constant") -> float:
    """Objective of a whole run, summed over requests."""
    serve(simulator, simulator.workloads[0], controller, _plant(), charge)
    assert int(simulator.state.totals[0]["finished"]) == simulator.workloads[0].num_requests
    return charged(simulator.state, 0, Prices())


def _bytes(simulator: Simulator) -> bytes:
    return b"".join(column.tobytes() for column in request_table(simulator.requests()).values())


def _written(arrival: list[float], prompt: list[int], rank: list[list[int]]) -> Workload:
    """Requests with these ranks of the target's tokens."""
    output = [len(ranks) for ranks in rank]
    flat = np.array([r for ranks in rank for r in ranks], dtype=np.uint8)
    offset = offsets(output)
    return Workload(
        name="by hand",
        arrival=np.array(arrival),
        prompt_tokens=np.array(prompt, dtype=np.int32),
        output_tokens=np.array(output, dtype=np.int32),
        offset=offset,
        run_length=run_lengths(flat, offset),
        rank=flat,
        confidence=np.full(flat.size, 0.5, dtype=np.float32),
    )


@pytest.mark.parametrize(
    ("rate", "lengths", "ttft_target"),
    [(2.0, "lmsys_chat_1m", 1.0), (3.0, "arxiv", 1.0), (6.0, "sharegpt", 0.5)],
)
def test_oracle_is_below_the_best_fixed_pair_and_below_every_controller(
    rate: float, lengths: str, ttft_target: float
) -> None:
    """Idle, overload and in between; the best fixed pair is found among all of them, one by one."""
    simulator = _simulator(_workload(rate, 60, 3, lengths), ttft_target)
    fixed = [
        _cost(Fixed(candidates=c, token_budget=n), simulator)
        for c in GRID.candidate_choices
        for n in GRID.budget_choices
    ]
    grid, oracle = _cost(OracleGrid(), simulator), _cost(Oracle(), simulator)
    assert grid == min(fixed)
    assert oracle <= grid
    for controller in (Analytic(ttft_target=ttft_target), Mpc(ttft_target=ttft_target)):
        assert oracle <= _cost(controller, simulator), controller.label()


@settings(max_examples=40)
@given(
    st.lists(
        st.tuples(st.floats(0.0, 2.0), st.integers(1, 3000), st.lists(st.integers(0, 1), min_size=1, max_size=60)),
        min_size=1,
        max_size=12,
    ),
    st.sampled_from([0.05, 1.0]),
    st.sampled_from([230, 1000]),
)
def test_no_fixed_pair_ever_beats_the_oracle(
    requests: list[tuple[float, int, list[int]]], ttft_target: float, blocks: int
) -> None:
    """Whatever the requests, also where the cache is so small that they are preempted."""
    requests = sorted(requests)
    workload = _written(*(list(part) for part in zip(*requests, strict=True)))  # type: ignore[arg-type]
    simulator = _simulator(workload, ttft_target, num_kv_blocks=blocks)
    oracle = _cost(Oracle(), simulator)
    for c in GRID.candidate_choices:
        for n in GRID.budget_choices:
            assert oracle <= _cost(Fixed(candidates=c, token_budget=n), simulator)


def test_where_agreements_alternate_the_oracle_drafts_what_will_be_accepted() -> None:
    """A run of 8 agreements every other time: it drafts 8, then 0, and beats every fixed pair by doing so."""
    simulator = _simulator(_written([0.0], [32], [[1] + ([1] + [0] * 8 + [1]) * 10]))
    controller = Oracle()
    log = serve(simulator, simulator.workloads[0], controller, _plant(), recording=True).iterations
    oracle = charged(simulator.state, 0, Prices())
    decoding = log[log["num_decodes"] > 0]
    assert decoding["candidates"].tolist() == [0, 8] * 10
    assert decoding["emitted_tokens"].tolist() == [1, 9] * 10
    for c in GRID.candidate_choices:
        for n in GRID.budget_choices:
            assert oracle < 0.99 * _cost(Fixed(candidates=c, token_budget=n), simulator)


def test_a_prompt_that_can_wait_is_held_back_until_the_decode_before_it_is_done() -> None:
    """Budgets that keep the second prompt's deadline slow the first request, unless they come after its last token."""
    simulator = _simulator(_written([0.0, 0.05], [64, 12000], [[1] * 40, [1] * 2]), ttft_target=1.7)
    oracle = _cost(Oracle(), simulator)
    foresight = request_table(simulator.requests())
    assert foresight["ttft_s"][1] <= 1.7
    assert oracle < 0.9 * _cost(OracleGrid(), simulator)
    assert foresight["tpot_s"][0] < 0.9 * request_table(simulator.requests())["tpot_s"][0]


@pytest.mark.parametrize("blocks", [0, 300])
@pytest.mark.parametrize("before", [0, 7, 40, 90])
@pytest.mark.parametrize("pair", [(0, 64), (4, 1024)])
def test_a_copy_rolled_to_its_end_is_charged_what_the_engine_is(
    pair: tuple[int, int], before: int, blocks: int
) -> None:
    """Also with a cache so small that requests are preempted, which a copy renumbers."""
    simulator = _simulator(_workload(30.0, 80, 5), ttft_target=0.3, num_kv_blocks=blocks)
    engine = Figures(simulator.state)
    for _ in range(before):
        simulator.step(0, 2, 256)
    while blocks and before and engine["preemptions"] == 0:
        simulator.step(0, 2, 256)
    prices = Prices().per_unit(0.3)
    scratch = new_scratch(simulator, GRID.candidates, GRID.budgets)
    _fork(simulator, scratch)
    earlier = charged(simulator.state, 0, Prices())
    outlook = Outlook(1.0, 1.0, 1.0, *prices)
    plan = Plan(pair[1], pair[1], 1.0, pair[0])
    arguments = (plan, 1e9, 1e9, 0.0, outlook, UNBOUNDED)
    rolled = roll(scratch, *arguments)
    again = roll(scratch, *arguments)
    simulator.run_to_end(simulator.loop(constant(*pair)))
    assert rolled == again, "a rollout leaves its origin as it was"
    assert rolled.cost == pytest.approx(charged(simulator.state, 0, Prices()) - earlier, rel=1e-9)


def _fork(simulator: Simulator, scratch: Scratch) -> None:
    """Make the scratch's origin a copy of the simulator that has been charged nothing."""
    origin = scratch.origin
    fork(simulator.state, 0, simulator.system.feed, origin.state, origin.feed, 1e9)
    for name in ("tpot_cost", "violations", "lateness"):
        origin.state.totals[name] = 0


def test_what_is_unfinished_is_charged_by_hand() -> None:
    """One request of 5 tokens decodes, one of 3 waits; a token takes 10 ms, a prompt token 1 ms."""
    simulator = _simulator(_written([0.0, 0.0], [64, 100], [[1] * 5, [1] * 3]), ttft_target=0.05)
    simulator.step(0, 0, 64)
    now = float(simulator.state.instances["now"][0])
    scratch = new_scratch(simulator, GRID.candidates, GRID.budgets)
    _fork(simulator, scratch)
    outlook = Outlook(token_s=0.01, prefill_s=0.001, interference=0.003, second=20.0, violation=2.0, lateness=7.0)
    until = now - 1e-6
    plan = Plan(64, 64, 1.0, FORESEEN)
    rolled = roll(scratch, plan, until, until, 0.0, outlook, UNBOUNDED)
    decoding = 20.0 * 4 / 4 * 0.01
    late = 2.0 + 7.0 * (now + 0.1 - 0.05)
    waiting = late + 20.0 * 2 / 2 * 0.01
    assert now < 0.05
    assert rolled.cost == pytest.approx(decoding + waiting + 0.003 * 100)


def test_the_best_fixed_pair_is_the_first_of_equals() -> None:
    """One token and no queue: c is never used, and every budget that takes the prompt in one go is as good."""
    simulator = _simulator(_written([0.0], [64], [[1]]), ttft_target=0.001)
    best = best_fixed_pair(simulator, GRID, Prices())
    assert (best.candidates, best.token_budget) == (0, 4096)
    assert int(simulator.state.totals[0]["iterations"]) == 0, "the workload is loaded afresh"


def test_the_chosen_pair_is_in_the_open() -> None:
    controller = OracleGrid()
    simulator = _simulator(_workload(2.0, 30, 1))
    assert (controller.candidates, controller.token_budget) == (None, None)
    cost = _cost(controller, simulator)
    assert controller.candidates is not None
    assert controller.token_budget is not None
    assert _cost(Fixed(candidates=controller.candidates, token_budget=controller.token_budget), simulator) == cost


def test_prices_decide() -> None:
    """With deadlines for nothing, the pair is the one of the lowest TPOT; with TPOT nearly so, of the fewest misses."""
    simulator = _simulator(_workload(12.0, 60, 2, "sharegpt"), ttft_target=0.3)
    runs: dict[tuple[int, int], NDArray[np.void]] = {}
    for c in GRID.candidate_choices:
        for n in GRID.budget_choices:
            _cost(Fixed(candidates=c, token_budget=n), simulator)
            runs[c, n] = simulator.state.totals[0].copy()
    tpot = best_fixed_pair(simulator, GRID, Prices(violation=0.0, lateness=0.0))
    late = best_fixed_pair(simulator, GRID, Prices(tpot_target=1e6, lateness=0.0))
    assert runs[tpot.candidates, tpot.token_budget]["tpot_cost"] == min(run["tpot_cost"] for run in runs.values())
    assert runs[late.candidates, late.token_budget]["violations"] == min(run["violations"] for run in runs.values())
    assert tpot != late


@pytest.mark.parametrize("kind", [OracleGrid, Oracle])
def test_the_same_seed_gives_the_same_bytes_also_from_a_used_bound(kind: type[PeekingController]) -> None:
    used = kind()
    simulator = _simulator(_workload(5.0, 40, 8))
    _cost(used, simulator)
    simulator.load(0, _workload(5.0, 40, 4))
    runs = []
    for controller in (used, used, kind()):
        _cost(controller, simulator)
        runs.append(_bytes(simulator))
    assert runs[0] == runs[1] == runs[2]


@pytest.mark.parametrize("kind", [OracleGrid, Oracle])
@pytest.mark.parametrize("charge", ["constant", "measured", "off"])
def test_a_bound_is_never_charged_for_thinking(kind: type[PeekingController], charge: Charge) -> None:
    simulator = _simulator(_workload(5.0, 20, 0))
    assert kind.peeks
    assert _cost(kind(), simulator, charge) == _cost(kind(), simulator, "off")


@pytest.mark.parametrize("kind", [OracleGrid, Oracle])
def test_a_bound_is_refused_where_there_is_no_simulator(kind: type[PeekingController]) -> None:
    controller = kind()
    controller.reset(_plant())
    assert "bound" in controller.label()
    for ask in (controller.choose, controller.act):
        with pytest.raises(PeekingError, match="is a bound, not a controller"):
            ask(observation(num_decodes=1))


@pytest.mark.parametrize("kind", [OracleGrid, Oracle])
def test_a_bound_is_refused_in_mid_run(kind: type[PeekingController]) -> None:
    simulator = _simulator(_workload(5.0, 20, 0))
    controller = kind()
    controller.reset(_plant())
    simulator.step(0, 0, 64)
    with pytest.raises(ValueError, match="already run 1 iterations"):
        controller.loop(simulator, 0.0)


@pytest.mark.parametrize(
    "fields", [{"horizons": ()}, {"horizons": (0.0,)}, {"every": -1.0}, {"tpot_target": 0.0}, {"horizon": 1.0}], ids=str
)
def test_an_impossible_setting_is_refused_by_name(fields: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Oracle(**fields)
