"""Decisions per CPU second of the vector environment, observations included: `python -m tests.bench.environment`."""

from __future__ import annotations

import os
import statistics
import time

import gymnasium
import numpy as np

import envs
from tests.bench import measure

NUM_ENVS = 256
STEPS = 100
STRETCHES = 60
SETTINGS: dict[str, dict[str, int]] = {
    "every episode draws its workload": {"distinct_workloads": None},
    "as made by default": {},
}


def _stretches(settings: dict[str, int]) -> tuple[list[float], list[bool], float]:
    """CPU seconds of each stretch of steps under random actions, whether an episode ended in it, and the mean batch."""
    env = gymnasium.make_vec(envs.SERVING_ID, num_envs=NUM_ENVS, vectorization_mode="vector_entry_point", **settings)
    env.reset(seed=0)
    choices = env.single_action_space.nvec
    actions = np.random.default_rng(0).integers(choices, size=(STEPS, NUM_ENVS, len(choices)))
    env.step(actions[0])
    seconds, ended, batches = [], [], []
    for _ in range(STRETCHES):
        over = False
        begin = time.process_time()
        for action in actions:
            observation, _, _, truncated, _ = env.step(action)
            over |= bool(truncated.any())
        seconds.append(time.process_time() - begin)
        ended.append(over)
        batches.append(observation["load"][:, 0].mean())
    env.close()
    return seconds, ended, float(np.mean(batches))


def main() -> None:
    """The whole, resets included, and the median stretch in which no episode ended."""
    measure.title(f"{envs.SERVING_ID}, {NUM_ENVS} environments, decisions over all of them under random actions")
    decisions = STEPS * NUM_ENVS
    for name, settings in SETTINGS.items():
        runs = [_stretches(settings) for _ in range(3)]
        whole = statistics.median(sum(seconds) for seconds, _, _ in runs)
        undisturbed = [s for seconds, ended, _ in runs for s, over in zip(seconds, ended, strict=True) if not over]
        batch = statistics.mean(mean for *_, mean in runs)
        measure.rate(f"{name}, mean batch {batch:.1f}", STRETCHES * decisions / whole, 5e5)
        if undisturbed:
            measure.rate("  of it, steps without a reset", decisions / statistics.median(undisturbed), 5e5)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
