"""Small training settings for tests."""

from __future__ import annotations

from typing import Any

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.workload.randomized import RandomizedSource
from runs.evaluation import LookupFit, Targets
from runs.learning.scenarios import Scenario, TrainingEnv

GRID = ActionGrid(candidate_choices=(0, 1, 3), budget_choices=(64, 256, 1024))


def scenario(timing_error: float = 0.0, **workload: Any) -> Scenario:
    """Short code completions on a Vicuna-7B."""
    settings: dict[str, Any] = {"prefill_rate": 5300.0, "decode_rate": 2600.0, "num_requests": 8}
    settings |= {
        "lengths": ("azure_code",),
        "output_scale": {"low": 0.3, "high": 0.5},
        "load": {"low": 0.3, "high": 1.5},
    }
    return Scenario(
        engine=EngineConfig(name="vicuna_7b_a100", latency="vicuna_7b_a100", timing_error=timing_error, timing_seed=1),
        workload=RandomizedSource(**(settings | workload)),
        slo=Targets(ttft_target=1.0, tpot_target=0.04),
    )


def training_env(**settings: Any) -> TrainingEnv:
    """Two scenarios, six environments."""
    own: dict[str, Any] = {
        "scenarios": {"exact": scenario(), "mistimed": scenario(0.2)},
        "num_envs": 6,
        "decide_every": 2,
        "distinct_workloads": 4,
        "actions": GRID,
        "lookup": LookupFit(samples=400, trees=4),
    }
    return TrainingEnv(**(own | settings))
