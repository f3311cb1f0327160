"""The environments keep gymnasium's rules, and the vector environment is the single one, row by row."""

from __future__ import annotations

import inspect
import re
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.utils.env_checker import check_env
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import vector
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from stable_baselines3 import PPO
from stable_baselines3.common.env_util import make_vec_env

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.choices import BUDGET_CHOICES, CANDIDATE_CHOICES, ActionError
from engine.core.objective import Prices
from engine.core.telemetry import LOAD_FIELDS, NO_DEADLINE_S, PREEMPTIONS, TTFT_TARGET_S
from engine.latency.table_file import LatencyTableError
from engine.workload.workload import WorkloadError
from envs import SERVING_ID
from envs.episodes import Episodes
from envs.named import named_workload
from envs.reward import TERMS
from envs.serving import ServingEnv
from envs.spaces import LOAD_BOUNDS
from envs.vector import ServingVectorEnv
from envs.viewer import HEIGHT, STRIP, STRIPS, WIDTH
from envs.wrappers import BoxAction, DiscreteAction, FlatObservation
from tests.envs.traffic import conversations, fixed, play, requests, short, tiny_engine

REPOSITORY = Path(__file__).resolve().parents[2]
REGISTERED = [name for name in gymnasium.registry if name.startswith("governor/")]

FORMS: dict[str, Callable[[gymnasium.Env], gymnasium.Env]] = {
    "plain": lambda env: env,
    "discrete": DiscreteAction,
    "box": BoxAction,
    "flat": FlatObservation,
    "discrete and flat": lambda env: FlatObservation(DiscreteAction(env)),
    "box and flat": lambda env: FlatObservation(BoxAction(env)),
}

Observed = dict[str, np.ndarray]


def _assert_same(a: Observed, b: Observed) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert a[name].dtype == b[name].dtype == np.float32
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


def _copy(observation: Observed) -> Observed:
    return {name: array.copy() for name, array in observation.items()}


@pytest.mark.parametrize("name", REGISTERED)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [{}, {"workload": short(), "decide_every": 2, "queue_rows": 1}], ids=len)
def test_gymnasiums_checker_has_no_complaint(name: str, form: str, options: dict[str, Any]) -> None:
    env = FORMS[form](gymnasium.make(name, disable_env_checker=True, **options).unwrapped)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Said of every wrapper: the checker would rather have the environment inside it.
        warnings.filterwarnings("ignore", message=".*is different from the unwrapped version")
        check_env(env, skip_render_check=form != "plain")


def test_the_serving_environment_is_registered() -> None:
    assert SERVING_ID in REGISTERED


def test_a_process_that_imported_nothing_makes_both_forms_by_id() -> None:
    script = (
        "import gymnasium, sys\n"
        "assert 'envs' not in sys.modules\n"
        "single = gymnasium.make('envs:governor/Serving-v0', queue_rows=3)\n"
        "many = gymnasium.make_vec('envs:governor/Serving-v0', num_envs=2, queue_rows=3)\n"
        "print(type(single.unwrapped).__name__, type(many.unwrapped).__name__)\n"
        "print(single.reset(seed=0)[0]['queue'].shape, many.reset(seed=0)[0]['queue'].shape)\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == ["ServingEnv ServingVectorEnv", "(4, 2) (2, 4, 2)"]


@pytest.mark.parametrize("num_envs", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("mode", [AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP], ids=lambda mode: mode.name)
def test_the_vector_environment_is_gymnasiums_own_vector_of_single_ones(num_envs: int, mode: AutoresetMode) -> None:
    """Over dozens of episode ends, by the last request and by the cut; bit for bit, infos included."""
    options: dict[str, Any] = {"workload": short(), "queue_rows": 2, "episode_decisions": 25}
    ours = ServingVectorEnv(num_envs, autoreset_mode=mode, **options)
    theirs = SyncVectorEnv([lambda: ServingEnv(**options) for _ in range(num_envs)], autoreset_mode=mode)
    assert ours.metadata["autoreset_mode"] is mode
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    rng = np.random.default_rng(num_envs)
    ended = cut = 0
    for seed in (0, 11, list(range(100, 100 + num_envs))):
        _assert_same(ours.reset(seed=seed)[0], theirs.reset(seed=seed)[0])
        for _ in range(150):
            actions = rng.integers([9, 13], size=(num_envs, 2))
            observation, reward, terminated, truncated, info = ours.step(actions)
            expected = theirs.step(actions)
            _assert_same(observation, expected[0])
            np.testing.assert_array_equal(reward, expected[1])
            assert reward.dtype == expected[1].dtype
            assert not terminated.any()
            np.testing.assert_array_equal(truncated, expected[3])
            same_step = mode is AutoresetMode.SAME_STEP
            assert ("final_obs" in info) == ("final_obs" in expected[4]) == (same_step and bool(truncated.any()))
            last, expected_last = (i.get("final_info", {}) if same_step else i for i in (info, expected[4]))
            for e in np.flatnonzero(truncated):
                if same_step:
                    _assert_same(info["final_obs"][e], expected[4]["final_obs"][e])
                    assert info["_final_obs"][e]
                for figure, values in last["episode_summary"].items():
                    other = expected_last["episode_summary"][figure]
                    np.testing.assert_array_equal(values[e], other[e], err_msg=figure)
                ended += 1
                cut += expected_last["reward_terms"]["unfinished"][e] > 0.0
            terms = np.array([info["reward_terms"][name] for name in TERMS])
            np.testing.assert_allclose(terms.sum(axis=0), -reward, rtol=1e-12)
            if not same_step:
                np.testing.assert_array_equal(
                    info["_reward_terms"], expected[4].get("_reward_terms", np.zeros(num_envs, dtype=np.bool_))
                )
    assert 0 < cut < ended


def test_gymnasiums_vector_wrappers_see_the_same_in_next_step_mode() -> None:
    """Normalised observations and rewards and the statistics of episodes, as over gymnasium's own vector."""
    options: dict[str, Any] = {"workload": short(), "queue_rows": 2, "episode_decisions": 12}
    mode = AutoresetMode.NEXT_STEP
    ours, theirs = (
        vector.RecordEpisodeStatistics(
            vector.NormalizeReward(vector.NormalizeObservation(vector.FlattenObservation(env)))
        )
        for env in (
            gymnasium.make_vec(SERVING_ID, num_envs=3, autoreset_mode="NEXT_STEP", **options),
            SyncVectorEnv([lambda: ServingEnv(**options) for _ in range(3)], autoreset_mode=mode),
        )
    )
    assert ours.metadata["autoreset_mode"] is mode
    np.testing.assert_array_equal(ours.reset(seed=5)[0], theirs.reset(seed=5)[0])
    rng = np.random.default_rng(0)
    for _ in range(100):
        actions = rng.integers([9, 13], size=(3, 2))
        got, expected = ours.step(actions), theirs.step(actions)
        for mine, their in zip(got[:4], expected[:4], strict=True):
            np.testing.assert_array_equal(mine, their)
    assert list(ours.length_queue) == list(theirs.length_queue)
    assert len(ours.length_queue) > 15
    assert list(ours.return_queue) == list(theirs.return_queue)


def test_statistics_of_episodes_are_the_same_in_both_autoreset_modes() -> None:
    """The same seeds and one action give the same episodes, whichever step they are reset in."""
    counted = []
    for mode in ("SAME_STEP", "NEXT_STEP"):
        env = vector.RecordEpisodeStatistics(ServingVectorEnv(2, workload=short(), autoreset_mode=mode))
        env.reset(seed=3)
        while len(env.return_queue) < 8:
            env.step(np.full((2, 2), 4))
        counted.append((list(env.return_queue)[:8], list(env.length_queue)[:8]))
    assert sorted(zip(*counted[0], strict=True)) == sorted(zip(*counted[1], strict=True))


def test_the_vector_environments_first_step_after_an_end_starts_a_new_episode() -> None:
    env = ServingVectorEnv(2, workload=short(), episode_decisions=3)
    env.reset(seed=0)
    actions = np.zeros((2, 2), dtype=np.int64)
    over = [bool(env.step(actions)[3].all()) for _ in range(9)]
    assert over == [False, False, True] * 3


def test_make_vec_cuts_episodes_after_max_episode_steps() -> None:
    env = gymnasium.make_vec(SERVING_ID, num_envs=2, max_episode_steps=4, workload=short())
    env.reset(seed=0)
    cuts = [env.step(np.zeros((2, 2), dtype=np.int64))[3].tolist() for _ in range(8)]
    assert cuts == [[step % 4 == 3] * 2 for step in range(8)]


def test_returned_arrays_are_the_callers_to_keep() -> None:
    twins = [ServingEnv(workload=short(), queue_rows=2) for _ in range(2)]
    spoilt, kept = (env.reset(seed=4)[0] for env in twins)
    for _ in range(15):
        before = _copy(kept)
        for array in spoilt.values():
            array.fill(np.nan)
        spoilt, after = (env.step(np.array([3, 2]))[0] for env in twins)
        _assert_same(spoilt, after)
        _assert_same(kept, before)
        kept = after


def test_returned_arrays_of_the_vector_environment_are_the_callers_to_keep() -> None:
    twins = [ServingVectorEnv(3, workload=short(), queue_rows=2, episode_decisions=7) for _ in range(2)]
    spoilt, kept = (env.reset(seed=4)[0] for env in twins)
    actions = np.array([[3, 2], [0, 12], [8, 0]])
    finals: list[tuple[Observed, Observed]] = []
    for _ in range(30):
        before = _copy(kept)
        for array in spoilt.values():
            array.fill(np.nan)
        spoilt, reward, _, truncated, info = twins[0].step(actions)
        after, expected, _, expected_truncated, expected_info = twins[1].step(actions)
        _assert_same(spoilt, after)
        _assert_same(kept, before)
        np.testing.assert_array_equal(reward, expected)
        np.testing.assert_array_equal(truncated, expected_truncated)
        finals += [(o, _copy(o)) for o in expected_info.get("final_obs", ()) if o is not None]
        reward.fill(np.nan)
        truncated.fill(True)
        for terms in info["reward_terms"].values():
            terms.fill(np.nan)
        for final in info.get("final_obs", ()):
            for array in (final or {}).values():
                array.fill(np.nan)
        kept = after
    assert len(finals) == 12
    for final, as_returned in finals:
        _assert_same(final, as_returned)


def _episode(env: ServingEnv, **reset: Any) -> tuple[list[Observed], list[float]]:
    observation, _ = env.reset(**reset)
    observations, rewards, over = [observation], [], False
    rng = np.random.default_rng(0)
    while not over:
        observation, reward, _, over, _ = env.step(rng.integers([9, 13]))
        observations.append(observation)
        rewards.append(reward)
    return observations, rewards


def test_a_seed_is_an_episode() -> None:
    env = ServingEnv(workload=short(num_requests=20))
    first, other, again = (_episode(env, seed=seed) for seed in (1, 2, 1))
    elsewhere = _episode(ServingEnv(workload=short(num_requests=20)), seed=1)
    for same in (again, elsewhere):
        assert first[1] == same[1]
        for a, b in zip(first[0], same[0], strict=True):
            _assert_same(a, b)
    assert first[1] != other[1]


def test_resets_without_a_seed_go_on_with_other_episodes() -> None:
    def digests(seed: int) -> list[str]:
        env = ServingEnv(workload=short())
        env.reset(seed=seed)
        found = [env.batch.simulator.workloads[0].digest]
        for _ in range(3):
            env.reset()
            found.append(env.batch.simulator.workloads[0].digest)
        return found

    assert len(set(digests(0))) == 4
    assert digests(0) == digests(0)


def test_distinct_workloads_limits_what_is_drawn_and_keeps_it() -> None:
    env = ServingVectorEnv(4, workload=short(), distinct_workloads=3)
    drawn = []
    for seed in range(10):
        env.reset(seed=seed)
        drawn += env.batch.simulator.workloads
    assert len({id(workload) for workload in drawn}) == len({workload.digest for workload in drawn}) == 3
    assert {workload.digest for workload in drawn} == {short().draw(seed).digest for seed in range(3)}


def test_a_given_workload_is_the_one_that_is_played() -> None:
    workload = short(num_requests=9).draw(77)
    env, many = ServingEnv(workload=short()), ServingVectorEnv(3, workload=short())
    episodes = [_episode(env, seed=seed, options={"workload": workload}) for seed in (0, 1)]
    assert episodes[0][1] == episodes[1][1]
    assert env.batch.simulator.workloads[0] is workload
    _, info = play(env, fixed(0, 512), options={"workload": workload})
    assert info["episode_summary"]["requests_finished"] == 9
    observation, _ = many.reset(seed=5, options={"workload": workload})
    for e in range(3):
        _assert_same({name: array[e] for name, array in observation.items()}, episodes[0][0][0])


def test_a_workload_as_the_source_is_every_episode() -> None:
    workload = short().draw(3)
    env = ServingEnv(workload=workload)
    assert _episode(env, seed=0)[1] == _episode(env)[1]


def test_decide_every_repeats_the_action() -> None:
    workload = requests([0.0, 0.0, 0.1], [300, 200, 100], [30, 20, 40])
    slow, quick = (ServingEnv(workload=workload, decide_every=k, decision_s=0.0) for k in (3, 1))
    slow.reset(seed=0)
    quick.reset(seed=0)
    over = False
    while not over:
        action = np.array([2, 3])
        observation, reward, _, over, _ = slow.step(action)
        rewards, sums, quick_over = [], np.zeros(len(LOAD_FIELDS)), False
        for _ in range(3):
            if not quick_over:
                last, one, _, quick_over, _ = quick.step(action)
                rewards.append(one)
                sums += last["load"]
        assert over == quick_over
        assert reward == pytest.approx(sum(rewards), rel=1e-12)
        np.testing.assert_array_equal(observation["queue"], last["queue"])
        since = [LOAD_FIELDS.index(name) for name in ("interval_s", "iterations", "finished", "emitted_tokens")]
        now = [LOAD_FIELDS.index(name) for name in ("num_decodes", "free_kv_tokens", "last_iteration_s", "overdue")]
        np.testing.assert_allclose(observation["load"][since], sums[since], rtol=1e-6)
        np.testing.assert_array_equal(observation["load"][now], last["load"][now])


def _check_every_step(env: ServingEnv, actions: Callable[[], np.ndarray], **reset: Any) -> dict[str, float]:
    """Play an episode; every observation, reward and info must be lawful. Returns preemptions and most waiting."""
    observation, _ = env.reset(**reset)
    seen = {"preemptions": 0.0, "waiting": 0.0}
    over, steps = False, 0
    while not over:
        assert env.observation_space.contains(observation), observation
        observation, reward, terminated, over, info = env.step(actions())
        terms = info["reward_terms"]
        assert tuple(terms) == TERMS
        assert min(terms.values()) >= 0.0
        assert -reward == pytest.approx(sum(terms.values()), rel=1e-12)
        assert not terminated
        seen["preemptions"] += observation["load"][PREEMPTIONS]
        seen["waiting"] = max(seen["waiting"], observation["load"][LOAD_FIELDS.index("num_waiting")])
        steps += 1
        assert steps < 20_000
    assert env.observation_space.contains(observation)
    assert "episode_summary" in info
    return seen


@given(
    st.lists(
        st.tuples(st.sampled_from([0.0, 0.0, 0.01, 0.3, 40.0]), st.integers(1, 300), st.integers(1, 40)),
        min_size=1,
        max_size=12,
    ),
    st.integers(22, 40),
    st.integers(1, 6),
    st.integers(1, 3),
    st.sampled_from([None, 1, 5]),
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 12)), min_size=1, max_size=5),
    st.sampled_from([0.01, 1.0]),
)
@settings(max_examples=60, deadline=None)
def test_every_observation_is_in_the_space(
    rows: list[tuple[float, int, int]],
    blocks: int,
    seqs: int,
    queue_rows: int,
    cut: int | None,
    cycle: list[tuple[int, int]],
    ttft_target: float,
) -> None:
    gaps, prompt, output = zip(*rows, strict=True)
    env = ServingEnv(
        engine=tiny_engine(blocks, seqs),
        workload=requests(np.cumsum(gaps), prompt, output),
        queue_rows=queue_rows,
        episode_decisions=cut,
        ttft_target=ttft_target,
    )
    position = -1

    def next_action() -> np.ndarray:
        nonlocal position
        position += 1
        return np.array(cycle[position % len(cycle)])

    _check_every_step(env, next_action, seed=0)


@pytest.mark.parametrize("action", [(0, 0), (0, 12), (8, 12), None], ids=str)
def test_every_observation_is_in_the_space_while_requests_are_preempted(action: tuple[int, int] | None) -> None:
    rng = np.random.default_rng(1)
    workload = requests(np.arange(40) * 0.02, rng.integers(50, 200, 40), rng.integers(20, 200, 40))
    env = ServingEnv(engine=tiny_engine(60), workload=workload, queue_rows=3)
    seen = _check_every_step(env, lambda: rng.integers([9, 13]) if action is None else np.array(action), seed=0)
    assert seen["preemptions"] > 5
    assert seen["waiting"] > 20


def test_every_observation_is_in_the_space_under_overload_without_speculation() -> None:
    env = ServingEnv(workload=conversations(rate=60.0, num_requests=300), queue_rows=8, episode_decisions=400)
    seen = _check_every_step(env, lambda: np.array([0, 3]), seed=0)
    assert seen["waiting"] > 200


def test_an_engine_that_never_speculates_has_an_observation_too() -> None:
    grid = ActionGrid(candidate_choices=(0,), budget_choices=(64, 512))
    env = ServingEnv(workload=short(), grid=grid)
    assert env.observation_space["drafted"].shape == (1,)
    _check_every_step(env, lambda: np.array([0, 1]), seed=0)


@pytest.mark.parametrize(
    "action",
    [[9, 0], [0, 13], [-1, 0], [0, -1], [0.0, 1.0], [np.nan, 0], [True, False], [0], [0, 0, 0], 5, None, "ab"],
    ids=str,
)
def test_an_action_off_the_grid_is_refused_and_changes_nothing(action: Any) -> None:
    env, twin = ServingEnv(workload=short()), ServingEnv(workload=short())
    env.reset(seed=0)
    twin.reset(seed=0)
    with pytest.raises(ActionError, match="action"):
        env.step(action)
    _assert_same(env.step(np.array([1, 1]))[0], twin.step(np.array([1, 1]))[0])


@pytest.mark.parametrize(
    "actions", [np.zeros((2, 2), int), np.zeros((3, 2)), np.array([[0, 0], [0, 13], [0, 0]]), np.zeros(6, int)]
)
def test_a_vector_of_actions_off_the_grid_is_refused(actions: np.ndarray) -> None:
    env = ServingVectorEnv(3, workload=short())
    env.reset(seed=0)
    with pytest.raises(ActionError, match="action"):
        env.step(actions)


@pytest.mark.parametrize("action", [117, -1, 1.5, "a", None, [1, 2]])
def test_a_discrete_action_that_is_no_choice_is_refused(action: Any) -> None:
    env = DiscreteAction(ServingEnv(workload=short()))
    env.reset(seed=0)
    with pytest.raises(ActionError, match="0 to 116"):
        env.step(action)


@pytest.mark.parametrize("action", [[np.nan, 0.0], [0.0], [0.0, 0.0, 0.0], 0.0])
def test_a_box_action_that_is_no_pair_of_numbers_is_refused(action: Any) -> None:
    env = BoxAction(ServingEnv(workload=short()))
    env.reset(seed=0)
    with pytest.raises(ActionError, match="two numbers"):
        env.step(np.array(action, dtype=np.float32))


@pytest.mark.parametrize(
    "setting",
    [
        {"queue_rows": 0},
        {"queue_rows": "many"},
        {"queue_rows": 2.5},
        {"decide_every": 0},
        {"decide_every": 1.5},
        {"episode_decisions": 0},
        {"distinct_workloads": -1},
        {"ttft_target": 0.0},
        {"ttft_target": float("nan")},
        {"ttft_target": float("inf")},
        {"ttft_target": "1"},
        {"decision_s": -1e-6},
        {"decision_s": float("nan")},
        {"engine": 3},
        {"workload": "azure"},
        {"prices": {"violation": 1.0}},
        {"grid": [(0, 1), (64,)]},
        {"tpot_target": 0.0},
        {"tpot_target": "fast"},
        {"render_mode": "human"},
        {"queue_row": 3},
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(setting: dict[str, Any]) -> None:
    (name,) = setting
    with pytest.raises((ValueError, TypeError), match=name):
        ServingEnv(**setting)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        (lambda: Prices(violation=-1.0), "violation"),
        (lambda: Prices(tpot_target=0.0), "tpot_target"),
        (lambda: Prices(latenes=1.0), "latenes"),
        (lambda: ActionGrid(budget_choices=(64, 32)), "budget_choices"),
        (lambda: ActionGrid(candidate_choices=()), "candidate_choices"),
    ],
)
def test_bad_prices_and_choices_are_refused_by_name(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        make()


def test_other_misuse_says_what_to_do() -> None:
    with pytest.raises(ValueError, match="num_envs=0"):
        ServingVectorEnv(0)
    with pytest.raises(ValueError, match=r"autoreset_mode=.*DISABLED.* must be SAME_STEP or NEXT_STEP"):
        ServingVectorEnv(2, autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(RuntimeError, match="reset"):
        ServingEnv().step(np.array([0, 0]))
    with pytest.raises(RuntimeError, match="reset"):
        ServingVectorEnv(2).step(np.zeros((2, 2), dtype=np.int64))
    with pytest.raises(ValueError, match="2 seeds for 3"):
        ServingVectorEnv(3).reset(seed=[1, 2])
    with pytest.raises(LatencyTableError, match=r"'vicuna_7b'.*vicuna_7b_a100"):
        ServingEnv(engine=EngineConfig(name="x", latency="vicuna_7b")).reset(seed=0)
    with pytest.raises(ValueError, match=r"options\['workload'\]"):
        ServingEnv().reset(seed=0, options={"workload": short()})
    with pytest.raises(WorkloadError, match="KV cache"):
        ServingEnv(engine=tiny_engine(4), workload=requests([0.0], [60], [30])).reset(seed=0)


def test_discrete_actions_number_every_pair_once() -> None:
    env = DiscreteAction(ServingEnv())
    assert env.action_space == spaces.Discrete(117)
    pairs = [tuple(env.action(np.int64(action))) for action in range(117)]
    assert pairs == [(c, n) for c in range(9) for n in range(13)]
    assert tuple(env.action(np.array(14))) == (1, 1)


def test_box_actions_reach_every_choice_in_order() -> None:
    env = BoxAction(ServingEnv())
    ends = {(-1.0, -1.0): (0, 0), (1.0, 1.0): (8, 12), (0.0, 0.0): (4, 6), (-9.0, 9.0): (0, 12)}
    for numbers, indices in ends.items():
        assert tuple(env.action(np.array(numbers, dtype=np.float32))) == indices
    along = [int(env.action(np.array([x, 0.0]))[0]) for x in np.linspace(-1.0, 1.0, 901)]
    assert along == sorted(along)
    assert set(along) == set(range(9))


def test_the_flat_vector_holds_the_whole_observation() -> None:
    env = FlatObservation(ServingEnv(workload=short(), queue_rows=2, ttft_target=0.5))
    load = np.arange(1.0, len(LOAD_FIELDS) + 1.0, dtype=np.float32)
    load[TTFT_TARGET_S] = 0.5
    queue = np.array([[300.0, 0.2], [100.0, -0.4], [0.0, NO_DEADLINE_S]], dtype=np.float32)
    drafted = np.array([8, 4, 2, 0, 0, 0, 0, 0], dtype=np.float32)
    accepted = np.array([4, 2, 2, 0, 0, 0, 0, 0], dtype=np.float32)
    rates = np.array([0, 0, 3, 0, 0, 0, 0, 5], dtype=np.float32)
    seen = {"load": load, "queue": queue, "drafted": drafted, "accepted": accepted, "rates": rates}
    flat = env.observation(seen)
    assert flat.shape == env.observation_space.shape
    assert env.observation_space.contains(flat)
    count = len(LOAD_FIELDS)
    units = [0.01 if name.endswith("_s") else 100.0 if "tokens" in name else 1.0 for name in LOAD_FIELDS]
    np.testing.assert_allclose(np.expm1(flat[:count]) * units, load, rtol=1e-5)
    np.testing.assert_allclose(flat[count : count + 3], np.log1p([3.0, 1.0, 0.0]), rtol=1e-6)
    np.testing.assert_allclose(flat[count + 3 : count + 6], [np.tanh(0.4), np.tanh(-0.8), 1.0], rtol=1e-6)
    np.testing.assert_allclose(flat[count + 6 : count + 14], np.log1p(drafted), rtol=1e-6)
    np.testing.assert_allclose(flat[count + 14 : count + 22], [0.5, 0.5, 1.0, 0, 0, 0, 0, 0])
    np.testing.assert_allclose(flat[count + 22 :], np.log1p(rates), rtol=1e-6)


def test_the_class_docstring_lists_the_load_fields_and_choices_that_there_are() -> None:
    page = ServingEnv.__doc__ or ""
    table = re.findall(r"^ *\| *(?:load)? *\| (\d+) \| (\w+)[^|]*\| ([\w]+) \| ([\w.]+) \|$", page, flags=re.MULTILINE)
    assert [name for _, name, _, _ in table] == list(LOAD_FIELDS)
    assert [int(index) for index, *_ in table] == list(range(len(LOAD_FIELDS)))
    assert {name: float(most) for _, name, _, most in table} == LOAD_BOUNDS
    for _, name, unit, _ in table:
        expected = "s" if name.endswith("_s") else "tokens" if "tokens" in name or "candidates" in name else None
        assert expected is None or unit == expected, name
    choices = re.findall(r"^ *\| \d \| [cn], [^|]*\| tokens \| ([\d ]+) \|$", page, flags=re.MULTILINE)
    assert [tuple(int(x) for x in row.split()) for row in choices] == [CANDIDATE_CHOICES, BUDGET_CHOICES]


def test_the_class_docstring_explains_every_argument_with_its_default() -> None:
    rows = re.findall(r"^ *\| `(\w+)` \| `?([\w.-]+)`? \| ", ServingEnv.__doc__ or "", flags=re.MULTILINE)
    accepted = inspect.signature(ServingEnv).parameters.values()
    assert [name for name, _ in rows] == [parameter.name for parameter in accepted]
    for (name, written), parameter in zip(rows, accepted, strict=True):
        default = parameter.default
        assert (float(written) if isinstance(default, float | int) else written) == (
            default if isinstance(default, float | int) else str(default)
        ), name


def test_the_single_and_the_vector_environment_take_the_same_arguments() -> None:
    def settings(kind: Any, *others: str) -> dict[str, Any]:
        taken = inspect.signature(kind).parameters
        assert not any(p.kind is inspect.Parameter.VAR_KEYWORD for p in taken.values())
        return {name: parameter.default for name, parameter in taken.items() if name not in others}

    single = settings(ServingEnv, "render_mode")
    assert settings(Episodes.__init__, "self", "num_envs") == single
    assert settings(ServingVectorEnv, "num_envs", "max_episode_steps", "render_mode", "autoreset_mode") == single


def test_stable_baselines_usual_entry_works() -> None:
    """It asks every environment for pictures, and goes on without them after a TypeError only."""
    many = make_vec_env(SERVING_ID, n_envs=2, seed=0, env_kwargs={"workload": short()})
    assert many.render_mode == "rgb_array"
    assert many.reset()["load"].shape == (2, len(LOAD_FIELDS))
    model = PPO("MultiInputPolicy", SERVING_ID, n_steps=8, batch_size=8, n_epochs=1, seed=0)
    before = [parameter.clone() for parameter in model.policy.parameters()]
    model.learn(16)
    assert any((a != b).any() for a, b in zip(before, model.policy.parameters(), strict=True))


def test_a_picture_shows_queue_batch_and_both_choices_of_the_last_decisions() -> None:
    env = ServingEnv("rgb_array", workload=requests([0.0] * 3, [600, 600, 600], [40, 40, 40]))
    plain = ServingEnv(workload=short())
    plain.reset(seed=0)
    assert plain.render() is None
    env.reset(seed=0)
    empty = env.render()
    assert empty.shape == (HEIGHT, WIDTH, 3)
    assert empty.dtype == np.uint8
    observation, *_ = env.step(np.array([0, 8]))
    waiting, decoding = (int(observation["load"][LOAD_FIELDS.index(f"num_{what}")]) for what in ("waiting", "decodes"))
    assert (waiting, decoding) == (2, 1)
    picture = env.render()
    full = STRIP - 6
    for place, (share, (_, colour)) in enumerate(zip((2 / 2, 1 / 1, 1 / 9, 9 / 13), STRIPS, strict=True)):
        column = picture[place * STRIP : (place + 1) * STRIP, -1]
        assert (column == colour).all(axis=-1).sum() == round(share * full), place
        assert not (picture[place * STRIP : (place + 1) * STRIP, -3] == colour).all(axis=-1).any()
    env.reset(seed=0)
    np.testing.assert_array_equal(env.render(), empty)


def test_pictures_are_collected_by_gymnasium_and_change_no_episode() -> None:
    made = gymnasium.make(SERVING_ID, render_mode="rgb_array_list", workload=short())
    plain = gymnasium.make(SERVING_ID, workload=short())
    assert made.metadata["render_fps"] > 0
    made.reset(seed=1)
    plain.reset(seed=1)
    for _ in range(5):
        observation, reward, *_ = made.step(np.array([2, 5]))
        expected, other, *_ = plain.step(np.array([2, 5]))
        _assert_same(observation, expected)
        assert reward == other
    assert [frame.shape for frame in made.render()] == [(HEIGHT, WIDTH, 3)] * 6


def test_the_vector_environment_draws_every_engine_as_the_single_one_does() -> None:
    many = gymnasium.make_vec(SERVING_ID, num_envs=2, render_mode="rgb_array", workload=short())
    single = [ServingEnv("rgb_array", workload=short()) for _ in range(2)]
    many.reset(seed=4)
    for e, env in enumerate(single):
        env.reset(seed=4 + e)
    for _ in range(6):
        many.step(np.array([[2, 5], [8, 0]]))
        single[0].step(np.array([2, 5]))
        single[1].step(np.array([8, 0]))
    frames = many.render()
    assert frames is not None
    for frame, env in zip(frames, single, strict=True):
        np.testing.assert_array_equal(frame, env.render())


def _names() -> list[str]:
    """The choices of `conf/workload` that need nothing given."""
    files = sorted((REPOSITORY / "conf" / "workload").glob("*.yaml"))
    return [file.stem for file in files if "???" not in file.read_text()]


@pytest.mark.parametrize("name", _names())
def test_a_workload_by_name_is_the_one_that_the_apps_compose(name: str) -> None:
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base=None):
        theirs = instantiate(compose("evaluate", [f"workload={name}"]).workload, _convert_="all")
    assert named_workload(name) == theirs


def test_the_environments_take_a_workload_by_name() -> None:
    for env in (
        gymnasium.make(SERVING_ID, workload="bench_idle").unwrapped,
        ServingVectorEnv(2, workload="bench_idle"),
    ):
        assert env.batch.source == named_workload("bench_idle")  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"workload=azure_conv_lik: no such choice; did you mean azure_conv_like\?"):
        ServingEnv(workload="azure_conv_lik")
    with pytest.raises(ValueError, match=r"workload=trace: no default for path: give a TraceSource\(path=...\)"):
        ServingEnv(workload="trace")


def test_the_tpot_target_prices_the_reward() -> None:
    workload = requests([0.0, 0.1], [300, 200], [30, 20])
    usual, half = (ServingEnv(workload=workload, tpot_target=target) for target in (None, 0.025))
    assert half.batch.prices == Prices(tpot_target=0.025)
    assert play(half, fixed(2, 512))[0] == pytest.approx(2.0 * play(usual, fixed(2, 512))[0])
    assert ServingEnv(tpot_target=0.1, prices=Prices(violation=9.0)).batch.prices == Prices(
        tpot_target=0.1, violation=9.0
    )
    with pytest.raises(ValueError, match=r"tpot_target=0\.1 and prices\.tpot_target=0\.2 differ: give one"):
        ServingEnv(tpot_target=0.1, prices=Prices(tpot_target=0.2))
