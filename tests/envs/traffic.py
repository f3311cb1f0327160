"""Requests that the environments' tests serve, small enough that whole episodes run in a test."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.workload.agreement import DrafterAgreement, IidAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import LognormalLengths, NamedLengths
from engine.workload.source import SyntheticSource
from engine.workload.workload import Workload
from envs.serving import ServingEnv

LATENCY = "vicuna_7b_a100"
GRID = ActionGrid()

Policy = Callable[[dict[str, NDArray[np.float32]]], NDArray[np.int64]]


def short(num_requests: int = 5, rate: float = 8.0) -> SyntheticSource:
    """A few short requests; an episode takes about twenty decisions."""
    return SyntheticSource(
        name="short",
        arrivals=PoissonArrivals(rate=rate),
        lengths=LognormalLengths(prompt_median=120, prompt_sigma=1.0, output_median=12, output_sigma=0.8),
        agreement=IidAgreement(alpha=0.6),
        num_requests=num_requests,
    )


def crowded(num_requests: int) -> SyntheticSource:
    """More than `tiny_engine(40)` holds: prompts up to 300 tokens, outputs from 1 to 300."""
    return SyntheticSource(
        name="crowded",
        arrivals=PoissonArrivals(rate=20.0),
        lengths=LognormalLengths(
            prompt_median=80, prompt_sigma=0.8, output_median=30, output_sigma=2.0, max_prompt_tokens=300,
            max_output_tokens=300,
        ),
        agreement=IidAgreement(alpha=0.6),
        num_requests=num_requests,
    )  # fmt: skip


def conversations(rate: float, num_requests: int) -> SyntheticSource:
    """Requests as long as those of Azure's conversation trace; one A100 saturates between 4 and 8 a second."""
    return SyntheticSource(
        name="conversations",
        arrivals=PoissonArrivals(rate=rate),
        lengths=NamedLengths(name="azure_conv"),
        agreement=DrafterAgreement(),
        num_requests=num_requests,
    )


def requests(arrival: Any, prompt: Any, output: Any, alpha: float = 0.6, seed: int = 0) -> Workload:
    """Exactly these requests; drafter and target agree with probability `alpha` at every position."""
    return Workload.build("given", arrival, prompt, output, IidAgreement(alpha=alpha), seed)


def tiny_engine(num_kv_blocks: int, max_num_seqs: int = 8) -> EngineConfig:
    """An A100 with so few KV blocks of 16 tokens that requests must be preempted."""
    return EngineConfig(name="tiny", latency=LATENCY, num_kv_blocks=num_kv_blocks, max_num_seqs=max_num_seqs)


def fixed(candidates: int, token_budget: int) -> Policy:
    """Always this pair."""
    action = GRID.action(candidates, token_budget)
    return lambda observation: action


def thrashing(seed: int) -> Policy:
    """Any pair of the grid, at random."""
    rng = np.random.default_rng(seed)
    choices = [len(GRID.candidate_choices), len(GRID.budget_choices)]
    return lambda observation: rng.integers(choices)


def play(env: ServingEnv, policy: Policy, **reset: Any) -> tuple[float, dict[str, Any]]:
    """The return of one episode and the last info."""
    observation, _ = env.reset(**reset)
    total, over = 0.0, False
    while not over:
        observation, reward, _, over, info = env.step(policy(observation))
        total += reward
    return total, info
