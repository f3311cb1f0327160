"""Predictors of iteration times learned from observed iterations: a simple base model, and trees for the ratio to it.

Trees predict constants between observed points, so they only correct the base model's errors: interactions and
staircases. With thousands of iterations a straight line over the sizes is a sufficient base. With the few hundred that
a profile measures, the base is piecewise linear.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.latency.curves import hats, nodes, rising, solve_weights

Kind = Literal["extra_trees", "random_forest", "none"]
Guess = Literal["line", "curves"]
Feature = Literal["decodes", "candidates", "prefill", "kv", "rows", "tokens", "kv_each", "drafted", "unread"]


class Observed(NamedTuple):
    """Quantities of S iterations known before they run, each (S,): B, cached tokens of decodes, c, prompt tokens."""

    decodes: NDArray[Any]
    kv: NDArray[Any]
    candidates: NDArray[Any]
    prefill: NDArray[Any]
    unread: NDArray[Any] | None = None
    """Tokens that the drafter reads in this iteration; None where it reads with the target."""


_COLUMNS: dict[str, Callable[[Observed], NDArray[Any]]] = {
    "decodes": lambda seen: seen.decodes,
    "candidates": lambda seen: seen.candidates,
    "prefill": lambda seen: seen.prefill,
    "kv": lambda seen: seen.kv,
    "rows": lambda seen: seen.decodes * (1 + seen.candidates),
    "tokens": lambda seen: seen.decodes * (1 + seen.candidates) + seen.prefill,
    "kv_each": lambda seen: seen.kv / np.maximum(seen.decodes, 1),
    "drafted": lambda seen: seen.candidates * seen.decodes,
    "unread": lambda seen: np.zeros(len(seen.decodes)) if seen.unread is None else seen.unread,
}

FEATURES = tuple(name for name in _COLUMNS if name != "unread")
ALL_FEATURES = tuple(_COLUMNS)


@dataclass(frozen=True)
class Forest:
    """Settings of the trees: their number, the fewest iterations in a leaf, and the features they may split on.

    `guess` is the base model of their ratio: a straight line by least squares, or rising piecewise linear curves.
    Raises ValueError for an unknown feature, or numbers below 1.
    """

    trees: int = 40
    min_samples_leaf: int = 3
    features: tuple[str, ...] = FEATURES
    guess: Guess = "line"

    def __post_init__(self) -> None:
        for name in ("trees", "min_samples_leaf"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        object.__setattr__(self, "features", tuple(self.features))
        unknown = [name for name in self.features if name not in _COLUMNS]
        if unknown or not self.features:
            raise ValueError(f"features={list(self.features)} must be some of {', '.join(_COLUMNS)}")


DEFAULT_FOREST = Forest()


@dataclass(frozen=True)
class Predictor:
    """A fitted prediction of seconds; call it with `Observed` iterations."""

    forest: Forest
    columns: Callable[[Observed], NDArray[np.float64]]
    weights: NDArray[np.float64]
    floor_s: float
    trees: Any
    """A fitted regression of the ratio to the guess; None: the guess alone."""

    @classmethod
    def fit(
        cls, seen: Observed, seconds: NDArray[np.float64], forest: Forest, seed: int, kind: Kind = "extra_trees"
    ) -> Predictor:
        """Learn from observed iterations and their seconds (S,)."""
        columns: Callable[[Observed], NDArray[np.float64]] = _straight_line
        if forest.guess == "curves":
            columns = _Curves.over(seen)
            (weights,), _ = solve_weights([columns(seen)], seconds, seconds)
        else:
            line = columns(seen) / seconds[:, None]
            weights = np.asarray(np.linalg.lstsq(line, np.ones(len(seconds)), rcond=None)[0], dtype=np.float64)
        floor = 0.25 * float(seconds.min())
        if kind == "none":
            return cls(forest, columns, weights, floor, None)
        import sklearn.ensemble

        grow = {
            "extra_trees": sklearn.ensemble.ExtraTreesRegressor,
            "random_forest": sklearn.ensemble.RandomForestRegressor,
        }[kind]
        trees = grow(n_estimators=forest.trees, min_samples_leaf=forest.min_samples_leaf, random_state=seed, n_jobs=1)
        ratio = seconds / np.maximum(columns(seen) @ weights, floor)
        # Where few iterations share a leaf, the slow ones would pull its mean up; errors are counted relative to each.
        trees.fit(
            _features(seen, forest.features), ratio, sample_weight=1.0 / ratio if forest.guess == "curves" else None
        )
        return cls(forest, columns, weights, floor, trees)

    def __call__(self, seen: Observed) -> NDArray[np.float64]:
        """Seconds of the iterations, (S,)."""
        guess = np.maximum(self.columns(seen) @ self.weights, self.floor_s)
        if self.trees is None:
            return guess
        predicted: NDArray[np.float64] = self.trees.predict(_features(seen, self.forest.features)) * guess
        return predicted


def _features(seen: Observed, names: tuple[str, ...]) -> NDArray[np.float32]:
    return np.stack([np.asarray(_COLUMNS[name](seen), dtype=np.float32) for name in names], axis=1)


def _straight_line(seen: Observed) -> NDArray[np.float64]:
    """Columns of the linear base model, to which trees learn the ratio, (S, 7), or (S, 8) with `unread`."""
    rows = seen.decodes * (1 + seen.candidates)
    drafting = (seen.candidates > 0) & (seen.decodes > 0)
    columns = [
        np.ones(len(rows)), rows + seen.prefill, seen.kv, seen.kv * seen.candidates, drafting * seen.candidates,
        seen.prefill > 0, rows,
    ]  # fmt: skip
    if seen.unread is not None:
        columns.append(seen.unread)
    return np.stack([np.asarray(column, dtype=np.float64) for column in columns], axis=1)


@dataclass(frozen=True)
class _Curves:
    """Columns of a sum of curves: by tokens, by decodes, attention, drafter steps, unread drafter tokens."""

    token_nodes: NDArray[np.float64]
    request_nodes: NDArray[np.float64]

    @classmethod
    def over(cls, seen: Observed) -> _Curves:
        """Curves with nodes over the range of the iterations."""
        tokens = seen.decodes * (1 + seen.candidates) + seen.prefill
        return cls(nodes(len(tokens), tokens.max()), nodes(len(tokens), seen.decodes.max()))

    def __call__(self, seen: Observed) -> NDArray[np.float64]:
        """(S, columns)"""
        decodes, prefill, kv = (np.asarray(x, dtype=np.float64) for x in (seen.decodes, seen.prefill, seen.kv))
        steps = np.where(decodes > 0, seen.candidates, 0).astype(np.float64)
        unread = np.zeros_like(decodes) if seen.unread is None else np.asarray(seen.unread, dtype=np.float64)
        by_decodes = hats(decodes, self.request_nodes) * (decodes > 0)[:, None]
        blocks = [
            np.ones((len(decodes), 1)),
            rising(decodes * (1 + steps) + prefill, self.token_nodes),
            np.stack([prefill > 0, prefill, prefill**2], axis=1).astype(np.float64),
            by_decodes * kv[:, None],
            (steps * kv)[:, None],
            steps[:, None] * rising(decodes, self.request_nodes),
            np.stack([steps > 0, (steps > 0) * decodes, unread > 0, unread, unread**2], axis=1).astype(np.float64),
        ]
        return np.concatenate(blocks, axis=1)
