"""How often the rest of a batch changes a request's next token: `python -m tests.bench.torch_precision`.

The same texts, the target's own continuations of held-out prompts, are read token by token, each alone and then all
together in batches of different company. Where rounding makes another token the most probable one, that is a flip.
"""

from __future__ import annotations

import argparse
import os
import sys

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.model import PagedModel
from engine.backends.torch.table import CacheTable
from engine.models.load import load_target
from engine.speculation.sampling import most_probable
from tests.bench import measure
from tests.bench.torch_speed import generate, prompts

PROMPT_TOKENS = 32


def choices(
    model: PagedModel, table: CacheTable, batches: list[tuple[NDArray[np.int64], NDArray[np.int64]]]
) -> NDArray:
    """The model's choice after every token of the table's texts, read as `batches` of (seats, tokens each) say."""
    read = np.full_like(table.tokens, -1)
    done = np.zeros(len(table.tokens), dtype=np.int64)
    for seats, counts in batches:
        logits = model.forward(table, seats, done[seats], counts, counts)
        rows = (
            np.repeat(seats, counts),
            np.concatenate([np.arange(d, d + c) for d, c in zip(done[seats], counts, strict=True)]),
        )
        read[rows] = most_probable(logits)
        done[seats] += counts
    return read


def ways(texts: int, length: int) -> dict[str, list[tuple[NDArray[np.int64], NDArray[np.int64]]]]:
    """Alone first, then in company: after the prompts, one token a step, or as verification of 4 candidates reads."""
    all_seats = np.arange(texts)

    def stepping(seats: NDArray[np.int64], stride: int) -> list[tuple[NDArray[np.int64], NDArray[np.int64]]]:
        first = [(seats, np.full_like(seats, PROMPT_TOKENS))]
        starts = range(PROMPT_TOKENS, length, stride)
        return first + [(seats, np.full_like(seats, min(stride, length - start))) for start in starts]

    return {
        "alone": [part for seat in all_seats for part in stepping(all_seats[seat : seat + 1], 1)],
        "8 together": [part for seats in np.split(all_seats, texts // 8) for part in stepping(seats, 1)],
        "all together": stepping(all_seats, 1),
        "all together, 5 tokens each": stepping(all_seats, 5),
        "alone, 5 tokens each": [part for seat in all_seats for part in stepping(all_seats[seat : seat + 1], 5)],
    }


def main(arguments: list[str] | None = None) -> None:
    """Flips per thousand choices against reading alone, for every type."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.torch_precision")
    parser.add_argument("--texts", type=int, default=32, help="a multiple of 8")
    parser.add_argument("--new-tokens", type=int, default=96)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    config = TorchEngineConfig(name="precision", max_num_seqs=options.texts, max_model_len=512)
    asked = prompts(options.texts, PROMPT_TOKENS, config)
    _, outputs = generate(load_target())(asked, options.new_tokens)
    length = PROMPT_TOKENS + options.new_tokens
    measure.title(f"{options.texts} texts, {options.new_tokens} choices each")
    for name in options.dtypes:
        table = CacheTable(config.limits)
        table.tokens[: options.texts, :length] = np.array([a + b for a, b in zip(asked, outputs, strict=True)])
        table.blocks[:-1] = np.arange(config.limits.total_blocks).reshape(len(table.blocks) - 1, -1)
        model = PagedModel(load_target(getattr(torch, name)), table.num_blocks, table.block_size)
        alone = None
        for way, batches in ways(options.texts, length).items():
            found = choices(model, table, batches)[: options.texts, PROMPT_TOKENS:length]
            if alone is None:
                alone = found
                continue
            flips = int((found != alone).sum())
            print(f"  {name:<10}{way:<32}{flips:>6} of {alone.size:,} choices flip: {100 * flips / alone.size:.3f} %")


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
