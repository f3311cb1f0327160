"""The native vector environment as Stable-Baselines3 wants it: the one adapter between the two.

`AutoresetMode.SAME_STEP` is what SB3 expects of its own environments: the observation of an ended episode goes to
`infos[i]["terminal_observation"]`, and the one returned begins the next. Episodes end by truncation, since serving is a
continuing task, so a learner bootstraps from their last observation.
"""

from collections.abc import Iterable, Sequence
from copy import deepcopy
from dataclasses import asdict, dataclass
from typing import Any, Literal, Self

import numpy as np
from gymnasium import spaces
from numpy.typing import NDArray
from stable_baselines3.common.vec_env import VecEnv

from controllers.features import FARTHEST
from controllers.learned import (
    Params,
    Sight,
    begin,
    distinct_choices,
    new_sight,
    new_sight_memory,
    notice,
    own_choice,
    shifted,
    show_all,
)
from controllers.network import NetworkMemory, network_row
from engine.compiled import outlined
from engine.core.telemetry import INTERVAL_S, Observation
from engine.simulator.simulator import Simulator
from envs.reward import TERMS
from envs.vector import ServingVectorEnv
from runs.learning.baseline import Baseline, Charged
from runs.learning.scenarios import Scenario, TrainingEnv

Form = Literal["pair", "joint", "box"]
"""The action space: `MultiDiscrete` of c and n, `Discrete` over all pairs, or a `Box` in [-1, 1] squared."""


@outlined
def _look(observation, sight, memory, rows, inputs, base):
    """Take in the telemetry of all engines of a scenario and write the policy's inputs."""
    for e in range(rows):
        c, n = notice(observation, e, sight, memory, e)
        base[e, 0] = c
        base[e, 1] = n
        show_all(observation, e, sight, memory, e, c, n, inputs[e])


@outlined
def _look_last(observation, sight, memory, m, inputs):
    """The same for the last telemetry of an episode, after which row m begins anew."""
    c, n = notice(observation, 0, sight, memory, m)
    show_all(observation, 0, sight, memory, m, c, n, inputs)
    begin(memory, m)


@outlined
def _shift(sight, base, chosen, actions):
    for e in range(chosen.shape[0]):
        c, n = shifted(sight, base[e, 0], base[e, 1], chosen[e, 0], chosen[e, 1])
        actions[e, 0] = c
        actions[e, 1] = n


@outlined
def _choose_all(observation, memory, base, params, room, pairs):
    """A policy's own indices in every engine of a scenario; `room` is for one at a time."""
    for e in range(pairs.shape[0]):
        mine = network_row(room, 0)
        show_all(observation, e, params.sight, memory, e, base[e, 0], base[e, 1], mine.values)
        c, n = own_choice(observation, e, params, mine)
        pairs[e, 0] = c
        pairs[e, 1] = n


@outlined
def _mask(observation, candidates, budgets, mask):
    for e in range(mask.shape[0]):
        c, n = distinct_choices(observation, e, candidates, budgets)
        for i in range(candidates.shape[0]):
            mask[e, i] = i < c
        for i in range(budgets.shape[0]):
            mask[e, candidates.shape[0] + i] = i < n


@dataclass
class Episode:
    """A finished episode: its figures, from its first arrival on, beside those of `analytic` on the same requests."""

    scenario: str
    tpot_s: float
    ttft_attainment: float
    objective: float
    duration_s: float
    baseline: Charged

    @classmethod
    def of(cls, plain: dict[str, Any]) -> Self:
        """Return the episode of which `dataclasses.asdict` gave `plain`."""
        return cls(**plain | {"baseline": Charged(**plain["baseline"])})


class Group:
    """The environments of one scenario."""

    def __init__(self, name: str, scenario: Scenario, training: TrainingEnv, count: int, first_seed: int) -> None:
        self.name = name
        self.scenario = scenario
        self.count = count
        self._first_seed = first_seed
        self.env = ServingVectorEnv(
            count,
            engine=scenario.engine,
            workload=training.source(scenario, training.stage(0.0)),
            ttft_target=scenario.slo.ttft_target,
            prices=scenario.slo.prices,
            grid=training.actions,
            decide_every=training.decide_every,
            decision_s=training.decision_s,
            distinct_workloads=training.distinct_workloads,
        )
        self._sources = [training.source(scenario, stage) for stage in range(len(training.curriculum.stages) + 1)]
        self.plant = training.plant(scenario)
        self.sight: Sight = new_sight(
            self.plant,
            training.layout,
            training.residual,
            scenario.slo.ttft_target,
            scenario.slo.tpot_target,
        )
        self.memory = new_sight_memory(self.plant, training.layout, training.residual, count)
        self.base = np.zeros((count, 2), dtype=np.int64)
        self.charged: list[Charged] = []
        self.rates = np.zeros((2, count))
        """What `analytic` is charged per s, and per request, on the workload of each environment."""
        self.observation: Observation | None = None
        self._baseline: Baseline | None = None

    def reset(self) -> None:
        """Begin an episode everywhere."""
        fields, _ = self.env.reset(seed=self._first_seed)
        self.observation = Observation(**fields)
        for e in range(self.count):
            begin(self.memory, e)
        self._charge_all()

    def _charge_all(self) -> None:
        self.charged = [self._charge(e) for e in range(self.count)]
        self.rates[:] = np.array([(charged.per_second, charged.objective) for charged in self.charged]).T

    def _charge(self, e: int) -> Charged:
        workload = self.env.batch.simulator.workloads[e]
        if self._baseline is None:
            slo = self.scenario.slo
            simulator = Simulator(self.scenario.engine, [workload], ttft_target=slo.ttft_target)
            self._baseline = Baseline(simulator, self.plant, slo.prices, slo.ttft_target)
        return self._baseline.of(workload)

    def begun(self, e: int) -> None:
        """Episode e began: look up what `analytic` is charged for it."""
        self.charged[e] = charged = self._charge(e)
        self.rates[:, e] = charged.per_second, charged.objective

    def look(self, inputs: NDArray[np.float32]) -> None:
        """Write the policy's inputs, (count, F), and keep what `analytic` would choose."""
        _look(self.observation, self.sight, self.memory, self.count, inputs, self.base)

    def chosen(self, params: Params, room: NetworkMemory) -> NDArray[np.int64]:
        """(count, 2) the indices that a policy without memory of its own would choose now."""
        pairs = np.zeros((self.count, 2), dtype=np.int64)
        _choose_all(self.observation, self.memory, self.base, params, room, pairs)
        return pairs

    def snapshot(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, in plain containers and arrays.

        A workload is given as the curriculum's stage and the seed that it was drawn with.
        """
        assert self.observation is not None
        env = self.env.snapshot()
        batch = env["batch"]
        return {
            "origins": [
                (self._sources.index(source), seed) for source, seed in map(batch["origins"].get, range(self.count))
            ],
            "decisions": batch["decisions"],
            "simulator": batch["simulator"],
            "rngs": env["rngs"],
            "ended": env["ended"],
            "memory": deepcopy([memory._asdict() for memory in self.memory]),
            "base": self.base.copy(),
            "observation": self.observation._asdict(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a `snapshot`."""
        batch = {
            "origins": {e: (self._sources[stage], seed) for e, (stage, seed) in enumerate(saved["origins"])},
            "decisions": saved["decisions"],
            "simulator": saved["simulator"],
        }
        self.env.restore({"batch": batch, "rngs": saved["rngs"], "ended": saved["ended"]})
        for memory, arrays in zip(self.memory, saved["memory"], strict=True):
            for name, array in arrays.items():
                getattr(memory, name)[...] = array
        self.base[...] = saved["base"]
        self.observation = Observation(**saved["observation"])
        self._charge_all()


class GovernorVecEnv(VecEnv):
    """All scenarios of a `TrainingEnv` as one SB3 environment.

    Observations are (num_envs, F) float32, fresh at every step. Episodes that ended since they were last asked for are
    in `take_episodes()`; `multiplier` is the price of a violation as a factor on the objective's.
    """

    def __init__(self, training: TrainingEnv, seed: int = 0, form: Form = "pair", masked: bool = False) -> None:
        self.training = training
        self.masked = masked
        self.multiplier = training.reward.multiplier if training.reward.constraint == "lagrangian" else 1.0
        self.stage = training.stage(0.0)
        self._form = form
        self.groups: list[Group] = []
        self._slices: list[slice] = []
        first = seed * 1_000_003
        for name, count in training.shares().items():
            self.groups.append(Group(name, training.scenarios[name], training, count, first))
            begin = self._slices[-1].stop if self._slices else 0
            self._slices.append(slice(begin, begin + count))
            first += count
        self._many = training.spread
        self._inputs = len(training.inputs)
        self._actions: NDArray[Any] | None = None
        self._episodes: list[Episode] = []
        self._returns = np.zeros(training.num_envs)
        self._lengths = np.zeros(training.num_envs, dtype=np.int64)
        box = spaces.Box(-FARTHEST, FARTHEST, shape=(self._inputs,), dtype=np.float32)
        self.render_mode = None
        super().__init__(training.num_envs, box, _action_space(form, self._many))

    def reset(self) -> NDArray[np.float32]:
        """Begin an episode everywhere."""
        for group in self.groups:
            group.reset()
        self._returns[:] = 0.0
        self._lengths[:] = 0
        inputs = np.zeros((self.num_envs, self._inputs), dtype=np.float32)
        for group, rows in zip(self.groups, self._slices, strict=True):
            group.look(inputs[rows])
        return inputs

    def step_async(self, actions: NDArray[Any]) -> None:
        """Keep the actions for `step_wait`."""
        self._actions = actions

    def step_wait(self) -> tuple[NDArray[np.float32], NDArray[np.float32], NDArray[np.bool_], list[dict[str, Any]]]:
        """One decision everywhere."""
        assert self._actions is not None
        pairs = self._pairs(self._actions)
        rewards = np.zeros(self.num_envs, dtype=np.float32)
        dones = np.zeros(self.num_envs, dtype=np.bool_)
        infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
        inputs = np.zeros((self.num_envs, self._inputs), dtype=np.float32)
        for group, rows in zip(self.groups, self._slices, strict=True):
            self._step_group(group, pairs[rows], rewards[rows], dones[rows], infos[rows], inputs[rows])
        self._returns += rewards
        self._lengths += 1
        for i in np.flatnonzero(dones).tolist():
            infos[i]["episode"] = {"r": float(self._returns[i]), "l": int(self._lengths[i])}
            self._returns[i], self._lengths[i] = 0.0, 0
        return inputs, rewards, dones, infos

    def _step_group(
        self,
        group: Group,
        pairs: NDArray[np.int64],
        rewards: NDArray[np.float32],
        dones: NDArray[np.bool_],
        infos: list[dict[str, Any]],
        inputs: NDArray[np.float32],
    ) -> None:
        """One decision in the environments of a scenario, whose rows are given."""
        actions = np.empty_like(pairs)
        _shift(group.sight, group.base, pairs, actions)
        fields, _, _, over, raw = group.env.step(actions)
        elapsed = fields["load"][:, INTERVAL_S].astype(np.float64)
        ended = np.flatnonzero(over).tolist()
        for e in ended:
            elapsed[e] = raw["final_obs"][e]["load"][INTERVAL_S]
        rewards[:] = self._reward(group, raw["reward_terms"], elapsed)
        dones[:] = over
        for e in ended:
            last = Observation(**{name: array[None] for name, array in raw["final_obs"][e].items()})
            seen = np.zeros(self._inputs, dtype=np.float32)
            _look_last(last, group.sight, group.memory, e, seen)
            infos[e] |= {"terminal_observation": seen, "TimeLimit.truncated": True}
            figures = raw["final_info"]["episode_summary"]
            self._episodes.append(
                Episode(
                    scenario=group.name,
                    tpot_s=float(figures["tpot_mean_s"][e]),
                    ttft_attainment=float(figures["ttft_attainment"][e]),
                    objective=float(figures["objective"][e]),
                    duration_s=float(figures["duration_s"][e]) - group.charged[e].begin_s,
                    baseline=group.charged[e],
                )
            )
            group.begun(e)
        group.observation = Observation(**fields)
        group.look(inputs)

    def _reward(
        self, group: Group, terms: dict[str, NDArray[np.float64]], elapsed: NDArray[np.float64]
    ) -> NDArray[np.float64]:
        reward = self.training.reward
        factors = {
            "tpot": reward.tpot,
            "violation": reward.violation * self.multiplier,
            "lateness": reward.lateness,
            "unfinished": 1.0,
        }
        cost = sum(factors[name] * terms[name] for name in TERMS)
        if not reward.relative:
            return -reward.scale * np.asarray(cost)
        per_second, objective = group.rates
        earned: NDArray[np.float64] = reward.scale * (per_second * elapsed - cost) / objective
        return earned

    def _pairs(self, actions: NDArray[Any]) -> NDArray[np.int64]:
        """The learner's actions as indices (num_envs, 2) of what it picks c and n from."""
        many = np.array(self._many)
        if self._form == "pair":
            return np.asarray(actions, dtype=np.int64)
        if self._form == "joint":
            return np.stack(np.divmod(np.asarray(actions, dtype=np.int64).reshape(-1), self._many[1]), axis=1)
        unit = (np.clip(np.asarray(actions, dtype=np.float64), -1.0, 1.0) + 1.0) / 2.0
        return np.floor(unit * (many - 1) + 0.5).astype(np.int64)

    def action_masks(self) -> NDArray[np.bool_]:
        """(num_envs, choices of c + choices of n): False where a choice has the effect of a smaller one."""
        mask = np.ones((self.num_envs, sum(self._many)), dtype=np.bool_)
        for group, rows in zip(self.groups, self._slices, strict=True):
            _mask(group.observation, group.sight.candidates, group.sight.budgets, mask[rows])
        return mask

    def take_episodes(self) -> list[Episode]:
        """The episodes that ended since the last call."""
        taken, self._episodes = self._episodes, []
        return taken

    def progress(self, share: float) -> None:
        """Say how much of the training is done: the curriculum may move on."""
        stage = self.training.stage(share)
        if stage != self.stage:
            self.stage = stage
            for group in self.groups:
                group.env.batch.draws_from(self.training.source(group.scenario, stage))

    def snapshot(self) -> dict[str, Any]:
        """Return everything that the next steps depend on, as a checkpoint holds it."""
        return {
            "groups": [group.snapshot() for group in self.groups],
            "multiplier": self.multiplier,
            "stage": self.stage,
            "episodes": [asdict(episode) for episode in self._episodes],
            "returns": self._returns.copy(),
            "lengths": self._lengths.copy(),
        }

    def restore(self, saved: dict[str, Any]) -> None:
        """Go on from a `snapshot` of an environment of the same settings and seed, bit for bit."""
        self.stage = saved["stage"]
        for group, state in zip(self.groups, saved["groups"], strict=True):
            group.env.batch.draws_from(self.training.source(group.scenario, self.stage))
            group.restore(state)
        self.multiplier = saved["multiplier"]
        self._episodes = [Episode.of(plain) for plain in saved["episodes"]]
        self._returns[:] = saved["returns"]
        self._lengths[:] = saved["lengths"]

    def close(self) -> None:
        """Nothing to close."""

    def get_attr(self, attr_name: str, indices: int | Iterable[int] | None = None) -> list[Any]:
        """The adapter's own attribute, once per environment."""
        return [getattr(self, attr_name)] * len(list(self._get_indices(indices)))

    def set_attr(self, attr_name: str, value: Any, indices: int | Iterable[int] | None = None) -> None:
        """Set the adapter's own attribute, for all environments at once."""
        setattr(self, attr_name, value)

    def env_method(
        self, method_name: str, *method_args: Any, indices: int | Iterable[int] | None = None, **method_kwargs: Any
    ) -> list[Any]:
        """The rows of what the adapter's method returns."""
        result = getattr(self, method_name)(*method_args, **method_kwargs)
        return [result[i] for i in self._get_indices(indices)]

    def env_is_wrapped(self, wrapper_class: type[Any], indices: int | Iterable[int] | None = None) -> list[bool]:
        """Nothing is wrapped; episodes are reported like `Monitor` does."""
        return [False] * len(list(self._get_indices(indices)))

    def has_attr(self, attr_name: str) -> bool:
        """Masks are offered only where they are meant."""
        return hasattr(self, attr_name) and (self.masked or attr_name != "action_masks")


def _action_space(form: Form, many: Sequence[int]) -> spaces.Space[Any]:
    if form == "pair":
        return spaces.MultiDiscrete(list(many))
    if form == "joint":
        return spaces.Discrete(int(np.prod(many)))
    return spaces.Box(-1.0, 1.0, shape=(2,), dtype=np.float32)
