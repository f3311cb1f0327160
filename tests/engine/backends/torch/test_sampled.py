"""End to end, sampled outputs with speculation have the distribution of the target model alone."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from scipy import stats

from engine.backends.torch.engine import TorchEngine
from engine.speculation.allocation import CHAINS, Speculation
from engine.speculation.drafter import Drafter
from engine.speculation.model import ModelDrafter
from engine.speculation.ngram import NgramDrafter
from engine.speculation.sampling import Sampling
from tests.engine.backends.torch.models import limits, model, paged

VOCABULARY = 10
REQUESTS = 7000
TOKENS = 3
PROMPT = [1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1, 2]
SETTINGS = Sampling(temperature=3.0, top_k=8)


def _joint() -> NDArray[np.float64]:
    """(V, V, V) probability of every output of three tokens."""
    target = model("llama", 0, VOCABULARY)
    pairs = list(itertools.product(range(VOCABULARY), repeat=2))
    with torch.inference_mode():
        logits = target(torch.tensor([[*PROMPT, *pair] for pair in pairs])).logits[:, -TOKENS:].double().numpy()
    each = SETTINGS.probabilities(logits.reshape(-1, VOCABULARY)).reshape(VOCABULARY, VOCABULARY, TOKENS, VOCABULARY)
    first, second, third = each[0, 0, 0], each[:, 0, 1], each[:, :, 2]
    return first[:, None, None] * second[:, :, None] * third


@pytest.mark.parametrize(
    ("draft_with", "candidates", "how"),
    [
        ("ngram", 2, CHAINS),
        ("model", 2, CHAINS),
        ("model", 5, Speculation("uniform", 3)),
        ("model", 5, Speculation("global", 3)),
    ],
    ids=["ngram-chain", "drawn-chain", "drawn-tree", "determined-tree"],
)
def test_outputs_are_distributed_as_the_targets_own(draft_with: str, candidates: int, how: Speculation) -> None:
    """21,000 sampled tokens; chi-square over whole outputs, cells that expect fewer than 5 taken together."""
    bounds = limits(total_blocks=400, max_num_seqs=128)
    source: Drafter = NgramDrafter()
    if draft_with == "model":
        source = ModelDrafter(paged(model("llama", 1, VOCABULARY), bounds, exact=False))
    served = TorchEngine(paged(model("llama", 0, VOCABULARY), bounds, exact=False), bounds, source, how)
    for seed in range(REQUESTS):
        served.submit(PROMPT, TOKENS, Sampling(SETTINGS.temperature, SETTINGS.top_k, SETTINGS.top_p, seed))
    served.run(candidates, 4096)
    counts = np.zeros((VOCABULARY,) * TOKENS)
    for number in range(REQUESTS):
        counts[tuple(served.collect(number))] += 1
    assert served.state.totals["accepted"][0] > 500
    expected = _joint().ravel() * REQUESTS
    assert not counts.ravel()[expected == 0].any()
    large = expected >= 5
    observed = np.append(counts.ravel()[large], counts.ravel()[~large].sum())
    expected = np.append(expected[large], expected[~large].sum())
    assert stats.chisquare(observed, expected).pvalue > 1e-3
