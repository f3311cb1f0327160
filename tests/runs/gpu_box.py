"""A Python that finds only the packages that docs/gpu.md names for a GPU machine."""

from __future__ import annotations

import re
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions
from pathlib import Path

from packaging.requirements import Requirement

REPOSITORY = Path(__file__).resolve().parents[2]
INSTALLED = ("torch", "transformers", "numpy", "numba", "scikit-learn", "hydra-core", "omegaconf", "pydantic")
OTHERS = {"rich", "pandas", "gymnasium", "wandb", "stable_baselines3"}
"""Refused even where something that is installed would bring them."""

FINDER = """
import os
import sys
from importlib.machinery import PathFinder

REFUSED = frozenset(os.environ["REFUSED"].split(","))


class Only(PathFinder):
    @classmethod
    def find_spec(cls, name, path=None, target=None):
        return None if name.partition(".")[0] in REFUSED else super().find_spec(name, path, target)


sys.meta_path[:] = [Only if finder is PathFinder else finder for finder in sys.meta_path]
"""
"""The `sitecustomize.py` of such a Python; REFUSED in its environment holds `refused_packages`."""


def refused_packages() -> set[str]:
    """Every importable name that a machine with `INSTALLED` alone would not have."""
    found: set[str] = set()
    asked = list(INSTALLED)
    while asked:
        name = _normalised(asked.pop())
        if name in found:
            continue
        try:
            needs = map(Requirement, distribution(name).requires or [])
        except PackageNotFoundError:
            continue
        found.add(name)
        asked += [need.name for need in needs if need.marker is None or need.marker.evaluate({"extra": ""})]
    own = {path.name for path in REPOSITORY.iterdir()}
    others = {
        name
        for name, distributions in packages_distributions().items()
        if name not in own and not {_normalised(entry) for entry in distributions} & found
    }
    return others | OTHERS


def _normalised(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
