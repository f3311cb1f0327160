"""How a batch's candidate tokens are best shared out, on the real engine: `python -m tests.bench.torch_trees`.

The same held-out prompts, greedy, B requests in flight, the same budget of c candidate tokens a request in every
iteration; only their shape and their allocation differ. Prints tokens per iteration and request, and TPOT, as means
over requests with 95 % intervals of the paired difference to `local` of the same shape.
"""

from __future__ import annotations

import argparse
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.core.metrics import request_table
from engine.models.corpus import held_out_prompts
from engine.speculation.allocation import Speculation
from tests.bench import measure

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
WAYS = tuple(Way(allocation, branching) for branching in (1, 2, 3) for allocation in ALLOCATIONS)


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
    table = request_table(engine.state)
    decoded = table["generated_tokens"] - 1
    steps = decoded - table["accepted_tokens"]
    return Served(decoded / steps, table["tpot_s"], [engine.output(number) for number in numbers])


def interval(differences: NDArray[np.float64]) -> tuple[float, float]:
    """95 % bootstrap interval of a mean."""
    random = np.random.default_rng(0)
    means = differences[random.integers(0, differences.size, (2000, differences.size))].mean(axis=1)
    low, high = np.quantile(means, (0.025, 0.975))
    return float(low), float(high)


def main(arguments: list[str] | None = None) -> None:
    """Every way at every batch size, in alternating rounds."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.torch_trees")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 4, 16])
    parser.add_argument("--candidates", type=int, nargs="+", default=[4])
    parser.add_argument("--layers", type=int, default=24, help="layers the shipped target is deepened to")
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args(arguments)
    base = TorchEngineConfig(name="trees", layers=options.layers, num_kv_blocks=1024)
    cut = held_out_prompts(base.tokenizer(), [PROMPT_TOKENS] * options.prompts, 1)
    prompts = [prompt.tokens.tolist() for prompt in cut]
    for batch in options.batches:
        engine = base.model_copy(update={"max_num_seqs": batch}).build(ttft_target=60.0)
        for candidates in options.candidates:
            rounds: dict[Way, list[Served]] = {way: [] for way in WAYS}
            for _ in range(1 + options.rounds):
                for way in WAYS:
                    engine.speculation = Speculation(way.allocation, way.branching)
                    rounds[way].append(serve(engine, prompts, candidates))
            measure.title(f"B = {batch}, c = {candidates}, {options.prompts} prompts, {options.layers} layers")
            # What a drafter's probabilities are worth is learnt in the first round.
            _report({way: served[1:] for way, served in rounds.items()})


def _report(rounds: dict[Way, list[Served]]) -> None:
    results = {
        way: Served(
            served[0].tokens_per_iteration,
            np.median([one.tpot_s for one in served], axis=0),
            served[0].outputs,
        )
        for way, served in rounds.items()
    }
    reference = results[WAYS[0]].outputs
    print(f"  {'shape':<14}{'allocation':<12}{'tokens/iteration':>26}{'TPOT':>30}{'same output':>14}")
    for way, served in results.items():
        local = results[Way("local", way.branching)]
        gain = served.tokens_per_iteration - local.tokens_per_iteration
        slower = served.tpot_s / local.tpot_s - 1.0
        tokens, tpot = "", ""
        if way.allocation != "local":
            tokens = "({:+.2f} to {:+.2f})".format(*interval(gain))
            tpot = "({:+.1%} to {:+.1%})".format(*interval(slower))
        same = sum(a == b for a, b in zip(served.outputs, reference, strict=True))
        print(
            f"  {way.shape:<14}{way.allocation:<12}{served.tokens_per_iteration.mean():>8.2f} {tokens:>17}"
            f"{1e3 * served.tpot_s.mean():>9.2f} ms {tpot:>17}{same:>9}/{len(reference)}"
        )


if __name__ == "__main__":
    main()
