"""What every test may ask for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

# Without a GPU Triton's kernels are interpreted, which has to be said before anything imports it.
if not Path("/dev/nvidiactl").exists():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# The first example of a test may compile what it calls.
settings.register_profile("compiled", deadline=None)
settings.load_profile("compiled")

REPOSITORY = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def data_dir() -> Path:
    """The folder of third-party data (../shared/data, or $GOVERNOR_DATA); skips the test where there is none."""
    folder = Path(os.environ.get("GOVERNOR_DATA", REPOSITORY.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no data folder at {folder}; set GOVERNOR_DATA to run the tests that need measured data")
    return folder
