"""What a controller chooses, as pictures: c and n over the batch and the queue."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import BoundaryNorm
from matplotlib.figure import Figure
from numpy.typing import NDArray

from controllers.controller import Controller
from engine.core.telemetry import LOAD_FIELDS, RATE_BANDS
from engine.plant import Plant

BATCHES = (0, 1, 2, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
QUEUES = (0, 128, 256, 512, 1024, 2048, 4096, 8192)
QUEUE_ROWS = 64
REPEATS = 30
"""Times a situation is shown before the choice counts, so that what a controller remembers belongs to it."""


@dataclass(frozen=True)
class Situation:
    """What is the same all over a map.

    Args:
        context_tokens: cached tokens per decoding request.
        prompt_tokens: of each waiting request.
        slack: of each waiting request, as a share of the TTFT target.
        acceptance: chance that a candidate is accepted, at every depth.
        drafted: candidates that every request drafted in the last iteration.
        interval_s: between two observations.
    """

    context_tokens: float = 700.0
    prompt_tokens: float = 512.0
    slack: float = 0.5
    acceptance: float = 0.65
    drafted: int = 3
    interval_s: float = 0.02


def observed(
    situation: Situation, decodes: int, waiting_tokens: int, ttft_target: float, depths: int
) -> dict[str, NDArray[np.float32]]:
    """Telemetry of a steady engine: one prompt arrives whenever one is done."""
    kv_tokens = decodes * situation.context_tokens
    load: dict[str, float] = dict.fromkeys(LOAD_FIELDS, 0.0)
    prompts = -(-waiting_tokens // int(situation.prompt_tokens))
    expected = sum(situation.acceptance**d for d in range(1, situation.drafted + 1))
    load |= {
        "num_decodes": decodes,
        "decode_kv_tokens": kv_tokens,
        "num_waiting": prompts,
        "waiting_tokens": waiting_tokens,
        "free_kv_tokens": 60_000.0,
        "free_seqs": 256.0 - decodes,
        "interval_s": situation.interval_s,
        "iterations": 1.0,
        "last_iteration_s": situation.interval_s,
        "last_candidates": situation.drafted,
        "last_num_decodes": decodes,
        "last_decode_kv_tokens": kv_tokens,
        "emitted_tokens": decodes * (1.0 + expected),
        "last_emitted_tokens": decodes * (1.0 + expected),
        "ttft_target_s": ttft_target,
    }
    queue = np.zeros((QUEUE_ROWS + 1, 2), dtype=np.float32)
    left = float(waiting_tokens)
    for row in range(min(prompts, QUEUE_ROWS)):
        queue[row] = (min(left, situation.prompt_tokens), situation.slack * ttft_target)
        left -= queue[row, 0]
    reached = decodes * situation.acceptance ** np.arange(depths) * (np.arange(depths) < situation.drafted)
    rates = np.zeros(RATE_BANDS, dtype=np.float32)
    rates[int(situation.acceptance * RATE_BANDS)] = decodes
    return {
        "load": np.array([load[name] for name in LOAD_FIELDS], dtype=np.float32),
        "queue": queue,
        "drafted": reached.astype(np.float32),
        "accepted": (reached * situation.acceptance).astype(np.float32),
        "rates": rates,
    }


def choices(
    controller: Controller, plant: Plant, ttft_target: float, situation: Situation = Situation()
) -> NDArray[np.int64]:
    """(batches, queues, 2) c and n that a controller chooses."""
    made = np.zeros((len(BATCHES), len(QUEUES), 2), dtype=np.int64)
    depths = max(1, plant.grid.candidate_choices[-1])
    for i, decodes in enumerate(BATCHES):
        for j, waiting in enumerate(QUEUES):
            controller.reset(plant)
            seen = observed(situation, decodes, waiting, ttft_target, depths)
            for _ in range(REPEATS):
                made[i, j] = controller.choose(seen)
    return made


def draw(maps: Mapping[str, NDArray[np.int64]], plant: Plant) -> Figure:
    """One column a controller: c above, n below."""
    figure = Figure(figsize=(3.1 * len(maps) + 1.2, 6.2), layout="constrained")
    axes = figure.subplots(2, len(maps), squeeze=False, sharex=True, sharey=True)
    rows: tuple[tuple[str, Sequence[int]], ...] = (
        ("c, candidate tokens per request", plant.grid.candidate_choices),
        ("n, prompt tokens per iteration", plant.grid.budget_choices),
    )
    for which, (title, values) in enumerate(rows):
        for place, (name, chosen) in zip(axes[which], maps.items(), strict=True):
            picture = _panel(place, np.searchsorted(values, chosen[..., which]), len(values))
            if which == 0:
                place.set_title(name, fontsize=10)
            else:
                place.set_xlabel("waiting prompt tokens")
        axes[which, 0].set_ylabel("decoding requests")
        bar = figure.colorbar(picture, ax=list(axes[which]), ticks=np.arange(len(values)), pad=0.01)
        bar.ax.set_yticklabels([str(value) for value in values], fontsize=7)
        bar.set_label(title, fontsize=9)
    return figure


def _panel(axes: Axes, index: NDArray[np.int64], many: int) -> Any:
    norm = BoundaryNorm(np.arange(many + 1) - 0.5, many)
    picture = axes.imshow(index, origin="lower", aspect="auto", cmap=colormaps["viridis"].resampled(many), norm=norm)
    axes.set_xticks(range(len(QUEUES)), [str(value) for value in QUEUES], fontsize=7, rotation=45)
    axes.set_yticks(range(len(BATCHES)), [str(value) for value in BATCHES], fontsize=7)
    return picture
