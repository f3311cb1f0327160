"""Without vLLM everything else works, and importing its backend says what to install."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import gymnasium
import pytest

from engine.backends.vllm.engine_config import VllmEngineConfig

ROOT = Path(__file__).resolve().parents[4]
PACKAGE = "engine.backends.vllm"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_importing_it_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32.*docs/vllm\.md"):
        importlib.import_module(PACKAGE).GovernedScheduler  # noqa: B018


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_an_engine_that_cannot_be_started_says_what_is_missing() -> None:
    with pytest.raises(ValueError, match=r"needs vLLM 0\.32.*docs/vllm\.md"):
        VllmEngineConfig(name="vllm").build(ttft_target=1.0)
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32"):
        gymnasium.make("envs:governor/Serving-v0", engine="vllm")


def test_nothing_else_imports_more_of_it_than_its_settings() -> None:
    own = ROOT.joinpath(*PACKAGE.split("."))
    other = re.compile(rf"(from|import) {re.escape(PACKAGE)}\b(?!\.engine_config\b)")
    naming = [
        path
        for folder in ("engine", "envs", "controllers", "runs", "hydra_plugins")
        for path in (ROOT / folder).rglob("*.py")
        if own not in path.parents and other.search(path.read_text())
    ]
    assert naming == []
