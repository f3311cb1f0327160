"""The natively batched serving environment: N engines in one compiled step."""

from collections.abc import Sequence
from copy import deepcopy
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.objective import Prices
from engine.core.telemetry import Observation
from engine.workload.source import WorkloadSource
from engine.workload.workload import Workload
from envs.batch import ServingBatch
from envs.episodes import RENDER_MODES, check_render_mode, given_workload
from envs.reward import TERMS
from envs.spaces import action_space, observation_space
from envs.viewer import FPS, Viewer


class ServingVectorEnv(VectorEnv[dict[str, NDArray[np.float32]], NDArray[np.int64], NDArray[np.bool_]]):
    """N independent `ServingEnv` episodes in one compiled step.

    Environment i seeded with s + i behaves bit for bit like the single environment seeded with s + i. Observations are
    fresh arrays at every step.

    With `AutoresetMode.SAME_STEP` the next episode begins in the step that ends one: the last observation is in
    `infos["final_obs"][i]`, the summary in `infos["final_info"]`. With `AutoresetMode.NEXT_STEP`, which wrappers such
    as `gymnasium.wrappers.vector.NormalizeObservation` need, the step that ends an episode returns its last observation
    and, in `infos`, its summary; the step after it begins the next one, whatever its action, at a reward of 0.

    Args:
        num_envs: N.
        max_episode_steps: decisions after which an episode is cut, in place of `episode_decisions`.
        render_mode: None or `rgb_array`: `render()` gives a picture per environment.
        autoreset_mode: `SAME_STEP` or `NEXT_STEP`, as the enum's member, its name or its value.
        engine, ...: those of `ServingEnv`.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": FPS, "autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012

    def __init__(
        self,
        num_envs: int = 1,
        max_episode_steps: int | None = None,
        render_mode: str | None = None,
        *,
        autoreset_mode: AutoresetMode | str = AutoresetMode.SAME_STEP,
        engine: str | EngineConfig = "vicuna_7b_a100",
        workload: str | WorkloadSource | Workload | None = None,
        ttft_target: float = 1.0,
        tpot_target: float | None = None,
        prices: Prices | None = None,
        grid: ActionGrid | None = None,
        queue_rows: int = 64,
        decide_every: int = 1,
        decision_s: float = 20e-6,
        episode_s: float | None = None,
        episode_decisions: int | None = None,
        distinct_workloads: int | None = 64,
    ) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        self.autoreset_mode = _autoreset(autoreset_mode)
        self.metadata = {**self.metadata, "autoreset_mode": self.autoreset_mode}
        self.num_envs = num_envs
        self.batch = ServingBatch(
            num_envs,
            engine=engine,
            workload=workload,
            ttft_target=ttft_target,
            tpot_target=tpot_target,
            prices=prices,
            grid=grid,
            queue_rows=queue_rows,
            decide_every=decide_every,
            decision_s=decision_s,
            episode_s=episode_s,
            episode_decisions=episode_decisions if episode_decisions is not None else max_episode_steps,
            distinct_workloads=distinct_workloads,
        )
        self.single_observation_space = observation_space(self.batch.queue_rows, self.batch.max_candidates)
        self.single_action_space = action_space(self.batch.grid)
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self._rngs: list[np.random.Generator] = []
        self._ended = np.zeros(num_envs, dtype=np.bool_)
        self._viewers = [Viewer(self.batch.grid) for _ in range(num_envs)] if render_mode is not None else []

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
        self._ended[:] = False
        for viewer in self._viewers:
            viewer.clear()
        return self._dict(observation), {}

    def render(self) -> tuple[NDArray[np.uint8], ...] | None:
        """A picture of every environment's last decisions (see `ServingEnv.render`); None without a `render_mode`."""
        return tuple(viewer.frame() for viewer in self._viewers) if self._viewers else None

    def snapshot(self) -> dict[str, Any]:
        """Picklable state of every episode and every generator; see `ServingBatch.snapshot`."""
        return {"batch": self.batch.snapshot(), "rngs": deepcopy(self._rngs), "ended": self._ended.copy()}

    def restore(self, snapshot: dict[str, Any]) -> None:
        """Continue from a `snapshot` of an environment of the same settings; the next steps are equal, bit for bit."""
        self._rngs = deepcopy(snapshot["rngs"])
        self._ended = snapshot["ended"].copy()
        self.batch.restore(snapshot["batch"])

    @staticmethod
    def _dict(observation: Observation) -> dict[str, NDArray[np.float32]]:
        return dict(zip(Observation._fields, observation, strict=True))

    def step(  # type: ignore[override]  # rewards are floats, VectorEnv ties their type to that of the flags
        self, actions: NDArray[np.int64]
    ) -> tuple[
        dict[str, NDArray[np.float32]], NDArray[np.float64], NDArray[np.bool_], NDArray[np.bool_], dict[str, Any]
    ]:
        """One decision in every environment; ended episodes restart according to `autoreset_mode`."""
        actions = np.asarray(actions)
        observation, costs, over = self.batch.step(actions)
        # An engine whose episode ended in the previous step has run in this one as well; its reset undoes that.
        begun = self._ended
        costs[begun] = 0.0
        over &= ~begun
        for e, viewer in enumerate(self._viewers):
            viewer.add(actions[e], observation, e)
        infos: dict[str, Any] = {
            "reward_terms": {name: costs[:, i].copy() for i, name in enumerate(TERMS)},
            "_reward_terms": ~begun,
        }
        ended = np.flatnonzero(over).tolist()
        same_step = self.autoreset_mode is AutoresetMode.SAME_STEP
        for e in ended:
            summary = {"episode_summary": self.batch.summary(e)}
            if same_step:
                final = {name: array[e].copy() for name, array in self._dict(observation).items()}
                infos = self._add_info(infos, {"final_obs": final, "final_info": summary}, e)
            else:
                infos = self._add_info(infos, summary, e)
        self._begin(ended if same_step else np.flatnonzero(begun).tolist(), observation)
        if not same_step:
            self._ended = over.copy()
        terminated = np.zeros(self.num_envs, dtype=np.bool_)
        return self._dict(observation), -costs.sum(axis=1), terminated, over, infos

    def _begin(self, envs: list[int], observation: Observation) -> None:
        """Begin a new episode in each of `envs`, observed in their rows."""
        if not envs:
            return
        self.batch.reset(envs, [self._rngs[e] for e in envs])
        self.batch.observe(envs, observation)
        for e in envs:
            if self._viewers:
                self._viewers[e].clear()


def _autoreset(mode: AutoresetMode | str) -> AutoresetMode:
    """The mode of this name. Raises ValueError for modes that this environment does not support."""
    for known in (AutoresetMode.SAME_STEP, AutoresetMode.NEXT_STEP):
        if mode in (known, known.name, known.value):
            return known
    raise ValueError(f"autoreset_mode={mode!r} must be SAME_STEP or NEXT_STEP")
