"""The calibration card on disk: `calibration.json`, the figures, and one self-contained page."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from engine.files import write_whole
from runs.reporting import calibration, calibration_figures, page, palette
from runs.reporting.calibration import OWN_AGREEMENTS, PREDICTED, written_ratio
from runs.reporting.tables import Column, Table, decimals, milliseconds, percent, seconds, text, whole

JSON, PAGE = "calibration.json", "calibration.html"
SCHEMA = 1
CAPTIONS = {
    "ratios": (
        "Real over simulated, by load level",
        "At 1 the simulator is right. Filled marks are what it predicted from the profile alone; hollow ones were "
        "simulated with the agreements between drafter and target that the real outputs had, so what is left of them "
        "is an error in time. Bars are 95 % t intervals over repeats.",
    ),
    "iteration_times": (
        "Iteration time, real over predicted, by batch",
        "Every iteration of the real runs, with the time that the profile's table gives the very batch that ran: no "
        "acceptance and no queue is in it. Above 1 the engine was slower than its profile says. Total time over total "
        "time, so the lines say what the error does to a run.",
    ),
}
RULES = {
    "Level": "A request rate relative to the engine's capacity, the rate at which the simulator finishes requests that "
    "are all there from the start (c = 0).",
    "Ratio": "Real / simulated, the mean over repeats of each repeat's ratio, in brackets its 95 % t "
    "interval over repeats. A repeat is another draw of arrivals and prompts.",
    "Predicted": "Simulated with the profile's tables and with agreements drawn from the model fitted to the profile's "
    "acceptance log, on prompts other than those served. Arrivals, prompt and output lengths are the workload's.",
    "Own agreements": "Simulated with the profile's tables and with the agreements of drafter and target along the "
    "outputs of that very run: what remains is an error in time, not in acceptance.",
    "Replay parity": "A real run's recording, its iterations' times and acceptances, drives the shared scheduler once "
    "more; every request must have the same admission, first token, end, and counts, to the bit.",
}


@dataclass(frozen=True)
class Card:
    """Everything a card holds; frames as in `runs.reporting.calibration`.

    facts: engine, profile, machine, settings · levels: `level`, `share`, `request_rate_rps`, `requests` · pairs ·
    iterations · held_out: group -> MAPE of the profile's held-out iterations · parity: `runs`, `identical` · cells: one
    row a real run, in the order they ran · vllm: pairs of recorded vLLM runs (with `requests`).
    """

    facts: Mapping[str, Any]
    levels: pd.DataFrame = field(default_factory=pd.DataFrame)
    pairs: pd.DataFrame = field(default_factory=pd.DataFrame)
    iterations: pd.DataFrame = field(default_factory=pd.DataFrame)
    held_out: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    parity: Mapping[str, int] = field(default_factory=dict)
    cells: pd.DataFrame = field(default_factory=pd.DataFrame)
    vllm: pd.DataFrame = field(default_factory=pd.DataFrame)
    notes: Sequence[str] = ()

    @property
    def said(self) -> list[str]:
        """What the card comes to, one line each."""
        lines: list[str] = []
        if len(self.pairs):
            lines += calibration.sentences(calibration.over_labels(self.pairs), self.iterations, self.parity)
        for label, group in self.vllm.groupby("label", sort=False) if len(self.vllm) else ():
            ratio = calibration.over_repeats(group).set_index(["level", "metric"])["ratio"]
            levels = ", ".join(
                f"{level} {ratio[level, 'tpot_mean_s']:.3f} / {ratio[level, 'ttft_mean_s']:.3f}"
                for level in group["level"].unique()
            )
            lines.append(f"vLLM, {label}: mean TPOT / TTFT real / simulated: {levels}.")
        return lines


def write(card: Card, out: Path) -> None:
    """Write the card's files into `out`, the page last: where it exists, everything else does."""
    out.mkdir(parents=True, exist_ok=True)
    pictures = draw(card)
    for picture in pictures:
        write_whole(out / f"{picture.name}.png", picture.png)
    write_whole(out / JSON, (json.dumps(document(card), indent=1, allow_nan=False) + "\n").encode())
    write_whole(out / PAGE, render(card, pictures).encode())


def draw(card: Card) -> list[page.Picture]:
    """The figures of a card, as PNG."""
    figures = {}
    if len(card.pairs):
        figures["ratios"] = calibration_figures.ratios(calibration.over_repeats(card.pairs))
    if len(card.iterations):
        figures["iteration_times"] = calibration_figures.iteration_times(calibration.by_batch(card.iterations))
    return [page.Picture(name, *CAPTIONS[name], palette.png(figure)) for name, figure in figures.items()]


def document(card: Card) -> dict[str, Any]:
    """`calibration.json`: facts, and every table of the page as a list of records; what has no value is null."""
    frames = {
        "levels": card.levels,
        "pairs": card.pairs,
        "compared": calibration.over_repeats(card.pairs) if len(card.pairs) else card.pairs,
        "by_level": calibration.over_labels(card.pairs) if len(card.pairs) else card.pairs,
        "iteration_times": calibration.by_batch(card.iterations) if len(card.iterations) else card.iterations,
        "cells": card.cells,
        "vllm": _vllm(card.vllm) if len(card.vllm) else card.vllm,
    }
    return {
        "schema": SCHEMA,
        "said": card.said,
        "facts": _plain(dict(card.facts)),
        "held_out_mape": _plain({name: dict(groups) for name, groups in card.held_out.items()}),
        "replay_parity": dict(card.parity),
        **{name: json.loads(frame.to_json(orient="records")) for name, frame in frames.items()},
        "notes": list(card.notes),
    }


def render(card: Card, pictures: Sequence[page.Picture]) -> str:
    """The page as text."""
    body: list[str] = []
    links: dict[str, str] = {}

    def heading(place: str, title: str) -> None:
        links[place] = title
        body.append(f"<h2 id='{place}'>{title}</h2>")

    if pictures:
        heading("figures", "Figures")
        body.extend(page.figure(picture) for picture in pictures)
    if len(card.pairs):
        heading("levels", "Real runs beside the simulator")
        body.extend(page.noted(table) for table in run_tables(card))
    if len(card.iterations) or card.held_out:
        heading("times", "Iteration time")
        body.extend(page.noted(table) for table in time_tables(card))
    if len(card.vllm):
        heading("vllm", "Recorded vLLM runs")
        body.append(page.noted(Table("Real vLLM 0.19 beside the simulator", VLLM, _vllm(card.vllm), VLLM_NOTE)))
    heading("rules", "What is meant")
    body.append(page.definitions(RULES))
    if len(card.cells):
        heading("ran", "What was run")
        body.append(page.folded(Table(f"All {len(card.cells)} real runs, in order", CELLS, card.cells)))
    facts = " · ".join(f"{key} {value}" for key, value in card.facts.items() if isinstance(value, str | int | float))
    return page.document("Calibration card", facts, links, card.said, list(card.notes), body)


def run_tables(card: Card) -> list[Table]:
    """Levels, and for each way of simulating latencies and counts."""
    compared = calibration.over_repeats(card.pairs)
    tables = [
        Table("Load levels", LEVELS, card.levels),
        Table(
            "Over controllers, by level",
            POOLED,
            _with_ratio(calibration.over_labels(card.pairs)),
            "Mean of the controllers' ratios, and the controller that is farthest off.",
        ),
    ]
    for way, title in ((PREDICTED, "Predicted"), (OWN_AGREEMENTS, "With the run's own agreements")):
        mine = compared[compared["way"] == way]
        if len(mine):
            tables.append(Table(f"{title}: latency", LATENCY, _wide(mine)))
            tables.append(Table(f"{title}: iterations and tokens", COUNTS, _wide(mine)))
    return tables


def time_tables(card: Card) -> list[Table]:
    """Errors of iteration times: within the real runs, and held out in the profile."""
    tables = []
    if len(card.iterations):
        batches = calibration.by_batch(card.iterations)
        batches["total"] = batches["kind"] == "all"
        note = (
            "The batches that the real runs had, with the table's time for each. decode: c = 0; verify: c > 0; mixed: "
            "beside prompt chunks; prefill: alone."
        )
        tables.append(Table("Within the real runs", BATCHES, batches, note, emphasis="total"))
    if card.held_out:
        groups = list(dict.fromkeys(group for errors in card.held_out.values() for group in errors))
        frame = pd.DataFrame(
            [{"group": g} | {name: errors.get(g, math.nan) for name, errors in card.held_out.items()} for g in groups]
        )
        columns = (
            Column("group", "iterations", text, number=False),
            *(Column(name, f"{name}, MAPE", percent) for name in card.held_out),
        )
        note = "Iterations that the prediction was not fitted to."
        tables.append(Table("Held out in the profile", columns, frame, note))
    return tables


def _with_ratio(frame: pd.DataFrame) -> pd.DataFrame:
    worst = [f"{label}: {ratio:.3f}" for label, ratio in zip(frame["worst_label"], frame["worst_ratio"], strict=True)]
    metric = frame["metric"].str.replace("_s$", "", regex=True).str.replace("_", " ")
    return frame.assign(
        metric=metric, written=[written_ratio(row) for _, row in frame.iterrows()], worst=worst, sort=frame["ratio"]
    )


def _wide(compared: pd.DataFrame) -> pd.DataFrame:
    """One row a level and controller with real, simulated and ratio of every metric side by side."""
    rows = []
    for (level, label), group in compared.groupby(["level", "label"], sort=False):
        row: dict[str, Any] = {"level": level, "label": label}
        for _, entry in group.iterrows():
            metric = entry["metric"]
            row |= {f"{metric}_real": entry["real"], f"{metric}_simulated": entry["simulated"]}
            row |= {f"{metric}_ratio": entry["ratio"], f"{metric}_written": written_ratio(entry)}
        rows.append(row)
    return pd.DataFrame(rows)


def _vllm(pairs: pd.DataFrame) -> pd.DataFrame:
    requests = pairs.drop_duplicates(["label", "level"]).set_index(["label", "level"])["requests"]
    rows = []
    for label, group in pairs.groupby("label", sort=False):
        wide = _wide(calibration.over_repeats(group))
        wide["requests"] = [int(requests[(label, level)]) for level in wide["level"]]
        rows.append(wide)
    return pd.concat(rows, ignore_index=True)


def _sides(metric: str, title: str, write: Any) -> tuple[Column, Column, Column]:
    return (
        Column(f"{metric}_real", f"{title}: real", write),
        Column(f"{metric}_simulated", "simulated", write),
        Column(f"{metric}_written", "ratio", text, sort_key=f"{metric}_ratio"),
    )


_CASE = (Column("level", "load", text, number=False), Column("label", "controller", text, number=False))
LATENCY = (
    *_CASE,
    *_sides("tpot_mean_s", "TPOT mean, ms", milliseconds),
    *_sides("tpot_p99_s", "TPOT P99, ms", milliseconds),
    *_sides("ttft_mean_s", "TTFT mean, ms", milliseconds),
    *_sides("ttft_p99_s", "TTFT P99, ms", milliseconds),
)
COUNTS = (
    *_CASE,
    *_sides("tokens_per_iteration", "tokens/iteration", decimals(3)),
    *_sides("iterations", "iterations", whole),
    *_sides("ttft_attainment", "TTFT attained", percent),
)
LEVELS = (
    Column("level", "load", text, number=False),
    Column("share", "of capacity", decimals(2)),
    Column("request_rate_rps", "req/s", decimals(2)),
    Column("requests", "requests", whole),
    Column("repeats", "repeats", whole),
)
POOLED = (
    Column("level", "load", text, number=False),
    Column("way", "simulated with", text, number=False),
    Column("metric", "figure", text, number=False),
    Column("written", "real / simulated", text, sort_key="sort"),
    Column("worst", "farthest off", text, number=False),
)
BATCHES = (
    Column("kind", "batch", text, number=False),
    Column("num_decodes", "B", text),
    Column("iterations", "iterations", whole),
    Column("share", "of all time", percent),
    Column("ratio", "real / predicted, total", decimals(3)),
    Column("median_ratio", "median", decimals(3)),
    Column("mape", "MAPE", percent),
)
CELLS = (
    Column("order", "#", whole),
    Column("level", "load", text, number=False),
    Column("label", "controller", text, number=False),
    Column("repeat", "repeat", whole),
    Column("load_average", "load average", decimals(2)),
    Column("duration_s", "s", seconds),
    Column("between_share", "outside iterations, busy", percent),
    Column("identical", "replayed", text, number=False),
    Column("folder", "folder", text, number=False),
)
VLLM = (
    Column("label", "run", text, number=False),
    Column("level", "load", text, number=False),
    Column("requests", "requests", whole),
    *_sides("tpot_mean_s", "TPOT mean, ms", milliseconds),
    *_sides("tpot_p99_s", "TPOT P99, ms", milliseconds),
    *_sides("ttft_mean_s", "TTFT mean, s", seconds),
    *_sides("ttft_p99_s", "TTFT P99, s", seconds),
)
VLLM_NOTE = (
    "The same arrivals, prompt and output lengths, with the same card's tables and vLLM's limits. The load is vLLM's "
    "own count of waiting requests in the second of a request's arrival. What remains: steps were scheduled one ahead, "
    "so a request that finds no queue starts up to one iteration later than in the simulator, which is much of its "
    "TTFT; prefix caching was on, and which prompts it shortened and what it saved preempted requests is not recorded; "
    "the overhead of an iteration was set from the RTX PRO 6000's run and is too much on the RTX 4090, whose first "
    "requests also met an engine that was still warming up."
)


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, str | int | float | bool | None) else str(value)
