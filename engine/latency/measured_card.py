"""Held-out errors of predictions of a measured engine's iteration times.

A profile has few points, so all of them are held out once: five folds, shuffled within kind of batch and bucket of
decodes, repeated with other shuffles. The final prediction is fitted on all points.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.latency.measured import MeasuredIterations, errors
from engine.latency.measured_fit import MemoryFigures, fit_table
from engine.latency.model import LatencyModel
from engine.latency.predictors import ALL_FEATURES, Forest, Kind, Observed, Predictor

FOLDS = 5
REPEATS = 2

MEASURED_FOREST = Forest(trees=100, min_samples_leaf=5, features=ALL_FEATURES, guess="curves")
"""For the few hundred points of a profile."""

Fit = Callable[[MeasuredIterations], Callable[[MeasuredIterations], NDArray[np.float64]]]
"""Function that fits on some iterations and predicts others."""


def observed(measured: MeasuredIterations) -> Observed:
    """Quantities of measured iterations that a controller knows before they run."""
    return Observed(
        measured.num_decodes,
        measured.decode_kv_tokens,
        measured.candidates,
        measured.prefill_tokens,
        measured.unread_tokens,
    )


def table_times(document: dict[str, Any], measured: MeasuredIterations) -> NDArray[np.float64]:
    """Seconds (S,) of measured iterations under a latency table's document, as the simulator computes them."""
    model = LatencyModel.from_document(document, document["name"])
    kv = measured.padded_kv_tokens(model.tables.padding)
    return np.array(
        [
            model.time(
                int(measured.num_decodes[i]),
                int(measured.candidates[i]),
                float(kv[i]),
                [(chunk, int(measured.prefill_context[i]) if j == 0 else 0) for j, chunk in enumerate(chunks)],
                int(measured.prompts_completed[i]),
                int(measured.unread_tokens[i]),
            )
            for i, chunks in enumerate(measured.chunks)
        ]
    )


def heldout_errors(measured: MeasuredIterations, fit: Fit, seed: int = 0) -> dict[str, float]:
    """Mean absolute relative error by `MeasuredIterations.groups` of predictions for held-out iterations."""
    found: list[dict[str, float]] = []
    for repeat in range(REPEATS):
        fold = measured.folds(FOLDS, seed + repeat)
        predicted = np.empty(len(measured))
        for held_out in np.unique(fold):
            rows = fold == held_out
            predicted[rows] = fit(measured.subset(~rows))(measured.subset(rows))
        found.append(errors(measured, predicted))
    return {group: float(np.mean([entry[group] for entry in found])) for group in found[0]}


def predictor_errors(
    measured: MeasuredIterations, forest: Forest, seed: int = 0, kind: Kind = "extra_trees"
) -> dict[str, float]:
    """`heldout_errors` of a `Predictor`."""

    def fit(seen: MeasuredIterations) -> Callable[[MeasuredIterations], NDArray[np.float64]]:
        predictor = Predictor.fit(observed(seen), seen.seconds, forest, seed, kind)
        return lambda unseen: predictor(observed(unseen))

    return heldout_errors(measured, fit, seed)


def card(measured: MeasuredIterations, forest: Forest, seed: int = 0) -> dict[str, dict[str, float]]:
    """Held-out errors of every kind of prediction, and of a median against itself (`noise`), by group of iterations.

    linear: a straight line · curves: the base of the trees' ratio, if that is `curves` · random forest and extra trees:
    with the same settings · latency table: the simulator's truth, which also knows the longest request of the
    batch · noise: half the interquartile range of an iteration's repeats over its median.
    """
    memory = MemoryFigures(0.0, 0.0, 0.0, 1)

    def fit(seen: MeasuredIterations) -> Callable[[MeasuredIterations], NDArray[np.float64]]:
        document = fit_table(seen, "measured", memory, {})
        return lambda unseen: table_times(document, unseen)

    noise = 0.5 * measured.seconds_iqr / measured.seconds
    return {
        "linear": predictor_errors(measured, replace(forest, guess="line"), seed, "none"),
        "curves": predictor_errors(measured, replace(forest, guess="curves"), seed, "none"),
        "random forest": predictor_errors(measured, forest, seed, "random_forest"),
        "extra trees": predictor_errors(measured, forest, seed),
        "latency table": heldout_errors(measured, fit, seed),
        "noise": {group: float(noise[rows].mean()) for group, rows in measured.groups.items()},
    }
