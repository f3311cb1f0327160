"""The report's figure of scores over many scenarios: the share of runs that reach each score (performance profiles)."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from numpy.typing import NDArray

from runs.reporting import palette
from runs.reporting.aggregate import interval, performance_profile
from runs.reporting.scores import ZERO, scored_runs

MOST_COLOURED = 7
THRESHOLDS = 201
WORST_SHOWN = -1.0
_HEIGHT_IN = 3.4


def profiles(runs: pd.DataFrame, aggregates: pd.DataFrame, one: str) -> Figure:
    """Share of runs, over all scenarios and seeds, whose score is at least tau, against tau.

    `runs` and `one` as in `scores.Scored`, `aggregates` as from `scores.aggregates`, whose best controllers have
    colours and 95 % stratified-bootstrap bands, the best a thicker line; the rest are grey. The dashed line is the
    best single static setting, dotted ones are bounds.
    """
    frame = scored_runs(runs)
    static = aggregates.loc[aggregates["role"] == "static", "label"].head(1).tolist()
    bounds = aggregates.loc[aggregates["role"] == "bound", "label"].tolist()
    deciding = aggregates.loc[aggregates["role"] == "optimizer", "label"].tolist()
    coloured = deciding[:MOST_COLOURED]
    colours = palette.colours_of(aggregates[aggregates["label"].isin(coloured)])
    looks: dict[str, dict[str, Any]] = {
        label: {"color": palette.FAINT, "lw": 1.0, "zorder": 1} for label in deciding if label not in coloured
    }
    looks |= {label: {"color": palette.ENVELOPE, "lw": 1.2, "ls": (0, (4, 2)), "zorder": 4} for label in static}
    looks |= {label: {"color": palette.BOUND, "lw": 1.4, "ls": palette.BOUND_LINE, "zorder": 3} for label in bounds}
    for label in coloured:
        strong = label == coloured[0]
        looks[label] = {"color": colours[label], "lw": 2.4 if strong else 1.6, "zorder": 6 if strong else 5}
    with mpl.rc_context(palette.STYLE):
        figure, outer = palette.grid(1, 1, _HEIGHT_IN, palette.Head(_legend(looks, coloured, static, bounds)))
        axes = figure.add_subplot(outer[0, 0])
        _draw(axes, frame, looks, coloured)
        axes.set_xlabel(f"score tau (0: {ZERO}; 1: {one})")
        axes.set_ylabel("runs with score at least tau, %")
        return figure


def _draw(axes: Axes, frame: pd.DataFrame, looks: Mapping[str, Mapping[str, Any]], coloured: list[str]) -> None:
    drawn = frame[frame["label"].isin(looks)]
    low = max(float(drawn["score"].quantile(0.05)), WORST_SHOWN)
    thresholds = np.linspace(min(low, 0.0) - 0.05, max(float(drawn["score"].quantile(0.99)), 1.0) + 0.02, THRESHOLDS)
    for label, look in looks.items():
        own = frame[frame["label"] == label]
        scores: NDArray[np.float64] = own["score"].to_numpy(float)
        axes.plot(thresholds, 100 * performance_profile(scores, thresholds), **look)
        if label in coloured:
            strata = own["stratum"].to_numpy(np.int64)
            lowest, highest = interval(lambda values: performance_profile(values, thresholds), strata, scores)
            axes.fill_between(thresholds, 100 * lowest, 100 * highest, color=look["color"], alpha=0.1, lw=0)
    axes.axvline(0.0, color=palette.QUIET, lw=0.8, zorder=0)
    axes.set_xlim(thresholds[0], thresholds[-1])
    axes.set_ylim(-2, 102)


def _legend(
    looks: Mapping[str, Mapping[str, Any]], coloured: list[str], static: list[str], bounds: list[str]
) -> list[Line2D]:
    named = {label: label for label in coloured}
    named |= {label: f"{label} (best single static setting)" for label in static} | {label: label for label in bounds}
    handles = [Line2D([], [], label=text, **looks[label]) for label, text in named.items()]
    if len(looks) > len(named):
        handles.append(Line2D([], [], color=palette.FAINT, lw=1.0, label="other controllers"))
    return handles
