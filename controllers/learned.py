"""A trained policy as a controller: its features, its network and its choice in one compiled decision."""

import math
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.admission import admissible_tokens
from controllers.analytic import Memory, Settings, choose_pair, new_analytic_memory
from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.features import (
    FeatureMemory,
    Layout,
    View,
    forget,
    new_feature_memory,
    remember,
    show,
    unpredicted,
)
from controllers.network import Network, NetworkMemory, forward, new_network_memory
from controllers.policy import HEADS, Policy, Residual, refuse_other_choices
from engine.compiled import kernel
from engine.core.telemetry import NUM_DECODES
from engine.plant import Plant

PAIR, JOINT, BOX = range(len(HEADS))


class Base(NamedTuple):
    """The controller that a residual policy shifts: its settings and memories, one row per engine."""

    settings: Settings
    memory: Memory


class Sight(NamedTuple):
    """What a policy is shown, of N engines: in service N is 1, in training as many as are stepped together.

    residual: 1 if the base's choice is shown, and shifted · reach: most steps of c and of n that it is shifted.
    """

    shown: View
    memory: FeatureMemory
    residual: int
    base: Base
    reach: tuple[int, int]
    candidates: NDArray[np.int64]
    budgets: NDArray[np.int64]


class Rules(NamedTuple):
    """What a decision reads and keeps.

    held: (3,) c and n that hold, and for how many more iterations.
    """

    sight: Sight
    network: Network
    scratch: NetworkMemory
    head: int
    masked: int
    decide_every: int
    held: NDArray[np.int64]


def new_sight(
    plant: Plant, layout: Layout, residual: Residual | None, ttft_target: float, tpot_target: float, engines: int = 1
) -> Sight:
    """Fresh sight of so many engines.

    Raises:
        ValueError: predictions or a base are asked for, and the engine's times are not known.
    """
    grid = plant.grid
    predicted = plant.lookup.grid if layout.predictions or residual is not None else unpredicted(grid)
    one = new_analytic_memory(predicted)
    stacked = Memory(*(np.repeat(array[None], engines, axis=0) for array in one))
    controller = (residual or Residual()).controller(ttft_target)
    return Sight(
        shown=View(predicted, ttft_target, tpot_target, layout.queue_rows, layout.predictions),
        memory=new_feature_memory(engines, grid),
        residual=int(residual is not None),
        base=Base(controller.settings, stacked),
        reach=(0, 0) if residual is None else (residual.candidates, residual.budgets),
        candidates=grid.candidates,
        budgets=grid.budgets,
    )


def new_rules(policy: Policy, plant: Plant, ttft_target: float, tpot_target: float) -> Rules:
    """A policy about to govern a plant for these targets (s).

    Raises:
        PolicyError: it was made for other choices.
    """
    header = policy.header
    refuse_other_choices(header.name, header.actions, plant.grid)
    return Rules(
        sight=new_sight(plant, header.layout, header.residual, ttft_target, tpot_target),
        network=policy.network,
        scratch=new_network_memory(policy.network),
        head=HEADS.index(header.head),
        masked=int(header.masked),
        decide_every=header.decide_every,
        held=np.zeros(3, dtype=np.int64),
    )


@kernel
def _row(memory, m):
    return Memory(
        memory.acceptance[m],
        memory.choices[m],
        memory.tokens[m],
        memory.arriving[m],
        memory.finished[m],
        memory.seconds[m],
        memory.later[m],
        memory.most_seconds[m],
    )


@kernel
def begin(sight, m):
    """Forget engine m."""
    forget(sight.memory, m)
    memory = sight.base.memory
    memory.acceptance[m] = 0.0
    memory.choices[m] = 0.0
    memory.tokens[m] = 1.0
    memory.arriving[m] = 0.0
    memory.finished[m] = 0.0


@kernel
def notice(observation, e, sight, m):
    """Take in engine e's telemetry as row m, once for every observation; returns the base's indices of (c, n)."""
    remember(observation, e, sight.shown, sight.memory, m)
    if sight.residual == 0:
        return 0, 0
    c, n = choose_pair(observation, e, sight.shown.grid, sight.base.settings, _row(sight.base.memory, m))
    return c, n - 1


@kernel
def show_all(observation, e, sight, m, base_c, base_n, out):
    """Write all inputs of a policy for engine e to `out`; returns how many."""
    f = show(observation, e, sight.shown, sight.memory, m, out)
    if sight.residual == 0:
        return f
    for c in range(sight.candidates.shape[0]):
        out[f] = 1.0 if c == base_c else 0.0
        f += 1
    for n in range(sight.budgets.shape[0]):
        out[f] = 1.0 if n == base_n else 0.0
        f += 1
    return f


@kernel
def shifted(sight, base_c, base_n, c, n):
    """Indices of the choices of c and n that a policy's own pair of indices stands for."""
    if sight.residual == 0:
        return c, n
    c = min(max(base_c + c - sight.reach[0], 0), sight.candidates.shape[0] - 1)
    n = min(max(base_n + n - sight.reach[1], 0), sight.budgets.shape[0] - 1)
    return c, n


@kernel
def distinct_choices(observation, e, candidates, budgets):
    """How many of the first choices of c, and of n, differ in effect.

    With nobody to decode every c is the same, and so are all n that the prompts at hand do not fill.
    """
    work = admissible_tokens(observation, e)
    n = 1
    while n < budgets.shape[0] and budgets[n - 1] < work:
        n += 1
    return 1 if observation.load[e, NUM_DECODES] <= 0.0 else candidates.shape[0], n


@kernel
def _pick(values, first, count):
    best = first
    for i in range(first + 1, first + count):
        if values[i] > values[best]:
            best = i
    return best - first


@kernel
def _place(value, count):
    unit = (math.tanh(value) + 1.0) / 2.0
    return math.floor(unit * (count - 1) + 0.5)


@kernel
def own_choice(observation, e, rules):
    """A policy's own indices of c and n, from the inputs in `rules.scratch.values`."""
    sight, values = rules.sight, rules.scratch.values
    forward(rules.network, rules.scratch)
    many_c, many_n = sight.candidates.shape[0], sight.budgets.shape[0]
    if sight.residual == 1:
        many_c, many_n = 2 * sight.reach[0] + 1, 2 * sight.reach[1] + 1
    if rules.head == JOINT:
        pair = _pick(values, 0, many_c * many_n)
        return pair // many_n, pair % many_n
    if rules.head == BOX:
        return _place(values[0], many_c), _place(values[1], many_n)
    distinct_c, distinct_n = many_c, many_n
    if rules.masked == 1:
        distinct_c, distinct_n = distinct_choices(observation, e, sight.candidates, sight.budgets)
    return _pick(values, 0, distinct_c), _pick(values, many_c, distinct_n)


@kernel
def choose(observation, e, rules, base_c, base_n):
    """Indices of the choices of (c, n)."""
    show_all(observation, e, rules.sight, 0, base_c, base_n, rules.scratch.values)
    c, n = own_choice(observation, e, rules)
    return shifted(rules.sight, base_c, base_n, c, n)


@kernel
def decide(observation, e, rules):
    """(c, n) in tokens of the next action for engine `e`."""
    base_c, base_n = notice(observation, e, rules.sight, 0)
    held = rules.held
    if held[2] <= 0:
        c, n = choose(observation, e, rules, base_c, base_n)
        held[0] = rules.sight.candidates[c]
        held[1] = rules.sight.budgets[n]
        held[2] = rules.decide_every
    held[2] -= 1
    return held[0], held[1]


@configured
class Learned(KernelController):
    """A policy that `python -m runs.train` made, or one shipped in `controllers/policies`.

    It refuses to govern what it was not trained for: other choices of c and n, or an observation whose features have
    changed. Other targets are no obstacle, since what it is shown is relative to them.

    Args:
        path: a policy file, or the name of a shipped one.
        ttft_target, tpot_target: targets in s that it is to serve.
    """

    decision_s = 40e-6
    decide = staticmethod(decide)

    path: Annotated[str, Field(min_length=1)] = "vicuna_7b_a100"
    ttft_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 1.0
    tpot_target: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 0.05

    @cached_property
    def policy(self) -> Policy:
        """The file's content. PolicyError when it is not there or cannot be used."""
        return Policy.load(self.path)

    @property
    def rules(self) -> Rules:
        """Features, network and memory."""
        return self._rules

    @classmethod
    def of(cls, policy: Policy, ttft_target: float = 1.0, tpot_target: float = 0.05) -> "Learned":
        """A policy that is not in a file."""
        made = cls(path=policy.header.name, ttft_target=ttft_target, tpot_target=tpot_target)
        made.__dict__["policy"] = policy
        return made

    def reset(self, plant: Plant) -> None:
        """Begin on `plant`. PolicyError when the policy was made for other choices."""
        super().reset(plant)
        self._rules = new_rules(self.policy, plant, self.ttft_target, self.tpot_target)

    def label(self) -> str:
        """The policy's own name."""
        return self.policy.header.name
