"""TPOT of every static c at every load, their lower envelope, and how close a controller comes to it."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from runs.reporting import palette
from runs.reporting.statistics import over_seeds, paired_difference
from runs.reporting.tables import Column, Table, decimals, milliseconds, text, whole

TOLERANCE = 0.05
"""How far above the envelope a controller may be to count as following it."""
RULE = (
    "The envelope of a load is the lowest mean TPOT, over its seeds, of the static c with one budget, chosen in "
    "hindsight. A controller's ratio is to the runs of that c, paired seed by seed on the same requests; it follows "
    f"the envelope where the ratio is at most {1 + TOLERANCE:.2f}."
)
_BAND = "#eef3ee"
_PANEL_IN = 3.4


def envelope(runs: pd.DataFrame, budgets: Mapping[tuple[str, str], str]) -> pd.DataFrame:
    """One row an engine, load and setting, lightest load first: mean TPOT, and its ratio to the envelope.

    `runs` as in `Collation.runs`, `budgets` maps (engine, family) to the budget whose static settings are drawn.
    Columns: those of `over_seeds`, `best` (the envelope's label), `ratio`, `low`, `high` (NaN with one seed). Static
    settings have a ratio too.
    """
    rows = []
    for (engine, family, _), group in runs.groupby(["engine", "family", "scenario"], sort=False):
        of_budget = group["budget"] == budgets.get((engine, family))
        kept = group[of_budget | ((group["role"] == "optimizer") & group["budget"].isna())]
        settings = over_seeds(kept)
        static = settings[(settings["role"] == "static") & settings["tpot_mean_s"].notna()]
        if static.empty or static["candidates"].nunique() < 2:
            continue
        best = static.loc[static["tpot_mean_s"].idxmin(), "label"]
        mine = dict(list(kept.groupby("label")))
        for _, setting in settings.iterrows():
            paired = paired_difference(mine[setting["label"]], mine[best], "tpot_mean_s")
            found = (np.nan,) * 3 if paired is None else (paired.ratio, paired.ratio_low, paired.ratio_high)
            rows.append({**setting, "best": best, **dict(zip(("ratio", "low", "high"), found, strict=True))})
    frame = pd.DataFrame(rows)
    return frame.sort_values(["engine", "family", "request_rate_rps"], kind="stable") if len(frame) else frame


def table(frame: pd.DataFrame) -> Table:
    """The controllers' ratios, load by load."""
    mine = frame[frame["role"] == "optimizer"].copy()
    mine["written"] = [
        f"{row.ratio:.3f}" + (f" [{row.low:.3f}, {row.high:.3f}]" if np.isfinite(row.low) else "")
        for row in mine.itertuples()
    ]
    mine["follows"] = np.where(mine["ratio"] <= 1 + TOLERANCE, "holds", "fails")
    return Table("TPOT against the envelope of static c", _COLUMNS, mine, RULE)


_COLUMNS = (
    Column("engine", "engine", text, number=False),
    Column("scenario", "scenario", text, number=False),
    Column("request_rate_rps", "req/s", decimals(2)),
    Column("label", "controller", text, number=False),
    Column("tpot_mean_s", "TPOT, ms", milliseconds),
    Column("best", "envelope", text, number=False),
    Column("written", "ratio [95 % interval]", text, sort_key="ratio"),
    Column("seeds", "seeds", whole),
    Column("follows", f"at most {1 + TOLERANCE:.2f}", text, number=False),
)


def draw(frame: pd.DataFrame) -> Figure:
    """Above, mean TPOT against request rate, a line a static c and controller; below, controller / envelope.

    `frame` as from `envelope`.
    """
    with mpl.rc_context(palette.STYLE):
        colours = palette.colours_of(frame)
        handles: list[Line2D | Patch] = [palette.handle(label, colours[label]) for label in palette.shown(frame)]
        handles.append(Line2D([], [], color=palette.ramp(3)[1], lw=1.4, label="static c, light to dark"))
        handles.append(Patch(color=_BAND, label=f"within {100 * TOLERANCE:.0f} % of the best static c"))
        figure, panels = palette.panels(frame, _PANEL_IN, palette.Head(handles), beside_in=0.42, parts=(2, 1))
        for _, _, group, (upper, lower), leftmost in panels:
            _draw_lines(upper, group, colours)
            _draw_ratios(lower, group, colours)
            lower.set_xlabel("requests/s")
            upper.set_ylabel("TPOT, ms" if leftmost else "")
            lower.set_ylabel("TPOT / best static c" if leftmost else "")
        return figure


def _draw_lines(axes: Axes, group: pd.DataFrame, colours: Mapping[str, str]) -> None:
    static = group[group["role"] == "static"]
    choices = sorted(static["candidates"].unique())
    beside = []
    for choice, shade in zip(choices, palette.ramp(len(choices)), strict=True):
        line = static[static["candidates"] == choice]
        axes.plot(line["request_rate_rps"], 1e3 * line["tpot_mean_s"], color=shade, lw=1.4, marker=".", ms=4, zorder=2)
        beside.append((1e3 * line["tpot_mean_s"].iloc[-1], f"c = {choice}", shade))
    for label in palette.shown(group):
        line = group[group["label"] == label]
        rates, tpots = line["request_rate_rps"], 1e3 * line["tpot_mean_s"]
        axes.plot(rates, tpots, color=colours[label], lw=2.2, marker="o", ms=5, zorder=5)
    palette.scale_axis(axes, 1e3 * group["tpot_mean_s"], "y")
    palette.scale_axis(axes, group["request_rate_rps"], "x", ratio=8)
    palette.label_beside(axes, beside)


def _draw_ratios(axes: Axes, group: pd.DataFrame, colours: Mapping[str, str]) -> None:
    axes.axhspan(1 - TOLERANCE, 1 + TOLERANCE, color=_BAND, lw=0, zorder=0)
    axes.axhline(1.0, color=palette.ENVELOPE, lw=0.8, zorder=1)
    seen = [1 - 2 * TOLERANCE, 1 + 2 * TOLERANCE]
    for label in palette.shown(group):
        line = group[group["label"] == label]
        axes.plot(line["request_rate_rps"], line["ratio"], color=colours[label], lw=1.6, marker="o", ms=4.5, zorder=4)
        axes.vlines(line["request_rate_rps"], line["low"], line["high"], color=colours[label], lw=1.2, zorder=3)
        seen += [value for key in ("ratio", "low", "high") for value in line[key] if np.isfinite(value)]
    axes.set_ylim(min(seen) - 0.02, max(seen) + 0.02)
