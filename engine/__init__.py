"""The serving engine: one scheduler, simulated and real clocks, and models of iteration time.

Importing this package points numba's on-disk cache at a folder named after the compiled sources. Numba itself only
notices a change in the file that holds a function, not in the functions it calls.
"""

import hashlib
import os
from pathlib import Path

import numba


def cache_home() -> Path:
    """Cache folder of reproducible files: compiled code and baked lookup tables (`$XDG_CACHE_HOME/governor`)."""
    base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "governor"


def _compiled_sources_digest() -> str:
    root = Path(__file__).resolve().parent.parent
    digest = hashlib.sha256(numba.__version__.encode())
    for package in ("engine", "controllers", "envs"):
        for path in sorted((root / package).rglob("*.py")):
            text = path.read_bytes()
            if b"numba" in text or b"engine.compiled" in text:
                digest.update(str(path.relative_to(root)).encode() + b"\0" + text)
    return digest.hexdigest()[:16]


if not os.environ.get("NUMBA_CACHE_DIR"):
    numba.config.CACHE_DIR = str(  # type: ignore[attr-defined]
        cache_home() / f"numba-{_compiled_sources_digest()}"
    )
