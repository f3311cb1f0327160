"""The environment on a real engine: the torch engine with the embedded models."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from engine.backends.torch.config import TorchEngineConfig
from engine.core.action import ActionGrid
from engine.core.metrics import summarize
from engine.core.objective import Prices
from engine.workload.agreement import DrafterAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import FixedLengths
from engine.workload.source import SyntheticSource
from envs import SERVING_ID
from envs.real import RealEpisodes

TORCH = TorchEngineConfig(name="torch_tiny", max_num_seqs=4, num_kv_blocks=64)
REQUESTS, OUTPUT = 5, 6
WORKLOAD = SyntheticSource(
    arrivals=PoissonArrivals(rate=0.01),
    lengths=FixedLengths(prompt_tokens=20, output_tokens=OUTPUT),
    agreement=DrafterAgreement(),
    num_requests=REQUESTS,
    name="short",
)


@pytest.fixture(scope="module")
def env() -> Iterator[gymnasium.Env[Any, Any]]:
    made = gymnasium.make(SERVING_ID, engine=TORCH, workload=WORKLOAD)
    yield made
    made.close()


def _play(env: gymnasium.Env[Any, Any], action: list[int]) -> tuple[float, dict[str, Any]]:
    env.reset(seed=0)
    total = 0.0
    while True:
        _, reward, terminated, truncated, info = env.step(np.array(action))
        assert not terminated
        total += float(reward)
        if truncated:
            return total, info


def _episodes(env: gymnasium.Env[Any, Any]) -> RealEpisodes:
    episodes = env.unwrapped.batch  # type: ignore[attr-defined]
    assert isinstance(episodes, RealEpisodes)
    return episodes


def test_spaces_and_info_are_those_of_the_simulator(env: gymnasium.Env[Any, Any]) -> None:
    simulated = gymnasium.make(SERVING_ID, workload=WORKLOAD)
    assert env.observation_space == simulated.observation_space
    assert env.action_space == simulated.action_space
    real_info, simulated_info = _play(env, [2, 3])[1], _play(simulated, [2, 3])[1]
    assert real_info.keys() == simulated_info.keys()
    for name in ("reward_terms", "episode_summary"):
        assert real_info[name].keys() == simulated_info[name].keys()


def test_gymnasium_finds_no_fault(env: gymnasium.Env[Any, Any]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check=True)
    assert env.spec is not None
    assert env.spec.nondeterministic


def test_rewards_sum_to_the_objective_and_every_request_is_served(env: gymnasium.Env[Any, Any]) -> None:
    total, info = _play(env, [3, 0])
    summary = info["episode_summary"]
    assert summary["requests_finished"] == REQUESTS
    assert total == pytest.approx(-REQUESTS * summary["objective"])
    episodes = _episodes(env)
    assert [len(episodes.engine.output(i)) for i in range(REQUESTS)] == [OUTPUT] * REQUESTS
    reported = summarize(episodes.state, episodes.engine.requests, ttft_target=1.0, prices=Prices())
    assert reported["objective"] == pytest.approx(summary["objective"])


def test_tokens_do_not_depend_on_c(env: gymnasium.Env[Any, Any]) -> None:
    served = []
    for candidates in (0, 4):
        _play(env, [candidates, 12])
        served.append([_episodes(env).engine.output(i) for i in range(REQUESTS)])
    assert served[0] == served[1]


def test_time_stands_still_between_steps_and_jumps_over_idleness(env: gymnasium.Env[Any, Any]) -> None:
    env.reset(seed=0)
    episodes = _episodes(env)
    clock = episodes.engine.clock
    first, second = episodes.state.requests["arrival"][:2]
    assert clock.now() == first == clock.now()
    for _ in range(1 + OUTPUT):
        before = clock.now()
        env.step(np.array([0, 12]))
        assert clock.now() == clock.now() > before
        if clock.now() >= second:
            break
    # The requests come a hundred seconds apart; nobody has waited for them.
    assert clock.now() >= second


def test_a_cut_episode_charges_what_it_leaves() -> None:
    env = gymnasium.make(SERVING_ID, engine=TORCH, workload=WORKLOAD, episode_decisions=2, decide_every=2)
    env.reset(seed=0)
    assert env.step(np.array([0, 0]))[4]["reward_terms"]["unfinished"] == 0.0
    _, reward, _, truncated, info = env.step(np.array([0, 0]))
    assert truncated
    assert float(reward) == -sum(info["reward_terms"].values())
    assert info["reward_terms"]["unfinished"] > 0.0
    env.close()


def test_what_a_real_engine_cannot_do_is_refused_with_the_way_out() -> None:
    with pytest.raises(ValueError, match=r"engine=torch_tiny runs for real.*gymnasium\.make"):
        gymnasium.make_vec(SERVING_ID, num_envs=2, engine=TORCH)
    without = TORCH.model_copy(update={"drafter": "none"})
    with pytest.raises(ValueError, match=r"grid.candidate_choices=\[0, 1, .*proposes at most 0"):
        gymnasium.make(SERVING_ID, engine=without)
    env = gymnasium.make(SERVING_ID, engine=without, grid=ActionGrid(candidate_choices=(0,)), workload=WORKLOAD)
    with pytest.raises(RuntimeError, match="reset"):
        env.unwrapped.step(np.array([0, 0]))
    env.close()
