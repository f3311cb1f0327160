"""Every learner trains, leaves a policy that acts as it was trained, and goes on after an interruption unharmed."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from controllers.learned import Learned, SightMemory, policy_params
from controllers.network import new_network_memory
from controllers.policy import Policy, Residual
from engine.plant import Plant
from runs.evaluation import Targets, load_lookup
from runs.learning.checkpoint import CHECKPOINT
from runs.learning.cloning import Clone
from runs.learning.evolution import CEM, CONTROLLER
from runs.learning.learners import DQNLearner, MaskablePPOLearner, PPOLearner, RecurrentPPOLearner, SACLearner
from runs.learning.policy_iteration import PolicyIteration
from runs.learning.record import METRICS, STEP
from runs.learning.reinforcement import Run
from runs.learning.scenarios import Reward
from runs.learning.training import POLICY, Learner, Training
from tests.runs.learning.training_settings import GRID, training_env

PPO_STEPS: dict[str, Any] = {"steps": 6 * 16 * 8, "n_steps": 16, "batch_size": 48, "n_epochs": 2, "layers": (16,)}
OFF_POLICY: dict[str, Any] = {
    "steps": 720, "buffer_size": 400, "learning_starts": 60, "batch_size": 32, "gradient_steps": 1, "layers": (16,),
}  # fmt: skip
SPANS = {"guard": {"low": 0.4, "high": 1.0}, "prefill_price": {"low": 0.2, "high": 3.0, "log": True}}
ITERATION: dict[str, Any] = {"rounds": 1, "moments": 40, "shifts": 3, "every": 4, "epochs": 2, "layers": (8,)}
LEARNERS: dict[str, Learner] = {
    "ppo": PPOLearner(**PPO_STEPS),
    "maskable ppo": MaskablePPOLearner(**PPO_STEPS),
    "recurrent ppo": RecurrentPPOLearner(**PPO_STEPS, lstm_hidden=4),
    "dqn": DQNLearner(**OFF_POLICY),
    "sac": SACLearner(**OFF_POLICY),
    "cloned ppo": PPOLearner(**PPO_STEPS, clone=Clone(rounds=2, decisions=300, epochs=2)),
    "residual ppo": PPOLearner(**PPO_STEPS),
    "policy iteration": PolicyIteration(**ITERATION, margins=(0.0, 1.0)),
    "cem": CEM(generations=6, population=4, elite=2, workloads=1, spans=SPANS),  # type: ignore[arg-type]
}
WALL = {"train/wall_s", "train/steps_per_s"}


def training(name: str, **settings: Any) -> Training:
    env: dict[str, Any] = settings.pop("env", {})
    if name in ("residual ppo", "policy iteration"):
        env |= {"residual": Residual(candidates=1, budgets=1)}
    own = {"log_every": 100, "validation_every": 300, "validation_workloads": 1}
    return Training(env=training_env(**env), learner=LEARNERS[name], seed=2, kind=name, **(own | settings))


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / METRICS).open(encoding="utf-8") as file:
        return [{key: value for key, value in row.items() if key not in WALL} for row in csv.DictReader(file)]


class Killed(Exception):  # noqa: N818 - stands for a signal
    pass


@pytest.mark.parametrize("name", LEARNERS)
def test_an_interrupted_run_ends_as_an_undisturbed_one(name: str, tmp_path: Path) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    expected = training(name, checkpoint_s=1e9).run(whole)
    rng = np.random.default_rng(0)
    kills = 0
    for _ in range(40):
        left = int(rng.integers(1, 5))

        def progress(done: int, total: int, note: str = "") -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise Killed

        try:
            result = training(name, checkpoint_s=1e-9).run(broken, progress)
            break
        except Killed:
            kills += 1
    assert kills >= 1
    assert rows(broken) == rows(whole)
    steps = [float(row[STEP]) for row in rows(whole)]
    assert steps == sorted(set(steps))
    product = CONTROLLER if name == "cem" else POLICY
    assert (broken / product).read_bytes() == (whole / product).read_bytes()
    for key in expected.keys() - {"wall_s", "steps_per_s_median"}:
        assert str(result[key]) == str(expected[key]), key


@pytest.mark.parametrize("name", ["ppo", "maskable ppo", "recurrent ppo", "dqn", "sac", "residual ppo"])
def test_the_policy_that_is_served_chooses_what_the_one_that_was_trained_would(name: str, tmp_path: Path) -> None:
    settings = training(name)
    run = Run(settings, settings.learner, tmp_path, None)  # type: ignore[arg-type]
    run.go()
    policy = run._policy()
    env, normalizer = run.env, run.normalizer
    inputs = env.reset()
    state, starts = None, np.ones(env.num_envs, dtype=bool)
    one_each = [
        (policy_params(policy, group.plant, 1.0, 0.04), new_network_memory(policy.network, 1))
        for group in env.groups
        for _ in range(group.count)
    ]
    agreed = total = 0
    for _ in range(60):
        kwargs: dict[str, Any] = {}
        if name == "maskable ppo":
            kwargs["action_masks"] = env.action_masks()
        actions, state = run.model.predict(
            normalizer.normalize_obs(inputs.copy()), state=state, episode_start=starts, deterministic=True, **kwargs
        )
        wanted = env._pairs(actions)
        ours = _served(env, one_each, starts)
        agreed += int((ours == wanted).all(axis=1).sum())
        total += len(ours)
        inputs, _, starts, _ = env.step(actions)
    # Two outputs may be equal to the last bits.
    assert agreed >= 0.99 * total


def _served(env: Any, policies: list[Any], starts: Any) -> Any:
    from runs.learning.vec_env import _choose_all

    pairs = np.zeros((env.num_envs, 2), dtype=np.int64)
    i = 0
    for group in env.groups:
        for e in range(group.count):
            params, room = policies[i]
            if starts[i]:
                room.state[:] = 0.0
                room.cell[:] = 0.0
            # The kernel asks from engine 0 on: give it this engine alone.
            fields = type(group.observation)(*(array[e : e + 1] for array in group.observation))
            memory = SightMemory(*(type(part)(*(array[e : e + 1] for array in part)) for part in group.memory))
            _choose_all(fields, memory, group.base[e : e + 1], params, room, pairs[i : i + 1])
            i += 1
    return pairs


def test_ppo_learns_what_is_plainly_better(tmp_path: Path) -> None:
    """With deadlines free of charge and long outputs, only TPOT counts: c = 3 beats c = 0 on idle engines."""
    idle = {"load": {"low": 0.05, "high": 0.1}, "output_scale": {"low": 2.0, "high": 2.0}, "num_requests": 3}
    from tests.runs.learning.training_settings import scenario

    env = {
        "scenarios": {"idle": scenario(**idle)},
        "num_envs": 16,
        "reward": Reward(violation=0.0, lateness=0.0),
        "decide_every": 4,
    }
    learner = PPOLearner(steps=16 * 64 * 40, n_steps=64, batch_size=256, layers=(16,), learning_rate=3e-3, ent_coef=0.0)
    settings = Training(
        env=training_env(**env), learner=learner, validation_workloads=2, validation_every=20_000, log_every=10_000
    )
    result = settings.run(tmp_path)
    with (tmp_path / METRICS).open(encoding="utf-8") as file:
        read = [row for row in csv.DictReader(file) if row["eval/tpot_ratio"]]
    assert result["eval/tpot_ratio"] < 0.9 * float(read[0]["eval/tpot_ratio"])
    assert result["eval/tpot_ratio"] < 1.1


def test_dual_ascent_raises_the_price_of_missed_deadlines(tmp_path: Path) -> None:
    env = {"reward": Reward(constraint="lagrangian", multiplier=0.5, multiplier_rate=0.5)}
    training("ppo", env=env).run(tmp_path)
    prices = [float(row["train/violation_multiplier"]) for row in rows(tmp_path)]
    missed = [1.0 - float(row["serving/ttft_attainment"]) for row in rows(tmp_path) if row["serving/ttft_attainment"]]
    assert max(missed) > 0.05
    assert prices[0] == 0.5
    assert prices[-1] > 0.5


def test_a_clone_agrees_with_analytic(tmp_path: Path) -> None:
    learner = PPOLearner(
        steps=6, n_steps=1, batch_size=6, layers=(64,), clone=Clone(rounds=3, decisions=3000, epochs=20, batch_size=128)
    )
    settings = training("ppo").model_copy(update={"learner": learner})
    assert settings.run(tmp_path)["cloned_agreement"] > 0.8


def test_a_checkpoint_of_another_configuration_is_refused(tmp_path: Path) -> None:
    def stop(done: int, total: int, note: str = "") -> None:
        raise Killed

    with pytest.raises(Killed):
        training("ppo", checkpoint_s=1e-9).run(
            tmp_path, lambda *_: stop(0, 0) if (tmp_path / CHECKPOINT).exists() else None
        )
    with pytest.raises(ValueError, match="of another configuration or version of the code"):
        training("ppo").model_copy(update={"seed": 3}).run(tmp_path)


def test_learners_that_do_not_go_together_are_refused_with_the_reason(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"env.residual="):
        Training(env=training_env(), learner=PolicyIteration()).run(tmp_path)
    cloned = PPOLearner(**PPO_STEPS, clone=Clone(rounds=1, decisions=10))
    with pytest.raises(ValueError, match="begins at analytic's choice anyway"):
        Training(env=training_env(residual=Residual()), learner=cloned).run(tmp_path)


def test_a_trained_policy_governs_an_engine(tmp_path: Path) -> None:
    training("residual ppo").run(tmp_path)
    policy = Policy.load(tmp_path / POLICY)
    assert policy.header.trained["algorithm"] == "ppo"
    assert policy.header.env == training("residual ppo").env.digest
    controller = Learned(path=str(tmp_path / POLICY))
    first = next(iter(training("residual ppo").env.scenarios.values()))
    limits = first.engine.limits(first.engine.true_latency())
    controller.reset(Plant(GRID, lambda: load_lookup(first.engine, GRID, limits, training_env().lookup)))
    assert controller.label() == "residual ppo seed=2"
    assert Targets().ttft_target == 1.0
