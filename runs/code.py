"""Which version of this code a result comes from."""

import hashlib
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DECIDING = (
    "engine/**/*.py",
    "engine/latency/tables/*.json",
    "engine/models/weights/*/*",
    "controllers/*.py",
    "controllers/policies/*.npz",
    "runs/evaluation.py",
    "runs/simulated.py",
    "runs/serving.py",
    "runs/live.py",
)
"""What the figures of a run depend on beside its configuration."""


@cache
def code_digest() -> str:
    """A digest over the files that decide what a run gives; another one means that its figures may have changed."""
    digest = hashlib.sha256()
    for path in sorted(path for pattern in DECIDING for path in ROOT.glob(pattern)):
        content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {content}\n".encode())
    return digest.hexdigest()[:12]
