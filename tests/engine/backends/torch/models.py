"""Tiny random models, engines on them, and what `transformers` itself generates."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.model import PagedModel
from engine.backends.torch.table import CacheTable
from engine.limits import EngineLimits
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.drafter import Drafter, NoDrafter
from engine.speculation.model import ModelDrafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.tree import Branches
from tests.engine.core.cases import Figures

VOCABULARY = 40
LAYERS = 2
POSITIONS = 256

# A wide initialisation, so that the most probable token is not the same everywhere.
_COMMON = {"vocab_size": VOCABULARY, "initializer_range": 0.3}
_LLAMA = _COMMON | {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": POSITIONS,
}

CONFIGS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(**_LLAMA),
    "qwen2": lambda: transformers.Qwen2Config(**_LLAMA),
    "gpt2": lambda: transformers.GPT2Config(
        **_COMMON, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=POSITIONS, bos_token_id=0, eos_token_id=0
    ),
    "mistral_window": lambda: transformers.MistralConfig(**_LLAMA, sliding_window=7),
}


@cache
def model(kind: str, seed: int = 0, vocabulary: int = VOCABULARY) -> Any:
    """A random model of a kind in `CONFIGS`, float32."""
    config = CONFIGS[kind]()
    config.vocab_size = vocabulary
    torch.manual_seed(seed)
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


@cache
def near(kind: str) -> Any:
    """The same model with a little noise on its weights: its second choice is often the model's first."""
    made = copy.deepcopy(model(kind))
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in made.parameters():
            weight += 0.03 * torch.randn_like(weight)
    return made


@cache
def exact(kind: str) -> Any:
    """The same model in float64."""
    return copy.deepcopy(model(kind)).double()


def limits(
    *, total_blocks: int = 64, block_size: int = 4, watermark_blocks: int = 0, max_num_seqs: int = 8
) -> EngineLimits:
    return EngineLimits(total_blocks, block_size, watermark_blocks, max_num_seqs, POSITIONS)


def paged(source: Any, bounds: EngineLimits, *, exact: bool = True) -> PagedModel:
    return PagedModel(source, CacheTable(bounds).num_blocks, bounds.block_size, exact=exact)


def drafter(name: str, kind: str, bounds: EngineLimits) -> Drafter:
    """`copy` drafts with the target's own weights, `near` with slightly other ones, `model` with other ones."""
    if name == "none":
        return NoDrafter()
    if name == "ngram":
        return NgramDrafter()
    source = near(kind) if name == "near" else model(kind, seed=0 if name == "copy" else 1)
    return ModelDrafter(paged(source, bounds))


def engine(
    kind: str, draft_with: str, bounds: EngineLimits, speculation: Speculation = CHAINS, **options: Any
) -> TorchEngine:
    return TorchEngine(paged(model(kind), bounds), bounds, drafter(draft_with, kind, bounds), speculation, **options)


def prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """Random prompts; every second one repeats a short phrase, which prompt lookup can find."""
    random = np.random.default_rng(seed)
    made = []
    for i, length in enumerate(lengths):
        phrase = random.integers(0, VOCABULARY, min(length, 5) if i % 2 else length)
        made.append(np.resize(phrase, length).tolist())
    return made


@cache
def _generated(kind: str, prompt: tuple[int, ...], max_tokens: int) -> tuple[int, ...]:
    ids = torch.tensor(prompt)[None]
    with torch.inference_mode():
        out = exact(kind).generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=max_tokens, do_sample=False)
    return tuple(out[0, len(prompt) :].tolist())


def generated(kind: str, prompt: Sequence[int], max_tokens: int) -> list[int]:
    """Greedy output of `model.generate` in float64."""
    return list(_generated(kind, tuple(prompt), max_tokens))


def trees(roots: NDArray[np.int64], nodes: int, random: np.random.Generator) -> Branches:
    """Random trees of so many nodes behind the roots; the first is a chain."""
    requests = np.arange(len(roots))
    parents = np.array([[random.integers(-1, node) if i else node - 1 for node in range(nodes)] for i in requests])
    depths = np.zeros(parents.shape, dtype=np.int32)
    for node in range(nodes):
        depths[:, node] = 1 + np.where(parents[:, node] < 0, 0, depths[requests, parents[:, node]])
    return Branches(roots, parents.astype(np.int32), depths)


class ManualClock:
    """A clock that moves on by a fixed, awkward amount whenever it is read."""

    def __init__(self, tick: float = 0.0137) -> None:
        self.time = 0.0
        self._tick = tick

    def now(self) -> float:
        self.time += self._tick
        return self.time

    def wait_until(self, moment: float) -> None:
        self.time = max(self.time, moment)


def assert_generates_as_target(
    served: TorchEngine, actions: list[tuple[int, int]], kind: str, *, lengths: Sequence[int], max_tokens: int
) -> None:
    """Run prompts of these lengths under the actions in turn and compare every output; no block stays taken."""
    asked = prompts(lengths)
    numbers = [served.submit(prompt, max_tokens - i % 3) for i, prompt in enumerate(asked)]
    turns = cycle(actions)
    while served.step(*next(turns)):
        pass
    for i, (number, prompt) in enumerate(zip(numbers, asked, strict=True)):
        assert served.output(number) == generated(kind, prompt, max_tokens - i % 3)
    state = Figures(served.state)
    assert state["finished"] == len(numbers)
    assert state["free_blocks"] == served.limits.total_blocks
