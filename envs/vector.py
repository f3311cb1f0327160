"""The natively batched serving environment: N engines in one compiled step."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from engine.core.telemetry import Observation
from envs.batch import ServingBatch
from envs.episodes import given_workload, refuse_rendering
from envs.reward import TERMS
from envs.spaces import action_space, observation_space


class ServingVectorEnv(VectorEnv[dict[str, NDArray[np.float32]], NDArray[np.int64], NDArray[np.bool_]]):
    """N independent `ServingEnv` episodes, reset in the step that ends them (`AutoresetMode.SAME_STEP`).

    Environment i seeded with s + i behaves bit for bit like the single environment seeded with s + i. The last
    observation of an episode is in `infos["final_obs"][i]`, its summary in `infos["final_info"]`. Observations are
    fresh arrays at every step.

    Args:
        num_envs: N.
        max_episode_steps: decisions after which an episode is cut, like `episode_decisions`.
        settings: those of `ServingEnv`.
    """

    metadata = {"render_modes": [], "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        **settings: Any,
    ) -> None:
        refuse_rendering(render_mode)
        self.render_mode = None
        settings.setdefault("episode_decisions", max_episode_steps)
        self.num_envs = num_envs
        self.batch = ServingBatch(num_envs, **settings)
        self.single_observation_space = observation_space(self.batch.queue_rows, self.batch.max_candidates)
        self.single_action_space = action_space(self.batch.grid)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []

    def reset(
        self, *, seed: int | Sequence[int | None] | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
        """Begin an episode everywhere; an integer seed s seeds environment i with s + i.

        `options["workload"]` gives one workload to all.
        """
        seeds: list[int | None]
        if seed is None:
            seeds = [None] * self.num_envs
        elif isinstance(seed, int | np.integer):
            seeds = [int(seed) + i for i in range(self.num_envs)]
        else:
            seeds = list(seed)
        if len(seeds) != self.num_envs:
            raise ValueError(f"{len(seeds)} seeds for {self.num_envs} environments")
        if not self._rngs:
            self._rngs = [gymnasium.utils.seeding.np_random(s)[0] for s in seeds]
        else:
            for i, s in enumerate(seeds):
                if s is not None:
                    self._rngs[i] = gymnasium.utils.seeding.np_random(s)[0]
        given = given_workload(options)
        everywhere = range(self.num_envs)
        self.batch.reset(everywhere, self._rngs, None if given is None else [given] * self.num_envs)
        observation = self.batch.new_observation()
        self.batch.observe(everywhere, observation)
        return self._dict(observation), {}

    def snapshot(self) -> dict[str, Any]:
        """Where every episode and every generator is, to be pickled; see `ServingBatch.snapshot`."""
        return {"batch": self.batch.snapshot(), "rngs": deepcopy(self._rngs)}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Take up a `snapshot` of an environment of the same settings: the next steps are the same, bit for bit."""
        self._rngs = deepcopy(snapshot["rngs"])
        self.batch.restore(snapshot["batch"])

    @staticmethod
    def _dict(observation: Observation) -> dict[str, NDArray[np.float32]]:
        return dict(zip(Observation._fields, observation, strict=True))

    def step(  # type: ignore[override]  # rewards are floats, VectorEnv ties their type to that of the flags
        self, actions: NDArray[np.int64]
    ) -> tuple[
        dict[str, NDArray[np.float32]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """One decision in every environment; episodes that end begin anew in the same step."""
        observation, costs, over = self.batch.step(np.asarray(actions))
        infos: dict[str, Any] = {
            "reward_terms": {name: costs[:, i].copy() for i, name in enumerate(TERMS)},
            "_reward_terms": np.ones(self.num_envs, dtype=np.bool_),
        }
        ended = np.flatnonzero(over).tolist()
        for e in ended:
            final = {name: array[e].copy() for name, array in self._dict(observation).items()}
            summary = {"episode_summary": self.batch.summary(e)}
            infos = self._add_info(infos, {"final_obs": final, "final_info": summary}, e)
        if ended:
            self.batch.reset(ended, [self._rngs[e] for e in ended])
            self.batch.observe(ended, observation)
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        return self._dict(observation), -costs.sum(axis=1), terminated, over, infos
