"""vLLM in this process, stepped from outside, with the embedded models on the processor."""

from __future__ import annotations

import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest

pytest.importorskip("vllm", reason="vLLM is not installed; make test-vllm runs this in an environment of its own")

from gymnasium.utils.env_checker import check_env

from engine.backends.real import RealEngine, RequestError
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.core.metrics import request_table
from engine.core.telemetry import LOAD_FIELDS, observe
from engine.models.load import load_tokenizer
from engine.speculation.sampling import GREEDY
from engine.workload.agreement import DrafterAgreement
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import FixedLengths
from engine.workload.source import SyntheticSource
from envs import SERVING_ID
from runs import folder

CONFIG = VllmEngineConfig(name="vllm", max_num_seqs=4, max_model_len=256, max_num_batched_tokens=512)
ACTIONS = [(0, 32), (4, 64), (2, 128), (1, 256), (3, 48), (8, 64)]
OUTPUT = 20
THEIRS = ("free_kv_tokens", "interval_s", "last_iteration_s")
"""Blocks that vLLM keeps for itself, and the wall's clock."""


@pytest.fixture(scope="module")
def engine() -> Iterator[RealEngine]:
    made = CONFIG.build(ttft_target=1.0)
    yield made
    made.close()


def _submit(engine: Any) -> list[int]:
    tokens = load_tokenizer()(Path(json.__file__).read_text(encoding="utf-8"))["input_ids"]
    return [engine.submit(tokens[60 * i : 60 * i + 15 + 12 * i], OUTPUT) for i in range(9)]


def _outputs(engine: Any, actions: list[tuple[int, int]]) -> list[list[int]]:
    engine.reset()
    numbers, step = _submit(engine), 0
    while engine.poll():
        engine.step(*actions[step % len(actions)])
        step += 1
    return [engine.output(number) for number in numbers]


def test_tokens_do_not_depend_on_c_and_n(engine: Any) -> None:
    expected = _outputs(engine, [(0, 512)])
    assert [len(tokens) for tokens in expected] == [OUTPUT] * 9
    assert _outputs(engine, ACTIONS) == expected
    # c is drafted at the end of a step and verified in the next, by all of its decodes.
    assert request_table(engine.requests)["drafted_tokens"].sum() > 0


def test_a_controller_sees_what_the_request_table_says(engine: Any) -> None:
    engine.reset()
    _submit(engine)
    seen, expected, step = engine.new_observation(), engine.new_observation(), 0
    kept = [i for i, name in enumerate(LOAD_FIELDS) if name not in THEIRS]
    while engine.poll():
        engine.observe(seen)
        observe(engine.state, 0, expected)
        np.testing.assert_array_equal(seen.load[0, kept], expected.load[0, kept])
        np.testing.assert_array_equal(seen.queue[0, :, 0], expected.queue[0, :, 0])
        for name in ("drafted", "accepted", "rates"):
            np.testing.assert_array_equal(getattr(seen, name), getattr(expected, name), err_msg=f"{name}, step {step}")
        engine.step(*ACTIONS[step % len(ACTIONS)])
        step += 1
    assert step > 20


def test_who_leaves_is_dropped_and_a_reset_forgets_everybody(engine: Any) -> None:
    expected = _outputs(engine, [(2, 512)])
    engine.reset()
    numbers = _submit(engine)
    for _ in range(4):
        engine.step(2, 64)
    assert engine.cancel(numbers[0])
    assert engine.cancel(numbers[8])
    assert not engine.cancel(numbers[0])
    kept = engine.output(numbers[0])
    engine.run(2, 64)
    assert engine.output(numbers[0]) == kept == expected[0][: len(kept)]
    assert engine.output(numbers[8]) == []
    assert [engine.output(number) for number in numbers[1:8]] == expected[1:8]
    _submit(engine)
    engine.step(2, 64)
    assert _outputs(engine, [(1, 64)]) == expected


def test_a_stop_token_ends_an_output(engine: Any) -> None:
    expected = _outputs(engine, [(0, 512)])[3]
    stop = expected[7]
    engine.reset()
    tokens = load_tokenizer()(Path(json.__file__).read_text(encoding="utf-8"))["input_ids"]
    number = engine.submit(tokens[180:231], OUTPUT, GREEDY, stop=[stop])
    engine.run(4, 512)
    assert engine.output(number) == expected[: expected.index(stop) + 1]
    table = request_table(engine.requests)
    assert table["output_tokens"][0] == table["generated_tokens"][0] == expected.index(stop) + 1


def test_what_does_not_fit_is_refused(engine: Any) -> None:
    engine.reset()
    with pytest.raises(RequestError, match="exceed 256 tokens"):
        engine.submit([1] * 250, 7)
    with pytest.raises(RequestError, match="ids are 0 to"):
        engine.submit([10**7], 1)


def test_gymnasium_finds_no_fault_and_rewards_sum_to_the_objective() -> None:
    workload = SyntheticSource(
        arrivals=PoissonArrivals(rate=0.5),
        lengths=FixedLengths(prompt_tokens=20, output_tokens=8),
        agreement=DrafterAgreement(),
        num_requests=4,
        name="short",
    )
    env = gymnasium.make(SERVING_ID, engine=CONFIG, workload=workload)
    simulated = gymnasium.make(SERVING_ID, workload=workload)
    assert env.observation_space == simulated.observation_space
    assert env.action_space == simulated.action_space
    with warnings.catch_warnings():
        # vLLM looks at deprecated names of torch.
        warnings.filterwarnings("ignore", category=FutureWarning)
        check_env(env.unwrapped, skip_render_check=True)
    env.reset(seed=0)
    total, over = 0.0, False
    while not over:
        _, reward, _, over, info = env.step(np.array([3, 2]))
        total += float(reward)
    assert info["episode_summary"]["requests_finished"] == 4
    assert total == pytest.approx(-4 * info["episode_summary"]["objective"])
    env.close()


def test_an_evaluation_leaves_the_usual_folder(tmp_path: Path) -> None:
    from hydra import compose, initialize_config_dir

    from runs.evaluate import evaluate

    conf = Path(__file__).resolve().parents[4] / "conf"
    given = ["engine=vllm", "engine.max_num_seqs=4", "workload=prompts", "workload.num_requests=4", "controller=fixed"]
    lengths = ["workload/lengths=fixed", "workload.lengths.prompt_tokens=30", "workload.lengths.output_tokens=9"]
    with initialize_config_dir(str(conf), version_base=None):
        config = compose(
            "evaluate", [*given, *lengths, "workload.arrivals.rate=20", "logger=none", "record_iterations=true"]
        )
    result = evaluate(config, tmp_path, {})
    assert result.summary["requests_finished"] == 4
    assert result.outputs is not None
    assert [len(output.tokens) for output in result.outputs] == [9] * 4
    assert result.summary["run"]["engine"] == "vllm"
    assert result.summary["run"]["backend"]["vllm"].startswith("0.32")
    assert result.iterations["emitted_tokens"].sum() == 4 * 9
    assert {folder.SUMMARY, folder.OUTPUTS, "requests.parquet", "iterations.parquet"} <= {
        p.name for p in tmp_path.iterdir()
    }
