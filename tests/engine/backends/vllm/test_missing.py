"""Without vLLM everything else works, and importing its backend says what to install."""

from __future__ import annotations

import importlib
import re
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[4]
PACKAGE = "engine.backends.vllm"


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed")
def test_importing_it_says_what_is_missing() -> None:
    with pytest.raises(ImportError, match=r"needs vLLM 0\.32.*docs/vllm\.md"):
        importlib.import_module(PACKAGE)


def test_nothing_else_imports_it() -> None:
    own = ROOT.joinpath(*PACKAGE.split("."))
    naming = [
        path
        for folder in ("engine", "envs", "controllers", "runs", "hydra_plugins")
        for path in (ROOT / folder).rglob("*.py")
        if own not in path.parents and re.search(rf"(from|import) {re.escape(PACKAGE)}\b", path.read_text())
    ]
    assert naming == []
