"""Rolled-on copies of an engine cost what the engine itself would have cost, and leave it as it was."""

from __future__ import annotations

from copy import deepcopy
from typing import Any

import numpy as np
import pytest

from controllers.policy import Residual
from engine.core.objective import charged
from runs.learning.baseline import Charged
from runs.learning.policy_iteration import PolicyIteration, _Copies, _Iteration
from runs.learning.training import Training
from runs.learning.vec_env import Episode, GovernorVecEnv, Group
from tests.runs.learning.training_settings import training_env

REACH = Residual(candidates=2, budgets=2)


def _iteration(tmp_path: object, horizon_s: float) -> tuple[GovernorVecEnv, list[_Copies]]:
    learner = PolicyIteration(horizon_s=horizon_s)
    settings = Training(env=training_env(residual=REACH), learner=learner)
    policy = _Iteration(learner, settings, tmp_path).policy  # type: ignore[arg-type]
    env = GovernorVecEnv(settings.env, 0)
    env.reset()
    return env, [_Copies(group, policy, learner) for group in env.groups]


def _assert_same(ours: dict[str, Any], theirs: dict[str, Any]) -> None:
    for part in ("state", "feed", "seen"):
        for array, other in zip(ours["simulator"][part], theirs["simulator"][part], strict=True):
            for field in array.dtype.names or (...,):
                np.testing.assert_array_equal(array[field], other[field], err_msg=f"{part} {field}")
    for one, other in zip(ours["memory"], theirs["memory"], strict=True):
        for name, array in one.items():
            np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.parametrize("steps", [3, 25])
def test_a_copy_costs_what_the_engine_itself_costs(tmp_path: object, steps: int) -> None:
    env, copies = _iteration(tmp_path, horizon_s=1e6)
    stay = np.full((env.num_envs, 2), 2, dtype=np.int64)
    for _ in range(steps):
        env.step(stay)
    env.take_episodes()
    before = deepcopy(env.snapshot())
    pairs = np.array([[2, 2], [0, 2], [4, 2], [2, 0], [3, 4]])
    e = 1
    more = copies[0].more(e, pairs)
    _assert_same(env.groups[0].snapshot(), before["groups"][0])
    group = env.groups[0]
    prices = group.scenario.slo.prices
    baseline = _begun_with(group, before["groups"][0], e)
    costs = []
    for pair in pairs:
        env.restore(deepcopy(before))
        begun = charged(group.env.batch.simulator.state, e, prices)
        actions = stay.copy()
        actions[e] = pair
        ended: list[Episode] = []
        while not ended:
            env.step(actions)
            actions[e] = stay[e]
            ended = [episode for episode in env.take_episodes() if episode.baseline == baseline]
        costs.append(ended[0].objective * baseline.requests - begun)
    np.testing.assert_allclose(more, (np.array(costs[1:]) - costs[0]) / baseline.per_second, rtol=1e-6, atol=1e-9)
    assert np.abs(more).max() > 0.0


def _begun_with(group: Group, snapshot: dict[str, Any], e: int) -> Charged:
    """What `analytic` is charged for the workload that environment e was serving."""
    stage, seed = snapshot["origins"][e]
    assert stage == 0
    assert group._baseline is not None
    return group._baseline.of(group.scenario.workload.draw(seed))


def test_a_short_horizon_orders_choices_as_a_long_one_mostly(tmp_path: object) -> None:
    env, long = _iteration(tmp_path, horizon_s=1e6)
    settings = PolicyIteration(horizon_s=6.0)
    unshifted = _Iteration(settings, Training(env=env.training, learner=settings), tmp_path).policy  # type: ignore[arg-type]
    short = [_Copies(group, unshifted, settings) for group in env.groups]
    stay = np.full((env.num_envs, 2), 2, dtype=np.int64)
    pairs = np.array([[2, 2], [0, 2], [4, 2], [2, 0], [2, 4]])
    one, other = [], []
    for _ in range(40):
        env.step(stay)
        for e in range(env.groups[0].count):
            one.append(long[0].more(e, pairs))
            other.append(short[0].more(e, pairs))
    assert np.corrcoef(np.concatenate(one), np.concatenate(other))[0, 1] > 0.8
