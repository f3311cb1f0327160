"""One profile: a real engine is measured, and becomes a simulated one. No Hydra, and nothing validated but by hand.

`wanted` is anything with the attributes of `runs.profiling.Profile`, which says what they mean.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.clocks import clocks_of
from engine.backends.measure import begin, measure
from engine.backends.real import RealEngine
from engine.backends.torch.acceptance import agreement, speculate
from engine.backends.torch.engine import TorchEngine
from engine.core.choices import check_choices
from engine.files import write_whole
from engine.latency.design import Space, design
from engine.models.corpus import cut_prompts, library_texts
from runs.measured_folder import (
    ACCEPTANCE,
    AGREEMENT,
    TOKENS_PER_ITERATION,
    VISITS,
    Result,
    finish,
    processor,
    write_json,
    write_machine,
)

FEWEST_POINTS = 50

USUAL_POINTS, USUAL_POINTS_GPU = 300, 3000
"""A GPU's iterations are short, and their times are staircases in every size: graphs and products are padded."""

Progress = Callable[[int, int], Any]


@dataclass(frozen=True)
class Subject:
    """The engine to be measured, not loaded yet.

    settings: as configured, JSON-able, without the profile that it may have · tokenizer, build: make the target's
    tokenizer and the engine.
    """

    settings: dict[str, Any]
    tokenizer: Callable[[], Any]
    build: Callable[[], RealEngine]


def check(wanted: Any, prefill: str) -> None:
    """Refuse what cannot be measured, whatever the engine. Raises ValueError naming the key."""
    if prefill != "chunked":
        raise ValueError(
            f"engine.prefill={prefill}: iterations that mix prompts with decodes cannot be "
            "measured; profile with engine.prefill=chunked, the profile holds for every other"
        )
    if not wanted.minutes > 0.0:
        raise ValueError(f"minutes={wanted.minutes} must be above 0")
    if wanted.points != 0 and wanted.points < FEWEST_POINTS:
        raise ValueError(f"points={wanted.points} must be at least {FEWEST_POINTS}, or 0 for the usual number")
    if wanted.seed < 0:
        raise ValueError(f"seed={wanted.seed} must be at least 0")
    for key, least in (("prompts", 1), ("prompt_tokens", 1), ("max_tokens", 2)):
        if getattr(wanted.speculation, key) < least:
            raise ValueError(f"speculation.{key}={getattr(wanted.speculation, key)} must be at least {least}")
    for key in ("candidate_choices", "budget_choices"):
        check_choices(key, getattr(wanted.actions, key))


def profile(subject: Subject, wanted: Any, out: Path, progress: Callable[[str], Any]) -> Result:
    """Measure what is still missing in the folder `out`, and write everything else anew.

    `progress` makes, from a description, a context manager of a function of (done, total), or of None.

    Raises:
        ValueError: the engine cannot be built or is too small for the choices, or `out` holds another profile.
    """
    engine = subject.build()
    engine.prepare()
    text, prompts = _texts(subject.tokenizer(), wanted)
    # An engine that never drafts plans no candidates, whatever c is.
    choices = tuple(c for c in wanted.actions.candidate_choices if c <= engine.max_candidates)
    space = Space(engine.limits, choices or (0,), max(wanted.actions.budget_choices))
    about = engine.about()
    usual = USUAL_POINTS if about["device"] == "cpu" else USUAL_POINTS_GPU
    points = design(space, wanted.points or usual, wanted.seed)
    identity, clocks = _identity(subject.settings, about), clocks_of(about["device"])
    begin(out / VISITS, points, identity)
    write_machine(out, subject.settings, engine, clocks, wanted.predictor, wanted.seed)
    with progress("Measuring") as on_progress:
        measure(
            engine,
            text,
            points,
            out / VISITS,
            seconds=60.0 * wanted.minutes,
            seed=wanted.seed,
            identity=identity,
            sensors=None if clocks is None else clocks.read,
            on_progress=on_progress,
        )
    with progress("Speculating") as on_progress:
        _speculation(engine, prompts, space, subject.settings["drafter"], wanted.speculation, out, on_progress)
    return finish(out)


def _identity(settings: dict[str, Any], about: dict[str, Any]) -> str:
    """What the measured times depend on beside the points."""
    machine = {"machine": processor()}
    if about["device"] != "cpu":
        machine["gpu"] = about["device_name"]
    return json.dumps(settings | machine, sort_keys=True)


def _texts(tokenizer: Any, wanted: Any) -> tuple[NDArray[np.int32], list[NDArray[np.int32]]]:
    """Held-out text in one piece, and the prompts that are served."""
    texts = list(library_texts(held_out=True))
    lengths = [wanted.speculation.prompt_tokens] * wanted.speculation.prompts
    prompts = cut_prompts(texts, tokenizer, lengths, np.random.default_rng(wanted.seed))
    pieces = [tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"] for _, text in texts]
    return np.concatenate([np.asarray(piece, np.int32) for piece in pieces]), [prompt.tokens for prompt in prompts]


def _speculation(
    engine: RealEngine,
    prompts: list[NDArray[np.int32]],
    space: Space,
    drafter: str,
    served: Any,
    out: Path,
    on_progress: Progress | None,
) -> None:
    """Serve the prompts under every c; writes the acceptance log of the largest, the agreement, and what each c gave.

    The last of these comes last: where it is, speculation is done.
    """
    gains: dict[int, float] = {}
    for done, candidates in enumerate(space.candidates):
        run = speculate(engine, prompts, served.max_tokens, candidates, space.most_prefill)
        gains[candidates] = run.tokens_per_iteration
        if on_progress is not None:
            on_progress(done + 1, len(space.candidates))
    write_whole(out / ACCEPTANCE, "".join(json.dumps(turn) + "\n" for turn in run.turns).encode())
    if isinstance(engine, TorchEngine):
        # Only a drafter of our own can be asked what it would have proposed at every position.
        partial = out / f".{AGREEMENT}.partial.npz"
        np.savez_compressed(partial, **agreement(engine, prompts, run.outputs))  # type: ignore[arg-type]
        os.replace(partial, out / AGREEMENT)
    content = {
        "drafter": drafter,
        "workload": "held-out prompts, greedy",
        **vars(served),
        "tokens_per_iteration": {str(c): round(gain, 4) for c, gain in gains.items()},
    }
    write_json(out / TOKENS_PER_ITERATION, content)
