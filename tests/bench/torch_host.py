"""What a GPU's iteration costs the host: `python -m tests.bench.torch_host`, on any machine.

The engine serves through the GPU's way, staging, promises and all, with a device that has every answer at once: what is
left is the host's own time in an iteration, telemetry included. Microseconds, medians; a GPU adds its launches, and
hides what it computes meanwhile.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time

import numpy as np
import torch
import transformers

from engine.backends.torch.attention import LayerShape
from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.layout import Inputs
from engine.backends.torch.model import PagedModel
from engine.backends.torch.table import CacheTable
from engine.backends.torch.triton_llama import TritonLlama
from engine.limits import EngineLimits
from engine.speculation.model import ModelDrafter
from tests.bench import measure

VOCABULARY = 32_000
PROMPT_TOKENS, OUTPUT_TOKENS = 200, 1500
LIMITS = EngineLimits(8192, 16, 80, 64, 2048)
ZERO = torch.zeros(1)


class Answered(TritonLlama):
    """Everybody's next token is 0, and known at once."""

    def _run(self, host: torch.Tensor, size: int, splits: int, trees: bool) -> torch.Tensor:
        self._memory.copy_(host, non_blocking=True)
        return ZERO.expand(size, VOCABULARY)

    def _forward(self, inputs: Inputs, trees: bool, splits: int, tile_rows: int) -> torch.Tensor:
        return ZERO.expand(len(inputs.kept), VOCABULARY)


def engine() -> TorchEngine:
    """A target and a drafter of one narrow layer, which nobody computes."""
    config = transformers.LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=LIMITS.max_model_len,
    )
    models = []
    for _ in range(2):
        model = PagedModel(
            transformers.AutoModelForCausalLM.from_config(config), CacheTable(LIMITS).num_blocks, 16, fused=False
        )
        model.fused = Answered(model.model, [LayerShape(2, 16, 16, None, None)])
        models.append(model)
    models[1].defer_to(models[0])
    return TorchEngine(models[0], LIMITS, ModelDrafter(models[1]))


def main(arguments: list[str] | None = None) -> None:
    """A line for every batch size and c."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.torch_host")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--candidates", type=int, nargs="+", default=[0, 4])
    parser.add_argument("--iterations", type=int, default=300)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    served = engine()
    observation = served.new_observation()
    measure.title("The host's time in an iteration, us")
    print(f"  {'B':>4}{'c':>4}{'iteration':>12}{'drafter':>10}{'forward':>10}{'outside':>10}")
    for candidates in options.candidates:
        for batch in options.batches:
            served.reset()
            for _ in range(batch):
                served.submit(np.zeros(PROMPT_TOKENS, dtype=np.int32), OUTPUT_TOKENS)
            while served.state.instances["num_decoding"][0] < batch:
                served.step(0, 1 << 14)
            took = []
            for turn in range(options.iterations + 20):
                begin = time.perf_counter()
                served.poll()
                served.observe(observation)
                served.step(candidates, 512)
                whole = time.perf_counter() - begin
                if turn >= 20:
                    took.append((whole, served.draft_s, served.forward_s))
            whole, draft, forward = (1e6 * statistics.median(column) for column in zip(*took, strict=True))
            outside = whole - draft - forward
            print(f"  {batch:>4}{candidates:>4}{whole:>12.0f}{draft:>10.0f}{forward:>10.0f}{outside:>10.0f}")


if __name__ == "__main__":
    sys.exit(main())
