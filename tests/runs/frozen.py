"""Runs that must not change while code moves: `python -m tests.runs.frozen` writes the digests of today's code."""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from numpy.typing import NDArray

from engine.core.metrics import request_table
from engine.limits import EngineLimits
from engine.simulator.replay import Recording, replay
from engine.workload.agreement import DrafterAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.source import SyntheticSource
from envs.batch import ServingBatch
from runs.evaluation import Evaluation

CONF = Path(__file__).resolve().parents[2] / "conf"
DIGESTS = Path(__file__).with_name("frozen.json")
RECORDED = Path(__file__).with_name("frozen_run.npz")
RECORDED_LIMITS = EngineLimits(
    total_blocks=26, block_size=4, watermark_blocks=0, max_num_seqs=6, max_model_len=256, prefill="chunked"
)
"""The engine that `RECORDED` was recorded on: a torch engine with preemptions, cancellations and stop tokens."""
TRAINING = (
    "kind=frozen", "env.num_envs=14", "env.distinct_workloads=2", "learner.n_steps=32", "learner.batch_size=64",
    "learner.layers=[16]", "learner.steps=2_000", "validation_workloads=1", "validation_every=1_000", "log_every=500",
    "checkpoint_s=1e9", "logger=none",
)  # fmt: skip
LIBRARIES = ("numpy", "numba", "scipy", "scikit-learn", "torch", "stable-baselines3")
"""Digests hold for these versions: another may draw other numbers or fit other trees."""
SIGNIFICANT_DIGITS = 9
"""Times are compared to so many digits: the last bits of an exponential differ between processors."""

SMALL_CACHE = ("engine.num_kv_blocks=600", "engine.max_num_seqs=24")
CONVERSATIONS = ("workload=azure_conv_like", "workload.duration_s=60")
CODE = ("workload=azure_code_like", "workload.duration_s=240", "workload.rate_scale=0.4")
CHAT = ("workload=poisson_lmsys", "workload.arrivals.rate=12", "workload.num_requests=400")
LONG = ("workload=poisson_arxiv", "workload.arrivals.rate=0.8", "workload.num_requests=60")
TREES = ("engine.branching=3", "engine.draft_depth=4")

EVALUATIONS: dict[str, tuple[str, ...]] = {
    "fixed chat": ("controller=fixed", *CHAT),
    "fixed without candidates": ("controller=fixed", "controller.candidates=0", *CONVERSATIONS),
    "fixed in a preemption storm": ("controller=fixed", "controller.token_budget=2048", *SMALL_CACHE, *CONVERSATIONS),
    "fixed on 13B, H100": ("engine=vicuna_13b_h100", "controller=fixed", *CODE),
    "fixed on an RTX 4090": ("engine=llama3_8b_rtx4090", "controller=fixed", *CHAT),
    "whole prompts": ("controller=fixed", "engine.prefill=whole", *CONVERSATIONS, *SMALL_CACHE),
    "prompts first": ("controller=fixed", "engine.prefill=first", *CONVERSATIONS, *SMALL_CACHE),
    "prompts in turns": ("controller=fixed", "engine.prefill=turns", *CONVERSATIONS, *SMALL_CACHE),
    "uniform trees": ("controller=fixed", "controller.candidates=8", *TREES, *CHAT),
    "local trees": ("controller=fixed", "controller.candidates=6", "engine.allocation=local", *TREES, *CHAT),
    "global trees": ("controller=fixed", "engine.allocation=global", *TREES, *SMALL_CACHE, *CONVERSATIONS),
    "global chains by cost": (
        "controller=fixed", "engine.allocation=global", "engine.cost_aware=true", "engine.score=acceptance", *CHAT,
    ),
    "slo allocation": ("controller=adaserve", *CONVERSATIONS),
    "sarathi": ("controller=sarathi", "controller.candidates=2", *LONG),
    "poster": ("controller=poster", *CONVERSATIONS),
    "analytic chat": ("controller=analytic", *CHAT),
    "analytic conversations": ("controller=analytic", *CONVERSATIONS),
    "analytic on code, 13B": ("engine=vicuna_13b_a100", "controller=analytic", *CODE),
    "analytic in a preemption storm": ("controller=analytic", *SMALL_CACHE, *CONVERSATIONS),
    "analytic by choices, global trees": (
        "controller=analytic", "controller.estimate=choices", "engine.allocation=global", *TREES, *CHAT,
    ),
    "analytic looking ahead, 33B": (
        "engine=vicuna_33b_a100", "controller=analytic", "controller.look_ahead=true", *CHAT,
        "workload.arrivals.rate=2", "controller.estimate=requests",
    ),
    "mpc": ("controller=mpc", *CODE),
    "goodput": ("controller=goodput", *CHAT),
    "goodput per request": ("controller=goodput", "controller.per_request=true", *CHAT),
    "vllm_schedule": ("controller=vllm_schedule", *CONVERSATIONS),
    "sglang_adaptive": ("controller=sglang_adaptive", *CONVERSATIONS),
    "trtllm_schedule": ("controller=trtllm_schedule", *CONVERSATIONS),
    "p_pas": ("controller=p_pas", *CODE),
    "feedback": ("controller=feedback", *CONVERSATIONS),
    "bandit": ("controller=bandit", *CHAT),
    "learned": ("controller=learned", *CONVERSATIONS),
    "oracle_grid": ("controller=oracle_grid", *CHAT, "workload.num_requests=150"),
    "oracle": ("controller=oracle", *CHAT, "workload.num_requests=150"),
    "mistimed": ("controller=analytic", "engine.timing_error=0.2", "engine.timing_seed=3", *CHAT),
}  # fmt: skip


def digest(columns: Mapping[str, NDArray[Any]]) -> str:
    """SHA-256 of columns, whatever their integer types."""
    hashed = hashlib.sha256()
    for name in sorted(columns):
        values = np.asarray(columns[name])
        if values.dtype.kind == "f":
            text = "\n".join(f"{value:.{SIGNIFICANT_DIGITS}g}" for value in values.ravel().tolist())
        else:
            text = "\n".join(map(str, values.ravel().tolist()))
        hashed.update(f"{name}\n{text}\n".encode())
    return hashed.hexdigest()[:16]


def evaluated(overrides: tuple[str, ...]) -> str:
    """Digest of requests and iterations of a run that a command line describes."""
    with initialize_config_dir(str(CONF), version_base=None):
        config = compose("evaluate", ["logger=none", "record_iterations=true", "seed=11", *overrides])
    made: Evaluation = instantiate(config, _convert_="all")
    result = made.run()
    rows = result.iterations
    return digest({**result.requests, **{f"iteration {name}": rows[name] for name in rows.dtype.names or ()}})


def replayed() -> str:
    """Digest of a recorded run of a torch engine, replayed."""
    return digest(request_table(replay(Recording.load(RECORDED), RECORDED_LIMITS, 1.0).requests))


def stepped() -> str:
    """Digest of what a batch of environments that decide every four iterations shows and charges."""
    source = SyntheticSource(
        arrivals=PoissonArrivals(rate=4.0),
        lengths=NamedLengths(name="sharegpt"),
        agreement=DrafterAgreement(),
        num_requests=200,
        name="poisson_sharegpt",
    )
    batch = ServingBatch(3, workload=source, decide_every=4, episode_decisions=150, queue_rows=8)
    batch.reset(range(3), [np.random.default_rng(seed) for seed in range(3)])
    actions = np.random.default_rng(5)
    seen: dict[str, list[NDArray[Any]]] = {}
    for _ in range(300):
        chosen = actions.integers(0, [9, 13], size=(3, 2))
        observation, costs, over = batch.step(chosen)
        for name, array in (*observation._asdict().items(), ("costs", costs), ("over", over)):
            seen.setdefault(name, []).append(array.copy())
        ended = np.flatnonzero(over).tolist()
        if ended:
            batch.reset(ended, [np.random.default_rng(100 + e) for e in ended])
    return digest({name: np.stack(arrays) for name, arrays in seen.items()})


def trained() -> str:
    """Digest of the policy that a short training leaves."""
    with initialize_config_dir(str(CONF), version_base=None):
        training = instantiate(compose("train", list(TRAINING)), _convert_="all")
    with tempfile.TemporaryDirectory() as folder:
        training.run(Path(folder))
        with np.load(Path(folder) / "policy.npz") as policy:
            return digest({name: policy[name] for name in policy.files if policy[name].dtype.kind in "fiu"})


FROZEN: dict[str, Callable[[], str]] = {
    **{name: (lambda overrides=overrides: evaluated(overrides)) for name, overrides in EVALUATIONS.items()},  # type: ignore[misc]
    "a recorded run replayed": replayed,
    "a batch of environments": stepped,
    "a short training": trained,
}


def versions() -> dict[str, str]:
    """The libraries that digests depend on."""
    return {name: version(name).partition("+")[0] for name in LIBRARIES}


def main(names: list[str]) -> None:
    """Write the digests of all runs, or of those named."""
    known = json.loads(DIGESTS.read_text()) if DIGESTS.exists() and names else {"digests": {}}
    for name in names or FROZEN:
        known["digests"][name] = FROZEN[name]()
        print(f"{name}: {known['digests'][name]}", flush=True)
    DIGESTS.write_text(json.dumps({"versions": versions(), "digests": known["digests"]}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
