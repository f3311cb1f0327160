"""The report's figure of chunked prefill: TPOT against TTFT attainment, one panel a load."""

from collections.abc import Mapping
from typing import Any

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from runs.reporting import palette
from runs.reporting.statistics import ATTAINMENT_ENOUGH

MOST_LOADS = 4
FIXED_LINE = "#6f757d"
# At loads between these the settings differ in attainment.
TELLING = (0.2, 0.999)
_HEIGHT_IN = 1.75


def chunked_prefill(settings: pd.DataFrame) -> Figure:
    """TPOT against TTFT attainment, one panel a load: static budgets joined by a line, and the controllers.

    `settings` as from `mark_best_static`. The line's static settings have the best one's c and its kind of budget; the
    other static settings are faint dots. One row per engine and workload family, at most four loads (`telling_loads`).
    """
    with mpl.rc_context(palette.STYLE):
        groups = list(settings.groupby(["engine", "family"], sort=False))
        chosen = [telling_loads(group) for _, group in groups]
        columns = max(len(loads) for loads in chosen)
        colours = palette.colours_of(settings)
        figure, outer = palette.grid(len(groups), columns, _HEIGHT_IN, palette.Head(_legend(settings, colours), 0.16))
        across = (figure.get_figwidth() - 0.8) * (1.0 if columns > 1 else 0.9)
        for place, (((engine, family), group), loads) in enumerate(zip(groups, chosen, strict=True)):
            for column, (scenario, rate) in enumerate(loads.items()):
                axes = figure.add_subplot(outer[place, column])
                load = group[group["scenario"] == scenario]
                _draw_load(axes, load, colours)
                axes.text(0, 1.04, _load_title(rate, load), transform=axes.transAxes, fontsize=8, color="#5a6068")
                axes.set_xlabel("TTFT attained, %")
                if column == 0:
                    axes.set_ylabel("TPOT, ms")
                    palette.write_title(axes, engine, family, 0.24, across)
        return figure


def telling_loads(settings: pd.DataFrame) -> pd.Series:
    """Request rate by scenario of the loads worth a panel each, at most four: lightest first.

    Always the lightest and, if there is any, one overloaded load (no static setting attains 95 %), preferably the
    heaviest at which some still attains 20 %. The rest are spread evenly over the loads at which the most that a static
    setting attains is between 20 and 99.9 %, and only then over the others.
    """
    rates = settings.groupby("scenario")["request_rate_rps"].mean().sort_values()
    if len(rates) <= MOST_LOADS:
        return rates
    compared = settings[settings["role"] == "static"] if (settings["role"] == "static").any() else settings
    most = compared.groupby("scenario")["ttft_attainment"].max().reindex(rates.index)
    telling = most.between(*TELLING)
    overloaded = rates.index[most < ATTAINMENT_ENOUGH]
    picked = [rates.index[0]]
    if len(overloaded):
        known = [scenario for scenario in overloaded if telling[scenario]]
        picked.append(known[-1] if known else overloaded[0])
    for candidates in (rates.index[telling], rates.index):
        rest = [scenario for scenario in candidates if scenario not in picked]
        wanted = min(MOST_LOADS - len(set(picked)), len(rest))
        picked += [rest[int((place + 0.5) * len(rest) / wanted)] for place in range(wanted)]
    return rates[rates.index.isin(picked)]


def _legend(settings: pd.DataFrame, colours: Mapping[str, str]) -> list[Line2D]:
    handles = [palette.handle(label, colours[label], ls="none") for label in palette.shown(settings)]
    handles.append(Line2D([], [], color=FIXED_LINE, marker="o", ms=3.5, lw=1.1, label="static budgets at the best c"))
    handles.append(Line2D([], [], color=palette.FAINT, marker="o", ms=3.5, ls="none", label="other static settings"))
    if (settings["role"] == "bound").any():
        look: dict[str, Any] = {"marker": "*", "ms": 7, "mfc": "white", "ls": "none"}
        handles.append(Line2D([], [], color=palette.BOUND, label="bound: sees the future", **look))
    return handles


def _load_title(rate_rps: float, settings: pd.DataFrame) -> str:
    best = settings.loc[settings["best_static"], "candidates"]
    rate = f"{rate_rps:.1f}" if rate_rps >= 1 else f"{rate_rps:.2g}"
    return f"{rate} requests/s" + (f", best c = {best.iloc[0]}" if len(best) else "")


def _draw_load(axes: Axes, settings: pd.DataFrame, colours: Mapping[str, str]) -> None:
    drawn = settings.assign(x=100 * settings["ttft_attainment"], y=1e3 * settings["tpot_mean_s"]).dropna(subset="y")
    palette.attainment_axis(axes, drawn["x"])
    palette.scale_axis(axes, drawn["y"], "y", ratio=1.0)
    static = drawn[drawn["role"] == "static"]
    best = drawn[drawn["best_static"]]
    if len(best):
        kind = "token_budget" if pd.notna(best["token_budget"].iloc[0]) else "total_budget"
        joined = (static["candidates"] == best["candidates"].iloc[0]) & static[kind].notna()
        others, line = static[~joined], static[joined].sort_values(kind)
        axes.plot(others["x"], others["y"], color=palette.FAINT, marker="o", ms=2.5, ls="none", zorder=1)
        axes.plot(line["x"], line["y"], color=FIXED_LINE, marker="o", ms=3.5, lw=1.1, zorder=2)
        _name_points(axes, line, kind, drawn[drawn["role"] != "static"])
    bounds = drawn[drawn["role"] == "bound"]
    axes.plot(bounds["x"], bounds["y"], color=palette.BOUND, marker="*", ms=7, mfc="white", ls="none", zorder=4)
    for label in palette.shown(drawn):
        own = drawn[drawn["label"] == label]
        axes.plot(
            own["x"],
            own["y"],
            color=colours[label],
            marker=palette.MARKERS[colours[label]],
            ms=6.5,
            mec="white",
            mew=0.8,
            ls="none",
            clip_on=False,
            zorder=5,
        )


def _name_points(axes: Axes, line: pd.DataFrame, kind: str, marks: pd.DataFrame) -> None:
    """Writes the budget left of the line's points, or right of a mark or axis that is there, if there is room."""
    points = 72 / axes.figure.dpi
    places = axes.transData.transform(line[["x", "y"]].to_numpy(float)) * points
    taken = list(axes.transData.transform(marks[["x", "y"]].to_numpy(float)) * points)
    edge = float(axes.transAxes.transform((0.0, 0.0))[0]) * points
    for place, row in zip(places, line.itertuples(), strict=True):
        name = str(getattr(row, kind))
        width = palette.text_width(name, 6.8)
        for side in (-1, 1):
            middle = place + np.array([side * (5 + width / 2), 0.0])
            apart = [np.abs(middle - other) for other in taken]
            if middle[0] - width / 2 > edge and all(x > width / 2 + 4 or y > 6 for x, y in apart):
                axes.annotate(
                    name,
                    (row.x, row.y),
                    xytext=(5 * side, 0),
                    textcoords="offset points",
                    ha="right" if side < 0 else "left",
                    va="center",
                    fontsize=6.8,
                    color="#5a6068",
                    path_effects=[withStroke(linewidth=2.5, foreground="white")],
                    zorder=3,
                )
                taken.append(middle)
                break
