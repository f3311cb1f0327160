"""Iterations of a real engine as it serves: batches of a known size and cache, stepped one after another."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from engine.backends.torch.engine import TorchEngine
from tests.bench.gpu.device import counted_syncs

PREFILL_TOKENS = 8192
"""Prompt tokens of an iteration that fills the cache, which is not measured."""

WARMUP_STEPS = 8
"""Decode iterations before those that are timed: in the first with candidates the drafter reads the prompts, and a new
shape may compile or capture what later ones replay."""


@dataclass(frozen=True)
class Steps:
    """Medians over decode iterations of one batch.

    decodes: B · candidates: c · kv_tokens: cached tokens of all requests, mean · wall_s: from telemetry to stored
    outputs, as a serving loop pays for it · draft_s, forward_s: of these in the drafter and in the target's forward ·
    outside: median of 1 - (draft_s + forward_s) / wall_s · tokens_per_iteration: emitted for one request, mean ·
    tokens_per_s: emitted by all, over the time of all iterations.
    """

    decodes: int
    candidates: int
    kv_tokens: float
    wall_s: float
    draft_s: float
    forward_s: float
    outside: float
    tokens_per_iteration: float
    tokens_per_s: float


@dataclass(frozen=True)
class Prefill:
    """Medians over iterations that read one prompt of `tokens` into an empty cache, nothing else in the batch."""

    tokens: int
    wall_s: float
    forward_s: float


def room_for(candidates: int, steps: int) -> int:
    """Output tokens that a request may need while its iterations are timed, so that none ends."""
    return (1 + candidates) * (WARMUP_STEPS + steps + 2) + 1


def fits(engine: TorchEngine, decodes: int, kv_tokens: int, candidates: int, steps: int) -> bool:
    """Whether the engine has seats, context and cache for that."""
    limits, longest = engine.limits, kv_tokens + room_for(candidates, steps)
    blocks = decodes * -(-longest // limits.block_size)
    return (
        decodes <= limits.max_num_seqs
        and longest <= limits.max_model_len
        and blocks <= limits.total_blocks - limits.watermark_blocks
    )


def decoding(
    engine: TorchEngine, decodes: int, kv_tokens: int, candidates: int, steps: int, rng: np.random.Generator
) -> Steps:
    """Time `steps` iterations of `decodes` requests that begin with `kv_tokens` cached tokens each."""
    _fill(engine, decodes, kv_tokens, room_for(candidates, steps), rng)
    for _ in range(WARMUP_STEPS):
        engine.step(candidates, 1)
    observation = engine.new_observation()
    taken: list[tuple[float, float, float]] = []
    emitted: list[int] = []
    kv: list[int] = []
    latest = time.perf_counter()
    for _ in range(steps):
        engine.observe(observation)
        engine.step(candidates, 1)
        # No wait for the device here: what an iteration leaves running, the next one pays for, as in serving.
        now = time.perf_counter()
        taken.append((now - latest, engine.draft_s, engine.forward_s))
        latest = now
        emitted.append(sum(len(tokens) for _, tokens in engine.emitted))
        kv.append(int(engine.state.batches["decode_kv_tokens"][0]))
    engine.reset()
    wall, draft, forward = zip(*taken, strict=True)
    return Steps(
        decodes=decodes,
        candidates=candidates,
        kv_tokens=float(np.mean(kv)),
        wall_s=statistics.median(wall),
        draft_s=statistics.median(draft),
        forward_s=statistics.median(forward),
        outside=statistics.median(1.0 - (drafted + run) / all_of_it for all_of_it, drafted, run in taken),
        tokens_per_iteration=sum(emitted) / (steps * decodes),
        tokens_per_s=sum(emitted) / sum(wall),
    )


def prefill(engine: TorchEngine, tokens: int, repeats: int, rng: np.random.Generator) -> Prefill:
    """Time the iteration that reads a prompt of `tokens`, `repeats` times after two that are not timed."""
    taken: list[tuple[float, float]] = []
    for turn in range(2 + repeats):
        engine.reset()
        engine.submit(_prompt(engine, tokens, rng), 2)
        _synchronize(engine)
        begin = time.perf_counter()
        engine.step(0, tokens)
        now = time.perf_counter()
        if turn > 1:
            taken.append((now - begin, engine.forward_s))
    engine.reset()
    wall, forward = zip(*taken, strict=True)
    return Prefill(tokens, statistics.median(wall), statistics.median(forward))


def syncs(
    engine: TorchEngine, decodes: int, kv_tokens: int, candidates: int, steps: int, rng: np.random.Generator
) -> list[int] | None:
    """How often the host waits for the device in each of `steps` decode iterations; None without CUDA."""
    _fill(engine, decodes, kv_tokens, room_for(candidates, steps), rng)
    for _ in range(WARMUP_STEPS):
        engine.step(candidates, 1)
    found = []
    for _ in range(steps):
        with counted_syncs(engine.model.device) as waits:
            engine.step(candidates, 1)
        if waits.count is None:
            break
        found.append(waits.count)
    engine.reset()
    return found or None


def most_tokens(kv_tokens: Sequence[int], candidates: Sequence[int], prompt_tokens: int, steps: int) -> int:
    """Context that the longest of these measurements needs."""
    return max(max(kv_tokens) + room_for(max(candidates), steps), prompt_tokens + 2)


def _fill(engine: TorchEngine, decodes: int, kv_tokens: int, outputs: int, rng: np.random.Generator) -> None:
    """Requests of random tokens, each with its prompt read and its first token generated."""
    engine.reset()
    for _ in range(decodes):
        engine.submit(_prompt(engine, kv_tokens, rng), outputs)
    engine.poll()
    while int(engine.state.instances["num_decoding"][0]) < decodes:
        engine.step(0, PREFILL_TOKENS)
    _synchronize(engine)


def _prompt(engine: TorchEngine, tokens: int, rng: np.random.Generator) -> list[int]:
    return rng.integers(engine.model.vocab_size, size=tokens).tolist()


def _synchronize(engine: TorchEngine) -> None:
    if engine.model.device.type == "cuda":
        torch.cuda.synchronize(engine.model.device)
