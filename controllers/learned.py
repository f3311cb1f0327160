"""A trained policy as a controller: its features, its network and its choice in one compiled decision."""

import math
from functools import cached_property
from typing import Annotated, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from controllers.admission import admissible_tokens
from controllers.analytic import Memory, Settings, choose_pair, new_analytic_memory, row_of
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
from controllers.network import Network, NetworkMemory, forward, network_row, new_network_memory
from controllers.policy import HEADS, Policy, Residual, refuse_other_choices
from engine.compiled import kernel
from engine.core.telemetry import NUM_DECODES
from engine.latency.lookup import LookupGrid
from engine.plant import Plant

PAIR, JOINT, BOX = range(len(HEADS))


class Sight(NamedTuple):
    """Parameters of a policy's inputs.

    residual: 1 if the base's choice is an input, and is shifted · settings: of the base, the controller that is shifted
    · reach: most steps of c and of n that it is shifted.
    """

    shown: View
    residual: int
    settings: Settings
    reach: tuple[int, int]
    candidates: NDArray[np.int64]
    budgets: NDArray[np.int64]


class SightMemory(NamedTuple):
    """Memory of N instances, for the policy's features and for its base."""

    features: FeatureMemory
    base: Memory


class Params(NamedTuple):
    """Parameters of a decision."""

    sight: Sight
    network: Network
    head: int
    masked: int
    decide_every: int


class LearnedMemory(NamedTuple):
    """Memory of decisions, for N instances.

    held: (N, 3) current c and n, and the number of further iterations they hold.
    """

    sight: SightMemory
    network: NetworkMemory
    held: NDArray[np.int64]


def _predicted(plant: Plant, layout: Layout, residual: Residual | None) -> LookupGrid:
    return plant.lookup.grid if layout.predictions or residual is not None else unpredicted(plant.grid)


def new_sight(plant: Plant, layout: Layout, residual: Residual | None, ttft_target: float, tpot_target: float) -> Sight:
    """Parameters of the inputs of a policy of this layout.

    Raises:
        ValueError: predictions or a base are asked for, and the engine's times are not known.
    """
    controller = (residual or Residual()).controller(ttft_target)
    return Sight(
        shown=View(
            _predicted(plant, layout, residual), ttft_target, tpot_target, layout.queue_rows, layout.predictions
        ),
        residual=int(residual is not None),
        settings=controller.settings,
        reach=(0, 0) if residual is None else (residual.candidates, residual.budgets),
        candidates=plant.grid.candidates,
        budgets=plant.grid.budgets,
    )


def new_sight_memory(plant: Plant, layout: Layout, residual: Residual | None, instances: int) -> SightMemory:
    """Empty memory of `instances` instances."""
    return SightMemory(
        features=new_feature_memory(instances, plant.grid),
        base=new_analytic_memory(_predicted(plant, layout, residual), instances),
    )


def policy_params(policy: Policy, plant: Plant, ttft_target: float, tpot_target: float) -> Params:
    """Parameters of a policy that governs an engine for these targets (s).

    Raises:
        PolicyError: it was made for other choices.
    """
    header = policy.header
    refuse_other_choices(header.name, header.actions, plant.grid)
    return Params(
        sight=new_sight(plant, header.layout, header.residual, ttft_target, tpot_target),
        network=policy.network,
        head=HEADS.index(header.head),
        masked=int(header.masked),
        decide_every=header.decide_every,
    )


def policy_memory(policy: Policy, plant: Plant, instances: int) -> LearnedMemory:
    """A policy's memory of `instances` instances at the beginning of a run."""
    header = policy.header
    return LearnedMemory(
        sight=new_sight_memory(plant, header.layout, header.residual, instances),
        network=new_network_memory(policy.network, instances),
        held=np.zeros((instances, 3), dtype=np.int64),
    )


@kernel
def begin(memory, m):
    """Clear the memory of instance m."""
    forget(memory.features, m)
    base = memory.base
    base.acceptance[m] = 0.0
    base.choices[m] = 0.0
    base.tokens[m] = 1.0
    base.arriving[m] = 0.0
    base.finished[m] = 0.0


@kernel
def notice(observation, i, sight, memory, m):
    """Update row m with instance i's telemetry, once per observation; returns the base's indices of (c, n)."""
    remember(observation, i, sight.shown, memory.features, m)
    if sight.residual == 0:
        return 0, 0
    c, n = choose_pair(observation, i, sight.shown.grid, sight.settings, row_of(memory.base, m))
    return c, n - 1


@kernel
def show_all(observation, i, sight, memory, m, base_c, base_n, out):
    """Write all inputs of a policy for instance i to `out`; returns their number."""
    f = show(observation, i, sight.shown, memory.features, m, out)
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
    """Indices of the choices of c and n that a policy's own pair of indices selects."""
    if sight.residual == 0:
        return c, n
    c = min(max(base_c + c - sight.reach[0], 0), sight.candidates.shape[0] - 1)
    n = min(max(base_n + n - sight.reach[1], 0), sight.budgets.shape[0] - 1)
    return c, n


@kernel
def distinct_choices(observation, i, candidates, budgets):
    """Numbers of leading choices of c, and of n, that differ in effect.

    Without decodes every c has the same effect, and so do all n that exceed the available prompt tokens.
    """
    work = admissible_tokens(observation, i)
    n = 1
    while n < budgets.shape[0] and budgets[n - 1] < work:
        n += 1
    return 1 if observation.load[i, NUM_DECODES] <= 0.0 else candidates.shape[0], n


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
def own_choice(observation, i, params, room):
    """A policy's own indices of c and n, from the inputs in `room.values`, the row of a `NetworkMemory`."""
    sight, values = params.sight, room.values
    forward(params.network, room)
    many_c, many_n = sight.candidates.shape[0], sight.budgets.shape[0]
    if sight.residual == 1:
        many_c, many_n = 2 * sight.reach[0] + 1, 2 * sight.reach[1] + 1
    if params.head == JOINT:
        pair = _pick(values, 0, many_c * many_n)
        return pair // many_n, pair % many_n
    if params.head == BOX:
        return _place(values[0], many_c), _place(values[1], many_n)
    distinct_c, distinct_n = many_c, many_n
    if params.masked == 1:
        distinct_c, distinct_n = distinct_choices(observation, i, sight.candidates, sight.budgets)
    return _pick(values, 0, distinct_c), _pick(values, many_c, distinct_n)


@kernel
def choose(observation, i, params, memory, m, base_c, base_n):
    """Indices of the choices of (c, n) for instance i, with memory row m."""
    room = network_row(memory.network, m)
    show_all(observation, i, params.sight, memory.sight, m, base_c, base_n, room.values)
    c, n = own_choice(observation, i, params, room)
    return shifted(params.sight, base_c, base_n, c, n)


@kernel
def decide(observation, i, params, memory):
    """(c, n) in tokens of the next action for instance `i`."""
    base_c, base_n = notice(observation, i, params.sight, memory.sight, i)
    held = memory.held[i]
    if held[2] <= 0:
        c, n = choose(observation, i, params, memory, i, base_c, base_n)
        held[0] = params.sight.candidates[c]
        held[1] = params.sight.budgets[n]
        held[2] = params.decide_every
    held[2] -= 1
    return held[0], held[1]


@configured
class Learned(KernelController):
    """A policy that `python -m runs.train` made, or one shipped in `controllers/policies`.

    It refuses setups that it was not trained for: other choices of c and n, or an observation whose features have
    changed. Other targets are accepted, since its inputs are relative to them.

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
    def policy_file(self) -> Policy:
        """The file's content. PolicyError when it is not there or cannot be used."""
        return Policy.load(self.path)

    @classmethod
    def of(cls, policy: Policy, ttft_target: float = 1.0, tpot_target: float = 0.05) -> "Learned":
        """A controller of a policy in memory."""
        made = cls(path=policy.header.name, ttft_target=ttft_target, tpot_target=tpot_target)
        made.__dict__["policy_file"] = policy
        return made

    def params(self, plant: Plant) -> Params:
        """Features and network. PolicyError when the policy was made for other choices."""
        return policy_params(self.policy_file, plant, self.ttft_target, self.tpot_target)

    def memory(self, plant: Plant, instances: int) -> LearnedMemory:
        """Empty memory."""
        return policy_memory(self.policy_file, plant, instances)

    def label(self) -> str:
        """The policy's own name."""
        return self.policy_file.header.name
