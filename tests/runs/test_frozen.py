"""Moving code changes no run: digests of requests, iterations, telemetry, rewards and a policy stay what they were."""

from __future__ import annotations

import json

import pytest

from tests.runs.frozen import DIGESTS, FROZEN, versions

KEPT = json.loads(DIGESTS.read_text())


@pytest.mark.parametrize("name", FROZEN)
def test_a_run_stays_as_it_was(name: str) -> None:
    if KEPT["versions"] != versions():
        pytest.skip(f"digests were taken with {KEPT['versions']}, here are {versions()}")
    assert FROZEN[name]() == KEPT["digests"][name]
