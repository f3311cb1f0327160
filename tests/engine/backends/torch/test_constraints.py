"""Constraints on tokens hold under speculation: outputs are what the target alone would generate under them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats

from engine.backends.torch.engine import TorchEngine
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.constraints import Constraints
from engine.speculation.model import ModelDrafter
from engine.speculation.sampling import Sampling
from tests.engine.backends.torch import models

HOW = [("none", CHAINS), ("near", CHAINS), ("ngram", CHAINS), ("near", Speculation("uniform", 3))]
PROMPTS = models.prompts([9, 14, 3])


def alone(prompt: list[int], count: int, rules: Constraints) -> list[int]:
    """Greedy tokens of the target, one forward each."""
    tokens: list[int] = []
    for _ in range(count):
        with torch.inference_mode():
            logits = models.exact("llama")(torch.tensor(prompt + tokens)[None]).logits[0, -1].numpy()
        tokens.append(int(rules.apply(logits, tokens, []).argmax()))
    return tokens


def _rules(name: str) -> Constraints:
    usual = models.generated("llama", PROMPTS[0], 8)
    return {
        "allowed": Constraints(allowed=(3, 7, 8, 20, 21, 22)),
        "bias": Constraints(bias={5: 2.5, 9: 3.0, usual[0]: -100.0}),
        "banned": Constraints(banned=((usual[0], usual[1]), (usual[3],), tuple(usual[1:4]))),
        "held back": Constraints(ends=set(usual[:4]), min_tokens=6),
    }[name]


@pytest.mark.parametrize("name", ["allowed", "bias", "banned", "held back"])
@pytest.mark.parametrize(("draft_with", "how"), HOW)
def test_greedy_outputs_are_the_constrained_targets_own(draft_with: str, how: Speculation, name: str) -> None:
    served, rules = models.engine("llama", draft_with, models.limits(), how), _rules(name)
    numbers = [served.submit(prompt, 12, constraints=rules) for prompt in PROMPTS]
    free = served.submit(PROMPTS[0], 12)
    served.run(4, 64)
    for prompt, number in zip(PROMPTS, numbers, strict=True):
        assert served.output(number) == alone(prompt, 12, rules)
    assert served.output(free) == models.generated("llama", PROMPTS[0], 12) != served.output(numbers[0])


def test_sampled_outputs_are_distributed_as_the_constrained_targets() -> None:
    """6,000 outputs of three tokens, held back, banned and favoured; chi-square over whole outputs."""
    vocabulary, prompt, requests = 6, [1, 2, 3, 4, 5, 0, 1], 6000
    rules = Constraints(allowed=range(5), bias={1: 0.7}, banned=((2, 3), (4, 1)), ends=(0,), min_tokens=1)
    hot = Sampling(temperature=3.0)
    bounds = models.limits(total_blocks=400, max_num_seqs=128)
    target = models.model("llama", 0, vocabulary)
    drafter = ModelDrafter(models.paged(models.model("llama", 1, vocabulary), bounds, exact=False))
    served = TorchEngine(models.paged(target, bounds, exact=False), bounds, drafter)
    for seed in range(requests):
        served.submit(prompt, 3, Sampling(3.0, seed=seed), constraints=rules)
    served.run(2, 4096)
    observed = np.zeros((vocabulary,) * 3)
    for number in range(requests):
        observed[tuple(served.collect(number))] += 1
    assert served.state.totals["accepted"][0] > 500
    expected = np.zeros_like(observed)
    for output in itertools.product(range(vocabulary), repeat=3):
        with torch.inference_mode():
            logits = target(torch.tensor([[*prompt, *output]])).logits[0, -4:-1].double().numpy()
        weights = [
            hot.probabilities(rules.apply(row, output[:i], [])[None])[0, output[i]] for i, row in enumerate(logits)
        ]
        expected[output] = requests * np.prod(weights)
    assert not observed[expected == 0].any()
    assert not observed[0].any()
    possible = expected > 0
    assert expected[possible].min() > 5
    assert stats.chisquare(observed[possible], expected[possible]).pvalue > 1e-3


def test_rules_that_may_leave_no_token_are_known_beforehand() -> None:
    assert Constraints(allowed=(1, 2), ends=(1,), min_tokens=3).choices_left(10)
    assert not Constraints(allowed=(1, 2), banned=((5, 2),), ends=(1,), min_tokens=3).choices_left(10)
    assert Constraints(allowed=(1, 2), banned=((5, 2),), ends=(1,)).choices_left(10)
    assert not Constraints(banned=tuple((token,) for token in range(10))).choices_left(10)
