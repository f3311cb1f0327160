"""Bandits over pairs (c, n), based only on past rewards, without a model of the engine."""

import math
from typing import Annotated, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.compiled import KernelController
from controllers.controller import configured
from engine.compiled import kernel
from engine.core.telemetry import INTERVAL_S, LAST_NUM_DECODES, NUM_DECODES, NUM_WAITING, OVERDUE
from engine.plant import Plant
from engine.policy import stacked

UCB, EXP3 = 0, 1


class Params(NamedTuple):
    """arms: (A, 2) c and n · the rest as in `Bandit`."""

    arms: NDArray[np.int64]
    rule: int
    exploration: float
    every: int
    forgetting: float


class Memory(NamedTuple):
    """Rewards of the arms and the current play, for N instances.

    pulls, sums: (N, X, A) plays and rewards per context · losses: (N, X, A) estimated losses over which EXP3 weighs ·
    best_rate: (N, X) highest token rate a request has had, by which rewards are scaled · chance: (N, A) scratch ·
    random: (N, 1) uint64 state · current: (N, 4) context, arm, its probability, iterations left · gained: (N, 2)
    request-seconds of decoding and tokens since the arm was chosen; late: (N, 1) 1 if a TTFT deadline passed
    meanwhile.
    """

    pulls: NDArray[np.float64]
    sums: NDArray[np.float64]
    losses: NDArray[np.float64]
    best_rate: NDArray[np.float64]
    chance: NDArray[np.float64]
    random: NDArray[np.uint64]
    current: NDArray[np.float64]
    gained: NDArray[np.float64]
    late: NDArray[np.float64]


@kernel
def _row(memory, i):
    """Return the memory of instance `i`."""
    return Memory(
        memory.pulls[i],
        memory.sums[i],
        memory.losses[i],
        memory.best_rate[i],
        memory.chance[i],
        memory.random[i],
        memory.current[i],
        memory.gained[i],
        memory.late[i],
    )


@kernel
def _uniform(random):
    """The next number in [0, 1) of a xorshift64* stream (Vigna, 2016)."""
    x = random[0]
    x ^= x >> np.uint64(12)
    x ^= x << np.uint64(25)
    x ^= x >> np.uint64(27)
    random[0] = x
    return float((x * np.uint64(2685821657736338717)) >> np.uint64(11)) / 9007199254740992.0


@kernel
def _context(observation, e, contexts):
    """Bucket of the load: one per doubling of B, with and without waiting prompts; 0 with a single context."""
    if contexts == 1:
        return 0
    decodes = observation.load[e, NUM_DECODES]
    bucket = 0 if decodes < 1.0 else 1 + int(math.log2(decodes))
    waiting = 1 if observation.load[e, NUM_WAITING] > 0.0 else 0
    return min(2 * bucket + waiting, contexts - 1)


@kernel
def _settle(params, mine):
    """Turn the gain of the current arm into a reward in [0, 1] and record it."""
    x, arm = int(mine.current[0]), int(mine.current[1])
    if mine.gained[0] <= 0.0:
        return
    rate = mine.gained[1] / mine.gained[0]
    mine.best_rate[x] = max(mine.best_rate[x], rate)
    reward = 0.0 if mine.late[0] > 0.0 else rate / mine.best_rate[x]
    for a in range(params.arms.shape[0]):
        mine.pulls[x, a] *= params.forgetting
        mine.sums[x, a] *= params.forgetting
        mine.losses[x, a] *= params.forgetting
    mine.pulls[x, arm] += 1.0
    mine.sums[x, arm] += reward
    mine.losses[x, arm] += (1.0 - reward) / mine.current[2]


@kernel
def _pull_ucb(params, mine, x):
    """The arm of the highest upper confidence bound; rarely played arms come first."""
    total = 0.0
    for a in range(params.arms.shape[0]):
        total += mine.pulls[x, a]
    best = -1.0
    chosen = 0
    for a in range(params.arms.shape[0]):
        pulls = mine.pulls[x, a]
        if pulls < 0.5:
            return a
        bound = mine.sums[x, a] / pulls + params.exploration * math.sqrt(2.0 * math.log(max(total, 2.0)) / pulls)
        if bound > best:
            best = bound
            chosen = a
    return chosen


@kernel
def _pull_exp3(params, mine, x):
    """An arm drawn with exponential weights on its estimated loss, mixed with uniform exploration."""
    count = params.arms.shape[0]
    least = mine.losses[x, 0]
    for a in range(1, count):
        least = min(least, mine.losses[x, a])
    learning = params.exploration / count
    total = 0.0
    for a in range(count):
        mine.chance[a] = math.exp(-learning * (mine.losses[x, a] - least))
        total += mine.chance[a]
    left = _uniform(mine.random)
    chosen = count - 1
    for a in range(count):
        mine.chance[a] = (1.0 - params.exploration) * mine.chance[a] / total + params.exploration / count
        if left < mine.chance[a]:
            chosen = a
            break
        left -= mine.chance[a]
    mine.current[2] = mine.chance[chosen]
    return chosen


@kernel
def decide(observation, i, params, memory):
    """(c, n) of the arm that is being played."""
    mine = _row(memory, i)
    load = observation.load
    emitted = load[i, LAST_NUM_DECODES]
    for depth in range(observation.accepted.shape[1]):
        emitted += observation.accepted[i, depth]
    if load[i, LAST_NUM_DECODES] > 0.0:
        mine.gained[0] += load[i, INTERVAL_S] * load[i, LAST_NUM_DECODES]
        mine.gained[1] += emitted
    if load[i, OVERDUE] > 0.0:
        mine.late[0] = 1.0
    if mine.current[3] <= 0.0:
        _settle(params, mine)
        x = _context(observation, i, mine.pulls.shape[0])
        mine.current[2] = 1.0
        arm = _pull_ucb(params, mine, x) if params.rule == UCB else _pull_exp3(params, mine, x)
        mine.current[0] = x
        mine.current[1] = arm
        mine.current[3] = params.every
        mine.gained[0] = 0.0
        mine.gained[1] = 0.0
        mine.late[0] = 0.0
    mine.current[3] -= 1.0
    arm = int(mine.current[1])
    return params.arms[arm, 0], params.arms[arm, 1]


@configured
class Bandit(KernelController):
    """Plays each pair (c, n) for `every` iterations and prefers pairs with high rewards.

    The reward of a play is the token rate of its decoding requests (tokens per request and second) as a share of the
    best rate seen. It is 0 if a request was past its TTFT deadline meanwhile. Plays without decodes are not counted.
    `ucb` is UCB1 (Auer, Cesa-Bianchi, Fischer, 2002) with forgetting, because loads change; `exp3` is Exp3
    (Auer et al., SIAM J. Computing 2002). BanditSpec (Hou et al., 2025) plays both over speculation settings. With
    `contextual` there is one bandit for each doubling of B, with and without a queue, as Nightjar chooses its arm, no
    speculation among them, by batch size.

    Args:
        kind: `ucb` or `exp3`.
        contextual: one bandit per bucket of load.
        candidates: the c of the arms.
        token_budgets: the n of the arms.
        every: iterations an arm is played before the next choice.
        exploration: factor on UCB's confidence width, or Exp3's share of uniform exploration.
        forgetting: factor per play on earlier rewards.
        seed: of Exp3's draws.
    """

    decision_s = 5e-6
    decide = staticmethod(decide)

    kind: Literal["ucb", "exp3"] = "ucb"
    contextual: bool = True
    candidates: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [0, 1, 3, 5])
    token_budgets: Annotated[list[int], Field(min_length=1)] = Field(default_factory=lambda: [256, 1024, 4096])
    every: Annotated[int, Field(ge=1)] = 8
    exploration: Annotated[float, Field(gt=0.0, le=1.0)] = 0.1
    forgetting: Annotated[float, Field(gt=0.0, le=1.0)] = 0.999
    seed: Annotated[int, Field(ge=0)] = 0

    def params(self, plant: Plant) -> Params:
        """The arms. Raises ActionError when one is not on the grid of actions."""
        for candidates in self.candidates:
            for token_budget in self.token_budgets:
                plant.grid.action(candidates, token_budget)
        return Params(
            arms=np.array([(c, n) for c in self.candidates for n in self.token_budgets], dtype=np.int64),
            rule=UCB if self.kind == "ucb" else EXP3,
            exploration=self.exploration,
            every=self.every,
            forgetting=self.forgetting,
        )

    def memory(self, plant: Plant, instances: int) -> Memory:
        """Empty memory. Every instance has its own random stream."""
        arms = len(self.candidates) * len(self.token_budgets)
        contexts = 28 if self.contextual else 1
        shape = (contexts, arms)
        one = Memory(
            pulls=np.zeros(shape),
            sums=np.zeros(shape),
            losses=np.zeros(shape),
            best_rate=np.zeros(contexts),
            chance=np.zeros(arms),
            random=np.zeros(1, dtype=np.uint64),
            current=np.array([0.0, 0.0, 1.0, 0.0]),
            gained=np.zeros(2),
            late=np.zeros(1),
        )
        states = np.random.SeedSequence(self.seed).generate_state(instances, np.uint64) | np.uint64(1)
        return stacked(one, instances)._replace(random=states[:, None])

    def label(self) -> str:
        """Label, for example `bandit ucb by load`."""
        return f"bandit {self.kind}" + (" by load" if self.contextual else "")
