"""How the report's figures look: colours, type, panel grids, and labels that stand beside their lines."""

import io
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.gridspec import GridSpec
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, MaxNLocator, NullFormatter, NullLocator
from numpy.typing import NDArray

from runs.reporting.names import engine_name

WIDTH_IN = 9.0
DPI = 200
TITLE_SIZE = 9.5
BESIDE_SIZE = 7.8
SMALLEST_TITLE = 0.84
STRETCHED_FROM = 90.0
HANDLE_EM = 2.2
COLUMN_EM = 1.6
INK = "#222222"
QUIET = "#8a8f98"
FAINT = "#cfd3d8"
ENVELOPE = "#222222"
BOUND = "#555a61"
BOUND_LINE = (0, (1, 1.5))
# Okabe & Ito's colours, which people with any common colour vision deficiency tell apart, and two more.
COLOURS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#7A5195", "#8C6D31")
MARKERS = dict(zip(COLOURS, "oDs^vPXp", strict=True))
"""The marker that goes with each colour, so that lines differ without colour as well."""
STYLE: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 8.5,
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
    """A colour for each label that is no static setting, by name; bounds have one of their own."""
    bounds = dict.fromkeys(settings.loc[settings["role"] == "bound", "label"], BOUND)
    return dict(zip(shown(settings), itertools.cycle(COLOURS), strict=False)) | bounds


def ramp(count: int) -> list[str]:
    """`count` greys from light to dark for an ordered set such as c; colour is left to what decides."""
    return [mpl.colors.to_hex((level, level, level * 1.03)) for level in np.linspace(0.72, 0.22, count)]


@dataclass(frozen=True)
class Head:
    """What stands above the panels: the legend, and under each panel's title a line of `subtitle_in` inches."""

    handles: Sequence[Artist]
    subtitle_in: float = 0.0


def panels(
    frame: pd.DataFrame, panel_height_in: float, head: Head, beside_in: float, parts: Sequence[float] = (1,)
) -> tuple[Figure, list[Any]]:
    """A figure with one panel per engine and workload family, at most three side by side.

    `beside_in` is the room right of each panel for labels. Returns the figure and a list of (engine, family, rows of
    `frame`, axes, whether leftmost); each panel is cut into `len(parts)` axes, one above the other, that share their x
    axis.
    """
    groups = list(frame.groupby(["engine", "family"], sort=False))
    columns = len(groups) if len(groups) <= 3 else 2 if len(groups) == 4 else 3
    rows = -(-len(groups) // columns)
    figure, outer = grid(rows, columns, panel_height_in, head, between_in=beside_in + 0.4, right_in=beside_in + 0.08)
    found = []
    for place, ((engine, family), group) in enumerate(groups):
        inner = outer[place // columns, place % columns].subgridspec(len(parts), 1, height_ratios=parts, hspace=0.12)
        axes: list[Axes] = []
        for part in range(len(parts)):
            axes.append(figure.add_subplot(inner[part, 0], sharex=axes[0] if axes else None))
        for upper in axes[:-1]:
            upper.tick_params(labelbottom=False)
        width = axes[0].get_position().width * figure.get_figwidth() + beside_in
        write_title(axes[0], engine, family, 0.07 + head.subtitle_in, width)
        found.append((engine, family, group, axes, place % columns == 0))
    return figure, found


def grid(
    rows: int, columns: int, panel_height_in: float, head: Head, between_in: float = 0.45, right_in: float = 0.12
) -> tuple[Figure, GridSpec]:
    """A figure of README width whose panels, margins and legend have their sizes in inches, however many there are."""
    width = WIDTH_IN if columns > 1 else 6.2
    left, above, below = 0.62, 0.33 + head.subtitle_in, 0.46
    ncols = _legend_columns(head.handles, width - 0.3)
    legend_in = 0.1 + 0.2 * -(-len(head.handles) // ncols)
    height = legend_in + rows * (above + panel_height_in + below)
    across = (width - left - right_in - (columns - 1) * between_in) / columns
    figure = Figure(figsize=(width, height))
    figure.legend(
        handles=list(head.handles),
        loc="upper left",
        ncols=ncols,
        bbox_to_anchor=(0.1 / width, 1 - 0.08 / height),
        borderaxespad=0,
        borderpad=0,
        handlelength=HANDLE_EM,
        columnspacing=COLUMN_EM,
    )
    outer = figure.add_gridspec(
        rows,
        columns,
        left=left / width,
        right=1 - right_in / width,
        top=1 - (legend_in + above) / height,
        bottom=below / height,
        wspace=between_in / across,
        hspace=(above + below) / panel_height_in,
    )
    return figure, outer


def write_title(axes: Axes, engine: str, family: str, above_in: float, width_in: float) -> None:
    """Writes what was run `above_in` inches over the axes and within `width_in`.

    In one line if that fits, else smaller, in two lines, or cut.
    """
    room = 72 * width_in
    title = f"{engine_name(engine)} · {family}"
    size = TITLE_SIZE * min(1.0, max(room / text_width(title, TITLE_SIZE, "bold"), SMALLEST_TITLE))
    lines = [title]
    if text_width(title, size, "bold") > room:
        size, lines = TITLE_SIZE * SMALLEST_TITLE, [engine_name(engine), family]
        while len(lines[1]) > 8 and text_width(lines[1], size, "bold") > room:
            lines[1] = lines[1].rstrip("…")[:-1] + "…"
    axes.annotate(
        "\n".join(lines),
        (0, 1),
        xycoords="axes fraction",
        xytext=(0, 72 * above_in),
        textcoords="offset points",
        fontsize=size,
        fontweight="bold",
        linespacing=1.05,
    )


def text_width(text: str, size: float, weight: str = "normal") -> float:
    """How wide a text is in the written picture, in points."""
    font = get_font(findfont(FontProperties(family=STYLE["font.family"], weight=weight)))
    # Glyphs are hinted to whole pixels, so that a text at another resolution is up to a tenth wider or narrower.
    font.set_size(size, DPI)
    font.set_text(text, 0.0)
    return float(font.get_width_height()[0] / 64 * 72 / DPI)


def _legend_columns(handles: Sequence[Artist], width_in: float) -> int:
    """The most columns in which the legend is no wider than `width_in`; it fills them one after the other."""
    size = float(STYLE["legend.fontsize"])
    widths = [text_width(str(handle.get_label()), size) + (HANDLE_EM + 0.8) * size for handle in handles]
    for columns in range(len(widths), 1, -1):
        taken = [max(part) for part in np.array_split(widths, columns)]
        if sum(taken) + COLUMN_EM * size * (len(taken) - 1) <= 72 * width_in:
            return columns
    return 1


def shown(frame: pd.DataFrame) -> list[str]:
    """Labels of the controllers to draw, sorted."""
    return sorted(frame.loc[frame["role"] == "optimizer", "label"].unique())


def handle(label: str, colour: str, **given: Any) -> Line2D:
    """The legend's entry of a controller."""
    look: dict[str, Any] = {"marker": MARKERS.get(colour, "o"), "lw": 1.9, "ms": 5} | given
    return Line2D([], [], color=colour, label=label, **look)


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
    """An x axis of attained percent over the data's range; near 100 it stretches the last points, where they differ."""
    finite = np.asarray(percents, dtype=float)
    finite = finite[np.isfinite(finite)]
    low, high = (float(finite.min()), float(finite.max())) if finite.size else (0.0, 100.0)
    if high < STRETCHED_FROM:
        # A range of less than two points would make much of nothing.
        spread = max(high - low, 2.0)
        middle = (high + low) / 2
        axes.set_xlim(middle - 0.6 * spread, middle + 0.6 * spread)
        axes.xaxis.set_major_locator(MaxNLocator(4, steps=[1, 2, 5, 10], prune=None))
        axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}" if value >= 0 else ""))
        return
    # One more point than missed keeps 100 % finite; a point is also the margin that counts as equal.
    axes.set_xscale(
        "function", functions=(lambda x: -np.log(np.maximum(101.0 - x, 1e-3)), lambda u: 101.0 - np.exp(-u))
    )
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in (0, 50, 80, 95, 100) if tick >= low - 15]))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.set_xlim(max(min(low - 0.35 * (101 - low), 94), -30), 100.25)


def label_beside(
    axes: Axes, labels: Sequence[tuple[float, str, str]], line_in: float = 0.135, bold: Sequence[str] = ()
) -> None:
    """Writes (y in data units, text, colour) labels right of the axes, moved apart so that none overlap."""
    if not labels:
        return
    figure = axes.get_figure(root=True)
    assert figure is not None
    height_in = axes.get_position().height * figure.get_size_inches()[1]
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted((float(to_axes.transform((1.0, y))[1]), text, colour) for y, text, colour in labels)
    heights = apart(np.clip([place[0] for place in placed], 0, 1), line_in / height_in)
    for height, (_, text, colour) in zip(heights, placed, strict=True):
        axes.text(
            1.02,
            height,
            text,
            color=colour,
            transform=axes.transAxes,
            va="center_baseline",
            fontsize=BESIDE_SIZE,
            fontweight="bold" if text in bold else "normal",
        )


def beside_width(label: str) -> float:
    """The room that a label beside a panel takes, in inches."""
    return 0.2 + text_width(label, BESIDE_SIZE) / 72


def apart(places: NDArray[np.float64], gap: float) -> NDArray[np.float64]:
    """Sorted places in [0, 1] moved as little as need be so that neighbours are at least `gap` apart.

    Places that touch form a block around their mean; blocks that come to touch are joined.
    """
    blocks: list[list[float]] = [[float(place)] for place in places]

    def span(block: list[float]) -> tuple[float, float]:
        half = gap * (len(block) - 1) / 2
        middle = float(np.clip(np.mean(block), half, max(1 - half, half)))
        return middle - half, middle + half

    place = 0
    while place + 1 < len(blocks):
        if span(blocks[place])[1] + gap > span(blocks[place + 1])[0] + 1e-9:
            blocks[place : place + 2] = [blocks[place] + blocks[place + 1]]
            place = max(place - 1, 0)
        else:
            place += 1
    return np.concatenate([span(block)[0] + gap * np.arange(len(block)) for block in blocks])


def png(figure: Figure) -> bytes:
    """The figure as a PNG at twice the size it is shown at."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})
    return buffer.getvalue()
