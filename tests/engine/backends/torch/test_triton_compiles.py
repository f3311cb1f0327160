"""The kernels compile for GPUs at Vicuna's sizes, and fit their registers: seen in the machine code, without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from tests.conftest import REPOSITORY

pytest.importorskip("triton")

SHARED_BYTES = {80: 163 << 10, 90: 227 << 10}
"""What a block may have of an A100 and of an H100 or H200 (CUDA C++ Programming Guide, compute capabilities)."""


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_kernels_compile_without_spills(capability: int) -> None:
    script = [sys.executable, "-m", "tests.engine.backends.torch.compile_triton", str(capability)]
    # Compiled, where the tests around this one have them interpreted.
    environment = os.environ | {"TRITON_INTERPRET": "0", "TRITON_DEFAULT_FP_FUSION": "1"}
    ran = subprocess.run(script, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    reports = [json.loads(line) for line in ran.stdout.splitlines()]
    assert len(reports) == 10
    for one in reports:
        assert one["spilled_bytes"] == 0, one
        assert one["shared_bytes"] <= SHARED_BYTES[capability], one
        assert one["wide_loads"], one
        assert one["tensor_cores"] == (one["kernel"] == "_attend"), one
