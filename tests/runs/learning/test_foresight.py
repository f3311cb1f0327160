"""Rolled-on copies of an engine cost what the engine itself would have cost, and leave it as it was."""

from __future__ import annotations

import pickle

import numpy as np
import pytest

from controllers.policy import Residual
from engine.core.objective import charged
from runs.learning.policy_iteration import PolicyIteration, _Copies, _Iteration
from runs.learning.training import Training
from runs.learning.vec_env import GovernorVecEnv
from tests.runs.learning.training_settings import training_env

REACH = Residual(candidates=2, budgets=2)


def _iteration(tmp_path: object, horizon_s: float) -> tuple[GovernorVecEnv, list[_Copies]]:
    learner = PolicyIteration(horizon_s=horizon_s)
    settings = Training(env=training_env(residual=REACH), learner=learner)
    policy = _Iteration(learner, settings, tmp_path).policy  # type: ignore[arg-type]
    env = GovernorVecEnv(settings.env, 0)
    env.reset()
    return env, [_Copies(group, policy, learner) for group in env.groups]


@pytest.mark.parametrize("steps", [3, 25])
def test_a_copy_costs_what_the_engine_itself_costs(tmp_path: object, steps: int) -> None:
    env, copies = _iteration(tmp_path, horizon_s=1e6)
    stay = np.full((env.num_envs, 2), 2, dtype=np.int64)
    for _ in range(steps):
        env.step(stay)
    env.take_episodes()
    before = pickle.dumps(env.snapshot())
    pairs = np.array([[2, 2], [0, 2], [4, 2], [2, 0], [3, 4]])
    e = 1
    more = copies[0].more(e, pairs)
    assert pickle.dumps(env.snapshot()) == before
    group = env.groups[0]
    prices = group.scenario.slo.prices
    costs = []
    for pair in pairs:
        env.restore(pickle.loads(before))
        begun = charged(group.env.batch.simulator.state, e, prices)
        requests = group.charged[e].requests
        actions = stay.copy()
        actions[e] = pair
        while True:
            env.step(actions)
            actions[e] = stay[e]
            ended = [episode for episode in env.take_episodes() if episode.baseline is not None]
            finished = [x for x in ended if x.scenario == "exact" and x.baseline.requests == requests]
            if group.env.batch.decisions[e] == 0:
                break
        mine = [x for x in finished if x.baseline == before_charged(group, before, e)]
        costs.append(mine[0].objective * requests - begun)
    rate = before_charged(group, before, e).per_second
    np.testing.assert_allclose(more, (np.array(costs[1:]) - costs[0]) / rate, rtol=1e-6, atol=1e-9)
    assert np.abs(more).max() > 0.0


def before_charged(group: object, snapshot: bytes, e: int):  # type: ignore[no-untyped-def]
    source, seed = pickle.loads(snapshot)["groups"][0]["env"]["batch"]["origins"][e]
    return group._baseline.of(source.draw(seed))  # type: ignore[attr-defined]


def test_a_short_horizon_orders_choices_as_a_long_one_mostly(tmp_path: object) -> None:
    env, long = _iteration(tmp_path, horizon_s=1e6)
    _, short = _iteration(tmp_path, horizon_s=6.0)
    short = [_Copies(group, long[0]._policy, PolicyIteration(horizon_s=6.0)) for group in env.groups]
    stay = np.full((env.num_envs, 2), 2, dtype=np.int64)
    pairs = np.array([[2, 2], [0, 2], [4, 2], [2, 0], [2, 4]])
    one, other = [], []
    for _ in range(40):
        env.step(stay)
        for e in range(env.groups[0].count):
            one.append(long[0].more(e, pairs))
            other.append(short[0].more(e, pairs))
    assert np.corrcoef(np.concatenate(one), np.concatenate(other))[0, 1] > 0.8
