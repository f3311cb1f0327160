"""Who got a batch's candidates: tokens per iteration and TPOT of each allocation against chains of c for everyone."""

import itertools

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from runs.reporting import palette
from runs.reporting.statistics import paired_difference
from runs.reporting.tables import Column, Table, decimals, text, whole

CHAINS = "chains"
RULE = (
    "Ratios to runs of the same controller with chains of c candidates for every request, paired seed by seed on the "
    "same requests, with 95 % t intervals over seeds; B is the mean number of requests in an iteration. "
    "Global allocation keeps the candidates with the most expected tokens in every iteration. Where requests differ in "
    "acceptance it serves the predictable ones faster, so that the others are more of the batch: over a run it gains "
    "less than it expects."
)
_METRICS = {"tokens": "tokens_per_iteration", "tpot": "tpot_mean_s"}
_PANEL_IN = 3.8
_COLOURS = ("#0072b2", "#56b4e9", "#d55e00", "#e69f00", "#a0522d", "#009e73", "#cc79a7", "#555555")


def allocations(runs: pd.DataFrame) -> pd.DataFrame:
    """One row a controller, scenario, engine and way to share: both metrics' ratios to chains; empty without any.

    Columns: `engine` (the controller's label, which panels are titled by), `family` (the scenario), `sharing`, `batch`,
    `seeds`, and `tokens`, `tpot`, each with `_low` and `_high` (NaN with one seed).
    """
    if "speculation" not in runs:
        return pd.DataFrame()
    rows = []
    plain = [
        label.removesuffix(f" {sharing}") for label, sharing in zip(runs["label"], runs["speculation"], strict=True)
    ]
    for (_, scenario, label), group in runs.assign(plain=plain).groupby(["engine", "scenario", "plain"], sort=False):
        ways = dict(list(group.groupby("speculation", sort=False)))
        if CHAINS not in ways or len(ways) < 2:
            continue
        for sharing, mine in ways.items():
            row = {"engine": label, "family": scenario, "sharing": sharing, "batch": mine["mean_batch"].mean()}
            for name, metric in _METRICS.items():
                paired = paired_difference(mine, ways[CHAINS], metric)
                found = (np.nan,) * 3 if paired is None else (paired.ratio, paired.ratio_low, paired.ratio_high)
                row |= dict(zip((name, f"{name}_low", f"{name}_high"), found, strict=True))
                row["seeds"] = 0 if paired is None else len(paired.seeds)
            rows.append(row)
    frame = pd.DataFrame(rows)
    return frame.sort_values(["engine", "family", "batch"], kind="stable") if len(frame) else frame


def table(frame: pd.DataFrame) -> Table:
    """Both ratios of every way, smallest batches first."""
    mine = frame[frame["sharing"] != CHAINS].copy()
    for name in _METRICS:
        mine[f"{name}_written"] = [
            f"{row[name]:.3f}" + (f" [{row[f'{name}_low']:.3f}, {row[f'{name}_high']:.3f}]" if row["seeds"] > 1 else "")
            for _, row in mine.iterrows()
        ]
    return Table("Who gets the candidates", _COLUMNS, mine, RULE)


_COLUMNS = (
    Column("family", "scenario", text, number=False),
    Column("engine", "controller", text, number=False),
    Column("batch", "B", decimals(1)),
    Column("sharing", "allocation", text, number=False),
    Column("tokens_written", "tokens per iteration, ratio", text, sort_key="tokens"),
    Column("tpot_written", "TPOT, ratio", text, sort_key="tpot"),
    Column("seeds", "seeds", whole),
)


def draw(frame: pd.DataFrame) -> Figure:
    """Ratios against B, a panel a scenario: tokens per iteration above, TPOT below. `frame` as from `allocations`."""
    with mpl.rc_context(palette.STYLE):
        ways = [sharing for sharing in frame["sharing"].unique() if sharing != CHAINS]
        colours = dict(zip(sorted(ways), itertools.cycle(_COLOURS), strict=False))
        handles = [palette.handle(sharing, colour) for sharing, colour in colours.items()]
        figure, panels = palette.panels(frame, _PANEL_IN, palette.Head(handles), beside_in=0.05, parts=(3, 2))
        for _, _, group, (upper, lower), leftmost in panels:
            _draw_ratios(upper, group, "tokens", colours)
            _draw_ratios(lower, group, "tpot", colours)
            lower.set_xlabel("requests in the batch, B")
            upper.set_ylabel("tokens per iteration / chains" if leftmost else "")
            lower.set_ylabel("TPOT / chains" if leftmost else "")
        for place in (0, 1):
            _same_limits([parts[place] for *_, parts, _ in panels])
        return figure


def _draw_ratios(axes: Axes, group: pd.DataFrame, name: str, colours: dict[str, str]) -> None:
    axes.axhline(1.0, color=palette.ENVELOPE, lw=0.8, zorder=1)
    for sharing, colour in colours.items():
        line = group[group["sharing"] == sharing]
        axes.plot(line["batch"], line[name], color=colour, lw=1.6, marker="o", ms=3.5, zorder=4)
        axes.fill_between(line["batch"], line[f"{name}_low"], line[f"{name}_high"], color=colour, alpha=0.15, lw=0)
    palette.scale_axis(axes, group["batch"], "x")


def _same_limits(axes: list[Axes]) -> None:
    low, high = min(one.get_ylim()[0] for one in axes), max(one.get_ylim()[1] for one in axes)
    for one in axes:
        one.set_ylim(low, high)
