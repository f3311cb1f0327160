"""Fixed, Sarathi and the poster's optimizer: what they choose, and that compiled and stepwise runs are the same."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import ValidationError

from controllers.compiled import KernelController
from controllers.fixed import Fixed
from controllers.poster import G_WEIGHT, Poster
from controllers.sarathi import Sarathi
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.choices import ActionError
from engine.core.telemetry import (
    DECODE_KV_TOKENS,
    LAST_CANDIDATES,
    LOAD_FIELDS,
    NO_DEADLINE_S,
    NUM_DECODES,
    RATE_BANDS,
    TTFT_TARGET_S,
    as_dict,
)
from engine.latency.lookup import LookupGrid, LookupTable
from engine.latency.model import LatencyModel
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.agreement import IidAgreement
from engine.workload.workload import Workload

GRID = ActionGrid(candidate_choices=(0, 1, 3, 5), budget_choices=(64, 256, 1024))
BATCH = np.array([0.0, 8.0, 64.0])
KV_TOKENS = np.array([0.0, 1000.0, 20000.0])
QUEUE_ROWS = 4


def _plant(seconds: NDArray[np.float64]) -> Plant:
    """A plant whose predictions are exactly `seconds` (batch, KV tokens, c, 0 and n) at the nodes."""
    lookup = LookupGrid(BATCH, KV_TOKENS, GRID.candidates, np.append(0, GRID.budgets), np.ascontiguousarray(seconds))
    return Plant(grid=GRID, predict=lambda: LookupTable(lookup, {}))


def _linear_plant(latency: LatencyModel) -> Plant:
    b, _, c, n = np.meshgrid(BATCH, KV_TOKENS, GRID.candidates, np.append(0, GRID.budgets), indexing="ij")
    tables = latency.tables
    seconds = tables.fixed_s + tables.linear_slope_s * (b * (1 + c) + n) + tables.draft_step_s[1] * c
    return _plant(seconds)


def _random_plant(seed: int) -> Plant:
    shape = (len(BATCH), len(KV_TOKENS), len(GRID.candidates), len(GRID.budgets) + 1)
    return _plant(np.random.default_rng(seed).uniform(0.005, 0.5, shape))


def _observation(
    num_decodes: int = 0, kv_tokens: int = 0, queue: tuple[tuple[int, float], ...] = ()
) -> dict[str, NDArray[np.float32]]:
    load = np.zeros(len(LOAD_FIELDS), dtype=np.float32)
    load[NUM_DECODES], load[DECODE_KV_TOKENS], load[TTFT_TARGET_S] = num_decodes, kv_tokens, 1.0
    rows = np.zeros((QUEUE_ROWS + 1, 2), dtype=np.float32)
    rows[: len(queue)] = np.array(queue, dtype=np.float32).reshape(-1, 2)
    counts = {"drafted": 5, "accepted": 5, "rates": RATE_BANDS}
    return {"load": load, "queue": rows, **{name: np.zeros(size, np.float32) for name, size in counts.items()}}


def test_fixed_chooses_its_pair_and_finds_it_on_the_grid() -> None:
    controller = Fixed(candidates=3, token_budget=256)
    controller.reset(_random_plant(0))
    assert controller.choose(_observation(5)) == (3, 256)
    assert GRID.values(controller.act(_observation(5))) == (3, 256)
    assert controller.label() == "fixed c=3 n=256"


@pytest.mark.parametrize(
    ("candidates", "token_budget", "message"),
    [(2, 256, r"candidates=2 .*\[0, 1, 3, 5\]"), (3, 100, r"token_budget=100 .*\[64, 256, 1024\]")],
)
def test_fixed_off_the_grid_is_an_error_that_names_the_key_and_the_choices(
    candidates: int, token_budget: int, message: str
) -> None:
    controller = Fixed(candidates=candidates, token_budget=token_budget)
    controller.reset(_random_plant(0))
    with pytest.raises(ActionError, match=message):
        controller.act(_observation())


@pytest.mark.parametrize(
    "fields",
    [{"candidates": -1}, {"token_budget": 0}, {"candidates": 33}, {"candidate": 3}, {"token_budget": "many"}],
)
def test_an_impossible_fixed_setting_is_refused_by_name(fields: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Fixed(**fields)


def test_a_controller_that_was_not_reset_says_so() -> None:
    with pytest.raises(RuntimeError, match=r"Fixed.reset"):
        Fixed().act(_observation())


def _sarathi(total: int, candidates: int) -> Sarathi:
    controller = Sarathi(total_budget=total, candidates=candidates)
    controller.reset(_random_plant(0))
    return controller


@given(st.integers(1, 4096), st.integers(0, 8), st.integers(0, 300))
def test_sarathi_gives_prompts_what_the_decodes_leave(total: int, candidates: int, num_decodes: int) -> None:
    c, n = _sarathi(total, candidates).choose(_observation(num_decodes))
    assert c == candidates
    left = total - num_decodes * (1 + candidates)
    assert n == max(left, 0 if num_decodes else 1)


def test_sarathi_never_stalls_an_engine_that_only_prefills() -> None:
    assert _sarathi(1, 8).choose(_observation(0)) == (8, 1)


@pytest.mark.parametrize("fields", [{"total_budget": 0}, {"candidates": -1}, {"candidates": 33}, {"total": 3}])
def test_an_impossible_sarathi_setting_is_refused_by_name(fields: dict) -> None:
    with pytest.raises(ValidationError, match=next(iter(fields))):
        Sarathi(**fields)


def _predicted(plant: Plant, num_decodes: int, kv_tokens: int) -> NDArray[np.float64]:
    """T(c, n) at this load, (nC, nN): linear over cached tokens, then over decodes."""
    seconds = plant.lookup.grid.seconds
    by_batch = np.empty(seconds.shape[0:1] + seconds.shape[2:])
    for b in range(len(BATCH)):
        for c, n in np.ndindex(*seconds.shape[2:]):
            by_batch[b, c, n] = np.interp(kv_tokens, KV_TOKENS, seconds[b, :, c, n])
    out = np.empty(seconds.shape[2:])
    for c, n in np.ndindex(*out.shape):
        out[c, n] = np.interp(num_decodes, BATCH, by_batch[:, c, n])
    return out[:, 1:]


def _keeps_deadlines(n: float, seconds: float, queue: NDArray[np.float32], extra: float, margin: float) -> bool:
    """For every queued request i in order: n < S_i => n / T >= S_i / slack_i, unless its deadline has passed."""
    cumulative = 0.0
    for tokens, slack in queue.astype(np.float64):
        cumulative += tokens
        left = slack + extra
        binds = tokens > 0 and 0.0 < left < NO_DEADLINE_S / 2
        if binds and n < cumulative and not n / seconds >= (cumulative / left) * (1.0 + margin):
            return False
    return True


slacks = st.floats(-1.0, 3.0, width=32) | st.just(NO_DEADLINE_S)
queues = st.lists(st.tuples(st.integers(1, 4000), slacks), max_size=QUEUE_ROWS + 1).map(tuple)


@settings(max_examples=400, deadline=None)
@given(st.integers(0, 2**32), st.integers(0, 64), st.integers(0, 20000), queues, st.sampled_from([0.5, 1.0, 2.5]))
def test_the_poster_maximises_g_over_t_subject_to_the_queues_deadlines(
    seed: int, num_decodes: int, kv_tokens: int, queue: tuple, ttft_target: float
) -> None:
    plant = _random_plant(seed)
    poster = Poster(ttft_target=ttft_target, initial_acceptance=0.7)
    poster.reset(plant)
    observation = _observation(num_decodes, kv_tokens, queue)
    seconds = _predicted(plant, num_decodes, kv_tokens)
    tokens = np.array([sum(0.7**k for k in range(c + 1)) for c in GRID.candidate_choices])
    allowed = {margin: np.zeros(seconds.shape, dtype=bool) for margin in (-1e-9, 1e-9)}
    for margin, mask in allowed.items():
        for c, n in np.ndindex(*mask.shape):
            budget = float(GRID.budget_choices[n])
            mask[c, n] = _keeps_deadlines(budget, seconds[c, n], observation["queue"], ttft_target - 1.0, margin)
    # Pairs within rounding of a deadline may fall either way.
    assume(np.array_equal(*allowed.values()))
    mask = allowed[1e-9]
    chosen = tuple(poster.act(observation))
    if mask.any():
        assert mask[chosen]
        value = tokens[:, None] / seconds
        assert value[chosen] == pytest.approx(value[mask].max(), rel=1e-9)
    else:
        rate = GRID.budgets[None, :] / seconds
        assert rate[chosen] == pytest.approx(rate.max(), rel=1e-9)


def test_the_poster_is_free_when_nothing_waits_and_hurries_when_a_deadline_is_near() -> None:
    poster = Poster()
    poster.reset(_linear_plant(LatencyModel.linear(0.01, 1e-4, per_draft_step_s=1e-3)))
    idle = GRID.values(poster.act(_observation(8, 1000)))
    assert idle[1] == 64
    relaxed = GRID.values(poster.act(_observation(8, 1000, ((2000, 3.0),))))
    hurried = GRID.values(poster.act(_observation(8, 1000, ((2000, 0.25),))))
    late = GRID.values(poster.act(_observation(8, 1000, ((2000, -0.1),))))
    assert relaxed[1] == 64
    assert hurried[1] == 1024
    assert late == idle


def test_the_poster_measures_tokens_per_iteration_of_the_c_it_used() -> None:
    poster = Poster(initial_acceptance=0.5)
    poster.reset(_random_plant(1))
    before = poster.current.memory.tokens[0].copy()
    np.testing.assert_allclose(before, [1.0, 1.5, 1.875, 1.96875])
    observation = _observation(8, 1000)
    observation["load"][LAST_CANDIDATES] = 3
    observation["drafted"][:3] = (10, 9, 8)
    observation["accepted"][:3] = (9, 8, 7)
    poster.act(observation)
    measured = 1.0 + 24 / 10
    expected = before + np.array([0, 0, G_WEIGHT * (measured - before[2]), 0])
    np.testing.assert_allclose(poster.current.memory.tokens[0], expected)


def test_a_reset_poster_has_forgotten_what_it_measured() -> None:
    poster, plant = Poster(), _random_plant(2)
    poster.reset(plant)
    before = poster.current.memory.tokens[0].copy()
    observation = _observation(8, 1000)
    observation["load"][LAST_CANDIDATES] = 1
    observation["drafted"][0] = 5
    poster.act(observation)
    assert not np.array_equal(poster.current.memory.tokens[0], before)
    poster.reset(plant)
    assert np.array_equal(poster.current.memory.tokens[0], before)


LATENCY = LatencyModel.linear(0.008, 2e-5, per_request_s=1e-4, per_draft_step_s=1e-3)


def _simulator(seed: int, requests: int, rate: float, blocks: int) -> Simulator:
    rng = np.random.default_rng(seed)
    workload = Workload.build(
        "random",
        np.cumsum(rng.exponential(1.0 / rate, requests)),
        rng.integers(1, 1500, requests),
        rng.integers(1, 120, requests),
        IidAgreement(alpha=0.7),
        seed,
    )
    config = EngineConfig(name="test", latency="linear", num_kv_blocks=blocks, max_num_seqs=48)
    return Simulator(config, [workload], ttft_target=1.0, latency=LATENCY)


@pytest.mark.parametrize("blocks", [4000, 150])
@pytest.mark.parametrize("rate", [4.0, 40.0])
@pytest.mark.parametrize("decision_s", [0.0, 20e-6])
@pytest.mark.parametrize(
    "controller",
    [
        Fixed(candidates=3, token_budget=256),
        Sarathi(total_budget=512, candidates=3),
        Sarathi(total_budget=40),
        Poster(),
    ],
    ids=lambda controller: controller.label(),
)
def test_the_compiled_loop_equals_acting_step_by_step(
    controller: KernelController, decision_s: float, rate: float, blocks: int
) -> None:
    plant = _linear_plant(LATENCY)
    controller.reset(plant)
    compiled = _simulator(0, 150, rate, blocks)
    log, _ = compiled.run_to_end(compiled.loop(controller.current, decision_s), record_iterations=True)
    controller.reset(plant)
    stepwise = _simulator(0, 150, rate, blocks)
    observation = stepwise.new_observation()
    actions, more = [], True
    while more:
        stepwise.observe(0, observation)
        actions.append(controller.choose(as_dict(observation)))
        more = stepwise.step(0, *actions[-1], decision_s)
    assert list(zip(log["candidates"].tolist(), log["token_budget"].tolist(), strict=True)) == actions
    assert stepwise.state.requests.tobytes() == compiled.state.requests.tobytes()
    assert stepwise.state.instances["now"][0] == compiled.state.instances["now"][0]


def test_the_poster_uses_more_than_one_setting_under_load() -> None:
    poster = Poster()
    poster.reset(_linear_plant(LATENCY))
    simulator = _simulator(1, 150, 20.0, 4000)
    log, _ = simulator.run_to_end(simulator.loop(poster.current, 0.0), record_iterations=True)
    assert len(np.unique(log["token_budget"])) > 1
