"""How the report's figures look: colours, type, panel grids, and labels that stand beside their lines."""

import io
from collections.abc import Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.gridspec import GridSpec
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator

WIDTH_IN = 9.0
DPI = 200
INK = "#222222"
QUIET = "#8a8f98"
FAINT = "#cfd3d8"
ENVELOPE = "#222222"
# Okabe & Ito's colours, which people with any common colour vision deficiency tell apart.
OPTIMIZER_COLOURS = {"analytic": "#D55E00", "poster": "#0072B2"}
SARATHI_COLOUR = "#009E73"
_SPARE_COLOURS = ("#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
MARKERS = {"analytic": "o", "poster": "D", "sarathi": "s"}
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
    "axes.titlesize": 9,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 8,
    "axes.labelsize": 8.5,
    "axes.labelcolor": INK,
    "axes.edgecolor": "#a0a5ac",
    "axes.linewidth": 0.8,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#eceef0",
    "grid.linewidth": 0.8,
    "axes.axisbelow": True,
    "xtick.color": "#5a6068",
    "ytick.color": "#5a6068",
    "xtick.labelsize": 8,
    "ytick.labelsize": 8,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
}


def colours_of(settings: pd.DataFrame) -> dict[str, str]:
    """A colour for each label that is not a fixed setting; `analytic` and `poster` always have their own."""
    chosen: dict[str, str] = {}
    spare = list(_SPARE_COLOURS)
    rest = settings[settings["role"] != "fixed"].drop_duplicates("label")
    for label, controller in sorted(zip(rest["label"], rest["controller"], strict=True)):
        if controller in OPTIMIZER_COLOURS and OPTIMIZER_COLOURS[controller] not in chosen.values():
            chosen[label] = OPTIMIZER_COLOURS[controller]
        elif controller == "sarathi" and SARATHI_COLOUR not in chosen.values():
            chosen[label] = SARATHI_COLOUR
        else:
            chosen[label] = spare[0]
            spare.append(spare.pop(0))
    return chosen


def ramp(count: int) -> list[str]:
    """`count` greys from light to dark for an ordered set such as c; colour is left to what decides."""
    return [mpl.colors.to_hex((level, level, level * 1.03)) for level in np.linspace(0.72, 0.22, count)]


def panel_title(engine: str, family: str) -> str:
    return f"{engine} · {family}".replace("_", " ")


def panels(frame: pd.DataFrame, row_height_in: float, parts: Sequence[float] = (1,)) -> tuple[Figure, list[Any]]:
    """A figure with one panel per engine and workload family, at most three side by side.

    Returns the figure and a list of (engine, family, rows of `frame`, axes, whether leftmost); each panel is cut into
    `len(parts)` axes, one above the other, that share their x axis.
    """
    groups = list(frame.groupby(["engine", "family"], sort=False))
    columns = len(groups) if len(groups) <= 3 else 2 if len(groups) == 4 else 3
    figure, outer = grid(-(-len(groups) // columns), columns, row_height_in)
    found = []
    for place, ((engine, family), group) in enumerate(groups):
        inner = outer[place // columns, place % columns].subgridspec(len(parts), 1, height_ratios=parts, hspace=0.14)
        axes: list[Axes] = []
        for part in range(len(parts)):
            axes.append(figure.add_subplot(inner[part, 0], sharex=axes[0] if axes else None))
        for upper in axes[:-1]:
            upper.tick_params(labelbottom=False)
        axes[0].set_title(panel_title(engine, family))
        found.append((engine, family, group, axes, place % columns == 0))
    return figure, found


def grid(rows: int, columns: int, row_height_in: float) -> tuple[Figure, GridSpec]:
    """A figure of README width, margins in inches so that a tall one is not spread apart, and room for a legend."""
    width = WIDTH_IN if columns > 1 else 6.2
    height = rows * row_height_in + 0.35
    between, above = (0.8 if columns < 4 else 0.42), 0.85
    figure = Figure(figsize=(width, height))
    across = (width - 1.1 - (columns - 1) * between) / columns
    down = row_height_in - above
    outer = figure.add_gridspec(
        rows,
        columns,
        left=0.5 / width,
        right=1 - 0.6 / width,
        top=1 - 0.72 / height,
        bottom=1 - (0.72 + rows * row_height_in - above) / height,
        wspace=between / across,
        hspace=above / down,
    )
    return figure, outer


def scale_axis(axes: Axes, values: Any, which: str, ratio: float = 6.0) -> None:
    """A logarithmic axis with plain numbers when positive `values` span more than `ratio`, else a linear one."""
    finite = np.asarray(values, dtype=float)
    finite = finite[np.isfinite(finite)]
    axis = axes.xaxis if which == "x" else axes.yaxis
    limits, scale = (axes.set_xlim, axes.set_xscale) if which == "x" else (axes.set_ylim, axes.set_yscale)
    if finite.size == 0:
        return
    low, high = float(finite.min()), float(finite.max())
    if low > 0 and high / low > ratio:
        scale("log")
        limits(low / 1.15, high * 1.15)
        fine = high / low < 100
        axis.set_major_locator(
            LogLocator(base=10, subs=(1, 1.5, 2, 3, 5, 7) if high / low < 12 else (1, 2, 5) if fine else (1,))
        )
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.set_minor_formatter(NullFormatter())
        axis.set_minor_locator(NullLocator())
    else:
        margin = 0.06 * (high - low) or 0.1 * abs(high) or 1.0
        limits(low - margin, high + margin)
        axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))


def attainment_axis(axes: Axes, percents: Any) -> None:
    """An x axis of attained percent that stretches the last points before 100, where settings differ."""
    finite = np.asarray(percents, dtype=float)
    finite = finite[np.isfinite(finite)]
    low = float(finite.min()) if finite.size else 0.0
    # One more point than missed keeps 100 % finite; a point is also the margin that counts as equal.
    axes.set_xscale(
        "function", functions=(lambda x: -np.log(np.maximum(101.0 - x, 1e-3)), lambda u: 101.0 - np.exp(-u))
    )
    ticks = [tick for tick in (0, 50, 80, 95, 100) if tick >= low - 15]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(max(min(low - 0.35 * (101 - low), 94), -30), 100.25)


def label_beside(
    axes: Axes, labels: Sequence[tuple[float, str, str]], gap: float = 0.062, bold: Sequence[str] = ()
) -> None:
    """Writes (y in data units, text, colour) labels right of the axes, moved apart so that none overlap."""
    if not labels:
        return
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((1.0, y))[1]), text, colour) for y, text, colour in labels)
    heights = np.array([place[0] for place in placed])
    heights = np.clip(heights, 0, 1)
    for _ in range(200):
        close = np.diff(heights) < gap - 1e-6
        if not close.any():
            break
        for low in np.flatnonzero(close):
            push = (gap - (heights[low + 1] - heights[low])) / 2
            heights[low] -= push
            heights[low + 1] += push
        heights += max(0.0, -heights[0])
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        weight = "bold" if text in bold else "normal"
        axes.text(
            1.015, height, text, color=colour, transform=axes.transAxes, va="center", fontsize=7.5, fontweight=weight
        )


def png(figure: Figure) -> bytes:
    """The figure as a PNG at twice the size it is shown at."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, bbox_inches="tight", pad_inches=0.08, metadata={"Software": None})
    return buffer.getvalue()
