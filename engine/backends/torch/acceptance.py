"""Acceptance on a torch engine: logs of accepted candidates, and agreement of drafter and target by position."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.real import RealEngine
from engine.backends.torch.engine import TorchEngine
from engine.speculation.model import ModelDrafter
from engine.speculation.ngram import NgramDrafter, NgramIndex
from engine.workload.workload import offsets

NOT_PROPOSED = 255
"""Rank of a token that the drafter would not have proposed at any depth."""


@dataclass(frozen=True)
class SpeculationRun:
    """Results of a run under one c.

    outputs: tokens of each request · turns: a line of an acceptance log for each (see
    `engine.workload.acceptance_log.read_acceptance_log`) · tokens_per_iteration: emitted by a request in an iteration.
    """

    outputs: list[list[int]]
    turns: list[dict[str, Any]]
    tokens_per_iteration: float


def speculate(
    engine: RealEngine, prompts: Sequence[NDArray[np.int32]], max_tokens: int, candidates: int, token_budget: int
) -> SpeculationRun:
    """Serve the prompts greedily at one c, all arriving at once, and log every verification."""
    engine.reset(engine.clock)
    numbers = [engine.submit(prompt, max_tokens) for prompt in prompts]
    accepted: list[list[int]] = [[] for _ in numbers]
    drafted: list[list[int]] = [[] for _ in numbers]
    names = ("generated", "drafted", "accepted")
    while True:
        rows = engine.requests
        before = [rows[name][: len(numbers)].copy() for name in names]
        if not engine.step(candidates, token_budget):
            break
        after = [rows[name][: len(numbers)] for name in names]
        # A request's first token ends its prefill and verifies nothing.
        for i in np.flatnonzero((after[0] > before[0]) & (before[0] > 0)).tolist():
            drafted[i].append(int(after[1][i] - before[1][i]))
            accepted[i].append(int(after[2][i] - before[2][i]))
    outputs = [engine.output(number) for number in numbers]
    steps = sum(len(found) for found in accepted)
    emitted = steps + sum(sum(found) for found in accepted)
    engine.reset(engine.clock)
    turns = [
        {"question_id": i, "turn": 0, "task": "profile", "new_tokens": len(output), "n_accepted": a, "k_drafted": k}
        for i, (output, a, k) in enumerate(zip(outputs, accepted, drafted, strict=True))
        if a
    ]
    return SpeculationRun(outputs, turns, emitted / max(steps, 1))


def agreement(
    engine: TorchEngine, prompts: Sequence[NDArray[np.int32]], outputs: Sequence[Sequence[int]]
) -> dict[str, NDArray[Any]]:
    """Rank and confidence at every output position, with the target's own tokens as the drafter's context.

    Arrays as in `engine.workload.workload.Workload`: prompt_tokens, output_tokens (R,), offset (R+1,), rank (P,) uint8,
    confidence (P,) float32. Prompt lookup has one proposal or none: rank 0 or 255, confidence 1 or 0.
    """
    ranks, confidences = [], []
    for prompt, output in zip(prompts, outputs, strict=True):
        text = np.concatenate((np.asarray(prompt), np.asarray(output))).astype(np.int64)
        rank, confidence = _teacher_forced(engine.drafter, text, len(prompt), engine.model.device)
        ranks.append(rank)
        confidences.append(confidence)
    lengths = np.array([len(output) for output in outputs], dtype=np.int32)
    return {
        "prompt_tokens": np.array([len(prompt) for prompt in prompts], dtype=np.int32),
        "output_tokens": lengths,
        "offset": offsets(lengths),
        "rank": np.concatenate(ranks).astype(np.uint8),
        "confidence": np.concatenate(confidences).astype(np.float32),
    }


def _teacher_forced(
    drafter: Any, text: NDArray[np.int64], begin: int, device: torch.device
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Rank and confidence of the tokens of `text` from position `begin`."""
    count = len(text) - begin
    if isinstance(drafter, ModelDrafter):
        ids = torch.from_numpy(text).to(device)
        with torch.inference_mode():
            logits = drafter._runner.model(input_ids=ids[None, :-1], use_cache=False).logits[0, begin - 1 :].float()  # type: ignore[attr-defined]
        own = logits.gather(1, ids[begin:, None])
        rank = (logits > own).sum(1).clamp(max=NOT_PROPOSED)
        return rank.cpu().numpy(), logits.softmax(-1).max(-1).values.cpu().numpy()
    rank, confidence = np.full(count, NOT_PROPOSED), np.zeros(count)
    if isinstance(drafter, NgramDrafter):
        index = NgramIndex(drafter._shortest, drafter._longest)
        tokens = text.astype(np.int32)
        for place in range(count):
            index.extend(tokens[: begin + place])
            found = index.continuation(tokens[: begin + place])
            if found is not None:
                confidence[place] = 1.0
                rank[place] = 0 if tokens[found] == tokens[begin + place] else NOT_PROPOSED
    return rank, confidence
