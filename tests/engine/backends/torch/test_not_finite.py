"""Logits that are no numbers end the request they are of, and change nothing for the others."""

from __future__ import annotations

import copy
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch

from engine.backends.torch.engine import TorchEngine
from engine.core.metrics import request_table
from engine.simulator.replay import replay
from engine.speculation.drafter import NoDrafter
from engine.speculation.model import ModelDrafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.sampling import Sampling
from tests.engine.backends.torch import models

TOKENS = 12
LENGTHS = [1, 9, 23, 4, 17, 30, 2]


def _used(kind: str, prompts: list[list[int]]) -> set[int]:
    return {token for prompt in prompts for token in (*prompt, *models.generated(kind, prompt, TOKENS))}


def _spoilt(source: Any, token: int, value: float) -> Any:
    """The model as it is loaded, with one embedding that is no number."""
    with torch.no_grad():
        source.model.model.embed_tokens.weight[token] = value
    return source


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=str)
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "fused"])
@pytest.mark.parametrize("draft_with", ["none", "ngram", "near"])
@pytest.mark.parametrize("kind", ["llama", "mistral_window"])
def test_it_fails_alone_whatever_it_leaves_in_the_cache(kind: str, draft_with: str, exact: bool, value: float) -> None:
    prompts = models.prompts(LENGTHS)
    bad = min(set(range(models.VOCABULARY)) - _used(kind, prompts))
    # Few blocks: those that failed are used again at once, and some requests are preempted.
    bounds = models.limits(total_blocks=24, max_num_seqs=4)
    target = _spoilt(models.paged(copy.deepcopy(models.model(kind)), bounds, exact=exact), bad, value)
    drafter = {
        "none": NoDrafter, "ngram": NgramDrafter,
        "near": lambda: ModelDrafter(models.paged(copy.deepcopy(models.near(kind)), bounds, exact=exact)),
    }[draft_with]()  # fmt: skip
    engine = TorchEngine(target, bounds, drafter, record=True)
    good, wrong = [], []
    for i, prompt in enumerate(prompts):
        # Greedy and sampled, with the bad token at the end and shortly before it.
        wrong.append(engine.submit([*prompt, bad], TOKENS, Sampling(float(i % 2))))
        good.append(engine.submit(prompt, TOKENS))
        wrong.append(
            engine.submit([*prompt[:-3], bad, *prompt[-3:]], TOKENS - 11 * (i % 2), Sampling(float(i % 2), seed=i))
        )
    failed: list[int] = []
    actions = cycle([(3, 8), (0, 5), (2, 16)])
    while engine.step(*next(actions)):
        failed += engine.failed
        assert not {number for number, _ in engine.emitted} & set(wrong)
    assert sorted(failed) == wrong
    assert [engine.output(number) for number in good] == [models.generated(kind, prompt, TOKENS) for prompt in prompts]
    assert not any(engine.output(number) for number in wrong)
    totals = engine.state.totals[0]
    assert (totals["finished"], totals["cancelled"]) == (len(good), len(wrong))
    assert engine.state.instances["free_blocks"][0] == 24
    assert engine.recording is not None
    replayed = request_table(replay(engine.recording, bounds, 1.0).requests)
    for name, column in request_table(engine.requests).items():
        np.testing.assert_array_equal(replayed[name], column, err_msg=name)


@pytest.mark.parametrize("kind", ["gpt2"])
def test_it_may_come_in_the_middle_of_an_output(kind: str) -> None:
    prompts = models.prompts([9, 20])
    bounds = models.limits()
    target = models.paged(models.model(kind), bounds)
    with torch.no_grad():
        target.model.transformer.wpe.weight[20 + 5] = torch.nan
    engine = TorchEngine(target, bounds, NoDrafter())
    short, long = (engine.submit(prompt, TOKENS) for prompt in prompts)
    engine.run(0, 64)
    assert engine.output(short) == models.generated(kind, prompts[0], TOKENS)
    assert engine.output(long) == models.generated(kind, prompts[1], TOKENS)[:6]


@pytest.mark.parametrize("allocation", ["uniform", "global"])
@pytest.mark.parametrize("branching", [1, 3])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_a_drafter_without_numbers_costs_no_request(allocation: Any, branching: int, temperature: float) -> None:
    from engine.speculation.allocation import Speculation

    prompts, bounds = models.prompts(LENGTHS), models.limits()
    broken = models.paged(models.near("llama"), bounds)
    with torch.no_grad():
        broken.model.lm_head.weight.fill_(torch.nan)
    target = models.paged(models.model("llama"), bounds)
    engine = TorchEngine(target, bounds, ModelDrafter(broken), Speculation(allocation, branching))
    numbers = [engine.submit(prompt, TOKENS, Sampling(temperature)) for prompt in prompts]
    engine.run(3, 64)
    assert [len(engine.output(number)) for number in numbers] == [TOKENS] * len(numbers)
    if temperature == 0.0:
        expected = [models.generated("llama", prompt, TOKENS) for prompt in prompts]
        assert [engine.output(number) for number in numbers] == expected
