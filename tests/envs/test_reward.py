"""The reward sums to the reported objective, orders controllers as it does, and does not pay for hiding work."""

from __future__ import annotations

from itertools import permutations
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from engine.core.metrics import request_table, summarize
from engine.core.objective import Prices
from engine.workload.workload import Workload
from envs.batch import ServingBatch
from envs.reward import TERMS, unfinished_cost
from envs.serving import ServingEnv
from envs.vector import ServingVectorEnv
from tests.engine.core.cases import Figures
from tests.envs.traffic import Policy, conversations, crowded, fixed, play, requests, short, thrashing, tiny_engine

LOADS = {"idle": 0.3, "near saturation": 3.0, "overload": 10.0}
"""Conversations per second on one A100."""

STEADY = ((0, 512), (3, 512), (3, 2048))


def _table(env: ServingEnv) -> dict[str, NDArray[Any]]:
    return request_table(env.batch.simulator.requests())


def _objective(table: dict[str, NDArray[Any]], ttft_target: float, prices: Prices) -> float:
    """Mean over requests of TPOT / target + price [TTFT > l] + price max(0, TTFT - l) / l, request by request."""
    total = 0.0
    for r in range(len(table["request"])):
        if table["output_tokens"][r] > 1:
            tpot = (table["finish_s"][r] - table["first_token_s"][r]) / (table["output_tokens"][r] - 1)
            total += tpot / prices.tpot_target
        late = table["first_token_s"][r] - (table["arrival_s"][r] + ttft_target)
        if late > 0.0:
            total += prices.violation + prices.lateness * late / ttft_target
    return total / len(table["request"])


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    "options",
    [
        {"workload": short(num_requests=40, rate=4.0)},
        {"workload": conversations(rate=8.0, num_requests=60), "decide_every": 3, "decision_s": 5e-3},
        {
            "workload": crowded(num_requests=40),
            "engine": tiny_engine(40),
            "ttft_target": 0.5,
            "prices": Prices(tpot_target=0.02, violation=5.0, lateness=0.3),
        },
    ],
    ids=["light", "overload", "preemption"],
)
def test_an_episodes_rewards_sum_to_the_reported_objective(options: dict[str, Any], seed: int) -> None:
    env = ServingEnv(**options)
    total, info = play(env, thrashing(seed), seed=seed)
    table = _table(env)
    objective = _objective(table, env.batch.ttft_target, env.batch.prices)
    assert np.all(table["generated_tokens"] == table["output_tokens"])
    assert total == pytest.approx(-len(table["request"]) * objective, rel=1e-9)
    assert info["episode_summary"]["objective"] == pytest.approx(objective, rel=1e-9)


def test_the_objectives_terms_are_all_at_work_in_the_tests_above() -> None:
    env = ServingEnv(workload=crowded(num_requests=40), engine=tiny_engine(40), ttft_target=0.5)
    play(env, thrashing(0), seed=0)
    table = _table(env)
    late = table["ttft_s"] > 0.5
    assert 0 < late.sum() < late.size
    assert table["preemptions"].sum() > 0
    assert (table["output_tokens"] == 1).any()


@pytest.mark.parametrize("load", LOADS)
def test_returns_order_controllers_as_the_report_does(load: str) -> None:
    workload = conversations(LOADS[load], num_requests=60).draw(3)
    policies: list[Policy] = [fixed(*pair) for pair in (*STEADY, (0, 32), (8, 64), (8, 4096), (1, 128))]
    policies += [thrashing(seed) for seed in range(2)]
    env = ServingEnv(workload=workload)
    returns, objectives, figures = [], [], []
    for policy in policies:
        returns.append(play(env, policy, seed=0)[0])
        objectives.append(_objective(_table(env), 1.0, Prices()))
        reported = summarize(
            env.batch.simulator.state, env.batch.simulator.requests(), ttft_target=1.0, prices=Prices()
        )
        late = float(np.maximum(0.0, _table(env)["ttft_s"] - 1.0).mean())
        figures.append((reported["tpot_mean_s"], 1.0 - reported["ttft_attainment"], late))
    assert np.argsort(returns).tolist() == np.argsort(objectives)[::-1].tolist()
    assert len(set(returns)) == len(policies)
    pairs = list(permutations(range(len(policies)), 2))
    dominated = [(a, b) for a, b in pairs if all(x <= y for x, y in zip(figures[a], figures[b], strict=True))]
    assert dominated
    for better, worse in dominated:
        assert returns[better] > returns[worse]


@pytest.mark.parametrize("load", LOADS)
def test_putting_prompts_off_does_not_pay(load: str) -> None:
    """The smallest budget gives decodes short iterations and lets prompts wait."""
    env = ServingEnv(workload=conversations(LOADS[load], num_requests=60).draw(1))
    plain, _ = play(env, fixed(0, 512))
    for candidates in (0, 8):
        assert play(env, fixed(candidates, 32))[0] < plain


@pytest.mark.parametrize("load", LOADS)
def test_thrashing_does_not_pay(load: str) -> None:
    """A random pair every time is worse than the best of a few steady pairs.

    It may beat one steady pair: at random, candidates are still drafted, and c = 0 forgoes them.
    """
    env = ServingEnv(workload=conversations(LOADS[load], num_requests=60).draw(1))
    best = max(play(env, fixed(*pair))[0] for pair in STEADY)
    for seed in range(3):
        assert play(env, thrashing(seed))[0] < best


@pytest.mark.parametrize("cut", [20.0, 60.0])
@pytest.mark.parametrize("load", LOADS)
def test_leaving_prompts_behind_at_the_cut_does_not_pay(load: str, cut: float) -> None:
    """An episode that is cut short must not reward a policy that starves prefill until the cut.

    Summed over seeds, because where the cut falls within a request is luck.
    """
    source = conversations(LOADS[load], num_requests=800)
    env = ServingEnv(workload=source, episode_s=cut)
    workloads = [source.draw(seed) for seed in range(3)]

    def total(policy: Policy) -> float:
        return sum(play(env, policy, options={"workload": workload})[0] for workload in workloads)

    assert total(fixed(0, 32)) < total(fixed(0, 512))


def _small_case() -> Workload:
    """A finishes its prompt in one iteration of 64 tokens, B needs eight, C comes later and D after the cut."""
    return requests([0.0, 0.0, 0.04, 50.0], [64, 500, 10, 10], [11, 5, 1, 5], alpha=0.0)


def _cut(prices: Prices, ttft_target: float = 1.0) -> tuple[ServingEnv, dict[str, float]]:
    """The small case cut after five decisions of c = 0, n = 64: A has five of eleven tokens, B and C none."""
    env = ServingEnv(workload=_small_case(), episode_decisions=5, prices=prices, ttft_target=ttft_target)
    _, info = play(env, fixed(0, 64))
    assert len(env.batch.simulator.arrived()) == 3
    rows = env.batch.simulator.state.requests
    assert rows["generated"].tolist() == [5, 0, 0, 0]
    return env, info["reward_terms"]


def test_what_a_cut_leaves_is_charged_as_computed_by_hand() -> None:
    # A is faster than the target: 6 of 10 tokens owed at twice the target's cost of 1. B and C have no first token:
    # twice a whole TPOT each, a violation of 2 and a lateness of 1.
    _, terms = _cut(Prices())
    assert terms["unfinished"] == pytest.approx(0.6 * 2 + 2 * (2 + 2 + 1), rel=1e-12)


def test_a_slow_request_owes_at_its_own_pace() -> None:
    env, terms = _cut(Prices(tpot_target=0.001, violation=7.0, lateness=0.5))
    now = float(env.batch.simulator.state.instances[0]["now"])
    first = float(env.batch.simulator.state.requests[0]["first_token"])
    pace = (now - first) / 4
    assert pace > 0.005
    assert terms["unfinished"] == pytest.approx(0.6 * 2 * pace / 0.001 + 2 * (2 + 7.0 + 0.5), rel=1e-12)


def test_a_violation_already_paid_is_not_charged_again_at_the_cut() -> None:
    env, terms = _cut(Prices(), ttft_target=0.05)
    engine = Figures(env.batch.simulator.state)
    # B's deadline at 0.05 s has passed by the fifth iteration, C's at 0.09 s has not.
    assert 0.05 < engine["now"] < 0.09
    assert engine["overdue"] == 1
    assert terms["unfinished"] == pytest.approx(0.6 * 2 + (2 + 1) + (2 + 2 + 1), rel=1e-12)


def test_a_finished_engine_owes_nothing() -> None:
    env = ServingEnv(workload=short(num_requests=3))
    _, info = play(env, fixed(3, 512), seed=0)
    assert info["reward_terms"]["unfinished"] == 0.0
    simulator = env.batch.simulator
    assert unfinished_cost(simulator.state, 0, simulator.arrived(), Prices()) == 0.0
    decisions = int(env.batch.decisions[0])
    exact = ServingEnv(workload=short(num_requests=3), episode_decisions=decisions)
    _, info = play(exact, fixed(3, 512), seed=0)
    assert int(exact.batch.decisions[0]) == decisions
    assert info["reward_terms"]["unfinished"] == 0.0


def test_a_cut_costs_more_than_going_on() -> None:
    """With a steady policy and no overload, what is left behind is charged above what finishing it would have cost."""
    workload = conversations(LOADS["near saturation"], num_requests=40).draw(0)
    for cut in (20, 60, 180):
        env = ServingEnv(workload=workload, episode_decisions=cut)
        total, info = play(env, fixed(3, 1024))
        part = workload.subset(np.arange(len(env.batch.simulator.arrived())))
        finishing, _ = play(ServingEnv(workload=part), fixed(3, 1024))
        assert info["reward_terms"]["unfinished"] > 0.0
        assert total < finishing


def test_every_term_is_a_cost_and_they_make_up_the_reward() -> None:
    env = ServingVectorEnv(
        4, workload=crowded(num_requests=12), engine=tiny_engine(40), ttft_target=0.1, episode_decisions=40
    )
    env.reset(seed=0)
    rng = np.random.default_rng(0)
    largest = np.zeros(len(TERMS))
    for _ in range(200):
        _, reward, _, _, info = env.step(rng.integers([9, 13], size=(4, 2)))
        terms = np.array([info["reward_terms"][name] for name in TERMS])
        assert terms.min() >= 0.0
        np.testing.assert_allclose(terms.sum(axis=0), -reward, rtol=1e-12)
        largest = np.maximum(largest, terms.max(axis=1))
    assert largest.min() > 0.0


def test_prices_are_per_target() -> None:
    np.testing.assert_allclose(
        Prices(tpot_target=0.04, violation=3.0, lateness=2.0).per_unit(ttft_target=0.5), [25.0, 3.0, 4.0]
    )
    assert ServingBatch(1).prices == Prices(tpot_target=0.05, violation=2.0, lateness=1.0)
