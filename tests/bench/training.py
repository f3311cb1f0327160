"""Environment steps per second of PPO on 256 environments, learning included: `python -m tests.bench.training`.

The adapter alone is timed beside it, stepped with random actions.
"""

from __future__ import annotations

import os
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate

from runs.learning.training import Training
from runs.learning.vec_env import GovernorVecEnv
from tests.bench import measure

CONF = Path(__file__).resolve().parents[2] / "conf"
STEPS = 2_000_000
STRETCH = 200
STRETCHES = 10


def _training(*overrides: str) -> Training:
    with initialize_config_dir(str(CONF), version_base=None):
        made = instantiate(compose("train", ["kind=bench", *overrides]), _convert_="all")
    assert isinstance(made, Training)
    return made


def main() -> None:
    """From scratch and residual."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    measure.title("Training on conf/env/vicuna_7b.yaml, 256 environments, environment steps")
    for name, overrides in (("from scratch", []), ("residual", ["env.residual={candidates: 2, budgets: 3}"])):
        training = _training(
            f"learner.steps={STEPS}", "log_every=200_000", "validation_every=100_000_000", "checkpoint_s=1e9",
            "validation_workloads=1", *overrides,
        )  # fmt: skip
        env = GovernorVecEnv(training.env)
        env.reset()
        rng = np.random.default_rng(0)
        paces = []
        for _ in range(STRETCHES):
            actions = rng.integers(training.env.spread, size=(STRETCH, env.num_envs, 2))
            begin = time.perf_counter()
            for action in actions:
                env.step(action)
            paces.append(STRETCH * env.num_envs / (time.perf_counter() - begin))
        measure.rate(f"{name}: the adapter alone", statistics.median(paces), 1e5)
        with tempfile.TemporaryDirectory() as folder:
            result = training.run(Path(folder))
        measure.rate(f"{name}: PPO, learning included", result["steps_per_s_median"], 4e4)


if __name__ == "__main__":
    main()
