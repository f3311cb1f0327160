"""How a batch's candidate tokens are best shared out, on the real engine: `python -m tests.bench.torch_trees`.

The same held-out prompts, greedy, B requests in flight, the same budget of c candidate tokens a request in every
iteration; only their shape and their allocation differ. Prints tokens per iteration and request, and TPOT, as means
over requests with 95 % intervals of the paired difference to `local` of the same shape, and TPOT without candidates;
with `--out`, writes them as JSON.
"""

from __future__ import annotations

import argparse
import gc
import json
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.real import tokenizer_of
from engine.backends.torch.build import build, device_of
from engine.backends.torch.engine import TorchEngine
from engine.files import write_whole
from engine.models.corpus import held_out_prompts
from engine.speculation.allocation import Speculation
from tests.bench import measure
from tests.bench.gpu import device as devices
from tests.bench.gpu.engines import but, configured

Allocation = Literal["uniform", "local", "global"]

PROMPT_TOKENS = 96
NEW_TOKENS = 96
TOKEN_BUDGET = 256


class Way(NamedTuple):
    """A way to spend the candidates: who gets how many, in what shape."""

    allocation: Allocation
    branching: int

    @property
    def shape(self) -> str:
        """Chain or tree."""
        return "chain" if self.branching == 1 else f"tree, top {self.branching}"


ALLOCATIONS: tuple[Allocation, ...] = ("uniform", "local", "global")


class Served(NamedTuple):
    """Per request, in order of submission: tokens emitted per decode step, and TPOT in s. Outputs to compare."""

    tokens_per_iteration: NDArray[np.float64]
    tpot_s: NDArray[np.float64]
    outputs: list[list[int]]


def serve(engine: TorchEngine, prompts: list[list[int]], candidates: int) -> Served:
    """All prompts through the emptied engine, as many at a time as its batch holds."""
    engine.reset()
    numbers = [engine.submit(prompt, NEW_TOKENS) for prompt in prompts]
    engine.run(candidates, TOKEN_BUDGET)
    rows = engine.state.requests[: len(numbers)]
    decoded = rows["generated"] - 1
    tpot_s = (rows["last_token"] - rows["first_token"]) / decoded
    return Served(decoded / (decoded - rows["accepted"]), tpot_s, [engine.output(number) for number in numbers])


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    random = np.random.default_rng(0)
    means = differences[random.integers(0, differences.size, (2000, differences.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def main(arguments: list[str] | None = None) -> None:
    """Every way at every batch size, in alternating rounds."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.torch_trees")
    parser.add_argument("--engine", default="torch_small", help="a configuration of conf/engine")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="settings of the engine")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4])
    parser.add_argument("--branching", type=int, nargs="+", default=[1, 2, 3], help="most children of a candidate")
    parser.add_argument("--prompts", type=int, default=32, help="at least; twice the batch where that is more")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--out", type=Path, metavar="FILE.json")
    options = parser.parse_args(arguments)
    try:
        base = configured(options.engine, *options.set, f"device={options.device}")
        device = device_of(base)
    except ValueError as problem:
        parser.error(str(problem))
    ways = [Way(allocation, branching) for branching in options.branching for allocation in ALLOCATIONS]
    words, rows = tokenizer_of(base.target), []
    for batch in options.batches:
        count = max(options.prompts, 2 * batch)
        prompts = [prompt.tokens.tolist() for prompt in held_out_prompts(words, [PROMPT_TOKENS] * count, 1)]
        engine = build(but(base, max_num_seqs=batch), ttft_target=60.0)
        for candidates in options.candidates:
            plain: list[Served] = []
            rounds: dict[Way, list[Served]] = {way: [] for way in ways}
            for _ in range(1 + options.rounds):
                plain.append(serve(engine, prompts, 0))
                for way in ways:
                    engine.speculation = Speculation(way.allocation, way.branching)
                    rounds[way].append(serve(engine, prompts, candidates))
            measure.title(f"{base.name}, B = {batch}, c = {candidates}, {count} prompts")
            # What a drafter's probabilities are worth is learnt in the first round, and shapes are compiled.
            found = _compared(_over_rounds(plain[1:]), {way: _over_rounds(all_[1:]) for way, all_ in rounds.items()})
            rows += [{"batch": batch, "candidates": candidates} | row for row in found]
        # The next engine's weights and cache may not fit beside this one's.
        del engine
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if options.out is not None:
        about = {"engine": base.model_dump(mode="json"), "machine": devices.about(device), "rows": rows}
        write_whole(options.out, (json.dumps(about, indent=1) + "\n").encode())


def _over_rounds(served: list[Served]) -> Served:
    tpot_s = np.median([one.tpot_s for one in served], axis=0)
    return Served(served[0].tokens_per_iteration, tpot_s, served[0].outputs)


def _compared(plain: Served, results: dict[Way, Served]) -> list[dict[str, Any]]:
    """Print a line for every way, and return them."""
    print(f"  {'shape':<14}{'allocation':<12}{'tokens/iteration':>26}{'TPOT':>30}{'same output':>14}")
    print(f"  {'none':<14}{'':<12}{1.0:>8.2f} {'':>17}{1e3 * plain.tpot_s.mean():>9.2f} ms")
    rows: list[dict[str, Any]] = [{"shape": "none", "tokens_per_iteration": 1.0, "tpot_s": plain.tpot_s.mean()}]
    for way, served in results.items():
        local = results[Way("local", way.branching)]
        row = {
            "shape": way.shape,
            "allocation": way.allocation,
            "tokens_per_iteration": served.tokens_per_iteration.mean(),
            "tpot_s": served.tpot_s.mean(),
            "same_output": sum(a == b for a, b in zip(served.outputs, plain.outputs, strict=True)),
        }
        tokens, tpot = "", ""
        if way.allocation != "local":
            gain = interval(served.tokens_per_iteration - local.tokens_per_iteration)
            slower = interval(served.tpot_s / local.tpot_s - 1.0)
            row |= {"tokens_over_local": gain, "tpot_over_local": slower}
            tokens, tpot = "({:+.2f} to {:+.2f})".format(*gain), "({:+.1%} to {:+.1%})".format(*slower)
        rows.append(row)
        print(
            f"  {way.shape:<14}{way.allocation:<12}{row['tokens_per_iteration']:>8.2f} {tokens:>17}"
            f"{1e3 * row['tpot_s']:>9.2f} ms {tpot:>17}{row['same_output']:>9}/{len(plain.outputs)}"
        )
    return rows


if __name__ == "__main__":
    main()
