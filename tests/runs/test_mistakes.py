"""A mistyped command line is answered with one line that names the nearest key or choice."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from engine.backends.torch.config import TorchEngineConfig
from engine.config import EngineConfig
from runs import endings, evaluate, mistakes
from runs.profiling import Profile


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("contoller=analytic", "contoller: unknown key; did you mean controller?"),
        ("controller=analitic", "controller=analitic: no such choice; did you mean analytic?"),
        ("controller=nothing_like_it", "controller=nothing_like_it: no such choice; there are adaserve, analytic, "),
        (
            "workload=/data/day1.csv",
            "workload=/data/day1.csv: no such choice; a trace is workload=trace workload.path=/d",
        ),
        ("workload=data/day1.jsonl.gz", "a trace is workload=trace workload.path=data/day1.jsonl.gz"),
        ("slo.tpot=1", "slo.tpot: unknown key; did you mean slo.tpot_target?"),
        ("tpot_target=1", "tpot_target: unknown key; did you mean slo.tpot_target?"),
        ("controler.ttft_target=1", "did you mean controller.ttft_target?"),
        ("seed=0,1", "seed=0,1: several values: add -m"),
        ("seed", "seed: not of the form key=value"),
    ],
)
def test_a_mistyped_word_gets_one_line(
    word: str, said: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["evaluate", word])
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    with pytest.raises(SystemExit) as stopped:
        evaluate.main()
    (line,) = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2
    assert said in line


def test_an_object_of_another_class_is_refused_without_internals() -> None:
    with pytest.raises(ValueError) as refusal:
        Profile(engine=EngineConfig(name="simulated", latency="vicuna_7b_a100"))  # type: ignore[arg-type,call-arg]
    said = mistakes.explain(refusal.value, "")  # type: ignore[arg-type]
    assert "[" not in said
    assert TorchEngineConfig.__name__ not in said.partition("choose")[0]
    assert "torch_tiny" in said


def test_sigterm_ends_an_app_without_hydra_as_ctrl_c_does(caplog: pytest.LogCaptureFixture) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as stopped:
        endings.command(lambda: os.kill(os.getpid(), signal.SIGTERM) or 0)
    assert stopped.value.code == endings.INTERRUPTED
    assert caplog.messages == ["interrupted"]
    assert signal.getsignal(signal.SIGTERM) == before
