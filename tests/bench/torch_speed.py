"""The torch engine against other ways to serve the same model: `python -m tests.bench.torch_speed`.

The embedded target, the same held-out prompts, greedy, every sequence to the same length. Output tokens per second of
wall-clock time, while decoding and with the prompts' prefill, as medians of runs that take turns, with the ratio to
`transformers`' generation (for speculation: to c = 0).
llama.cpp takes part when `--llama-python` names an interpreter that has `llama-cpp-python` and `gguf`.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from engine.backends.torch.config import TorchEngineConfig
from engine.models.corpus import held_out_prompts
from engine.models.load import load_target
from tests.bench import measure

Outputs = list[list[int]]
Way = Callable[[Sequence[list[int]], int], tuple[float, Outputs]]
"""Seconds and output tokens for prompts, that many new tokens each."""


def prompts(count: int, tokens: int, config: TorchEngineConfig) -> list[list[int]]:
    """Beginnings of held-out files."""
    return [prompt.tokens.tolist() for prompt in held_out_prompts(config.tokenizer(), [tokens] * count, 0)]


def ours(config: TorchEngineConfig, candidates: int = 0) -> Way:
    """The engine at a fixed c; all prompts are prefilled at once."""
    engine = config.build(ttft_target=60.0)

    def run(asked: Sequence[list[int]], new_tokens: int) -> tuple[float, Outputs]:
        engine.reset()
        begin = time.perf_counter()
        numbers = [engine.submit(prompt, new_tokens) for prompt in asked]
        engine.run(candidates, 1 << 20)
        return time.perf_counter() - begin, [engine.output(number) for number in numbers]

    return run


def generate(model: Any) -> Way:
    """`model.generate`, one padded batch with a key-value cache."""

    def run(asked: Sequence[list[int]], new_tokens: int) -> tuple[float, Outputs]:
        ids = torch.tensor(asked)
        begin = time.perf_counter()
        with torch.inference_mode():
            found = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                do_sample=False,
                max_new_tokens=new_tokens,
                eos_token_id=None,
                pad_token_id=0,
            )
        return time.perf_counter() - begin, found[:, ids.shape[1] :].tolist()

    return run


def continuous(model: Any) -> Way:
    """`transformers`' own continuous batching, its cache and batch sized to the work instead of guessed."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    page = 16

    def run(asked: Sequence[list[int]], new_tokens: int) -> tuple[float, Outputs]:
        longest = max(len(prompt) for prompt in asked)
        sizes = ContinuousBatchingConfig(
            page_size=page,
            num_blocks=len(asked) * -(-(longest + new_tokens + 1) // page) + 8,
            max_batch_tokens=max(64, sum(len(prompt) for prompt in asked)),
            max_requests_per_batch=len(asked),
            allow_block_sharing=False,
            auto_switch_to_flash=False,
        )
        how = GenerationConfig(max_new_tokens=new_tokens, do_sample=False, eos_token_id=-1, pad_token_id=0)
        begin = time.perf_counter()
        found = model.generate_batch(list(asked), generation_config=how, continuous_batching_config=sizes)
        seconds = time.perf_counter() - begin
        by_prompt = {tuple(one.prompt_ids): one.generated_tokens for one in found.values()}
        return seconds, [list(by_prompt[tuple(prompt)]) for prompt in asked]

    return run


class LlamaCpp:
    """llama.cpp in float32 in another process (`tests.bench.llama_process`)."""

    def __init__(self, python: str, model: Any, asked: Sequence[list[int]], new_tokens: int, threads: int) -> None:
        self._folder = tempfile.TemporaryDirectory()
        folder = Path(self._folder.name)
        weights = {name: value.float().contiguous().numpy() for name, value in model.state_dict().items()}
        np.savez(folder / "weights.npz", **weights)
        job = {"config": model.config.to_dict(), "prompts": list(asked), "new_tokens": new_tokens, "threads": threads}
        (folder / "job.json").write_text(json.dumps(job, default=str))
        script = Path(__file__).with_name("llama_process.py")
        self._process = subprocess.Popen(
            [python, str(script), str(folder)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(threads)},
        )

    def __call__(self, asked: Sequence[list[int]], new_tokens: int) -> tuple[float, Outputs]:
        """One run over the first prompts of the job."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{len(asked)} {new_tokens}\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("llama.cpp ended; its own messages stand above")
        answer = json.loads(line)
        return answer["seconds"], answer["outputs"]

    def close(self) -> None:
        """End the process and remove its files."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._folder.cleanup()


def compare(ways: dict[str, Way], asked: Sequence[list[int]], new_tokens: int, rounds: int, reference: str) -> None:
    """Print the ways' medians, and how many of their outputs are those of the reference.

    The rate of decoding is that of the tokens after the first: the time of a run less that of one for a single token.
    """
    whole: dict[str, list[float]] = {name: [] for name in ways}
    decoding: dict[str, list[float]] = {name: [] for name in ways}
    outputs: dict[str, Outputs] = {}
    for turn in range(rounds + 1):
        for name, way in ways.items():
            first, _ = way(asked, 1)
            took, outputs[name] = way(asked, new_tokens)
            if turn > 0:
                whole[name].append(len(asked) * new_tokens / took)
                decoding[name].append(len(asked) * (new_tokens - 1) / (took - first))
    measure.title(f"batch {len(asked)}, {len(asked[0])} prompt tokens and {new_tokens} new ones each, tokens/s")
    print(f"  {'':<32}{'decoding':>10}{'ratio':>8}{'with prompts':>16}{'ratio':>8}{'same output':>14}")
    for name in ways:
        rates = [statistics.median(rates[name]) for rates in (decoding, whole)]
        usual = [statistics.median(rates[reference]) for rates in (decoding, whole)]
        same = sum(a == b for a, b in zip(outputs[name], outputs[reference], strict=True))
        print(
            f"  {name:<32}{rates[0]:>10,.0f}{rates[0] / usual[0]:>7.2f}x{rates[1]:>16,.0f}{rates[1] / usual[1]:>7.2f}x"
            f"{same:>10}/{len(asked)}"
        )


def outside_share(config: TorchEngineConfig, asked: Sequence[list[int]], new_tokens: int) -> float:
    """Share of engine time that is not in the model's forwards while all requests decode, c = 0."""
    engine = config.build(ttft_target=60.0)
    forward, inside = engine.model.forward, [0.0]

    def timed(*arguments: Any) -> Any:
        begin = time.perf_counter()
        found = forward(*arguments)
        inside[0] += time.perf_counter() - begin
        return found

    for prompt in asked:
        engine.submit(prompt, new_tokens)
    while engine.state.instances["num_decoding"][0] < len(asked):
        engine.step(0, 1 << 20)
    engine.model.forward = timed  # type: ignore[method-assign]
    shares = []
    for _ in range(new_tokens - 2):
        inside[0], begin = 0.0, time.perf_counter()
        engine.step(0, 64)
        shares.append(1.0 - inside[0] / (time.perf_counter() - begin))
    return statistics.median(shares)


def main(arguments: list[str] | None = None) -> None:
    """All ways at every batch size, then speculation, then the engine's own share."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.torch_speed")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--prompt-tokens", type=int, default=64)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--candidates", type=int, nargs="*", default=[1, 2, 4, 8], help="c with speculation; none: skip"
    )
    parser.add_argument("--llama-python", help="interpreter with llama-cpp-python and gguf")
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    most = max(options.batches)
    config = TorchEngineConfig(
        name="tiny", drafter="none", threads=options.threads, max_num_seqs=most, num_kv_blocks=64 * most
    )
    asked = prompts(most, options.prompt_tokens, config)
    model = load_target()
    ways: dict[str, Way] = {"generate": generate(model), "ours": ours(config), "continuous batching": continuous(model)}
    llama = None
    if options.llama_python:
        llama = LlamaCpp(options.llama_python, model, asked, options.new_tokens, options.threads)
        ways["llama.cpp"] = llama
    else:
        print("llama.cpp is left out: no --llama-python")
    for batch in options.batches:
        compare(ways, asked[:batch], options.new_tokens, options.rounds, "generate")
    if llama is not None:
        llama.close()
    for layers, name in ((None, "torch_tiny"), (24, "torch_small")):
        for drafter in ("ngram", "model"):
            if not options.candidates:
                break
            settings = config.model_copy(update={"drafter": drafter, "layers": layers})
            speculating = {f"{name}, {drafter}, c = {c}": ours(settings, c) for c in (0, *options.candidates)}
            for batch in options.batches:
                compare(speculating, asked[:batch], options.new_tokens, options.rounds, f"{name}, {drafter}, c = 0")
    measure.title("Engine time outside the model's forwards, all requests decoding, c = 0")
    for batch in options.batches:
        share = outside_share(config, asked[:batch], options.new_tokens)
        print(f"  batch {batch:<10}{100 * share:>6.1f} %" + ("   (goal: at most 10 %)" if batch == 8 else ""))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.exit(main())
