"""The calibration card's figures: ratios real / simulated by load level, and iteration times by batch size."""

from collections.abc import Sequence

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from runs.reporting import palette
from runs.reporting.calibration import PREDICTED, TARGET

TITLES = {"tpot_mean_s": "mean TPOT", "ttft_mean_s": "mean TTFT", "tpot_p99_s": "P99 TPOT", "ttft_p99_s": "P99 TTFT"}
KINDS = {"decode": "#0072B2", "verify": "#D55E00", "mixed": "#009E73"}
_COLOURS = ("#0072B2", "#E69F00", "#D55E00", "#009E73", "#CC79A7", "#56B4E9")
_BAND = "#eef3ee"
_SPREAD = 0.5
_LEAST_SPAN = 0.22
_HEIGHT_IN = 2.0


def ratios(compared: pd.DataFrame) -> Figure:
    """Real / simulated with intervals, one panel a metric, levels side by side, a mark for every controller.

    `compared` as from `calibration.over_repeats`. Filled marks are predictions, hollow ones simulations with the run's
    own agreements; shaded is the target.
    """
    metrics = [metric for metric in TITLES if (compared["metric"] == metric).any()]
    levels, labels = list(compared["level"].unique()), list(compared["label"].unique())
    colours = dict(zip(labels, _COLOURS * len(labels), strict=False))
    handles: list[Line2D | Patch] = [
        Line2D([], [], color=colours[label], marker="o", ms=5, ls="none", label=label) for label in labels
    ]
    if compared["way"].nunique() > 1:
        handles.append(
            Line2D([], [], color="#5a6068", marker="o", mfc="white", ms=5, ls="none", label="hollow: own agreements")
        )
    handles.append(Patch(color=_BAND, label=f"within {100 * TARGET:.0f} %"))
    with mpl.rc_context(palette.STYLE):
        rows = -(-len(metrics) // 2)
        figure, outer = palette.grid(rows, min(2, len(metrics)), _HEIGHT_IN, palette.Head(handles))
        for place, metric in enumerate(metrics):
            axes = figure.add_subplot(outer[place // 2, place % 2])
            axes.set_title(TITLES[metric], loc="left", fontsize=palette.TITLE_SIZE, fontweight="bold")
            _draw_ratios(axes, compared[compared["metric"] == metric], levels, colours)
            axes.set_ylabel("real / simulated" if place % 2 == 0 else "")
        return figure


def _draw_ratios(axes: Axes, mine: pd.DataFrame, levels: Sequence[str], colours: dict[str, str]) -> None:
    axes.axhspan(1 - TARGET, 1 + TARGET, color=_BAND, lw=0, zorder=0)
    axes.axhline(1.0, color=palette.QUIET, lw=0.8, zorder=1)
    lanes = [(label, way) for label in colours for way in mine["way"].unique()]
    for row in mine.itertuples():
        lane = lanes.index((row.label, row.way))
        x = levels.index(row.level) + _SPREAD * ((lane + 0.5) / len(lanes) - 0.5)
        colour = colours[row.label]
        if np.isfinite(row.low):
            axes.plot([x, x], [row.low, row.high], color=colour, lw=1.2, zorder=2)
        face = colour if row.way == PREDICTED else "white"
        axes.plot(x, row.ratio, marker="o", ms=5, color=colour, mfc=face, mew=1.2, zorder=3)
    seen = np.concatenate([mine[key].dropna().to_numpy() for key in ("ratio", "low", "high")])
    seen = seen[np.isfinite(seen)]
    reach = max(_LEAST_SPAN, 1.1 * float(np.abs(seen - 1.0).max()) if seen.size else 0.0)
    axes.set_ylim(max(0.0, 1 - reach), 1 + reach)
    axes.set_xlim(-0.5, len(levels) - 0.5)
    axes.set_xticks(range(len(levels)), levels)
    axes.grid(visible=False, axis="x")


def iteration_times(batches: pd.DataFrame) -> Figure:
    """Measured / predicted time of the iterations of real runs against B, one line a kind of batch.

    `batches` as from `calibration.by_batch`. A mark's area is the kind and bucket's share of all time.
    """
    drawn = batches[batches["kind"].isin(list(KINDS))]
    buckets = sorted(drawn["num_decodes"].unique(), key=lambda text: int(text.split("-")[0]))
    with mpl.rc_context(palette.STYLE):
        handles = [
            Line2D([], [], color=KINDS[kind], marker="o", ms=5, lw=1.5, label=kind)
            for kind in KINDS
            if (drawn["kind"] == kind).any()
        ]
        handles.append(Line2D([], [], color="#5a6068", marker="o", ms=7, ls="none", label="area: share of the time"))
        figure, outer = palette.grid(1, 1, _HEIGHT_IN, palette.Head(handles))
        axes = figure.add_subplot(outer[0, 0])
        axes.axhspan(1 - TARGET, 1 + TARGET, color=_BAND, lw=0, zorder=0)
        axes.axhline(1.0, color=palette.QUIET, lw=0.8, zorder=1)
        for kind, colour in KINDS.items():
            line = drawn[drawn["kind"] == kind]
            x = [buckets.index(bucket) for bucket in line["num_decodes"]]
            axes.plot(x, line["ratio"], color=colour, lw=1.5, zorder=2)
            axes.scatter(x, line["ratio"], s=12 + 400 * line["share"], color=colour, zorder=3, lw=0)
        axes.set_xticks(range(len(buckets)), buckets)
        axes.set_xlabel("B, decoding requests")
        axes.set_ylabel("measured / predicted time")
        return figure
