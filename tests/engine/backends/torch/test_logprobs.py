"""Log probabilities of prompts and outputs: those of a plain forward over the same tokens, however they came about."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from engine.backends.torch.logprobs import TokenLogprob
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.constraints import Constraints
from engine.speculation.sampling import GREEDY, Sampling
from tests.engine.backends.torch import models

TOP = 4


def plain(tokens: list[int]) -> NDArray[np.float64]:
    """(T - 1, V) log-softmax of `transformers`' logits before every token but the first."""
    with torch.inference_mode():
        logits = models.exact("llama")(torch.tensor(tokens)[None]).logits[0, :-1]
    return logits.log_softmax(-1).numpy()


def assert_equal(found: list[TokenLogprob], tokens: list[int], expected: NDArray[np.float64]) -> None:
    assert [one.token for one in found] == tokens
    np.testing.assert_allclose([one.logprob for one in found], expected[np.arange(len(tokens)), tokens], atol=1e-9)
    best = -np.sort(-expected, axis=1)[:, :TOP]
    np.testing.assert_allclose([[logprob for _, logprob in one.top] for one in found], best, atol=1e-9)
    for one, row in zip(found, expected, strict=True):
        assert [row[token] for token, _ in one.top] == pytest.approx([logprob for _, logprob in one.top], abs=1e-9)


@pytest.mark.parametrize(
    ("draft_with", "how"),
    [("none", CHAINS), ("near", CHAINS), ("near", Speculation("uniform", 3)), ("near", Speculation("global", 2))],
    ids=["plain", "chains", "trees", "global"],
)
@pytest.mark.parametrize("sampling", [GREEDY, Sampling(1.5, 9, 0.9, 3)], ids=["greedy", "sampled"])
def test_logprobs_are_a_plain_forwards_under_preemption_and_speculation(
    draft_with: str, how: Speculation, sampling: Sampling
) -> None:
    served = models.engine("llama", draft_with, models.limits(total_blocks=26, max_num_seqs=6), how)
    asked = models.prompts([3, 20, 31, 1, 17, 9, 26, 12])
    wants_prompt = [i % 2 == 0 for i in range(len(asked))]
    rules = [Constraints(allowed=range(30)) if i % 3 == 0 else Constraints() for i in range(len(asked))]
    numbers = [
        served.submit(prompt, 20, sampling, constraints=rule, logprobs=TOP, prompt_logprobs=wants)
        for prompt, rule, wants in zip(asked, rules, wants_prompt, strict=True)
    ]
    silent = served.submit(asked[0], 20)
    found: dict[int, list[TokenLogprob]] = {number: [] for number in numbers}
    while served.step(3, 7):
        for number, scored in served.logprobs.items():
            found[number] += scored
    assert silent not in found
    assert served.state.totals["preemptions"][0] > 0
    assert draft_with == "none" or served.state.totals["accepted"][0] > 0
    for number, prompt, wants in zip(numbers, asked, wants_prompt, strict=True):
        tokens = prompt + served.output(number)
        first = 1 if wants else len(prompt)
        assert_equal(found[number], tokens[first:], plain(tokens)[first - 1 :])


def test_a_cut_off_output_has_a_logprob_for_every_token_of_it() -> None:
    served = models.engine("llama", "copy", models.limits())
    prompt = models.prompts((9,))[0]
    whole = models.generated("llama", prompt, 12)
    number = served.submit(prompt, 12, stop=[whole[5]], logprobs=0)
    found: list[TokenLogprob] = []
    while served.step(5, 64):
        found += served.logprobs.get(number, [])
    assert [one.token for one in found] == served.output(number)
    assert all(one.top == [] for one in found)
