"""The report's three figures, each from a tidy frame: speculation, chunked prefill, overview."""

from collections.abc import Mapping

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patheffects import withStroke

from runs.reporting import palette
from runs.reporting.claims import MINIMUM_MEASURED

MOST_BINS = 8
MOST_LOADS = 4
FIXED_LINE = "#6f757d"
BAND_RESAMPLES = 1000
_WINDOW = ["scenario", "seed", "window"]


def speculation(windows: pd.DataFrame, budgets: Mapping[tuple[str, str], int]) -> Figure:
    """TPOT over time windows against the window's request rate: each fixed c at one budget n, and the optimizers.

    `windows` as in `Collation.windows`; `budgets` maps (engine, family) to the n whose fixed settings are drawn. Lines
    are means over the windows in a bin of request rate, bands their 95 % bootstrap intervals, both over the windows
    that every drawn setting has.
    """
    with mpl.rc_context(palette.STYLE):
        figure, panels = palette.panels(windows, 3.1)
        colours = palette.colours_of(windows)
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
            axes.set_title(palette.panel_title(engine, family), pad=17)
            if budget is not None:
                axes.text(
                    0, 1.03, f"fixed c at n = {budget}", transform=axes.transAxes, fontsize=8, color=palette.QUIET
                )
            _draw_speculation(axes, lines, colours)
        handles = [_handle(label, colours[label]) for label in _shown(windows, colours, ("optimizer",))]
        handles.append(Line2D([], [], color=palette.ramp(3)[1], lw=1.4, label="fixed c, light to dark"))
        _legend(figure, handles)
        return figure


def chunked_prefill(settings: pd.DataFrame) -> Figure:
    """TPOT against TTFT attainment, one panel a load: the fixed n joined by a line, and the controllers.

    `settings` as from `mark_best_fixed`. The line's fixed settings have the best fixed setting's c; the other fixed
    pairs are faint dots. One row per engine and workload family, at most four loads from lightest to heaviest.
    """
    with mpl.rc_context(palette.STYLE):
        groups = list(settings.groupby(["engine", "family"], sort=False))
        chosen = [_loads(group) for _, group in groups]
        columns = max(len(loads) for loads in chosen)
        figure, outer = palette.grid(len(groups), columns, 2.75 if columns > 1 else 3.4)
        colours = palette.colours_of(settings)
        for place, (((engine, family), group), loads) in enumerate(zip(groups, chosen, strict=True)):
            for column, (scenario, rate) in enumerate(loads.items()):
                axes = figure.add_subplot(outer[place, column])
                _draw_load(axes, group[group["scenario"] == scenario], colours)
                axes.set_title(
                    _load_title(rate, group[group["scenario"] == scenario]), fontsize=8, fontweight="normal", pad=4
                )
                axes.set_xlabel("TTFT attained, %")
                if column == 0:
                    axes.set_ylabel("TPOT, ms")
                    title = axes.annotate(
                        palette.panel_title(engine, family),
                        (0, 1),
                        xycoords="axes fraction",
                        xytext=(0, 19),
                        textcoords="offset points",
                        fontsize=9.5,
                        fontweight="bold",
                    )
                    title.set_in_layout(False)
        handles = [_handle(label, colours[label]) for label in _shown(settings, colours)]
        for handle in handles:
            handle.set_linestyle("none")
        handles.append(Line2D([], [], color=FIXED_LINE, marker="o", ms=3.5, lw=1.1, label="fixed n at the best c"))
        handles.append(Line2D([], [], color=palette.FAINT, marker="o", ms=3.5, ls="none", label="other fixed (c, n)"))
        _legend(figure, handles)
        return figure


def overview(settings: pd.DataFrame) -> Figure:
    """Mean TPOT and TTFT attainment against request rate: every fixed pair, their hindsight best, and the controllers.

    `settings` as from `mark_best_fixed`.
    """
    with mpl.rc_context(palette.STYLE):
        figure, panels = palette.panels(settings, 4.3, parts=(1.25, 1))
        colours = palette.colours_of(settings)
        for _, _, group, (upper, lower), leftmost in panels:
            group = group.sort_values("request_rate_rps")
            fixed = group[group["role"] == "fixed"]
            for _, line in fixed.groupby("label"):
                for axes, column, factor in ((upper, "tpot_mean_s", 1e3), (lower, "ttft_attainment", 100)):
                    axes.plot(line["request_rate_rps"], factor * line[column], color=palette.FAINT, lw=0.8, zorder=1)
            best = fixed[fixed["best_fixed"]]
            _line(upper, lower, best, palette.ENVELOPE, zorder=7, lw=1.1, linestyle=(0, (4, 2)))
            for label in _shown(group, colours):
                mine = group[group["label"] == label]
                controller = mine["controller"].iloc[0]
                strong = controller == "analytic"
                _line(
                    upper,
                    lower,
                    mine,
                    colours[label],
                    zorder=5 if strong else 4,
                    lw=2.2 if strong else 1.5,
                    marker=palette.MARKERS.get(controller, "o"),
                    ms=5 if strong else 3.5,
                )
            # A setting that collapses under load must not flatten the ones worth comparing.
            ceiling = 3 * group.loc[group["best_fixed"] | (group["role"] != "fixed"), "tpot_mean_s"].max()
            seen = group.loc[~(group["tpot_mean_s"] > ceiling), "tpot_mean_s"]
            palette.scale_axis(upper, 1e3 * seen, "y")
            palette.scale_axis(lower, group["request_rate_rps"], "x", ratio=8)
            lower.set_ylim(-3, 104)
            upper.set_ylabel("TPOT, ms" if leftmost else "")
            lower.set_ylabel("TTFT attained, %" if leftmost else "")
            lower.set_xlabel("requests/s")
        handles = [_handle(label, colours[label]) for label in _shown(settings, colours)]
        handles.append(
            Line2D([], [], color=palette.ENVELOPE, linestyle=(0, (4, 2)), label="best fixed at each load (hindsight)")
        )
        handles.append(Line2D([], [], color=palette.FAINT, lw=1.2, label="each fixed (c, n)"))
        _legend(figure, handles)
        return figure


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


def _speculation_lines(group: pd.DataFrame, budget: int | None) -> pd.DataFrame:
    drawn = group[(group["role"] == "optimizer") | ((group["token_budget"] == budget) & (group["role"] == "fixed"))]
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
        line["candidates"] = -1 if role != "fixed" else int(mine["candidates"].iloc[0])
        lines.append(line)
    return pd.concat(lines, ignore_index=True)


def _draw_speculation(axes: Axes, lines: pd.DataFrame, colours: Mapping[str, str]) -> None:
    fixed = lines[lines["role"] == "fixed"]
    choices = sorted(fixed["candidates"].unique())
    shades = dict(zip(choices, palette.ramp(len(choices)), strict=True))
    beside = []
    for label, line in lines.groupby("label"):
        is_fixed = line["role"].iloc[0] == "fixed"
        strong = line["controller"].iloc[0] == "analytic"
        colour = shades[line["candidates"].iloc[0]] if is_fixed else colours[str(label)]
        axes.plot(
            line["rate"],
            1e3 * line["mean"],
            color=colour,
            lw=1.3 if is_fixed else 2.4 if strong else 1.7,
            marker=None if is_fixed else palette.MARKERS.get(line["controller"].iloc[0], "o"),
            ms=4.5 if strong else 3.5,
            zorder=2 if is_fixed else 6 if strong else 5,
        )
        axes.fill_between(
            line["rate"], 1e3 * line["low"], 1e3 * line["high"], color=colour, alpha=0.13 if is_fixed else 0.22, lw=0
        )
        if is_fixed:
            beside.append((1e3 * line["mean"].iloc[-1], f"c = {line['candidates'].iloc[0]}", colour))
    spread = np.concatenate([1e3 * lines[key].dropna() for key in ("mean", "low", "high")])
    palette.scale_axis(axes, spread, "y")
    palette.scale_axis(axes, lines["rate"], "x", ratio=8)
    palette.label_beside(axes, beside)


def _loads(group: pd.DataFrame) -> pd.Series:
    loads = group.groupby("scenario")["request_rate_rps"].mean().sort_values()
    if len(loads) > MOST_LOADS:
        loads = loads.iloc[np.unique(np.linspace(0, len(loads) - 1, MOST_LOADS).round().astype(int))]
    return loads


def _load_title(rate_rps: float, settings: pd.DataFrame) -> str:
    best = settings.loc[settings["best_fixed"], "candidates"]
    rate = f"{rate_rps:.1f}" if rate_rps >= 1 else f"{rate_rps:.2g}"
    return f"{rate} requests/s" + (f", best c = {best.iloc[0]}" if len(best) else "")


def _draw_load(axes: Axes, settings: pd.DataFrame, colours: Mapping[str, str]) -> None:
    # A setting that collapses would flatten the ones worth comparing.
    drawn = settings[settings["tpot_mean_s"] <= 3 * settings["tpot_mean_s"].min()]
    drawn = drawn.assign(x=100 * drawn["ttft_attainment"], y=1e3 * drawn["tpot_mean_s"])
    palette.attainment_axis(axes, drawn["x"])
    palette.scale_axis(axes, drawn["y"], "y", ratio=4)
    fixed = drawn[drawn["role"] == "fixed"]
    best = drawn[drawn["best_fixed"]]
    if len(best):
        same_c = fixed["candidates"] == best["candidates"].iloc[0]
        others, line = fixed[~same_c], fixed[same_c].sort_values("token_budget")
        axes.plot(others["x"], others["y"], color=palette.FAINT, marker="o", ms=2.5, ls="none", zorder=1)
        axes.plot(line["x"], line["y"], color=FIXED_LINE, marker="o", ms=3.5, lw=1.1, zorder=2)
        _name_points(axes, line)
    for label in _shown(drawn, colours):
        own = drawn[drawn["label"] == label]
        controller = own["controller"].iloc[0]
        strong = controller == "analytic"
        axes.plot(
            own["x"],
            own["y"],
            color=colours[label],
            marker=palette.MARKERS.get(controller, "o"),
            ms=8 if strong else 5.5,
            mec="white",
            mew=0.8,
            ls="none",
            clip_on=False,
            zorder=6 if strong else 5,
        )


def _name_points(axes: Axes, line: pd.DataFrame) -> None:
    """Writes n beside the points that have room for it."""
    taken: list[np.ndarray] = []
    places = axes.transData.transform(line[["x", "y"]].to_numpy(float))
    for place, row in zip(places, line.itertuples(), strict=True):
        beside = axes.transAxes.inverted().transform(place)[0] > 0.25
        if all(np.hypot(*((place - other) / (1.6, 1.0))) > 11 for other in taken):
            axes.annotate(
                str(row.token_budget),
                (row.x, row.y),
                xytext=(-5, 0) if beside else (0, 4),
                textcoords="offset points",
                ha="right" if beside else "center",
                va="center" if beside else "bottom",
                fontsize=6.8,
                color="#5a6068",
                path_effects=[withStroke(linewidth=2.5, foreground="white")],
                zorder=3,
            )
            taken.append(place)


def _line(upper: Axes, lower: Axes, line: pd.DataFrame, colour: str, **look: object) -> None:
    look.setdefault("lw", 1.5)
    upper.plot(line["request_rate_rps"], 1e3 * line["tpot_mean_s"], color=colour, **look)  # type: ignore[arg-type]
    lower.plot(line["request_rate_rps"], 100 * line["ttft_attainment"], color=colour, **look)  # type: ignore[arg-type]


def _shown(
    frame: pd.DataFrame, colours: Mapping[str, str], roles: tuple[str, ...] = ("optimizer", "sarathi")
) -> list[str]:
    """Labels to draw, `analytic` and `poster` first."""
    labels = frame[frame["role"].isin(roles)].drop_duplicates("label")
    order = {"analytic": 0, "poster": 1}
    rank = [(order.get(row.controller, 2 if row.role == "optimizer" else 3), row.label) for row in labels.itertuples()]
    return [label for _, label in sorted(rank) if label in colours]


def _handle(label: str, colour: str) -> Line2D:
    marker = next((shape for name, shape in palette.MARKERS.items() if label.startswith(name)), "o")
    strong = label.startswith("analytic")
    return Line2D([], [], color=colour, marker=marker, lw=2.4 if strong else 1.7, ms=6 if strong else 4.5, label=label)


def _legend(figure: Figure, handles: list[Line2D]) -> None:
    height = figure.get_figheight()
    figure.legend(
        handles=handles,
        loc="upper left",
        ncols=min(len(handles), 5),
        bbox_to_anchor=(0.02, 1 - 0.02 / height),
        borderaxespad=0,
        handlelength=2.2,
        columnspacing=1.6,
    )
