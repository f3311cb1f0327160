"""The report's figures of published claims: Sarathi-Serve's ablation, SmartSpec's latency."""

import matplotlib as mpl
import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from runs.reporting import palette

SCHEDULERS = {
    "first": ("prompts first (vLLM of its time)", "#8a8f98"),
    "whole": ("hybrid batching only", "#0072B2"),
    "turns": ("chunked prefills only", "#E69F00"),
    "chunked": ("both (Sarathi-Serve)", palette.COLOURS[2]),
}
CONTROLLER_COLOUR = palette.COLOURS[0]
_DASHES = ("-", "--", ":", "-.")
_PANEL_IN = 3.3


def sarathi(frame: pd.DataFrame) -> Figure:
    """Median TTFT and P99 TBT against request rate, a line a scheduler and budget; a panel an engine and workload.

    `frame` as from `published.scheduler_values`.
    """
    with mpl.rc_context(palette.STYLE):
        present = [name for name in SCHEDULERS if name in set(frame["prefill"])]
        handles = [Line2D([], [], color=SCHEDULERS[name][1], lw=1.8, label=SCHEDULERS[name][0]) for name in present]
        budgets = sorted(budget for budget in frame["budget"].unique() if budget > 0)
        dashes = dict(zip(budgets, _DASHES, strict=False))
        handles += [
            Line2D([], [], color=palette.ENVELOPE, lw=1.2, ls=dash, label=f"budget {budget:,}")
            for budget, dash in dashes.items()
        ]
        figure, panels = palette.panels(frame, _PANEL_IN, palette.Head(handles), beside_in=0.1, parts=(1, 1))
        for _, _, group, (upper, lower), leftmost in panels:
            for axes, name in ((upper, "ttft"), (lower, "tbt")):
                for (prefill, budget), line in group.groupby(["prefill", "budget"], sort=False):
                    _line(axes, line, f"{name}_s", SCHEDULERS[prefill][1], dashes.get(budget, "-"))
                palette.scale_axis(axes, group[[f"{name}_low_s", f"{name}_high_s", f"{name}_s"]], "y", ratio=4)
            lower.set_xlabel("requests/s")
            upper.set_ylabel("TTFT p50, s" if leftmost else "")
            lower.set_ylabel("TBT p99, s" if leftmost else "")
        return figure


def smartspec(frame: pd.DataFrame) -> Figure:
    """Speed-up of mean latency over no speculation against request rate; a panel an engine and workload.

    `frame` as from `published.smartspec_speedups`.
    """
    with mpl.rc_context(palette.STYLE):
        label = frame.loc[frame["controller"] == "goodput", "label"].iloc[0]
        handles = [
            palette.handle(label, CONTROLLER_COLOUR, lw=2.2),
            Line2D([], [], color=palette.ramp(3)[1], lw=1.4, label="fixed k, light to dark"),
            Line2D([], [], color=palette.ENVELOPE, lw=0.9, label="no speculation"),
        ]
        figure, panels = palette.panels(frame, 2.9, palette.Head(handles), beside_in=0.42)
        for _, _, group, (axes,), leftmost in panels:
            axes.axhline(1.0, color=palette.ENVELOPE, lw=0.9, zorder=1)
            fixed = group[(group["role"] == "static") & (group["candidates"] > 0)]
            choices = sorted(fixed["candidates"].unique())
            beside = []
            for choice, shade in zip(choices, palette.ramp(len(choices)), strict=True):
                line = fixed[fixed["candidates"] == choice]
                axes.plot(line["request_rate_rps"], line["ratio"], color=shade, lw=1.4, marker=".", ms=4, zorder=2)
                beside.append((float(line["ratio"].iloc[-1]), f"k = {choice}", shade))
            for _, line in group[group["controller"] == "goodput"].groupby("label"):
                rates = line["request_rate_rps"]
                axes.plot(rates, line["ratio"], color=CONTROLLER_COLOUR, lw=2.2, marker="o", ms=5, zorder=4)
                axes.vlines(rates, line["low"], line["high"], color=CONTROLLER_COLOUR, lw=1.2, zorder=3)
            palette.scale_axis(axes, group["ratio"], "y", ratio=np.inf)
            axes.set_xlabel("requests/s")
            axes.set_ylabel("latency without / with" if leftmost else "")
            palette.label_beside(axes, beside)
        return figure


def _line(axes: Axes, line: pd.DataFrame, key: str, colour: str, dash: str) -> None:
    rates = line["request_rate_rps"]
    axes.plot(rates, line[key], color=colour, ls=dash, lw=1.7, marker="o", ms=4, zorder=3)
    stem = key.removesuffix("_s")
    axes.vlines(rates, line[f"{stem}_low_s"], line[f"{stem}_high_s"], color=colour, lw=1.1, zorder=2)
