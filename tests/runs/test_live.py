"""Runs on a real engine: the embedded models in the evaluation app, and tiny random ones on a clock of the test's."""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from fake_runs import write_constant
from hydra import compose, initialize_config_dir

from controllers.controller import Controller
from controllers.fixed import Fixed
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.core.action import ActionGrid
from engine.core.choices import ActionError
from engine.core.metrics import request_table
from engine.core.telemetry import NUM_DECODES, NUM_WAITING
from engine.plant import Plant
from engine.simulator.replay import replay
from engine.speculation.sampling import GREEDY, Sampling
from engine.workload.prompts import Prompts
from hydra_plugins.governor import launcher
from runs import evaluate, folder, live
from runs.reporting.collate import collate
from tests.engine.backends.torch import models

REPOSITORY = Path(__file__).resolve().parents[2]
PROSE = REPOSITORY / "README.md"
TINY = (
    "engine=torch_tiny",
    "engine.num_kv_blocks=256",
    "workload=prompts",
    "workload.name=prose",
    f"workload.path={PROSE}",
    "workload.num_requests=6",
    "workload.arrivals.rate=40",
    "workload/lengths=fixed",
    "workload.lengths.prompt_tokens=40",
    "workload.lengths.output_tokens=7",
    "lookup.samples=200",
    "logger=none",
)
Run = Callable[..., int]


build = functools.cache(TorchEngineConfig.build)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, call_app: Callable[..., int]) -> Callable[..., int]:
    """Calls the app as the command line would; returns its exit status. Equal engines are loaded once."""
    monkeypatch.setattr(TorchEngineConfig, "build", build)
    return functools.partial(call_app, evaluate.main, "evaluate")


@pytest.fixture
def profile(tmp_path: Path) -> Path:
    """Some engine's iteration times: whether they are this engine's does not matter here."""
    path = tmp_path / "profile.yaml"
    path.write_text("_target_: engine.config.EngineConfig\nname: torch_tiny_simulated\nlatency: vicuna_7b_a100\n")
    return path


def summary_of(out: Path) -> dict[str, Any]:
    summary = json.loads((out / folder.SUMMARY).read_text())
    assert isinstance(summary, dict)
    return summary


def outputs_of(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / folder.OUTPUTS).read_text().splitlines()]


@pytest.mark.parametrize("controller", ["fixed", "sarathi", "poster", "analytic"])
def test_every_controller_serves_every_prompt_to_its_last_token(
    run: Run, tmp_path: Path, profile: Path, controller: str
) -> None:
    out = tmp_path / "out"
    given = [f"controller={controller}", f"engine.profile={profile}", "record_iterations=true", f"hydra.run.dir={out}"]
    assert run(*TINY, *given) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.yaml", "evaluate.log", "iterations.parquet", "outputs.jsonl", "requests.parquet", "summary.json"
    ]  # fmt: skip
    requests, iterations = pd.read_parquet(out / folder.REQUESTS), pd.read_parquet(out / folder.ITERATIONS)
    assert requests["generated_tokens"].tolist() == [7] * 6
    assert (requests["finish_s"] >= requests["first_token_s"]).all()
    assert (requests["first_token_s"] > requests["arrival_s"]).all()
    assert iterations["emitted_tokens"].sum() == 42
    assert iterations["prefill_tokens"].sum() == 240
    assert (iterations["end_s"].to_numpy()[:-1] <= iterations["start_s"].to_numpy()[1:] + 1e-9).all()
    outputs = outputs_of(out)
    assert [entry["request"] for entry in outputs] == list(range(6))
    assert all(len(entry["tokens"]) == 7 and entry["text"] for entry in outputs)
    summary = summary_of(out)
    assert (summary["requests_finished"], summary["iterations"]) == (6, len(iterations))
    assert summary["decision_time_mean_s"] > 0
    identity = summary["run"]
    assert (identity["engine"], identity["workload"], identity["scenario"]) == ("torch_tiny", "prompts", "prose 40/s")
    backend = identity["backend"]
    assert (backend["drafter"], backend["dtype"], backend["threads"]) == ("model", "float32", 1)
    assert backend["device"].startswith(("cpu", "cuda"))
    assert backend["torch"] == torch.__version__


def test_what_is_generated_depends_on_the_prompts_and_not_on_controller_or_load(run: Run, tmp_path: Path) -> None:
    for name, given in {
        "idle": ["controller.candidates=0", "workload.rate_scale=0.5"],
        "busy": ["controller.candidates=4", "controller.token_budget=64"],
        "other": ["seed=1"],
    }.items():
        given += ["controller=fixed", "engine.exact=true", f"hydra.run.dir={tmp_path / name}"]
        assert run(*TINY, *given) == 0
    idle, busy, other = (outputs_of(tmp_path / name) for name in ("idle", "busy", "other"))
    assert idle == busy != other
    assert summary_of(tmp_path / "busy")["acceptance_rate"] > 0


def test_random_weights_of_a_shape_are_served_as_a_model_is(run: Run, tmp_path: Path) -> None:
    """Their text goes on the same way whatever drafts, is spelled in full, and reads back."""
    tokens = {}
    for name, given in {
        "alone": ["engine.drafter=none", "controller.candidates=0"],
        "drafted": ["engine.drafter_model=shape:mini_draft", "controller.candidates=4"],
        "trees": ["engine.drafter_model=shape:mini_draft", "engine.allocation=global", "engine.branching=3"],
    }.items():
        given += ["engine.target=shape:mini", "controller=fixed", f"hydra.run.dir={tmp_path / name}"]
        assert run(*TINY, *given, "workload.lengths.output_tokens=40") == 0
        outputs = outputs_of(tmp_path / name)
        tokens[name] = [entry["tokens"] for entry in outputs]
        for entry in outputs:
            words = [token for token in entry["tokens"] if token >= 2048]
            assert words
            assert [int(word) for word in re.findall(r"<(\d{4})>", entry["text"])] == words
    assert tokens["alone"] == tokens["drafted"] == tokens["trees"]
    assert all(len(set(output)) == len(output) == 40 for output in tokens["alone"])
    summary = summary_of(tmp_path / "drafted")
    assert 0.1 < summary["acceptance_rate"] < 0.9
    assert summary["run"]["backend"]["agreement"] == "draft68m"


def test_a_trace_of_lengths_is_served_with_text_of_these_lengths(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trace = tmp_path / "requests.csv"
    trace.write_text("arrival_s,prompt_tokens,output_tokens\n0.0,50,8\n0.01,70,1\n0.02,20,3000\n")
    base = ["engine=torch_tiny", "controller=fixed", "logger=none", "workload=trace", f"workload.path={trace}"]
    assert run(*base, f"hydra.run.dir={tmp_path / 'no'}") == 2
    said = capsys.readouterr().err
    assert "row 3" in said
    assert "too_long=clip" in said
    assert "max_total_tokens=2048" in said
    clip = ["workload.too_long=clip", "workload.max_total_tokens=90"]
    assert run(*base, *clip, f"hydra.run.dir={tmp_path / 'out'}") == 0
    requests = pd.read_parquet(tmp_path / "out" / folder.REQUESTS)
    assert requests["prompt_tokens"].tolist() == [50, 70, 1]
    assert requests["generated_tokens"].tolist() == [8, 1, 89]
    assert summary_of(tmp_path / "out")["run"]["scenario"].startswith("requests@")
    assert "agreements of drafter and target are not used" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["controller=analytic"], ["python -m runs.profile engine=torch_tiny", "engine.profile"]),
        (["controller=poster", "engine.profile=absent.yaml"], ["engine.profile=absent.yaml", "no such file"]),
        (["controller=fixed", "engine=vicuna_7b_a100"], ["workload=prompts", "engine=torch_tiny"]),
        (["controller=fixed", "engine.threads=0"], ["engine.threads=0"]),
        (["controller=fixed", "engine.drafter=oracle"], ["engine.drafter='oracle'"]),
        (["controller=fixed", "engine.target=shape:vicuna_8b"], ["engine.target", "shape:vicuna_7b", "shape:mini"]),
        (["controller=fixed", "engine.drafter_model=shape:"], ["engine.drafter_model", "shape:llama_68m"]),
        (["controller=fixed", "engine.agreement=eagle9"], ["engine.agreement='eagle9'", "eagle1"]),
        (["controller=fixed", "workload.path=absent.jsonl"], ["absent.jsonl", "cannot be read"]),
        (
            ["controller=fixed", "engine.max_model_len=32"],
            ["'prose', request 0", "40 prompt + 7 output", "too_long=clip"],
        ),
        (["controller=fixed", "workload.sampling.top_p=0"], ["workload.sampling.top_p=0"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_mistake_is_named_before_a_model_is_loaded(
    run: Run,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    overrides: list[str],
    said: list[str],
) -> None:
    monkeypatch.setattr(TorchEngineConfig, "build", lambda *_, **__: pytest.fail("a model is loaded"))
    base = [text for text in TINY if not (text.startswith("engine") and "engine=vicuna_7b_a100" in overrides)]
    assert run(*base, *overrides, f"hydra.run.dir={tmp_path}") == 2
    message = capsys.readouterr().err
    assert all(part in message for part in said)
    assert "Traceback" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.log"]


def test_an_interrupted_run_leaves_nothing(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    step = TorchEngine.step
    served: list[int] = []

    def stopped(engine: TorchEngine, candidates: int, token_budget: int) -> bool:
        if engine.state.totals[0]["finished"] >= 3:
            served.append(len(engine.emitted))
            raise KeyboardInterrupt
        return step(engine, candidates, token_budget)

    monkeypatch.setattr(live, "_warm_up", lambda *_: None)
    monkeypatch.setattr(TorchEngine, "step", stopped)
    given = ["controller=fixed", "workload.arrivals.rate=1000", "engine.max_num_seqs=3"]
    assert run(*TINY, *given, f"hydra.run.dir={tmp_path}") == 130
    assert served
    assert [path.name for path in tmp_path.iterdir()] == ["evaluate.log"]


def test_outputs_of_an_earlier_run_do_not_outlive_it(tmp_path: Path) -> None:
    columns = {"arrival_s": np.zeros(1)}
    folder.write_run(tmp_path, "", {}, columns, None, [{"request": 0, "tokens": [1], "text": "é"}])
    assert outputs_of(tmp_path) == [{"request": 0, "tokens": [1], "text": "é"}]
    folder.write_run(tmp_path, "", {}, columns, None)
    assert not (tmp_path / folder.OUTPUTS).exists()


def test_a_report_keeps_real_and_simulated_runs_apart(run: Run, tmp_path: Path) -> None:
    assert run(*TINY, "controller=fixed", f"hydra.run.dir={tmp_path / 'real'}") == 0
    write_constant(
        tmp_path / "simulated", "fixed c=3 n=512", 0.02, engine="torch_tiny profile", scenario="prompts 40/s"
    )
    runs = collate([tmp_path]).runs
    assert sorted(runs["engine"]) == ["torch_tiny", "torch_tiny profile"]
    assert runs["workload_digest"].nunique() == 2


@pytest.mark.parametrize(("engine", "expected"), [("torch_tiny", 1), ("vicuna_7b_a100", 5)])
def test_a_sweep_runs_real_engines_one_after_the_other(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, engine: str, expected: int
) -> None:
    asked: list[int] = []

    def results(jobs: Any, numbered: Any, workers: int) -> Any:
        asked.append(workers)
        raise KeyboardInterrupt

    monkeypatch.setattr(launcher, "available_cores", lambda: 5)
    monkeypatch.setattr(launcher, "_outcomes", results)
    with initialize_config_dir(str(REPOSITORY / "conf"), version_base=None):
        config = compose("evaluate", return_hydra_config=True)
        from hydra.core.global_hydra import GlobalHydra

        loader = GlobalHydra.instance().config_loader()
    config.hydra.sweep.dir = str(tmp_path)
    config.hydra.job.config_name = "evaluate"
    launched = launcher.ProcessLauncher()
    launched.jobs = launcher.Jobs(type("Context", (), {"config_loader": loader})(), evaluate.job, config)
    with pytest.raises(SystemExit):
        launched.launch([[f"engine={engine}", f"seed={seed}"] for seed in range(3)], 0)
    assert asked == [expected]


class Watching(Controller):
    """Chooses always the same and keeps what it saw: (decoding, waiting) requests."""

    def __init__(self, candidates: int = 0) -> None:
        self.candidates = candidates
        self.seen: list[tuple[int, int]] = []

    def reset(self, plant: Plant) -> None:
        super().reset(plant)
        self.seen = []

    def choose(self, observation: Mapping[str, Any]) -> tuple[int, int]:
        load = observation["load"]
        self.seen.append((int(load[NUM_DECODES]), int(load[NUM_WAITING])))
        return self.candidates, 16


PLANT = Plant(ActionGrid(), lambda: pytest.fail("nobody predicts"))


def few(arrivals: list[float], sampling: Sampling = GREEDY) -> Prompts:
    tokens = [np.array(prompt, np.int32) for prompt in models.prompts([9, 17, 4, 12][: len(arrivals)])]
    count = len(arrivals)
    return Prompts("few", np.array(arrivals), tokens, np.full(count, 6), [sampling] * count, ["here"] * count)


@pytest.mark.parametrize("draft_with", ["none", "ngram", "model"])
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(temperature=0.9, seed=5)], ids=["greedy", "sampled"])
def test_warming_up_leaves_no_trace_in_the_run(draft_with: str, sampling: Sampling) -> None:
    prompts = few([0.0, 0.1, 0.1, 2.0], sampling)
    cold = models.engine("llama", draft_with, models.limits(), record=True, clock=models.ManualClock())
    for tokens, arrival in zip(prompts.tokens, prompts.arrival.tolist(), strict=True):
        cold.submit(tokens, 6, sampling, arrival=arrival)
    cold.run(min(2, cold.max_candidates), 16)
    warm = models.engine("llama", draft_with, models.limits(), record=True, clock=models.ManualClock())
    controller = Fixed(candidates=min(2, warm.max_candidates), token_budget=16)
    served = live.serve(warm, prompts, controller, PLANT, clock=models.ManualClock)
    assert [warm.output(i) for i in range(4)] == [cold.output(i) for i in range(4)]
    assert warm.recording is not None
    assert len(warm.recording.requests) == 4
    assert len(served.requests) == served.state.totals[0]["finished"] == 4
    replayed = request_table(replay(warm.recording, warm.limits, ttft_target=1.0).requests)
    for name, column in request_table(served.requests).items():
        np.testing.assert_array_equal(column, replayed[name], err_msg=name)


def test_a_controller_decides_on_what_has_arrived_and_never_on_nothing() -> None:
    engine = models.engine("llama", "none", models.limits(), clock=models.ManualClock())
    controller = Watching()
    served = live.serve(
        engine, few([0.0, 0.0, 50.0, 90.0]), controller, PLANT, recording=True, clock=models.ManualClock
    )
    assert controller.seen[0] == (0, 2)
    assert all(decoding + waiting > 0 for decoding, waiting in controller.seen)
    assert len(controller.seen) == len(served.iterations) == served.decision_s.size
    requests = request_table(served.requests)
    assert (requests["ttft_s"] > 0).all()
    assert requests["ttft_s"][2:].max() < 1.0, "the engine wakes up when a request arrives"


def test_more_candidates_than_the_drafter_proposes_are_refused() -> None:
    engine = models.engine("llama", "none", models.limits(), clock=models.ManualClock())
    with pytest.raises(ActionError, match=r"at most 0: set controller.candidates=0"):
        live.serve(engine, few([0.0]), Watching(candidates=1), PLANT, clock=models.ManualClock)


def test_the_grid_has_only_what_the_drafter_can_propose() -> None:
    engine = models.engine("llama", "none", models.limits())
    assert live.grid_within(ActionGrid(), engine) == ActionGrid(candidate_choices=(0,))
    with pytest.raises(ActionError, match=r"candidate_choices=\[2, 4\].*include 0"):
        live.grid_within(ActionGrid(candidate_choices=(2, 4)), engine)
