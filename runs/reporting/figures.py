"""Two of the report's figures, each from a tidy frame: speculation and overview."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator

from runs.reporting import palette
from runs.reporting.claims import MINIMUM_MEASURED
from runs.reporting.statistics import close_to

MOST_BINS = 8
OVERLOAD = "#f6f1e7"
SERVED = 0.9
"""Share of requests that must meet both targets at a load that counts as served."""
ENVELOPE_DASH = (0, (4, 2))
BAND_RESAMPLES = 1000
_WINDOW = ["scenario", "seed", "window"]


def speculation(windows: pd.DataFrame, budgets: Mapping[tuple[str, str], str]) -> Figure:
    """TPOT over time windows against the window's request rate: each static c at one budget, and the optimizers.

    `windows` as in `Collation.windows`; `budgets` maps (engine, family) to the budget whose static settings are drawn.
    Lines are means over the windows in a bin of request rate, bands their 95 % bootstrap intervals, both over
    the windows that every drawn setting has.
    """
    with mpl.rc_context(palette.STYLE):
        colours = palette.colours_of(windows)
        handles = [palette.handle(label, colours[label]) for label in palette.shown(windows)]
        handles.append(Line2D([], [], color=palette.ramp(3)[1], lw=1.4, label="static c, light to dark"))
        figure, panels = palette.panels(windows, 2.3, palette.Head(handles, subtitle_in=0.16), beside_in=0.42)
        for engine, family, group, (axes,), leftmost in panels:
            budget = budgets.get((engine, family))
            lines = _speculation_lines(group, budget)
            axes.set_xlabel("requests/s in the window")
            axes.set_ylabel("TPOT, ms" if leftmost else "")
            if lines.empty:
                axes.text(
                    0.5, 0.5, "too few requests in a window", transform=axes.transAxes, ha="center", color=palette.QUIET
                )
                continue
            if budget is not None:
                axes.text(0, 1.03, f"static c at {budget}", transform=axes.transAxes, fontsize=8, color=palette.QUIET)
            _draw_speculation(axes, lines, colours)
        return figure


def overview(settings: pd.DataFrame) -> Figure:
    """Requests that meet both targets, and mean TPOT, against request rate.

    Every static setting, the best of each load in hindsight, and the controllers. `settings` as from
    `mark_best_static`. A controller's mark is hollow where fewer of its requests meet both targets than `close_to` the
    best static setting's; shaded are the loads at which no static setting lets 90 % of the requests meet both.
    """
    with mpl.rc_context(palette.STYLE):
        colours = palette.colours_of(settings)
        head = palette.Head(_overview_legend(bool((settings["role"] == "bound").any())))
        beside_in = max(palette.beside_width(label) for label in ["", *palette.shown(settings)])
        figure, panels = palette.panels(settings, 3.5, head, beside_in=beside_in, parts=(1.2, 1))
        for _, _, group, (share, tpot), leftmost in panels:
            group = group.sort_values("request_rate_rps")
            static = group[group["role"] == "static"]
            for _, line in static.groupby("label"):
                _line(tpot, share, line, palette.FAINT, zorder=1, lw=0.8)
            best = static[static["best_static"]]
            _line(tpot, share, best, palette.ENVELOPE, zorder=7, lw=1.2, linestyle=ENVELOPE_DASH)
            labels = palette.shown(group)
            # A setting that collapses under load must not flatten the ones worth comparing.
            ceiling = 3 * group.loc[group["best_static"] | (group["role"] != "static"), "tpot_mean_s"].max()
            seen = group.loc[~(group["tpot_mean_s"] > ceiling), "tpot_mean_s"]
            palette.scale_axis(tpot, 1e3 * seen, "y")
            palette.scale_axis(share, group["request_rate_rps"], "x", ratio=8)
            _shade_overload((tpot, share), static)
            reference = best.set_index("scenario")["slo_attainment"]
            for _, line in group[group["role"] == "bound"].groupby("label"):
                _line(tpot, share, line, palette.BOUND, zorder=3, lw=1.3, linestyle=palette.BOUND_LINE)
            for label in labels:
                mine = group[group["label"] == label]
                _draw_controller(tpot, share, mine, mine["scenario"].map(reference), colours[label])
            ends = [group[group["label"] == label].iloc[-1] for label in labels]
            palette.label_beside(
                tpot,
                [(1e3 * end["tpot_mean_s"], label, colours[label]) for label, end in zip(labels, ends, strict=True)],
            )
            share.set_ylim(-4, 104)
            share.yaxis.set_major_locator(FixedLocator([0, 25, 50, 75, 100]))
            tpot.set_ylabel("TPOT, ms" if leftmost else "")
            share.set_ylabel("both targets met, %" if leftmost else "")
            tpot.set_xlabel("requests/s")
        return figure


def _overview_legend(bounded: bool) -> list[Artist]:
    bound = Line2D([], [], color=palette.BOUND, lw=1.3, linestyle=palette.BOUND_LINE, label="bound: sees the future")
    return [
        Line2D(
            [],
            [],
            color=palette.ENVELOPE,
            lw=1.2,
            linestyle=ENVELOPE_DASH,
            label="best static setting of each load",
        ),
        Line2D([], [], color="#5a6068", marker="o", mfc="white", ms=5, ls="none", label="hollow: fewer than that"),
        Line2D([], [], color=palette.FAINT, lw=1.2, label="each static setting"),
        Patch(color=OVERLOAD, label="all static settings below 90 %"),
        *([bound] if bounded else []),
    ]


def _shade_overload(both: tuple[Axes, Axes], static: pd.DataFrame) -> None:
    loads = static.groupby("scenario").agg(rate=("request_rate_rps", "mean"), most=("slo_attainment", "max"))
    loads = loads.sort_values("rate")
    lost = (loads["most"] < SERVED).to_numpy()
    first = len(lost) - int(np.argmin(lost[::-1])) if not lost.all() else 0
    if not len(lost) or not lost[-1]:
        return
    rates = loads["rate"].to_numpy()
    start = both[0].get_xlim()[0] if first == 0 else float(np.sqrt(rates[first - 1] * rates[first]))
    for axes in both:
        axes.axvspan(start, both[0].get_xlim()[1], color=OVERLOAD, lw=0, zorder=0)


def _draw_controller(tpot: Axes, share: Axes, mine: pd.DataFrame, reference: pd.Series, colour: str) -> None:
    look = {"marker": palette.MARKERS[colour], "ms": 5, "clip_on": False}
    _line(tpot, share, mine, colour, zorder=4, lw=1.7, marker="")
    attains = (mine["slo_attainment"] >= reference.map(close_to)) | reference.isna()
    for points, inside in ((mine[attains], colour), (mine[~attains], "white")):
        _line(tpot, share, points, colour, zorder=4.5, mfc=inside, mew=1.3, ls="none", **look)


def binned(windows: pd.DataFrame, edges: np.ndarray, seed: int = 0) -> pd.DataFrame:
    """Mean TPOT in bins of request rate with 95 % bootstrap bounds: `rate`, `mean`, `low`, `high`, `windows`.

    A scenario's window is resampled with all its seeds at once: on a trace they are the same arrivals again, and no
    further evidence on the load.
    """
    rng = np.random.default_rng(seed)
    place = np.clip(np.searchsorted(edges, windows["request_rate_rps"], side="right") - 1, 0, len(edges) - 2)
    rows = []
    for _, group in windows.groupby(place):
        clusters = group.groupby(["scenario", "window"])["tpot_s"].agg(["sum", "size"]).to_numpy(float)
        low = high = np.nan
        if len(clusters) > 1:
            drawn = clusters[rng.integers(0, len(clusters), (BAND_RESAMPLES, len(clusters)))].sum(axis=1)
            low, high = np.quantile(drawn[:, 0] / drawn[:, 1], [0.025, 0.975])
        rows.append(
            {
                "rate": float(group["request_rate_rps"].mean()),
                "mean": float(group["tpot_s"].mean()),
                "low": float(low),
                "high": float(high),
                "windows": len(clusters),
            }
        )
    return pd.DataFrame(rows)


def _speculation_lines(group: pd.DataFrame, budget: str | None) -> pd.DataFrame:
    drawn = group[(group["role"] == "optimizer") | ((group["budget"] == budget) & (group["role"] == "static"))]
    drawn = drawn[drawn["measured"] >= MINIMUM_MEASURED]
    if drawn.empty:
        return pd.DataFrame()
    shared = drawn.groupby(_WINDOW)["label"].transform("nunique") == drawn["label"].nunique()
    drawn = drawn[shared]
    if drawn.empty:
        return pd.DataFrame()
    rates = drawn.drop_duplicates(_WINDOW)["request_rate_rps"].to_numpy()
    bins = int(np.clip(np.sqrt(len(rates)), 1, MOST_BINS))
    edges = np.unique(np.quantile(rates, np.linspace(0, 1, bins + 1)))
    if len(edges) < 2:
        edges = np.array([rates[0], rates[0] + 1])
    lines = []
    for (label, role), mine in drawn.groupby(["label", "role"]):
        line = binned(mine, edges)
        line["label"], line["role"] = label, role
        line["controller"] = mine["controller"].iloc[0]
        line["candidates"] = -1 if role != "static" else int(mine["candidates"].iloc[0])
        lines.append(line)
    return pd.concat(lines, ignore_index=True)


def _draw_speculation(axes: Axes, lines: pd.DataFrame, colours: Mapping[str, str]) -> None:
    static = lines[lines["role"] == "static"]
    choices = sorted(static["candidates"].unique())
    shades = dict(zip(choices, palette.ramp(len(choices)), strict=True))
    beside = []
    for label, line in lines.groupby("label"):
        is_static = line["role"].iloc[0] == "static"
        colour = shades[line["candidates"].iloc[0]] if is_static else colours[str(label)]
        axes.plot(
            line["rate"],
            1e3 * line["mean"],
            color=colour,
            lw=1.3 if is_static else 1.9,
            marker=_mark(line) if is_static else palette.MARKERS[colour],
            ms=4,
            zorder=2 if is_static else 5,
        )
        axes.fill_between(
            line["rate"], 1e3 * line["low"], 1e3 * line["high"], color=colour, alpha=0.13 if is_static else 0.22, lw=0
        )
        if is_static:
            beside.append((1e3 * line["mean"].iloc[-1], f"c = {line['candidates'].iloc[0]}", colour))
    spread = np.concatenate([1e3 * lines[key].dropna() for key in ("mean", "low", "high")])
    palette.scale_axis(axes, spread, "y")
    palette.scale_axis(axes, lines["rate"], "x", ratio=8)
    palette.label_beside(axes, beside)


def _line(tpot: Axes, share: Axes, line: pd.DataFrame, colour: str, **look: object) -> None:
    look = {"lw": 1.5, "marker": _mark(line), "ms": 4, **look}
    tpot.plot(line["request_rate_rps"], 1e3 * line["tpot_mean_s"], color=colour, **look)  # type: ignore[arg-type]
    share.plot(line["request_rate_rps"], 100 * line["slo_attainment"], color=colour, **look)  # type: ignore[arg-type]


def _mark(line: pd.DataFrame) -> str:
    """A marker where there is one load only: a line through one point cannot be seen."""
    return "o" if len(line) == 1 else ""
