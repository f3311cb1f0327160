"""Reinforcement learning with Stable-Baselines3: the loop around an algorithm, which can be killed and gone on with."""

import logging
import random
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sb3_contrib.common.recurrent.type_aliases import RNNStates
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.logger import Logger
from stable_baselines3.common.vec_env import VecNormalize

from controllers.network import LARGEST_INPUT
from controllers.policy import Policy
from runs.learning.checkpoint import load_checkpoint, save_checkpoint
from runs.learning.record import STEP, Metrics, Row
from runs.learning.training import POLICY, Training
from runs.learning.validation import Validation, reference, serving
from runs.learning.vec_env import Episode, GovernorVecEnv
from runs.serving import Progress

if TYPE_CHECKING:
    from runs.learning.learners import SB3Learner

log = logging.getLogger(__name__)

_PROGRESS = (
    "num_timesteps", "_n_updates", "_n_calls", "_episode_num", "_current_progress_remaining", "exploration_rate",
    "_last_obs", "_last_original_obs", "_last_episode_starts",
)  # fmt: skip
"""Attributes of SB3's algorithms that training changes, beside networks and buffers; none has all of them."""


class Run(BaseCallback):
    """The state of a run; SB3 calls it back."""

    def __init__(self, training: Training, learner: "SB3Learner", folder: Path, on_progress: Progress | None) -> None:
        super().__init__()
        torch.set_num_threads(1)
        torch.distributions.Distribution.set_default_validate_args(False)
        self.settings = training
        self.learner = learner
        self.folder = folder
        self.on_progress = on_progress
        self.saved = load_checkpoint(folder, training.fingerprint)
        self.env = GovernorVecEnv(training.env, training.seed, learner.form, learner.masked)
        self.normalizer = VecNormalize(self.env, norm_obs=True, norm_reward=False, clip_obs=LARGEST_INPUT)
        self.metrics = Metrics(folder, training.logger, training.label, training.model_dump(mode="json"))
        self.validation = Validation(training.env, training.validation_workloads, reference)
        self.best: tuple[float, Policy, Row] | None = None
        self.episodes: list[Episode] = []
        self.returns: list[float] = []
        self.next_log = self.next_validation = 0
        self.wall_s = 0.0
        self.logged_at = (0, 0.0)
        self.prepared: dict[str, float] = {}
        self.begun_at = self.saved_at = time.perf_counter()

    def go(self) -> dict[str, Any]:
        """Learn to the end, going on from the folder's checkpoint where there is one; returns the summary of it."""
        saved, self.saved = self.saved, None
        learner = self.learner
        if saved is None:
            model = learner.build(self.normalizer, self.settings.seed)
            self.prepared = learner.prepare(model, self.normalizer, self.settings)
        else:
            model = self._restore(saved)
        model.set_logger(Logger(folder=None, output_formats=[]))
        remaining = learner.steps - model.num_timesteps
        if remaining > 0:
            model.learn(remaining, callback=self, log_interval=None, reset_num_timesteps=saved is None)  # type: ignore[arg-type]
        self.model = model
        return self._finish()

    def _restore(self, saved: dict[str, Any]) -> BaseAlgorithm:
        self.env.reset()
        model = self.learner.build(self.normalizer, self.settings.seed)
        _restore_model(model, saved["model"])
        self.env.restore(saved["env"])
        vars(self.normalizer.obs_rms).update(saved["normalizer"])
        own = saved["run"]
        self.best, self.returns = own["best"], own["returns"]
        self.episodes = [Episode.of(plain) for plain in own["episodes"]]
        self.next_log, self.next_validation = own["next_log"], own["next_validation"]
        self.wall_s, self.prepared, self.logged_at = own["wall_s"], own["prepared"], own["logged_at"]
        self.metrics.resume(own["rows"])
        random.setstate(saved["random"][0])
        np.random.set_state(saved["random"][1])  # noqa: NPY002 - SB3 draws from the global generators
        torch.set_rng_state(saved["random"][2])
        log.info("goes on from step %d", model.num_timesteps)
        return model

    def _save(self) -> None:
        save_checkpoint(
            self.folder,
            self.settings.fingerprint,
            {
                "model": _plain_model(self.model),
                "env": self.env.snapshot(),
                "normalizer": vars(self.normalizer.obs_rms),
                "random": (random.getstate(), np.random.get_state(), torch.get_rng_state()),  # noqa: NPY002
                "run": {
                    "best": self.best,
                    "episodes": [asdict(episode) for episode in self.episodes],
                    "returns": self.returns,
                    "next_log": self.next_log,
                    "next_validation": self.next_validation,
                    "wall_s": self._wall(),
                    "prepared": self.prepared,
                    "logged_at": self.logged_at,
                    "rows": self.metrics.rows,
                },
            },
        )
        self.saved_at = time.perf_counter()

    def _wall(self) -> float:
        return self.wall_s + time.perf_counter() - self.begun_at

    def _on_rollout_start(self) -> None:
        """Between an update and the next steps: the one place where nothing is half done."""
        steps = self.model.num_timesteps
        self.env.progress(steps / self.learner.steps)
        if steps >= self.next_log or steps >= self.next_validation:
            self._log(steps)
        if time.perf_counter() - self.saved_at >= self.settings.checkpoint_s:
            self._save()

    def _on_step(self) -> bool:
        ended = self.env.take_episodes()
        if ended:
            self.episodes += ended
            self._price(ended)
            self.returns += [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
        return True

    def _price(self, ended: list[Episode]) -> None:
        """One step of dual ascent on the price of a missed deadline."""
        reward = self.settings.env.reward
        if reward.constraint == "lagrangian":
            for episode in ended:
                allowed = episode.baseline.missed / episode.baseline.requests + reward.slack
                excess = (1.0 - episode.ttft_attainment) - allowed
                self.env.multiplier = max(0.0, self.env.multiplier + reward.multiplier_rate * excess)

    def _log(self, steps: int) -> None:
        row: Row = {STEP: float(steps)}
        wall = self._wall()
        if steps > self.logged_at[0]:
            row["train/steps_per_s"] = (steps - self.logged_at[0]) / (wall - self.logged_at[1])
        row["train/wall_s"] = wall
        row |= {
            f"train/{name.split('/')[-1]}": float(value)
            for name, value in self.model.logger.name_to_value.items()
            if name.startswith("train/") and isinstance(value, int | float | np.number)
        }
        row["train/violation_multiplier"] = self.env.multiplier
        row["train/curriculum_stage"] = float(self.env.stage)
        if self.episodes:
            row["train/return"] = float(np.mean(self.returns))
            row["serving/tpot_s"] = float(np.nanmean([episode.tpot_s for episode in self.episodes]))
            row["serving/ttft_attainment"] = float(np.mean([episode.ttft_attainment for episode in self.episodes]))
            ratios = [episode.objective / episode.baseline.objective for episode in self.episodes]
            row["serving/objective_ratio"] = float(np.mean(ratios))
        if steps >= self.next_validation:
            self._validate(row)
            self.next_validation = steps + self.settings.validation_every
        self.metrics.add(row)
        self._show(steps, row)
        self.episodes, self.returns = [], []
        self.next_log = steps + self.settings.log_every
        # Validation is not training: its time does not count against the steps that follow.
        self.logged_at = (steps, self._wall())

    def _validate(self, row: Row) -> None:
        policy = self._policy()
        figures = self.validation.figures(serving(policy))
        row |= {f"eval/{name}": value for name, value in figures.items()}
        if self.best is None or figures["objective_ratio"] < self.best[0]:
            self.best = (figures["objective_ratio"], policy, dict(row))

    def _show(self, steps: int, row: Row) -> None:
        if self.on_progress is not None:
            note = ""
            if "train/steps_per_s" in row and "train/return" in row:
                note = (
                    f"{row['train/steps_per_s']:,.0f} steps/s  return {row['train/return']:.1f}  "
                    f"TPOT {1e3 * row['serving/tpot_s']:.1f} ms  on time {100 * row['serving/ttft_attainment']:.1f} %"
                )
            self.on_progress(steps, self.learner.steps, note)  # type: ignore[call-arg]
        if "eval/objective_ratio" in row:
            log.info(
                "step %d: objective %.4f, TPOT %.4f times analytic's, TTFT attainment %+.4f",
                steps,
                row["eval/objective_ratio"],
                row["eval/tpot_ratio"],
                row["eval/attainment_difference"],
            )

    def _policy(self) -> Policy:
        network = self.learner.actor(self.model).network(self.normalizer)
        steps = int(self.model.num_timesteps)
        return self.settings.policy(network, self.learner.form, self.learner.masked, steps=steps)

    def _finish(self) -> dict[str, Any]:
        steps = int(self.model.num_timesteps)
        if not self.metrics.rows or self.metrics.rows[-1][STEP] < steps:
            self.next_validation = 0
            self._log(steps)
        assert self.best is not None
        _, policy, row = self.best
        policy.save(self.folder / POLICY)
        paces = [row["train/steps_per_s"] for row in self.metrics.rows if "train/steps_per_s" in row]
        result = (
            {
                "name": policy.header.name,
                "steps": steps,
                "best_at_step": int(row[STEP]),
                "wall_s": self._wall(),
                "steps_per_s_median": float(np.median(paces)) if paces else float("nan"),
            }
            | self.prepared
            | {name: value for name, value in row.items() if name.startswith("eval/")}
        )
        self._save()
        self.metrics.finish(result)
        return result


def _plain_model(model: BaseAlgorithm) -> dict[str, Any]:
    """Return everything that training has changed in a model, as a checkpoint holds it."""
    plain: dict[str, Any] = {
        "parameters": model.get_parameters(),
        # SAC's entropy coefficient is a tensor of its own.
        "tensors": {name: getattr(model, name).data for name in model._get_torch_save_params()[1]},
        "progress": {name: getattr(model, name) for name in _PROGRESS if hasattr(model, name)},
        # The action space draws exploration.
        "action_space": model.action_space.np_random.bit_generator.state,
    }
    states: Any = getattr(model, "_last_lstm_states", None)
    if states is not None:
        plain["lstm"] = [tuple(states.pi), tuple(states.vf)]
    buffer = getattr(model, "replay_buffer", None)
    if buffer is not None:
        plain["buffer"] = {name: value for name, value in vars(buffer).items() if isinstance(value, np.ndarray)}
        plain["buffer_end"] = (buffer.pos, buffer.full)
    return plain


def _restore_model(model: Any, plain: dict[str, Any]) -> None:
    """Make a new model what `_plain_model` was given."""
    model.set_parameters(plain["parameters"], device="cpu")
    for name, value in plain["tensors"].items():
        getattr(model, name).data = value
    for name, value in plain["progress"].items():
        setattr(model, name, value)
    model.action_space.np_random.bit_generator.state = plain["action_space"]
    if "lstm" in plain:
        model._last_lstm_states = RNNStates(*plain["lstm"])
    if "buffer" in plain:
        for name, value in plain["buffer"].items():
            setattr(model.replay_buffer, name, value)
        model.replay_buffer.pos, model.replay_buffer.full = plain["buffer_end"]
