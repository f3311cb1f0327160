"""The adapter: SAME_STEP endings, rewards relative to analytic, masks, and going on from a snapshot bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from pydantic import ValidationError

from controllers.analytic import Analytic
from controllers.policy import Residual
from runs.learning.checkpoint import load_checkpoint, save_checkpoint
from runs.learning.scenarios import Curriculum, Reward
from runs.learning.vec_env import GovernorVecEnv
from tests.runs.learning.training_settings import GRID, scenario, training_env


def _play(env: GovernorVecEnv, steps: int, seed: int = 0) -> list[tuple[Any, ...]]:
    rng = np.random.default_rng(seed)
    many = env.training.spread
    played = []
    for _ in range(steps):
        actions = np.stack([rng.integers(count, size=env.num_envs) for count in many], axis=1)
        played.append(env.step(actions))
    return played


def _same(one: list[tuple[Any, ...]], other: list[tuple[Any, ...]]) -> None:
    for ours, theirs in zip(one, other, strict=True):
        for a, b in zip(ours[:3], theirs[:3], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(ours[3], theirs[3], strict=True):
            assert a.keys() == b.keys()
            if "terminal_observation" in a:
                np.testing.assert_array_equal(a["terminal_observation"], b["terminal_observation"])
                assert a["episode"] == b["episode"]


def test_the_same_seed_gives_the_same_steps_and_another_does_not() -> None:
    runs = []
    for seed in (3, 3, 4):
        env = GovernorVecEnv(training_env(), seed)
        first = env.reset()
        runs.append((first, _play(env, 60)))
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    _same(runs[0][1], runs[1][1])
    assert any((a[1] != b[1]).any() for a, b in zip(runs[0][1], runs[2][1], strict=True))


def test_an_ended_episode_is_reported_in_the_step_that_begins_the_next() -> None:
    env = GovernorVecEnv(training_env(), 0)
    env.reset()
    ended = 0
    names = env.training.inputs
    for observation, _, dones, infos in _play(env, 400):
        for i in np.flatnonzero(dones):
            ended += 1
            last = infos[i]["terminal_observation"]
            assert infos[i]["TimeLimit.truncated"]
            # Everything was served: nobody decodes and nobody waits, and the new episode has its first request.
            assert last[names.index("decodes")] == 0.0
            assert last[names.index("waiting_tokens")] == 0.0
            assert observation[i][names.index("waiting_tokens")] > 0.0
            assert infos[i]["episode"]["l"] > 1
        assert all("terminal_observation" not in infos[i] for i in np.flatnonzero(~dones))
    assert ended > 3
    episodes = env.take_episodes()
    assert len(episodes) == ended
    assert {episode.scenario for episode in episodes} == {"exact", "mistimed"}
    assert env.take_episodes() == []


def test_observations_of_different_steps_share_no_memory() -> None:
    env = GovernorVecEnv(training_env(), 0)
    first = env.reset()
    kept = first.copy()
    second = _play(env, 1)[0][0]
    assert not np.shares_memory(first, second)
    np.testing.assert_array_equal(first, kept)


@pytest.mark.parametrize("constraint", ["price", "lagrangian"])
def test_doing_what_analytic_does_earns_nothing(constraint: Any) -> None:
    settings = training_env(
        residual=Residual(candidates=1, budgets=1),
        decide_every=1,
        decision_s=Analytic.decision_s,
        reward=Reward(constraint=constraint),
    )
    env = GovernorVecEnv(settings, 0)
    env.reset()
    stay = np.ones((env.num_envs, 2), dtype=np.int64)
    returns = []
    while len(returns) < 8:
        _, _, _, infos = env.step(stay)
        returns += [info["episode"]["r"] for info in infos if "episode" in info]
    for episode, gained in zip(env.take_episodes(), returns, strict=True):
        assert episode.objective == pytest.approx(episode.baseline.objective, rel=1e-9)
        assert gained == pytest.approx(0.0, abs=1e-3)


def test_a_whole_episode_earns_its_relative_improvement() -> None:
    env = GovernorVecEnv(training_env(reward=Reward(scale=2.0)), 0)
    env.reset()
    worst = np.zeros((env.num_envs, 2), dtype=np.int64)
    gained: list[float] = []
    while len(gained) < 6:
        _, _, _, infos = env.step(worst)
        gained += [info["episode"]["r"] for info in infos if "episode" in info]
    for episode, earned in zip(env.take_episodes(), gained, strict=True):
        base = episode.baseline
        # What analytic is charged per second, for as long as this took, less what this was charged.
        credit = base.objective * base.requests * episode.duration_s / base.duration_s
        expected = (credit - episode.objective * base.requests) / base.objective
        assert earned == pytest.approx(2.0 * expected, rel=1e-4)


def test_plain_rewards_are_minus_the_objective() -> None:
    env = GovernorVecEnv(training_env(reward=Reward(relative=False, scale=1.0)), 0)
    env.reset()
    actions = np.full((env.num_envs, 2), 1, dtype=np.int64)
    gained: list[float] = []
    while len(gained) < 6:
        _, _, _, infos = env.step(actions)
        gained += [info["episode"]["r"] for info in infos if "episode" in info]
    for episode, earned in zip(env.take_episodes(), gained, strict=True):
        assert earned == pytest.approx(-episode.objective * episode.baseline.requests, rel=1e-4)


def test_a_learnt_price_scales_violations_only() -> None:
    rewards = []
    for multiplier in (1.0, 3.0):
        env = GovernorVecEnv(training_env(reward=Reward(relative=False, constraint="lagrangian")), 0)
        env.reset()
        env.multiplier = multiplier
        slow = np.zeros((env.num_envs, 2), dtype=np.int64)
        rewards.append(sum(env.step(slow)[1].sum() for _ in range(150)))
        violations = [e.baseline.requests * (1 - e.ttft_attainment) for e in env.take_episodes()]
        assert sum(violations) > 0
    assert rewards[1] < rewards[0] - 10.0


def _saved(folder: Path) -> dict[str, Any]:
    saved = load_checkpoint(folder, "")
    assert saved is not None
    return saved


@pytest.mark.parametrize("residual", [None, Residual(candidates=1, budgets=2)])
def test_a_snapshot_goes_on_bit_for_bit(residual: Residual | None, tmp_path: Path) -> None:
    settings = training_env(residual=residual)
    env = GovernorVecEnv(settings, 1)
    env.reset()
    _play(env, 70)
    save_checkpoint(tmp_path, "", env.snapshot())
    after = _play(env, 120, seed=9)
    other = GovernorVecEnv(settings, 1)
    other.reset()
    _play(other, 11, seed=5)
    other.restore(_saved(tmp_path))
    _same(after, _play(other, 120, seed=9))
    assert [e.objective for e in other.take_episodes()] == [e.objective for e in env.take_episodes()]


def test_a_curriculum_moves_on_and_a_snapshot_remembers_episodes_begun_before(tmp_path: Path) -> None:
    stages = Curriculum(stages=({"until": 0.5, "workload": {"kinds": {"poisson": 1.0}}},))  # type: ignore[arg-type]
    settings = training_env(curriculum=stages)
    env = GovernorVecEnv(settings, 0)
    env.reset()
    _play(env, 20)
    assert env.stage == 0
    env.progress(0.6)
    assert env.stage == 1
    save_checkpoint(tmp_path, "", env.snapshot())
    after = _play(env, 100, seed=2)
    other = GovernorVecEnv(settings, 0)
    other.reset()
    other.restore(_saved(tmp_path))
    _same(after, _play(other, 100, seed=2))


def test_masks_leave_out_what_changes_nothing() -> None:
    env = GovernorVecEnv(training_env(), 0, masked=True)
    inputs = env.reset()
    mask = env.action_masks()
    names = env.training.inputs
    idle = inputs[:, names.index("decodes")] == 0.0
    assert idle.all()
    assert (mask[:, : len(GRID.candidate_choices)].sum(axis=1) == 1).all()
    waiting = 500.0 * np.expm1(inputs[:, names.index("waiting_tokens")])
    for row, tokens in zip(mask[:, len(GRID.candidate_choices) :], waiting, strict=True):
        assert row[0]
        assert row.sum() == 1 + sum(budget < round(tokens) for budget in GRID.budget_choices[:-1])
    assert np.stack(env.env_method("action_masks")).shape == mask.shape


@pytest.mark.parametrize(
    ("form", "actions"),
    [("pair", [[2, 1]]), ("joint", [7]), ("box", [[0.9, 0.1]])],
)
def test_every_form_of_action_means_the_same_pair(form: Any, actions: NDArray[Any]) -> None:
    env = GovernorVecEnv(training_env(), 0, form=form)
    assert env._pairs(np.array(actions)).tolist() == [[2, 1]]
    assert env.action_space.contains(env.action_space.sample())


def test_environments_are_shared_out_by_weight() -> None:
    heavy = scenario().model_copy(update={"weight": 3.0})
    shares = training_env(scenarios={"a": scenario(), "b": heavy, "c": scenario()}, num_envs=28).shares()
    assert shares == {"a": 6, "b": 16, "c": 6}
    assert sum(training_env(num_envs=7).shares().values()) == 7


def test_settings_that_do_not_go_together_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="num_envs=1 leaves scenarios without any"):
        training_env(num_envs=1)
    with pytest.raises(ValidationError, match=r"until=\[0.5, 0.5\] must increase"):
        Curriculum(stages=({"until": 0.5}, {"until": 0.5}))  # type: ignore[arg-type]
    bad = Curriculum(stages=({"until": 0.5, "workload": {"burst": 1}},))  # type: ignore[arg-type]
    with pytest.raises(ValidationError, match=r"curriculum.stages\[0\].workload does not fit scenario exact"):
        training_env(curriculum=bad)
